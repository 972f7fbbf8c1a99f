"""One generation of a population after the other, on Ray Tune."""

import time
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from mmsa_dist import stopping
from mmsa_dist.metrics import is_better
from mmsa_dist.recipe import Recipe
from mmsa_dist.report import value_text
from shards.progress import console
from tune import reserved
from tune.asked import Asked
from tune.draw import Drawing, is_open
from tune.outcome import Outcome, read_outcome, read_outcomes
from tune.room import Room
from tune.search import Prepared, quiet, run
from tune.space import Space
from tune.watch import Watch


class Generations(Watch):
    """As `Watch`, of trials that pause and go on.

    Args:
        pauses: the epochs that all trials pause after.
    """

    def __init__(self, trials_dir: Path, monitor: str, epochs: int, trials: int, pauses: list[int]) -> None:
        super().__init__(trials_dir, monitor, epochs, trials)
        self.size, self.pauses = trials, pauses
        self.until: int | None = None
        self._waiting: dict[Path, Outcome] = {}
        self._legs, self._here, self._since = 0, 0, time.monotonic()

    def begin(self, until: int | None) -> None:
        """The next generation, until epoch `until`; None to the end."""
        self.until, self._here = until, 0
        self._waiting = {}
        there = read_outcomes(self.trials_dir, self.monitor)
        self.trials = max([self.size, *(each.number for each in there)])
        where = f"until epoch {until or self.epochs}"
        console.print(f"generation {self.generation} of {len(self.pauses) + 1}, {where}")

    @property
    def generation(self) -> int:
        """From 1."""
        return len(self.pauses) + 1 if self.until is None else self.pauses.index(self.until) + 1

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        folder = Path(trial.config["folder"])
        self._legs, self._here = self._legs + 1, self._here + 1
        if stopping.paused(folder) is None:
            super().on_trial_complete(iteration, trials, trial, **info)
            return
        self._running.pop(folder, None)
        reserved.free(folder)  # its ranks have ended
        seen = self._waiting[folder] = read_outcome(folder, self.monitor)
        reached = f"best valid {self.monitor} {value_text(self.monitor, seen.best)} at epoch {seen.best_epoch}"
        console.print(
            f"trial {seen.number} of {self.trials}  waits after epoch {seen.epochs} of {self.epochs}: {reached}"
        )

    def summary(self) -> str:
        said = [f"generation {self.generation} of {len(self.pauses) + 1}", super().summary()]
        best: Outcome | None = None
        for each in self._waiting.values():
            if is_better(self.monitor, each.best, best.best if best else None):
                best = each
        if best is not None:
            said.append(f"{len(self._waiting)} wait, best: trial {best.number}, {value_text(self.monitor, best.best)}")
        return " · ".join(said)

    def seconds_left(self) -> float | None:
        """By the pace of the trials that have come to the end of a generation."""
        if not self._legs:
            return None
        left = self.size * (len(self.pauses) + 2 - self.generation) - self._here
        return (time.monotonic() - self._since) / self._legs * left


def train(
    space: Space,
    recipe: Recipe,
    folder: Path,
    asked: Asked,
    until: int | None,
    watch: Generations,
    *,
    room: Room,
) -> bool:
    """Trains all trials until they pause after epoch `until`, or end; draws those that there are not yet.

    Returns:
        Whether they do; else somebody stopped it.
    """
    quiet()
    before = read_outcomes(folder / "trials", recipe.train.monitor)
    watch.begin(until)
    searcher: Drawing | Prepared
    if watch.generation == 1:
        searcher = Drawing(space, recipe, folder / "trials", asked, before, until)
        left, whole = searcher.left, searcher.total
    else:
        folders = [each.folder for each in before if is_open(each, until)]
        searcher, left, whole = Prepared(folders, until), len(folders), len(before)
    if left:
        run(searcher, FIFOScheduler(), watch, recipe, folder, count=left, room=room)
    after = read_outcomes(folder / "trials", recipe.train.monitor)
    return len(after) >= whole and not any(is_open(each, until) for each in after)
