"""Ray Tune, set up: Optuna's TPE draws, ASHA prunes, each trial is a Ray Train run, several at once.

Imports Ray and Optuna; `tune.sweep` imports this when a sweep starts, not before.
"""

import logging
import os
from pathlib import Path
from typing import Any

import optuna
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from mmsa_dist import run_folder, train
from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.metrics import higher_is_better
from mmsa_dist.recipe import Recipe, from_dict
from shards.mix import AnyIndex
from shards.progress import remarks
from tune.outcome import TRIAL
from tune.space import Space, with_values
from tune.trial import EPOCH, OBJECTIVE, run_trial
from tune.watch import Watch

DRIVER = {"memory": 1}
"""What a trial's own process takes of the cluster: one byte. It only waits for its ranks, and Ray refuses an empty
request; a CPU, Ray's default, would leave none to the ranks and stop the sweep for ever."""

REDUCTION = 3
"""ASHA: of the trials that reach a rung, the best third goes on."""


def concurrency(launch: LaunchConfig, free_cpus: float, free_gpus: float) -> int:
    """How many trials fit into what is free: min(free CPUs / (workers x CPUs), free GPUs / (workers x GPUs)).

    Raises:
        ConfigError: not even one.
    """
    need = {"CPU": launch.workers * launch.cpus_per_worker, "GPU": launch.workers * launch.gpus_per_worker}
    free = {"CPU": free_cpus, "GPU": free_gpus}
    fits = {kind: int((free[kind] + 1e-6) // need[kind]) for kind in need if need[kind]}
    short = [kind for kind, count in fits.items() if count == 0]
    if short:
        kind = short[0]
        per_worker = launch.cpus_per_worker if kind == "CPU" else launch.gpus_per_worker
        raise ConfigError(
            f"one trial needs {need[kind]:g} {kind}s = {launch.workers} workers x {per_worker:g}, the Ray cluster has "
            f"{free[kind]:g} free; lower --workers, wait for other jobs, or name a larger cluster (--address)"
        )
    return min(fits.values())


def search(space: Space, recipe: Recipe, folder: Path, *, trials: int, at_once: int, grace: int) -> None:
    """Draws and runs `trials` trials below ``folder/trials``; what became of them is read from there.

    Args:
        recipe: what all trials share; `recipe.seed` also seeds the drawing.
        grace: epochs that every trial may run before it can be stopped.
    """
    _quiet()
    epochs = recipe.train.epochs
    mode = "max" if higher_is_better(recipe.train.monitor) else "min"
    watch = Watch(recipe.train.monitor, epochs, trials)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(run_trial, DRIVER),
        tune_config=ray_tune.TuneConfig(
            metric=OBJECTIVE,
            mode=mode,
            num_samples=trials,
            max_concurrent_trials=at_once,
            search_alg=Drawing(space, recipe, folder / "trials", mode),
            scheduler=Asha(epochs, min(grace, epochs)),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[watch],
        ),
    )
    with watch:
        tuner.fit()


class Drawing(OptunaSearch):
    """Optuna's TPE over a space. A drawn trial gets its run folder here, in the driver, before it starts anywhere.

    The first trial has the recipe's own values, where they lie inside: a sweep does not end worse than it started.
    """

    def __init__(self, space: Space, recipe: Recipe, trials_dir: Path, mode: str) -> None:
        own = space.point(recipe)
        super().__init__(
            space=space.distributions(),
            metric=OBJECTIVE,
            mode=mode,
            # several are drawn before the first has a result: without the liar they would be drawn close together
            sampler=optuna.samplers.TPESampler(seed=recipe.seed, constant_liar=True),
            points_to_evaluate=[own] if own is not None else None,
        )
        self.space, self.trials_dir, self.drawn = space, trials_dir, 0
        self.base = recipe.dump()  # plain values: Tune keeps a copy of this object on disk

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The configuration of `run_trial` for the next trial."""
        values = self.space.decoded(super().suggest(trial_id))
        self.drawn += 1
        name = f"trial-{self.drawn:03d}"
        record = {"trial": trial_id, "number": self.drawn, "values": values}
        try:
            recipe = with_values(from_dict(self.base), values, name)
            index, recipe = train.check(recipe)
            folder = self._prepared(recipe, index, name)
        except ConfigError as error:  # values that do not fit together: this trial fails, the sweep goes on
            folder = self.trials_dir / name
            folder.mkdir(parents=True)
            run_folder.write_json(folder / TRIAL, record)
            return {"folder": str(folder), "error": str(error)}
        run_folder.write_json(folder / TRIAL, record)
        return {"folder": str(folder)}

    def _prepared(self, recipe: Recipe, index: AnyIndex, name: str) -> Path:
        try:
            return train.prepare(recipe, index, self.trials_dir, name)
        except TransientError as error:
            if not recipe.tracking.enabled:
                raise
            remarks.print(f"{name} is not recorded in MLflow: {error}")
            tracking = recipe.tracking.model_copy(update={"enabled": False})
            return train.prepare(recipe.model_copy(update={"tracking": tracking}), index, self.trials_dir, name)


class Asha(ASHAScheduler):
    """Asynchronous successive halving over epochs, which never stops a trial at its last: there it ends by itself."""

    def __init__(self, epochs: int, grace: int) -> None:
        # metric and mode come from TuneConfig
        super().__init__(
            time_attr=EPOCH, max_t=epochs, grace_period=grace, reduction_factor=REDUCTION, stop_last_trials=False
        )
        self.epochs = epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        return TrialScheduler.CONTINUE if result.get(EPOCH, 0) >= self.epochs else decision


def _quiet() -> None:
    """Tune tells of its trials at length; `Watch` does it in a line each."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
