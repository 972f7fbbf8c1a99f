"""Ray Tune, set up: trials are drawn and stopped as was asked, each is a Ray Train run, several at once.

Imports Ray and Optuna; `tune.sweep` imports this when a sweep starts, not before.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import optuna
import ray
from ray import tune as ray_tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mmsa_dist import places
from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import Recipe
from tune.asked import Asked
from tune.draw import Drawing
from tune.outcome import Outcome
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


def at_once(recipe: Recipe, most: int | None = None) -> int:
    """Joins or starts the recipe's cluster; gives how many trials, of at most so many, run in it at once.

    Raises:
        ConfigError: not even one.
    """
    places.connect(recipe, dashboard=True)  # with its state API Ray Train tidies up after killed trials, mostly
    fits = concurrency(recipe.launch, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    count = min(fits, most or fits)
    say_if_busy(recipe.launch, count)
    return count


def concurrency(launch: LaunchConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials the nodes hold at once: the workers that each has CPUs and GPUs for, over the workers of a trial.

    What others run there counts as room: trials that wait for it take turns with theirs.

    Raises:
        ConfigError: not even one.
    """
    fits = sum(workers_on(node, launch) for node in nodes) // launch.workers
    if fits:
        return fits
    for kind, each in (("CPU", launch.cpus_per_worker), ("GPU", launch.gpus_per_worker)):
        has = sum(node.get(kind, 0.0) for node in nodes)
        if launch.workers * each > has:
            raise ConfigError(
                f"one trial needs {launch.workers * each:g} {kind}s = {launch.workers} workers x {each:g}, the Ray "
                f"cluster has {has:g}; lower --workers, or name a larger cluster (--address)"
            )
    shapes = sorted({f"{node.get('CPU', 0.0):g} CPUs and {node.get('GPU', 0.0):g} GPUs" for node in nodes})
    raise ConfigError(
        f"one trial needs {launch.workers} workers, each with {launch.cpus_per_worker:g} CPUs and "
        f"{launch.gpus_per_worker:g} GPUs of one node; the Ray cluster's nodes have {', '.join(shapes)}; ask for less "
        "a worker (--launch.cpus-per-worker), lower --workers, or name a larger cluster (--address)"
    )


def workers_on(node: Mapping[str, float], launch: LaunchConfig) -> int:
    """How many workers a node has room for; a worker's share of a GPU is of one GPU."""
    fits = int(node.get("CPU", 0.0)) // launch.cpus_per_worker
    if not (each := launch.gpus_per_worker):
        return fits
    gpus = int(node.get("GPU", 0.0))
    return min(fits, gpus * int((1 + 1e-6) / each) if each < 1 else int(gpus / each))


def say_if_busy(launch: LaunchConfig, trials: int) -> None:
    """That trials will wait for others, where others hold what they need."""
    free = ray.available_resources()
    for kind, each in (("CPU", launch.cpus_per_worker), ("GPU", launch.gpus_per_worker)):
        if free.get(kind, 0.0) + 1e-6 < trials * launch.workers * each:
            has = ray.cluster_resources().get(kind, 0.0)
            print(
                f"{free.get(kind, 0.0):g} of the cluster's {has:g} {kind}s are free: what does not fit waits its turn"
            )
            return


def search(
    space: Space, recipe: Recipe, folder: Path, asked: Asked, *, at_once: int, before: Sequence[Outcome] = ()
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
    watch = Watch(folder / "trials", recipe.train.monitor, recipe.train.epochs, drawing.total)
    if drawing.left:
        run(drawing, scheduler, watch, recipe, folder, count=drawing.left, at_once=at_once)


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


def run_prepared(folders: Sequence[Path], watch: Watch, recipe: Recipe, folder: Path, at_once: int) -> None:
    """Runs what is in `folders` to its end, as many at once as there is room for."""
    run(Prepared(folders), FIFOScheduler(), watch, recipe, folder, count=len(folders), at_once=at_once)


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
    at_once: int,
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
            max_concurrent_trials=at_once,
            search_alg=drawing,
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
