"""What is known of a model that is compared: of a registered one, of a run in MLflow, or of the folder of a run."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import run_folder
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.predictor import RECIPE, weights_path
from mmsa_dist.recipe import read_values
from mmsa_dist.registered.paired import Predictions
from mmsa_dist.tracking import store
from mmsa_dist.tracking.fetch import INSIDE, Located, download, folder_of, in_mlflow, located, opened
from mmsa_dist.tracking.version import SPLITS, code_tags, code_text, count_weights

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TEST = "predictions/test.npz"
"""In a run's folder, and among its artifacts in MLflow."""

IN_RUN = {"valid": "best_valid_", "test": "test_"}
"""Split -> what the names of its metrics begin with in a run of MLflow."""

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Side:
    """One of two models.

    Attributes:
        name: as the user wrote it.
        recipe: dotted key -> value.
        parameters: `count_weights`; None where that is not known.
        code: what it was trained with, for people.
        metrics: split -> its metrics; without a split that was not read.
        predictions: of the test split; None where none are stored, or its labels are classes.
    """

    name: str
    recipe: dict[str, Any]
    card: DataCard
    parameters: int | None
    code: str | None
    metrics: dict[str, Metrics]
    predictions: Predictions | None


def side(model: str, tracking_uri: str | None, runs_dir: Path) -> Side:
    """What is known of `model`: ``models:/NAME/3``, ``models:/NAME@alias``, ``runs:/ID`` or a folder.

    Raises:
        ConfigError: there is none, or it is not of this project. DataError: a file is damaged.
        TransientError: MLflow cannot be reached.
    """
    if not in_mlflow(model):
        return _of_folder(model, folder_of(model))
    uri, client = opened(tracking_uri, runs_dir, f"model {model!r}")
    with tempfile.TemporaryDirectory(prefix="mmsa-") as scratch, store.said(uri):
        return _of_mlflow(model, uri, client, located(client, model), scratch)


def _of_folder(name: str, folder: Path) -> Side:
    if not (folder / RECIPE).is_file():
        raise ConfigError(f"{folder}: there is no run and no model (no {RECIPE}); give a folder under runs/")
    result, environment = (_json(folder / name) for name in ("result.json", "environment.json"))
    package = environment.get("packages", {}).get("mmsa-dist")
    return Side(
        name,
        read_values(folder / RECIPE),
        DataCard.load(folder),
        _parameters(folder),
        code_text(code_tags(package, {})) if package else None,
        {split: result[split] for split in SPLITS if split in result},
        Predictions.load(folder / TEST) if (folder / TEST).is_file() else None,
    )


def _of_mlflow(name: str, uri: str, client: "MlflowClient", found: Located, scratch: str) -> Side:
    files = {file: download(uri, name, f"{found.place}/{INSIDE}/{file}", scratch) for file in (RECIPE, "data.json")}
    run, version = _run(client, found.run_id), found.version
    metrics: dict[str, Metrics] = {}
    for split, prefix in IN_RUN.items():
        known = version.metrics(split) if version else {}
        if not known and run:  # of a version that was registered before tags had them
            known = {key.removeprefix(prefix): v for key, v in run.data.metrics.items() if key.startswith(prefix)}
        metrics |= {split: known} if known else {}
    code = version.code if version else None
    if code is None and run and (package := run.data.tags.get("version.mmsa-dist")):
        code = code_text(code_tags(package, run.data.tags))
    return Side(
        name,
        read_values(files[RECIPE]),
        DataCard.load(files["data.json"].parent),
        version.parameters if version else None,
        code,
        metrics,
        _predictions(client, run, scratch),
    )


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file: of a run that has not finished, or a model's folder."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = run_folder.read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); put it there again, or compare what MLflow has") from error
    return found


def _parameters(folder: Path) -> int | None:
    """None of a run that has not finished, or whose weights are gone or damaged: its figures still count."""
    try:
        return count_weights(weights_path(folder))
    except DataError:
        return None


def _run(client: "MlflowClient", run_id: str | None) -> "Run | None":
    """The run in MLflow; None where it is not there any more."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _predictions(client: "MlflowClient", run: "Run | None", scratch: str) -> Predictions | None:
    if run is None or TEST not in {file.path for file in client.list_artifacts(run.info.run_id, "predictions")}:
        return None
    return Predictions.load(Path(client.download_artifacts(run.info.run_id, TEST, scratch)))
