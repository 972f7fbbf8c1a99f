"""The model registry: the best weights as a model that answers anywhere, registered as a version.

A model is code (a copy of our packages), safetensors, JSON and YAML: nothing in it is pickled, and it loads with
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false.
"""

import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmsa_dist import checkpoint, model_card, run_folder
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import TrainingError
from mmsa_dist.predictor import ENCODER, RECIPE, WEIGHTS, Predictor, weights_path
from mmsa_dist.recipe import Recipe
from mmsa_dist.tracking.aliases import promote_better
from mmsa_dist.tracking.needs import constraints, requirements
from mmsa_dist.tracking.tracker import Link
from mmsa_dist.tracking.version import ANSWERS, code_tags, code_text, version_tags

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference between the registered model's answer and the run's own, on the input example."""


@dataclass(frozen=True)
class Published:
    """What became of a run's model.

    Attributes:
        uri: ``models:/NAME/VERSION``; ``models:/<model id>`` where it was logged without being registered.
        name, version: in the registry; None where it was not registered.
        aliases: those that point to this version now.
        notes: sentences for the user: aliases that were not moved, and why.
    """

    uri: str
    name: str | None
    version: str | None
    aliases: tuple[str, ...]
    notes: tuple[str, ...]


def publish(client: "MlflowClient", link: Link, run_dir: Path, recipe: Recipe) -> Published:
    """Logs the run's best model, registers it and moves the aliases that the recipe asks for.

    Raises:
        TrainingError: the registered model does not answer as the run's own weights do; no alias was moved.
    """
    name = registered_name(recipe)
    uri = link.model or _log(client, link, run_dir, recipe)
    if name is None:
        return Published(uri, None, None, (), ())
    if (found := re.fullmatch(r"models:/([^/@]+)/(\d+)", uri)) is not None:
        name, version = found.groups()
    else:
        version = _register(client, link, run_dir, recipe, uri, name)
        uri = f"models:/{name}/{version}"
    moved, notes = [], []
    for alias in recipe.tracking.alias:
        note = promote_better(client, name, version, alias, recipe.train.monitor)
        moved += [alias] if note is None else []
        notes += [note] if note else []
    return Published(uri, name, version, tuple(moved), tuple(notes))


def registered_name(recipe: Recipe) -> str | None:
    """The model's name in the registry; None where none is wanted."""
    asked = recipe.tracking.register_as
    if asked is not None:
        return None if asked.lower() in ("none", "") else asked
    return re.sub(r"[^\w.-]+", "-", recipe.system.rpartition(":")[2])


def model_folder(run_dir: Path, into: Path, weights: Path | None = None) -> Path:
    """Writes the model folder (see `predictor`) of a run, or of another such folder.

    Args:
        weights: those to take; the best ones by default.
    """
    into.mkdir(parents=True)
    shutil.copyfile(weights or weights_path(run_dir), into / WEIGHTS)
    shutil.copyfile(run_dir / RECIPE, into / RECIPE)
    card = DataCard.load(run_dir)
    card.save(into)
    if (run_dir / ENCODER).is_dir():
        shutil.copytree(run_dir / ENCODER, into / ENCODER)
    elif card.text is not None and card.text.encoder is not None:
        save_encoder(card.text.encoder, into / ENCODER)
    return into


def save_encoder(encoder: str, into: Path) -> None:
    """The encoder's configuration and tokenizer, so that the model needs neither its folder nor the hub again.

    Its weights are among the system's.
    """
    from mmsa_dist.layers.hub import locate

    place, local = locate(encoder)
    if local:
        into.mkdir()
        for file in sorted(Path(place).iterdir()):
            if file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, into / file.name)
        return
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(place).save_pretrained(into)
    AutoTokenizer.from_pretrained(place).save_pretrained(into)


def _log(client: "MlflowClient", link: Link, run_dir: Path, recipe: Recipe) -> str:
    """Logs the model to the run; gives its URI after checking that it loads and answers as the run's weights do."""
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType

    from mmsa_dist.serving import served

    with tempfile.TemporaryDirectory(prefix="mmsa-") as scratch, _global_store(link.uri):
        folder = model_folder(run_dir, Path(scratch) / "model")
        predictor = Predictor.load(run_dir)
        request = pd.DataFrame([predictor.example()])
        answer = served.answers(predictor, request.to_dict("records"))
        checkpoint.write_manifest(folder)  # of what a prediction depends on; a person may add to the card
        run_folder.write_json(folder / ANSWERS, answer.to_dict("list"))
        (folder / model_card.FILE).write_text(_card(run_dir, recipe, _code(client, link)), encoding="utf-8")
        # Any, not Array(Array(double)): that would refuse whole numbers, which JSON writes without a point, and costs
        # 0.1 s a request of MOSI's size. Our own check names row, step and feature.
        inputs = [ColSpec(DataType.string if c == "raw_text" else AnyType(), c) for c in predictor.columns]
        outputs = [ColSpec(DataType.double, str(column)) for column in answer.columns]
        needs = requirements(encoder=predictor.card.text is not None)
        pins = Path(scratch) / "constraints.txt"
        pins.write_text("\n".join(constraints(need.partition("==")[0] for need in needs)), encoding="utf-8")
        with mlflow.start_run(run_id=link.run_id, nested=True):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(served.__file__).with_name("model_code.py")),
                artifacts={"model": str(folder)},
                code_paths=code_paths(recipe.system),
                signature=ModelSignature(Schema(inputs), Schema(outputs)),
                input_example=request,
                pip_requirements=[*needs, f"-c {pins}"],
                metadata={"data.fingerprint": predictor.card.fingerprint, "mmsa-dist": _version("mmsa-dist")},
            )
        client.update_run(link.run_id, status="RUNNING")  # leaving the block above has ended it
        _load_test(info.model_uri, request, answer.to_numpy())
    return str(info.model_uri)


def _load_test(uri: str, request: "pd.DataFrame", expected: np.ndarray) -> None:
    import mlflow

    path = list(sys.path)
    try:
        found = mlflow.pyfunc.load_model(uri).predict(request).to_numpy()
    finally:
        sys.path[:] = path  # loading puts the model's own copy of our code in front
    if found.shape != expected.shape or not np.allclose(found, expected, atol=TOLERANCE):
        raise TrainingError(
            f"{uri}: the logged model answers {found.tolist()}, the run's weights {expected.tolist()} to the same "
            "request; it was not registered and no alias was moved"
        )


def _register(client: "MlflowClient", link: Link, run_dir: Path, recipe: Recipe, uri: str, name: str) -> str:
    """A new version of `name` from the logged model `uri`, or the one that a call before this made of the run and was
    killed before the run's folder said so; gives its number."""
    from mlflow.exceptions import MlflowException

    code = _code(client, link)
    result = run_folder.read_json(run_dir / "result.json")
    tags = version_tags(result, DataCard.load(run_dir), recipe, run_dir, weights_path(run_dir), code)
    with suppress(MlflowException):  # it exists already; if not, the next call says what is wrong
        client.create_registered_model(name)
    known = [each for each in client.search_model_versions(f"run_id = '{link.run_id}'") if each.name == name]
    if not known:
        with _global_store(link.uri):  # where the registry looks for the logged model
            known = [client.create_model_version(name, uri, link.run_id, tags, model_id=uri.removeprefix("models:/"))]
    version = str(known[0].version)
    text = model_card.description(_card(run_dir, recipe, code), f"models:/{name}/{version}")
    client.update_model_version(name, version, text)
    return version


def _card(run_dir: Path, recipe: Recipe, code: Mapping[str, str]) -> str:
    """The model card of a finished run; `code` from `_code`."""
    result = run_folder.read_json(run_dir / "result.json")
    return model_card.model_card(result, DataCard.load(run_dir), recipe, code_text(code) or "mmsa-dist")


def _code(client: "MlflowClient", link: Link) -> dict[str, str]:
    """`code_tags` of the run."""
    return code_tags(_version("mmsa-dist"), client.get_run(link.run_id).data.tags)


def code_paths(system: str) -> list[str]:
    """Folders of the packages that the model runs on: ours, and a third party's that holds the system."""
    import importlib

    from mmsa_dist.systems import get_system

    roots = dict.fromkeys(["shards", "mmsa_dist", get_system(system).__module__.partition(".")[0]])
    files = [Path(str(importlib.import_module(root).__file__)) for root in roots]
    return [str(file.parent if file.name == "__init__.py" else file) for file in files]


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@contextmanager
def _global_store(uri: str) -> Iterator[None]:
    """MLflow's functions that log models know only a global store: it is ours inside, what it was before outside.

    MLflow keeps it in the environment too, where our own next run would find it.
    """
    import mlflow

    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = [os.environ.get(name) for name in names]
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
        for name, value in zip(names, before, strict=True):
            if value is None:
                os.environ.pop(name, None)
