"""A run's entry in MLflow: opened before anything starts, closed with its result, pictures and best model."""

import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import run_folder
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import Recipe, flatten
from mmsa_dist.tracking import store
from mmsa_dist.tracking.tracker import SPILL, Link, epoch_numbers, log_rows, only_numbers, replay, short
from shards.remote.url import is_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from mmsa_dist.tracking.models import Published

log = logging.getLogger(__name__)

PARAMS_PER_CALL = 100
VALUE_LENGTH = 6000
"""MLflow's limits."""

CODE = Path(__file__).resolve().parents[2]
"""The checkout that this code runs from, where it is one."""

ARTIFACTS = ("recipe.yaml", "plan.json", "environment.json", "data.json", "time.json", "result.json")


def open_run(run_dir: Path, recipe: Recipe, command: list[str] | None = None) -> str | None:
    """Opens the run in MLflow, or takes up again the one that `run_dir` was opened with.

    Called by the driver before anything starts, so that an unreachable store costs seconds and not a training run.

    Args:
        run_dir: with its ``data.json``.
        command: words of the command line; those of this process by default.

    Returns:
        The run's id; None where tracking is off.

    Raises:
        TransientError: the store cannot be reached. ConfigError: it is none, or refuses; an alias cannot be one.
    """
    tracking = recipe.tracking
    if not tracking.enabled:
        return None
    if link := Link.load(run_dir):
        client = store.connect(link.uri)
        with store.said(link.uri):
            client.update_run(link.run_id, status="RUNNING")
        return link.run_id
    from mmsa_dist.tracking.aliases import check_alias

    for alias in tracking.alias:
        check_alias(alias)
    uri = store.store_uri(tracking.uri, run_dir.parent)
    client = store.connect(uri)
    card = DataCard.load(run_dir)
    with store.said(uri):
        name = tracking.experiment or card.name
        experiment_id = experiment(client, uri, name, run_dir.parent)
        tags = {**_tags(recipe, card, command or sys.argv), **tracking.tags}
        if tracking.parent:
            client.get_run(tracking.parent)  # a parent that does not exist is said now, not never
            tags["mlflow.parentRunId"] = tracking.parent
        run_id: str = client.create_run(experiment_id, run_name=run_dir.name, tags=tags).info.run_id
        _log_params(client, run_id, recipe)
        _log_dataset(client, run_id, card, recipe.data.paths)
        _log_files(client, run_id, run_dir)
    Link(uri, run_id, name, experiment_id).save(run_dir)
    return run_id


def finish_run(run_dir: Path, recipe: Recipe, *, model: bool = True) -> "Published | None":
    """Records what came out and registers the best model; called by the driver after training.

    A second call repeats nothing that is there already: the model is registered once.

    Args:
        model: log the best weights as a model; of many runs for one table they would fill a disk.

    Returns:
        The registered version and what was done with the aliases; None where the run is not tracked, or without model.

    Raises:
        TransientError: MLflow cannot be reached; the run folder is whole, and a second call catches up.
    """
    link = Link.load(run_dir)
    if link is None:
        return None
    from mmsa_dist.report import pictures
    from mmsa_dist.tracking.models import publish

    client = store.connect(link.uri)
    with store.said(link.uri):
        replay(client, link.run_id, run_dir / SPILL)
        _log_missing_epochs(client, link.run_id, run_dir)
        _log_result(client, link.run_id, run_dir)
        _log_files(client, link.run_id, run_dir)
        with tempfile.TemporaryDirectory(prefix="mmsa-") as folder:
            for picture in pictures(run_dir, Path(folder)):
                client.log_artifact(link.run_id, str(picture), "pictures")
        for file in sorted((run_dir / "predictions").glob("*.npz")):
            client.log_artifact(link.run_id, str(file), "predictions")
        published = publish(client, link, run_dir, recipe) if model else None
        if published and published.uri != link.model:
            replace(link, model=published.uri).save(run_dir)
        client.set_terminated(link.run_id, "FINISHED")
    return published


def end_run(run_dir: Path, status: str = "FAILED") -> bool:
    """Sets the run's status, FAILED or KILLED, after sending what was spilled or cut off. Never raises.

    Without it a run that failed would stand as running for ever.

    Returns:
        Whether all of it is there.
    """
    try:
        link = Link.load(run_dir)
        if link is None:
            return True
        client = store.connect(link.uri)
        replay(client, link.run_id, run_dir / SPILL)
        _log_missing_epochs(client, link.run_id, run_dir)
        client.set_terminated(link.run_id, status)
    except Exception as error:  # the error that ended the run matters more than its record
        log.warning("the run's end could not be recorded in MLflow: %s", short(error))
        return False
    return True


def experiment(client: "MlflowClient", uri: str, name: str, runs_dir: Path) -> str:
    """Id of the experiment `name`, made where there is none.

    Args:
        runs_dir: folder of the runs, for `store.artifact_root`.

    Raises:
        ConfigError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=store.artifact_root(uri, runs_dir)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another run made it just now
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"experiment {name!r} was deleted in MLflow at {store.shown(uri)}; restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or name another with --tracking.experiment"
        )
    return str(found.experiment_id)


def git_tags(root: Path) -> dict[str, str]:
    """Commit of the checkout at `root` and whether it was changed since; empty where it is none."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return {}  # installed into some other project's tree
        changed = git("status", "--porcelain")
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(changed)).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def _log_params(client: "MlflowClient", run_id: str, recipe: Recipe) -> None:
    from mlflow.entities import Param

    params = [Param(key, str(value)[:VALUE_LENGTH]) for key, value in flatten(recipe).items()]
    for begin in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[begin : begin + PARAMS_PER_CALL])


def _log_dataset(client: "MlflowClient", run_id: str, card: DataCard, paths: tuple[str, ...]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=card.name,
        digest=card.fingerprint[:36],  # MLflow's limit; the whole one is a tag
        source_type="remote" if any(map(is_url, paths)) else "local",
        source=json.dumps({"uri": " ".join(paths)}),
        profile=json.dumps({"splits": card.splits, "widths": card.widths, "synthetic": card.synthetic}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _log_missing_epochs(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """Epochs that never arrived: a rank that is killed takes what it had not sent yet with it; its events stay."""
    from mmsa_dist.report import epoch_events

    there = {metric.step for metric in client.get_metric_history(run_id, "train_loss")}
    rows = [
        {"step": event["step"], "timestamp": int(event["time"] * 1000), "metrics": only_numbers(epoch_numbers(event))}
        for event in epoch_events(run_dir)
        if event["step"] not in there
    ]
    log_rows(client, run_id, rows)


def _log_result(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    """``best_valid_*`` and ``test_*`` of the best epoch; ``valid_*`` are the series over epochs."""
    result = run_folder.read_json(run_dir / "result.json")
    numbers = {"best_epoch": result["best_epoch"], "epochs": result["epochs"]}
    numbers |= {f"best_valid_{name}": value for name, value in result["valid"].items()}
    numbers |= {f"test_{name}": value for name, value in result.get("test", {}).items()}
    if (run_dir / "time.json").is_file():
        numbers |= {f"time_{name}": value for name, value in run_folder.read_json(run_dir / "time.json").items()}
    from mlflow.entities import Metric

    # the file's time, so that a second call sends the same rows and adds none
    time_ms, step = int((run_dir / "result.json").stat().st_mtime * 1000), int(result["steps"])
    client.log_batch(run_id, [Metric(n, float(v), time_ms, step) for n, v in numbers.items() if v is not None])


def _log_files(client: "MlflowClient", run_id: str, run_dir: Path) -> None:
    for file in ARTIFACTS:
        if (run_dir / file).is_file():
            client.log_artifact(run_id, str(run_dir / file))


def _tags(recipe: Recipe, card: DataCard, command: list[str]) -> dict[str, str]:
    environment: Mapping[str, Any] = run_folder.environment()
    return {
        "mlflow.source.name": shlex.join(command),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown",
        "system": recipe.system,
        "data": card.name,
        "data.fingerprint": card.fingerprint,
        "data.synthetic": str(card.synthetic).lower(),
        **{f"version.{name}": found for name, found in environment["packages"].items() if found},
        "version.python": environment["python"],
        **git_tags(CODE),
    }
