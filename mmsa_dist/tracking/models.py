"""The model registry: the best weights as a model that answers anywhere, its versions and their aliases.

A model is code (a copy of our packages), safetensors, JSON and YAML: nothing in it is pickled, and it loads with
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false.
"""

import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsa_dist import run_folder
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import TrainingError
from mmsa_dist.metrics import is_better
from mmsa_dist.predictor import ENCODER, RECIPE, WEIGHTS, Predictor, weights_path
from mmsa_dist.recipe import Recipe
from mmsa_dist.report import data_name, value_text
from mmsa_dist.tracking.tracker import Link

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

REQUIREMENTS = ("torch", "numpy", "safetensors", "pydantic", "pyyaml", "tyro", "pyarrow", "pandas", "mlflow")
"""What a model needs to answer; transformers beside them where it reads text through an encoder."""

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
        note = promote(client, name, version, alias, recipe.train.monitor)
        moved += [alias] if note is None else []
        notes += [note] if note else []
    return Published(uri, name, version, tuple(moved), tuple(notes))


def registered_name(recipe: Recipe) -> str | None:
    """The model's name in the registry; None where none is wanted."""
    asked = recipe.tracking.register_as
    if asked is not None:
        return None if asked.lower() in ("none", "") else asked
    return re.sub(r"[^\w.-]+", "-", recipe.system.rpartition(":")[2])


def promote(client: "MlflowClient", name: str, version: str, alias: str, monitor: str) -> str | None:
    """Moves `alias` to `version`, unless the version that has it did better on validation of the same data.

    Two runs that end together both look again after moving, so that the better one keeps it.

    Args:
        monitor: validation metric to compare by; each version carries its own as the tag ``valid.<metric>``.

    Returns:
        None where `version` has the alias now; otherwise why not, in a sentence.
    """
    for _ in range(3):
        holder = client.get_registered_model(name).aliases.get(alias)
        if holder is not None and str(holder) == version:
            return None
        if holder is not None and (note := _better(client, name, version, str(holder), alias, monitor)):
            return note
        client.set_registered_model_alias(name, alias, version)
    return None


def _better(client: "MlflowClient", name: str, version: str, holder: str, alias: str, monitor: str) -> str | None:
    """Why `holder` keeps the alias; None where it does not. Versions of other data cannot be compared."""
    mine, its = (client.get_model_version(name, v).tags for v in (version, holder))
    if mine.get("data.fingerprint") != its.get("data.fingerprint"):
        return None
    new, old = (float(tags[f"valid.{monitor}"]) if f"valid.{monitor}" in tags else None for tags in (mine, its))
    if old is None or not is_better(monitor, old, new):
        return None
    shown = value_text(monitor, new)
    return (
        f"{alias} stays with version {holder} of {name}: its validation {monitor} {value_text(monitor, old)} on the "
        f"same data is better than {shown} of version {version}; to move it all the same: "
        f"mlflow.MlflowClient().set_registered_model_alias({name!r}, {alias!r}, {version!r})"
    )


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
        # Any, not Array(Array(double)): that would refuse whole numbers, which JSON writes without a point, and costs
        # 0.1 s a request of MOSI's size. Our own check names row, step and feature.
        inputs = [ColSpec(DataType.string if c == "raw_text" else AnyType(), c) for c in predictor.columns]
        outputs = [ColSpec(DataType.double, str(column)) for column in answer.columns]
        with mlflow.start_run(run_id=link.run_id, nested=True):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(served.__file__).with_name("model_code.py")),
                artifacts={"model": str(folder)},
                code_paths=code_paths(recipe.system),
                signature=ModelSignature(Schema(inputs), Schema(outputs)),
                input_example=request,
                pip_requirements=requirements(predictor.card),
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
    """A new version of `name` from the logged model `uri`; gives its number."""
    from mlflow.exceptions import MlflowException

    result = run_folder.read_json(run_dir / "result.json")
    card = DataCard.load(run_dir)
    tags = {
        "system": recipe.system,
        "data": card.name,
        "data.fingerprint": card.fingerprint,
        "data.synthetic": str(card.synthetic).lower(),
        "code.version": _version("mmsa-dist"),
        "run_dir": run_dir.name,
        **{f"valid.{metric}": repr(value) for metric, value in result["valid"].items() if value is not None},
    }
    if commit := client.get_run(link.run_id).data.tags.get("mlflow.source.git.commit"):
        tags["code.commit"] = commit
    with suppress(MlflowException):  # it exists already; if not, the next call says what is wrong
        client.create_registered_model(name)
    with _global_store(link.uri):  # where the registry looks for the logged model
        made = client.create_model_version(name, uri, link.run_id, tags, model_id=uri.removeprefix("models:/"))
    version = str(made.version)
    client.update_model_version(name, version, model_card(result, card, recipe, f"models:/{name}/{version}"))
    return version


def model_card(result: dict[str, Any], card: DataCard, recipe: Recipe, uri: str) -> str:
    """What a person who finds this version in the registry wants to know, in Markdown."""
    from mmsa_dist.systems import get_system

    splits = [split for split in ("valid", "test") if split in result]
    rows = [
        f"| {metric} | " + " | ".join(value_text(metric, result[split].get(metric)) for split in splits) + " |"
        for metric in result["valid"]
    ]
    low, high = card.label_range
    answer = f"Sentiment intensity of an utterance, {low:g} (negative) to {high:g} (positive)"
    if card.classes:
        named = ", ".join(card.judged)
        answer = f"Emotions of an utterance ({named}): of each the probability, 0 to 1, that it is there"
    splits_text = ", ".join(f"{count:,} {split}" for split, count in card.splits.items())
    chosen = f"epoch {result['best_epoch']} of {result['epochs']}, selected on {result.get('selected_on')}"
    synthetic = (
        "\n**Trained on synthetic data: its answers mean nothing for real utterances.**\n" if card.synthetic else ""
    )
    return f"""{recipe.system}: {get_system(recipe.system).paper}
{synthetic}
{answer}, from {", ".join(card.widths)}.
Trained on {data_name({"data": card.name, "synthetic": card.synthetic})} ({splits_text}),
fingerprint `{card.fingerprint[:12]}`; {chosen}.

| metric | {" | ".join(splits)} |
|---|{"---|" * len(splits)}
{chr(10).join(rows)}

`mmsa-dist predict {uri} --data FOLDER --out predictions.csv`, or `mlflow models serve -m {uri} --env-manager local`.
"""


def code_paths(system: str) -> list[str]:
    """Folders of the packages that the model runs on: ours, and a third party's that holds the system."""
    import importlib

    from mmsa_dist.systems import get_system

    roots = dict.fromkeys(["shards", "mmsa_dist", get_system(system).__module__.partition(".")[0]])
    files = [Path(str(importlib.import_module(root).__file__)) for root in roots]
    return [str(file.parent if file.name == "__init__.py" else file) for file in files]


def requirements(card: DataCard) -> list[str]:
    """Pinned to what the model was logged with; without a local version such as ``+cpu``, which no index has."""
    names = [*REQUIREMENTS, *(["transformers"] if card.text is not None else [])]
    return [f"{name}=={_version(name).partition('+')[0]}" for name in names]


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
