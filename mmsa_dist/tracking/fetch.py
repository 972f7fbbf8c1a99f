"""A model by the name a user gives it: a run folder, ``models:/NAME@alias``, ``models:/NAME/3`` or ``runs:/ID``."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from mmsa_dist.errors import ConfigError, DataError, TransientError
from mmsa_dist.suggest import nearest
from mmsa_dist.tracking import store
from mmsa_dist.tracking.version import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient

FORMS = "models:/NAME@alias, models:/NAME/VERSION, runs:/RUN_ID or the folder of a run"
LOGGED = r"models:/(m-[0-9a-f]{32})"
INSIDE = "artifacts/model"
"""Where a logged model keeps its model folder."""


@dataclass(frozen=True)
class Located:
    """A model in MLflow.

    Attributes:
        place: address of its files.
        run_id: of the run that logged it, where that is known.
        version: None where the name was a run's or a logged model's.
    """

    place: str
    run_id: str | None
    version: Version | None


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
    if not in_mlflow(model):
        yield folder_of(model)
        return
    uri, client = opened(tracking_uri, runs_dir, f"model {model!r}")
    with store.said(uri):
        place = located(client, model).place
    with tempfile.TemporaryDirectory(prefix="mmsa-") as scratch:
        with store.said(uri):
            folder = download(uri, model, f"{place}/{INSIDE}", scratch)
        if not (folder / "data.json").is_file():
            raise not_ours(model)
        yield folder


def in_mlflow(model: str) -> bool:
    """Whether `model` is the address of one in MLflow, and not a folder."""
    return re.match(r"(models|runs):/", model) is not None


def folder_of(model: str) -> Path:
    """The folder that `model` names.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    raise ConfigError(f"model {model!r} is neither a folder nor a name in the registry; give {FORMS}")


def opened(tracking_uri: str | None, runs_dir: Path, what: str) -> "tuple[str, MlflowClient]":
    """The store to read from, its address and a client; makes no new database.

    Args:
        what: is looked for, as the message begins with.

    Raises:
        ConfigError: there is none. TransientError: it cannot be reached.
    """
    uri = store.store_uri(tracking_uri, runs_dir)
    if uri.startswith("sqlite") and not (file := Path(uri.removeprefix("sqlite:///"))).is_file():
        raise ConfigError(
            f"{what}: there is no MLflow database {file}; train first, or name the store with --tracking-uri "
            "or --runs-dir"
        )
    return uri, store.connect(uri)


def located(client: "MlflowClient", model: str) -> Located:
    """Where the files of the logged model are that `model` names.

    Raises:
        ConfigError: there is no such model.
    """
    if (found := re.fullmatch(LOGGED, model)) is not None:
        return _logged(client, found[1])
    if (found := re.fullmatch(r"runs:/([^/]+)(/model)?/?", model)) is not None:
        return _logged(client, _model_of_run(client, found[1]))
    if (found := re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)) is None:
        raise ConfigError(f"model {model!r} is not a model's name; give {FORMS}")
    name, alias, number = found.groups()
    if alias is not None:
        aliases: dict[str, Any] = dict(registered(client, name).aliases)
        if alias not in aliases:
            none = " (it has none: mmsa-dist promote gives one, or give models:/NAME/VERSION)"
            raise ConfigError(
                f"registered model {name!r} has no alias {alias!r}{nearest(alias, aliases) if aliases else none}"
            )
        number = str(aliases[alias])
    return located_version(client, version_of(client, name, number))


def located_version(client: "MlflowClient", version: Version) -> Located:
    """Where the files of a registered version are."""
    logged = re.fullmatch(LOGGED, version.source)
    place = _logged(client, logged[1]).place if logged else version.source.rstrip("/")
    return Located(place, version.run_id, version)


def registered(client: "MlflowClient", name: str) -> Any:
    """MLflow's RegisteredModel called `name`.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in client.search_registered_models()]
        known = nearest(name, names) if names else " (it has none: train one first)"
        raise ConfigError(f"the registry has no model {name!r}{known}") from error


def versions_of(client: "MlflowClient", name: str) -> list[Version]:
    """The versions of a registered model, the newest first.

    Raises:
        ConfigError: there is no such model.
    """
    aliases = dict(registered(client, name).aliases)
    quote = '"' if "'" in name else "'"
    if quote in name:  # both: MLflow's filters cannot say that
        found = [each for each in client.search_model_versions() if each.name == name]
    else:
        found = client.search_model_versions(f"name = {quote}{name}{quote}")
    return sorted((Version.of(each, aliases) for each in found), key=lambda version: -int(version.number))


def version_of(client: "MlflowClient", name: str, number: str) -> Version:
    """Version `number` of a registered model.

    Raises:
        ConfigError: there is no such model or version; names those that are there.
    """
    versions = versions_of(client, name)
    for version in versions:
        if version.number == number:
            return version
    there = ", ".join(version.number for version in reversed(versions)) or "none"
    raise ConfigError(f"registered model {name!r} has no version {number} (versions: {there})")


def download(uri: str, model: str, address: str, scratch: str) -> Path:
    """The file or folder of `model` at `address`, in `scratch` or where it lies on this machine.

    Raises:
        TransientError: it cannot be fetched. DataError: it lay on this machine, and is gone.
    """
    import mlflow

    own = unquote(address.removeprefix("file://"))
    if own.startswith("/") and not Path(own).exists():
        raise DataError(
            f"model {model!r}: {own} is gone, where MLflow says its files are; put it back, or give another version"
        )
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=scratch, tracking_uri=uri))
    except (OSError, mlflow.MlflowException) as error:
        reason = store.shown(" ".join(str(error).split()))[:200]
        raise TransientError(
            f"model {model!r}: its files cannot be fetched from {store.shown(address)} ({reason}); try again; "
            "if mmsa-dist train did not log it, give another model"
        ) from error


def not_ours(model: str) -> ConfigError:
    """What to raise of a model that has no data card."""
    return ConfigError(f"model {model!r} was not logged by mmsa-dist train (no data.json in it); give {FORMS}")


def _logged(client: "MlflowClient", model_id: str) -> Located:
    from mlflow.exceptions import MlflowException

    try:
        logged = client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ConfigError(f"MLflow has no logged model {model_id!r}; give {FORMS}") from error
    return Located(str(logged.artifact_location).rstrip("/"), logged.source_run_id or None, None)


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
