"""What a sweep's driver does while trials run: says how they go, closes their MLflow runs, frees disk."""

import shutil
import time
from pathlib import Path
from typing import Any, Self

from ray.tune import Callback
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmsa_dist import exported, run_folder
from mmsa_dist.report import LABELS, value_text
from shards.progress import console
from tune.outcome import (
    DONE,
    ERROR,
    FAILED,
    INTERRUPTED,
    RESULT,
    STOPPED,
    TRIAL,
    Outcome,
    read_outcome,
    read_outcomes,
    winner,
)
from tune.record import record_trial
from tune.reserved import Reserved
from tune.space import Space
from tune.trial import EPOCH

PER_SECOND = 2
"""How often the terminal's table is drawn anew."""


class Watch(Callback):
    """Ray Tune calls this in the driver, between two looks at the trials: nothing here may take long.

    On a terminal a table of the trials that run stands below the lines of those that have ended; elsewhere each epoch
    has its line.

    Args:
        trials_dir: where the folders of the trials are.
        monitor: the validation metric that is shown. epochs: that a trial runs at most.
        trials: how many there will be in all. spare: whether only the best one keeps its checkpoints.
        space: from which their values are drawn.
    """

    def __init__(
        self,
        trials_dir: Path,
        monitor: str,
        epochs: int,
        trials: int,
        *,
        spare: bool = True,
        space: Space | None = None,
    ) -> None:
        self.trials_dir, self.monitor, self.epochs = trials_dir, monitor, epochs
        self.trials, self.spare, self.space = trials, spare, space
        self._reserved = Reserved()
        self._live: Live | None = None
        self._running: dict[Path, Outcome] = {}
        self._ended: list[Outcome] = []
        self._began, self._just_ended = time.monotonic(), 0
        self._exporter: exported.Exporter | None = None

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {"_live": None, "_exporter": None}
        return {**self.__dict__, **own}  # Tune keeps a copy of its callbacks on disk; these are of this process

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._ended = [each for each in read_outcomes(self.trials_dir, self.monitor) if each.status != INTERRUPTED]
        if console.is_terminal:
            self._live = Live(get_renderable=self.shown, console=console, refresh_per_second=PER_SECOND, transient=True)
            self._live.start()
        self._exporter = exported.Exporter(self.states, sweep=self.trials_dir.parent.name)
        self._exporter.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._exporter is not None:
            self._exporter.__exit__(*exception)
        self._reserved.release_all()

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._reserved.release()

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        folder = Path(trial.config["folder"])
        if folder in self._running:
            console.print(f"trial {self._running[folder].number} of {self.trials}  its process ended; it goes on")
        seen = self._running[folder] = read_outcome(folder, self.monitor)
        if self._live is None:
            drawn = f": {self.space.told(seen.values)}" if self.space else ""
            console.print(f"trial {seen.number} of {self.trials}  begins{drawn}", soft_wrap=True)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if EPOCH not in result:
            return  # of a trial that failed before its first
        folder = Path(trial.config["folder"])
        seen = self._running[folder] = read_outcome(folder, self.monitor)
        if self._live is None:
            console.print(
                f"trial {seen.number} of {self.trials}  epoch {result[EPOCH]} of {self.epochs}  "
                f"best valid {self.monitor} {value_text(self.monitor, seen.best)} at epoch {seen.best_epoch}"
            )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        folder = Path(trial.config["folder"])
        if not any((folder / name).is_file() for name in (RESULT, ERROR)):
            judged = (trial.last_result or {}).get(EPOCH, 0)
            run_folder.write_json(folder / TRIAL, {**run_folder.read_json(folder / TRIAL), "stopped": judged})
        self._has_ended(folder)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        folder = Path(trial.config["folder"])
        if not (folder / ERROR).is_file():  # its process could not say: it was killed
            seen = trial.get_error()
            message = f"the trial's process died: {' '.join(str(seen).split())[:300]}"
            run_folder.write_json(folder / ERROR, {"message": message, "exit_code": 75})
        self._has_ended(folder)

    def shown(self) -> Group:
        """The trials that run, the best one yet, how many there are of each kind, and for how long it will take."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        name = f"valid {LABELS.get(self.monitor, self.monitor)}"
        for head in ("running", "epoch", f"best {name}", "at"):
            table.add_column(head, justify="right" if head != "running" else "left")
        for each in sorted(self._running.values(), key=lambda outcome: outcome.number):
            reached = f"{each.epochs} of {self.epochs}" if each.epochs else "starting"
            table.add_row(
                f"trial {each.number}", reached, value_text(self.monitor, each.best), str(each.best_epoch or "-")
            )
        return Group(table, Text(self.summary(), style="bold"))

    def summary(self) -> str:
        """One line for the whole sweep."""
        counts = [(status, sum(each.status == status for each in self._ended)) for status in (DONE, STOPPED, FAILED)]
        said = [
            f"{len(self._ended)} of {self.trials} trials",
            *(f"{count} {status}" for status, count in counts if count),
        ]
        if best := winner(self._ended, self.monitor):
            said.append(f"best: trial {best.number}, {value_text(self.monitor, best.best)}")
        if left := self.seconds_left():
            said.append(f"about {_duration(left)} left")
        return " · ".join(said)

    def states(self) -> exported.Told:
        """How many trials are in which state, for Prometheus; called in a thread."""
        running, ended = len(self._running), list(self._ended)
        for state, status in (("done", DONE), ("stopped", STOPPED), ("failed", FAILED)):
            yield "mmsa_dist_trials", {"state": state}, sum(each.status == status for each in ended)
        yield "mmsa_dist_trials", {"state": "running"}, running
        yield "mmsa_dist_trials", {"state": "waiting"}, max(0, self.trials - running - len(ended))

    def seconds_left(self) -> float | None:
        """By the pace of the trials that have ended since this driver began; None before the first."""
        if not self._just_ended:
            return None
        return (time.monotonic() - self._began) / self._just_ended * (self.trials - len(self._ended))

    def _has_ended(self, folder: Path) -> None:
        self._running.pop(folder, None)
        self._just_ended += 1
        self._reserved.ended(folder)
        outcome = read_outcome(folder, self.monitor)
        self._ended.append(outcome)
        console.print(self._sentence(outcome))
        record_trial(outcome, self.monitor)
        if self.spare:
            spare_disk(folder.parent, self.monitor)

    def _sentence(self, outcome: Outcome) -> str:
        head = f"trial {outcome.number} of {self.trials}  {outcome.status}"
        if outcome.error is not None:
            return f"{head}: {outcome.error}"
        shown = value_text(self.monitor, outcome.best)
        after = "" if outcome.status == DONE else f" after {outcome.epochs} of {self.epochs} epochs"
        return f"{head}{after}: valid {self.monitor} {shown}"


def spare_disk(trials_dir: Path, monitor: str) -> None:
    """Removes the checkpoints of all trials that ended, but the best one's: fifty of BERT's would need 100 GB. One that
    was the winner before more trials were asked for keeps its best weights: it was tested, and may be registered."""
    outcomes = read_outcomes(trials_dir, monitor)
    best = winner(outcomes, monitor)
    for outcome in outcomes:
        if outcome.status in (DONE, STOPPED, FAILED) and outcome != best and not outcome.may_go_on:
            tested = (outcome.folder / "predictions" / "test.npz").is_file()
            for part in ("checkpoints", "ray") if tested else ("checkpoints", "best", "ray"):
                shutil.rmtree(outcome.folder / part, ignore_errors=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
