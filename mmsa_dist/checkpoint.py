"""Checkpoints on disk: a folder a step, whole or not there at all.

A folder is written under a hidden name, fsynced, given its manifest (sizes and sha256) last, then renamed. A folder
without a manifest does not exist; one whose bytes disagree with it is passed over for the one before.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsa_dist.errors import DataError, TransientError
from mmsa_dist.portable import MOMENTS, State

SCHEMA = 1


@dataclass
class Checkpoint:
    """What a run needs to go on as if nothing had happened.

    Attributes:
        engine: weights and moments.
        generator: the label generator's state.
        progress: plain values: epoch, step in the epoch, best result, patience, running sums.
    """

    engine: State
    generator: dict[str, Tensor]
    progress: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int, best_step: int | None) -> Path:
    """Writes ``folder/step-…`` and removes what is older than the last `keep`, the best one excepted.

    Raises:
        TransientError: the disk is full or refuses; what was there before is still whole.
    """
    step = checkpoint.engine.step
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{target.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(checkpoint.engine.weights, partial / "weights.safetensors")
        moments = {f"{key}.{name}": t for key in MOMENTS for name, t in checkpoint.engine.moments[key].items()}
        save_file(moments, partial / "optimizer.safetensors")
        save_file(checkpoint.generator, partial / "labels.safetensors")
        progress = {"engine_step": step, "run": checkpoint.progress}
        (partial / "progress.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(
            json.dumps({"schema": SCHEMA, "files": files}, indent=1), encoding="utf-8"
        )
        for path in partial.iterdir():
            _fsync(path)
        _fsync(partial)
        if target.exists():  # the same step, saved by an attempt that was killed after it
            shutil.rmtree(target)
        partial.rename(target)
        _fsync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TransientError(
            f"{target}: the checkpoint cannot be written: {error}; the one before is whole. "
            "Free space or choose another folder with --runs-dir, then go on with --resume"
        ) from error
    _retain(folder, keep, best_step)
    return target


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, None where there is none. Partial ones are removed."""
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(folder.glob("step-*"), reverse=True):
        if damage(path) is None:
            return load(path)
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises:
        DataError: it is not whole.
    """
    fault = damage(path)
    if fault is not None:
        raise DataError(f"{path}: {fault}; use an older checkpoint of the run, or train it again")
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    flat = load_file(path / "optimizer.safetensors")
    moments = {
        key: {name.removeprefix(f"{key}."): t for name, t in flat.items() if name.startswith(f"{key}.")}
        for key in MOMENTS
    }
    state = State(progress["engine_step"], load_file(path / "weights.safetensors"), moments)
    return Checkpoint(state, load_file(path / "labels.safetensors"), progress["run"])


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, None where all its bytes agree with its manifest."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return "no manifest.json: it was never finished"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        schema, files = content["schema"], content["files"]
    except (ValueError, KeyError, OSError):
        return "manifest.json cannot be read"
    if schema > SCHEMA:
        return f"written by a newer mmsa-dist (schema {schema}, this one reads {SCHEMA})"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
        if _fingerprint(file) != expected:
            return f"{name} differs from its sha256"
    return None


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _retain(folder: Path, keep: int, best_step: int | None) -> None:
    best = None if best_step is None else step_folder(folder, best_step)
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
