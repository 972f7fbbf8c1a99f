"""What a version must show before an alias moves to it. Each check says what it found, and what to do about it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmsa_dist import model_card, run_folder
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import ConfigError, DataError, MmsaError, TrainingError
from mmsa_dist.metrics import is_better
from mmsa_dist.predictor import RECIPE
from mmsa_dist.registered import load_alone
from mmsa_dist.report import value_text
from mmsa_dist.tracking.fetch import INSIDE
from mmsa_dist.tracking.version import ANSWERS, Version

TOLERANCE = 1e-5
"""Largest difference between what the model answers to its input example and what is stored with it."""

TIMEOUT = 900.0
"""Seconds in which the model must have loaded and answered one example."""


@dataclass(frozen=True)
class Check:
    """One check's outcome.

    Attributes:
        name: what was checked.
        passed: whether it is as it should be.
        found: in words.
        remedy: what to do where it did not pass.
        error: what a refusal for it is.
    """

    name: str
    passed: bool
    found: str
    remedy: str = ""
    error: type[MmsaError] = ConfigError

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.found}"


def checks(version: Version, holder: Version | None, alias: str, folder: Path, scratch: Path) -> Iterator[Check]:
    """All checks, the cheap ones first; each is made when it is asked for.

    Args:
        holder: the version that holds `alias` now.
        folder: the files of the logged model.
        scratch: folder for what the load test writes.
    """
    yield described(version, folder)
    yield as_good(version, holder, alias)
    found = alone(folder, scratch)
    yield loads(found)
    yield answers_alike(found, folder / INSIDE / ANSWERS)


def described(version: Version, folder: Path) -> Check:
    """Everything is there that a person needs who was not there when it was trained."""
    name, lacking = "metadata", missing(version, folder)
    if lacking:
        remedy = "train it again with this version of mmsa-dist, which writes all of it"
        return Check(name, False, f"it lacks {', '.join(lacking)}", remedy)
    found = "signature, input example and its answers, recipe, data, code, metrics and model card are there"
    return Check(name, True, found)


def missing(version: Version, folder: Path) -> list[str]:
    """What the version and its files lack of what `described` wants."""
    model = folder / INSIDE
    signature, example = _logged(folder)
    card = _data_card(model)
    there = {
        "the signature": signature,
        "the input example": example,
        f"the answers to the input example ({ANSWERS})": (model / ANSWERS).is_file(),
        f"the recipe ({RECIPE})": (model / RECIPE).is_file(),
        "the data card (data.json)": card is not None,
        "the data's fingerprint": bool(version.fingerprint),
        "a fingerprint that agrees with its data.json": card is None or version.fingerprint == card.fingerprint,
        "the code's version": bool(version.code),
        "the metric that chose its epoch (tag monitor)": bool(version.monitor),
        "validation metrics": bool(version.metrics("valid")),
        "test metrics": bool(version.metrics("test")) or (card is not None and not card.splits.get("test")),
        f"the model card ({model_card.FILE})": (model / model_card.FILE).is_file(),
        "the model card as its description": bool(version.description.strip()),
    }
    return [what for what, is_there in there.items() if not is_there]


def as_good(version: Version, holder: Version | None, alias: str) -> Check:
    """On validation it does at least as well as the version that holds the alias, on the same data."""
    name = "validation"
    if holder is None:
        return Check(name, True, f"no version holds {alias} yet")
    if holder.number == version.number:
        return Check(name, True, f"it holds {alias} itself")
    who = f"version {holder.number}, which holds {alias}"
    if version.fingerprint is None or version.fingerprint != holder.fingerprint:
        return Check(
            name,
            False,
            f"it was trained on {_data(version)}, {who}, on {_data(holder)}: their figures are not comparable",
            f"train on the same data, or compare both on one set with mmsa-dist predict and move {alias} with --force",
        )
    monitor = version.monitor or ""
    new, old = (each.metrics("valid").get(monitor) for each in (version, holder))
    if not monitor or old is None:
        what = f"{who} has no validation {monitor}" if monitor else "the metric that chose its epoch is not known"
        return Check(name, False, f"{what}: there is nothing to compare by", "compare them yourself: mmsa-dist compare")
    figures = f"{monitor} {value_text(monitor, new)}, that of {who}: {value_text(monitor, old)}"
    if is_better(monitor, old, new):
        return Check(name, False, f"{figures} on the same data", "train a better one")
    return Check(name, True, f"{figures} on the same data")


def alone(folder: Path, scratch: Path) -> dict[str, Any]:
    """What `load_alone` says of the logged model in `folder`, in a process of its own that reads no pickle."""
    into = scratch / "answer.json"
    command = [sys.executable, "-P", str(load_alone.__file__), str(folder), str(into)]
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    try:
        done = subprocess.run(
            command, env=environment, cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it did not answer within {TIMEOUT:.0f} seconds"}
    try:
        found: dict[str, Any] = json.loads(into.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = " ".join(done.stderr.split())[-200:]
        return {"error": f"its process ended with code {done.returncode} before it had answered ({last})"}
    return found


def loads(found: Mapping[str, Any]) -> Check:
    """The model loads from what the registry holds, and from no pickle. `found` is of `alone`."""
    name = "load test"
    if "error" in found:
        remedy = "take another version, or train it again"
        return Check(name, False, str(found["error"])[:400], remedy, TrainingError)
    return Check(name, True, "it loads with its own code and without any pickle, and answers")


def answers_alike(found: Mapping[str, Any], stored: Path) -> Check:
    """The model answers its input example as the weights did when it was registered.

    Args:
        found: of `alone`.
        stored: file of the answers then.
    """
    name = "answers"
    if "error" in found:
        return Check(name, False, "there are none to compare", "mend what the load test says", TrainingError)
    try:
        expected = run_folder.read_json(stored)
        before, now = (np.array([each[column] for column in expected], float) for each in (expected, found["answers"]))
    except (OSError, ValueError, TypeError, LookupError):
        return Check(name, False, f"{ANSWERS} cannot be read or has other columns", "train it again", TrainingError)
    if before.shape != now.shape or not before.size:
        return Check(name, False, f"{ANSWERS} is of another example", "train it again", TrainingError)
    furthest = float(np.abs(before - now).max())
    told = f"at most {furthest:.1e} from those stored when it was registered"
    if furthest <= TOLERANCE:  # false of NaN
        return Check(name, True, told)
    remedy = "its weights, its example or the stored answers were changed since: train it again"
    return Check(name, False, f"{told}, expected {TOLERANCE:.0e}", remedy, TrainingError)


def _data(version: Version) -> str:
    return f"{version.data or 'unknown data'} (fingerprint {(version.fingerprint or 'unknown')[:12]})"


def _logged(folder: Path) -> tuple[bool, bool]:
    """Whether the logged model has a signature with inputs and outputs, and an input example."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        model = Model.load(str(folder))
        signature = model.signature
        example = (model.saved_input_example_info or {}).get("artifact_path")
    except (MlflowException, OSError, ValueError, KeyError, TypeError):
        return False, False
    whole = signature is not None and bool(signature.inputs) and bool(signature.outputs)
    return whole, bool(example) and (folder / str(example)).is_file()


def _data_card(model: Path) -> DataCard | None:
    try:
        return DataCard.load(model)
    except DataError:
        return None
