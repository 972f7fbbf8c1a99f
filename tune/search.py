"""Ray Tune, set up: trials are drawn and stopped as was asked, each is a Ray Train run, several at once.

Imports Ray and Optuna; `tune.sweep` imports this when a sweep starts, not before.
"""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import optuna
from ray import tune as ray_tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mmsa_dist.recipe import Recipe
from tune.asked import Asked
from tune.draw import Drawing
from tune.outcome import Outcome
from tune.room import AsManyAsFit, Room
from tune.space import Space
from tune.stopping import make_scheduler, replay
from tune.trial import run_trial
from tune.watch import Watch

DRIVER = {"memory": 1}
"""What a trial's own process takes of the cluster: one byte. It only waits for its ranks, and Ray refuses an empty
request; a CPU, Ray's default, would leave none to the ranks and stop the sweep for ever."""

STATE = "tune"
"""Begins the name of the folder that Ray Tune keeps its own state in, of no use once it has ended: what a sweep goes on
from is in the folders of its trials."""


def search(
    space: Space, recipe: Recipe, folder: Path, asked: Asked, *, room: Room, before: Sequence[Outcome] = ()
) -> None:
    """Draws and runs trials below ``folder/trials``; what became of them is read from there.

    Args:
        recipe: what all trials share; `recipe.seed` also seeds the drawing.
        before: the trials that there are, of the same sweep: those that have not ended go on.
    """
    quiet()
    drawing = Drawing(space, recipe, folder / "trials", asked, before)
    scheduler = make_scheduler(asked, recipe.train.epochs, drawing.mode)
    replay(scheduler, before, recipe.train.monitor)
    watch = Watch(folder / "trials", recipe.train.monitor, recipe.train.epochs, drawing.total, space=drawing.space)
    if drawing.left:
        run(drawing, scheduler, watch, recipe, folder, count=drawing.left, room=room)


class Prepared(Searcher):
    """Runs whose folders there are already, one after another (until they pause after epoch `until`)."""

    def __init__(self, folders: Sequence[Path], until: int | None = None) -> None:
        super().__init__()
        self.waiting = [str(folder) for folder in folders]
        self.more = {} if until is None else {"until": until}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        return {"folder": self.waiting.pop(0), **self.more} if self.waiting else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()


def run_prepared(folders: Sequence[Path], watch: Watch, recipe: Recipe, folder: Path, room: Room) -> None:
    """Runs what is in `folders` to its end, as many at once as there is room for."""
    run(Prepared(folders), FIFOScheduler(), watch, recipe, folder, count=len(folders), room=room)


class Watching(Protocol):
    """A callback of Ray Tune's that is a context too."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def run(
    drawing: Searcher,
    scheduler: TrialScheduler,
    watch: Watching,
    recipe: Recipe,
    folder: Path,
    *,
    count: int,
    room: Room,
) -> None:
    """Ray Tune over the folders that `drawing` gives.

    Args:
        recipe: what they share of how they are launched. folder: where Ray Tune keeps its state meanwhile.
        count: how many there will be.
    """
    quiet()
    for left in folder.glob(f"{STATE}-*"):  # of a driver that was killed
        shutil.rmtree(left, ignore_errors=True)
    name = f"{STATE}-{time.time_ns():x}"  # Ray takes up a run whose name it has seen
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(run_trial, DRIVER),
        tune_config=ray_tune.TuneConfig(
            num_samples=count,
            search_alg=AsManyAsFit(drawing, room),
            scheduler=scheduler,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=ray_tune.RunConfig(
            name=name,
            storage_path=str(folder),
            verbose=0,
            callbacks=[watch],
            # of a trial's process that was killed; what it finds wrong itself it does not raise
            failure_config=ray_tune.FailureConfig(max_failures=recipe.launch.max_failures),
        ),
    )
    try:
        with watch:
            tuner.fit()
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)


def quiet() -> None:
    """Tune tells of its trials at length; `Watch` does it in a line each."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that fails may have reported nothing
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
