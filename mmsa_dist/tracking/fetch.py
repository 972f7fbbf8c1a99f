"""A model by the name a user gives it: a run folder, ``models:/NAME@alias``, ``models:/NAME/3`` or ``runs:/ID``."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.suggest import nearest
from mmsa_dist.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORMS = "models:/NAME@alias, models:/NAME/VERSION, runs:/RUN_ID or the folder of a run"
LOGGED = r"models:/(m-[0-9a-f]{32})"
INSIDE = "artifacts/model"
"""Where a logged model keeps its model folder."""


@contextmanager
def fetched(model: str, tracking_uri: str | None, runs_dir: Path) -> Iterator[Path]:
    """The model folder of `model`, on this machine as long as the context lasts.

    Nothing of it is run: only its weights, recipe, data card and tokenizer are read, by this version's code.

    Args:
        tracking_uri: MLflow store; by default as in training (`store.store_uri`).
        runs_dir: folder of the runs.

    Raises:
        ConfigError: there is no such model, version or alias; names those that are there.
        TransientError: MLflow cannot be reached.
    """
    if not re.match(r"(models|runs):/", model):
        yield _folder(model)
        return
    uri = store.store_uri(tracking_uri, runs_dir)
    if uri.startswith("sqlite") and not (file := Path(uri.removeprefix("sqlite:///"))).is_file():
        raise ConfigError(
            f"model {model!r}: there is no MLflow database {file}; train first, or name the store with --tracking-uri "
            "or --runs-dir"
        )
    client = store.connect(uri)
    with store.said(uri):
        location = _location(client, model)
    with tempfile.TemporaryDirectory(prefix="mmsa-") as scratch:
        with store.said(uri):
            folder = _download(uri, model, location, scratch)
        yield folder


def _folder(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    raise ConfigError(f"model {model!r} is neither a folder nor a name in the registry; give {FORMS}")


def _location(client: "MlflowClient", model: str) -> str:
    """Where the files of the logged model are that `model` names."""
    if (found := re.fullmatch(LOGGED, model)) is not None:
        return _files_of(client, found[1])
    if (found := re.fullmatch(r"runs:/([^/]+)(/model)?/?", model)) is not None:
        return _files_of(client, _model_of_run(client, found[1]))
    if (found := re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)) is None:
        raise ConfigError(f"model {model!r} is not a model's name; give {FORMS}")
    name, alias, version = found.groups()
    registered = _registered(client, name)
    if alias is not None:
        aliases: dict[str, Any] = dict(registered.aliases)
        if alias not in aliases:
            none = " (it has none: train with --alias, or give models:/NAME/VERSION)"
            raise ConfigError(
                f"registered model {name!r} has no alias {alias!r}{nearest(alias, aliases) if aliases else none}"
            )
        version = str(aliases[alias])
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    if version not in versions:
        there = ", ".join(sorted(versions, key=int)) or "none"
        raise ConfigError(f"registered model {name!r} has no version {version} (versions: {there})")
    source = str(versions[version].source)
    logged = re.fullmatch(LOGGED, source)
    return _files_of(client, logged[1]) if logged else source


def _files_of(client: "MlflowClient", model_id: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_logged_model(model_id).artifact_location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ConfigError(f"MLflow has no logged model {model_id!r}; give {FORMS}") from error


def _registered(client: "MlflowClient", name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in client.search_registered_models()]
        known = nearest(name, names) if names else " (it has none: train one first)"
        raise ConfigError(f"the registry has no model {name!r}{known}") from error


def _model_of_run(client: "MlflowClient", run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ConfigError(f"MLflow has no run {run_id!r}; give {FORMS}") from error
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        raise ConfigError(f"run {run_id!r} logged no model ({run.info.status.lower()}); give a run that finished")
    return str(outputs[-1].model_id)


def _download(uri: str, model: str, location: str, scratch: str) -> Path:
    """The model folder, in `scratch` or where it lies on this machine."""
    import mlflow

    try:
        folder = Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location.rstrip('/')}/{INSIDE}", dst_path=scratch, tracking_uri=uri
            )
        )
    except (OSError, mlflow.MlflowException) as error:
        reason = store.shown(" ".join(str(error).split()))[:200]
        raise TransientError(
            f"model {model!r}: its files cannot be fetched from {store.shown(location)} ({reason}); try again; "
            "if mmsa-dist train did not log it, give another model"
        ) from error
    if not (folder / "data.json").is_file():
        raise ConfigError(f"model {model!r} was not logged by mmsa-dist train (no data.json in it); give {FORMS}")
    return folder
