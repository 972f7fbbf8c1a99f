"""A sweep in MLflow: trials are child runs of the sweep's run. A failure here is a warning: the folders hold it all."""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import run_folder, tracking
from mmsa_dist.errors import MmsaError
from mmsa_dist.recipe import Recipe, read_recipe
from mmsa_dist.tracking import Link, store
from tune.outcome import DONE, FAILED, INTERRUPTED, STOPPED, TRIAL, Outcome

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

STATUS = {DONE: "FINISHED", STOPPED: "FINISHED", FAILED: "FAILED", INTERRUPTED: "KILLED"}
"""A trial that was stopped early is finished for MLflow: nothing went wrong."""


def record_trial(outcome: Outcome, monitor: str) -> bool:
    """Closes a trial's run with its best validation result and its status in the sweep; opens it where MLflow was away
    when the trial was drawn. Tells whether all of it is there."""

    def write(client: "MlflowClient", run_id: str) -> None:
        if outcome.best is not None:
            client.log_metric(run_id, f"best_valid_{monitor}", outcome.best)
            client.log_metric(run_id, "best_epoch", outcome.best_epoch)
        client.set_tag(run_id, "sweep.status", outcome.status)
        client.set_tag(run_id, "sweep.trial", str(outcome.number))
        if outcome.error is not None:
            client.set_tag(run_id, "sweep.error", outcome.error[:1000])

    done = _opened(outcome.folder) and written(outcome.folder, write)
    if tracking.end_run(outcome.folder, STATUS[outcome.status]) and done:
        run_folder.write_json(
            outcome.folder / TRIAL, run_folder.read_json(outcome.folder / TRIAL) | {"recorded": outcome.status}
        )
        return True
    return False


def record_rest(outcomes: Iterable[Outcome], monitor: str) -> None:
    """What MLflow could not take when a trial ended; says what it does not take now either."""
    left = [
        outcome.folder.name
        for outcome in outcomes
        if _recorded(outcome) != outcome.status and not record_trial(outcome, monitor)
    ]
    if left:
        print(f"warning: not wholly recorded in MLflow: {', '.join(left)}; --resume records them once it answers")


def _recorded(outcome: Outcome) -> str | None:
    """The status that a trial is known to MLflow with; one that was interrupted may have gone on since."""
    return run_folder.read_json(outcome.folder / TRIAL).get("recorded")


def _opened(folder: Path) -> bool:
    """Whether the trial's run is open in MLflow, or is not to be; opens it."""
    if Link.load(folder) is not None or not (folder / "recipe.yaml").is_file():
        return True
    try:
        tracking.open_run(folder, read_recipe(folder / "recipe.yaml"))
    except MmsaError as error:
        log.warning("%s is not recorded in MLflow yet: %s", folder.name, error)
        return False
    return True


def store_of(recipe: Recipe, runs_dir: Path) -> str | None:
    """The MLflow store spelt out, for runs whose folders lie deeper than others'.

    None where it is off, or comes from the environment: that may hold a password, which no recipe may.
    """
    if not recipe.tracking.enabled or (recipe.tracking.uri is None and os.environ.get("MLFLOW_TRACKING_URI")):
        return None
    return store.store_uri(recipe.tracking.uri, runs_dir)


FILES = ("best.yaml", "trials.csv", "rates.csv", "space.yaml", "sweep.json", "population.json", "result.json")
"""Of a sweep; two are of a population's alone."""


def record_sweep(folder: Path, monitor: str, result: dict[str, Any]) -> None:
    """Closes the sweep's run: what the best trial reached, which one it was, the sweep's files and pictures."""

    def write(client: "MlflowClient", run_id: str) -> None:
        numbers = {f"best_valid_{monitor}": result["valid"].get(monitor), "best_trial": result["trial"]}
        numbers |= {f"test_{name}": value for name, value in result.get("test", {}).items()}
        for split, over in result.get("seeds", {}).items():
            numbers |= {f"{split}_{name}_{kind}": each[kind] for name, each in over.items() for kind in each}
        for name, value in numbers.items():
            if value is not None:
                client.log_metric(run_id, name, float(value))
        winner = Link.load(folder / result["registered"])
        client.set_tag(run_id, "sweep.best_run", winner.run_id if winner else result["registered"])
        for key, value in result["values"].items():
            client.set_tag(run_id, f"best.{key}", str(value))
        for name in (name for name in FILES if (folder / name).is_file()):
            client.log_artifact(run_id, str(folder / name))
        for picture in sorted((folder / "pictures").glob("*")):
            client.log_artifact(run_id, str(picture), "pictures")

    written(folder, write)
    tracking.end_run(folder, "FINISHED")


def written(folder: Path, write: "Callable[[MlflowClient, str], None]") -> bool:
    """Calls `write` with the MLflow run of `folder` where it has one; what fails is a warning, and told."""
    link = Link.load(folder)
    if link is None:
        return True
    try:
        client = store.connect(link.uri)
        with store.said(link.uri):
            write(client, link.run_id)
    except MmsaError as error:
        log.warning("%s is not wholly recorded in MLflow: %s", folder.name, error)
        return False
    return True
