"""A run's entry in MLflow: opened before anything starts, closed with its result, pictures and best model."""

import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import run_folder
from mmsa_dist.config import TrackingConfig
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import ConfigError
from mmsa_dist.tracking import store
from mmsa_dist.tracking.tracker import SPILL, Link, replay, short

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PARAMS_PER_CALL = 100
VALUE_LENGTH = 6000
"""MLflow's limits."""


def open_run(
    run_dir: Path,
    recipe: Mapping[str, Any],
    tracking: TrackingConfig,
    card: DataCard,
    command: list[str] | None = None,
) -> str | None:
    """Opens the run in MLflow, or takes up again the one that `run_dir` was opened with.

    Called by the driver before anything starts, so that an unreachable store costs seconds and not a training run.

    Args:
        recipe: resolved, as ``Recipe.dump()`` gives it.
        card: of the data set.
        command: words of the command line; those of this process by default.

    Returns:
        The run's id; None where tracking is off.

    Raises:
        TransientError: the store cannot be reached. ConfigError: it is none, or refuses.
    """
    if not tracking.enabled:
        return None
    if link := Link.load(run_dir):
        client = store.connect(link.uri)
        with store.said(link.uri):
            client.update_run(link.run_id, status="RUNNING")
        return link.run_id
    uri = store.store_uri(tracking.uri, run_dir.parent)
    client = store.connect(uri)
    with store.said(uri):
        name = tracking.experiment or card.name
        experiment_id = experiment(client, uri, name)
        tags = {**_tags(recipe, card, command or sys.argv), **tracking.tags}
        if tracking.parent:
            client.get_run(tracking.parent)  # a parent that does not exist is said now, not never
            tags["mlflow.parentRunId"] = tracking.parent
        run_id: str = client.create_run(experiment_id, run_name=run_dir.name, tags=tags).info.run_id
        _log_params(client, run_id, recipe)
        _log_dataset(client, run_id, card, str(recipe.get("data", {}).get("path", "")))
        for file in ("recipe.yaml", "plan.json", "environment.json"):
            if (run_dir / file).is_file():
                client.log_artifact(run_id, str(run_dir / file))
    Link(uri, run_id, name, experiment_id).save(run_dir)
    return run_id


def experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Id of the experiment `name`, made where there is none.

    Raises:
        ConfigError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=store.artifact_root(uri)))
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


def end_run(run_dir: Path, status: str) -> None:
    """Sets the run's status: FINISHED, FAILED or KILLED, after sending what was spilled. Never raises.

    Without it a run that failed would stand as running for ever.
    """
    link = Link.load(run_dir)
    if link is None:
        return
    try:
        client = store.connect(link.uri)
        replay(client, link.run_id, run_dir / SPILL)
        client.set_terminated(link.run_id, status)
    except Exception as error:  # the run's own end matters more than its record
        log.warning("the run's end could not be recorded in MLflow: %s", short(error))


def _log_params(client: "MlflowClient", run_id: str, recipe: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(key, str(value)[:VALUE_LENGTH]) for key, value in flatten(recipe).items()]
    for begin in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[begin : begin + PARAMS_PER_CALL])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value})
    return flat


def _log_dataset(client: "MlflowClient", run_id: str, card: DataCard, path: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=card.name,
        digest=card.fingerprint[:36],  # MLflow's limit; the whole one is a tag
        source_type="local",
        source=json.dumps({"uri": path}),
        profile=json.dumps({"splits": card.splits, "widths": card.widths, "synthetic": card.synthetic}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _tags(recipe: Mapping[str, Any], card: DataCard, command: list[str]) -> dict[str, str]:
    environment = run_folder.environment()
    return {
        "mlflow.source.name": shlex.join(command),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown",
        "system": str(recipe.get("system")),
        "data": card.name,
        "data.fingerprint": card.fingerprint,
        "data.synthetic": str(card.synthetic).lower(),
        **{f"version.{name}": found for name, found in environment["packages"].items() if found},
        "version.python": environment["python"],
        **git_tags(),
    }


def git_tags() -> dict[str, str]:
    """Commit of the checkout this code runs from and whether it was changed since; empty where it is no checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return {}  # installed into some other project's tree
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(changed)).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
