"""A reproduction in MLflow: a run of its own with the table and the pictures, whose children are the training runs.

A failure here is a warning: the folders hold it all.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mmsa_dist import run_folder, session, tracking
from mmsa_dist.errors import MmsaError, TransientError
from mmsa_dist.recipe import Recipe
from mmsa_dist.tracking import Link
from shards.mix import AnyIndex
from shards.progress import remarks
from tune.papers.measured import Measured
from tune.papers.pictures import slug
from tune.papers.runs import KEY, Run
from tune.record import written

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


def open_reproduction(folder: Path, recipe: Recipe, index: AnyIndex) -> str | None:
    """Opens the reproduction's run, or takes it up again; None where it is not recorded."""
    run_folder.write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
    run_folder.write_json(folder / "environment.json", run_folder.environment())
    session.card(recipe, index).save(folder)
    try:
        return tracking.open_run(folder, recipe)
    except TransientError as error:
        remarks.print(f"not recorded in MLflow: {error}", soft_wrap=True)
        return None


def as_child(run: Run, parent: str | None, uri: str | None) -> Run:
    """The run as it is recorded: below the reproduction, and as a model only where the command names one."""
    own = run.recipe.tracking
    changed = {"parent": parent, "uri": uri, "register_as": own.register_as or "none", "enabled": parent is not None}
    recipe = run.recipe.model_copy(update={"tracking": own.model_copy(update=changed)})
    return replace(run, recipe=recipe)


def record_run(run: Run) -> None:
    """Closes a training run that is done, once."""
    known = run_folder.read_json(run.folder / KEY)
    if known.get("recorded") or Link.load(run.folder) is None:
        return
    try:
        tracking.finish_run(run.folder, run.recipe, model=run.recipe.tracking.register_as not in (None, "none"))
    except MmsaError as error:
        log.warning("%s is not wholly recorded in MLflow: %s", run.folder.name, error)
        return
    run_folder.write_json(run.folder / KEY, {**known, "recorded": True})


def record_reproduction(
    folder: Path, measured: Iterable[Measured], files: Iterable[Path], pictures: Iterable[Path]
) -> bool:
    """Closes the reproduction's run: what each row reached, the table and the pictures. False where that failed."""

    def write(client: "MlflowClient", run_id: str) -> None:
        for each in measured:
            for metric in next(iter(each.tests.values()), {}):
                if (mean := each.mean(metric)) is not None:
                    client.log_metric(run_id, f"{slug(each.name).replace('+', ' ')}/test_{metric}", mean)
        for file in files:
            client.log_artifact(run_id, str(file))
        for picture in pictures:
            client.log_artifact(run_id, str(picture), "pictures")

    if not written(folder, write):
        return False
    tracking.end_run(folder, "FINISHED")
    return True
