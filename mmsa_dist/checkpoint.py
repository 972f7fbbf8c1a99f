"""Checkpoints on disk: a folder a step, whole or not there at all.

A folder is written under a hidden name, fsynced, given its manifest (sizes and sha256) last, then renamed. Before ranks
start, `tidy` puts aside what a kill cut short or a disk has damaged, so that ranks and retention see whole ones only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsa_dist.errors import ConfigError, DataError, TransientError
from mmsa_dist.portable import MOMENTS, State

SCHEMA = 1

MANIFEST = "manifest.json"

WEIGHTS = "weights.safetensors"

FILES = (WEIGHTS, "optimizer.safetensors", "labels.safetensors", "progress.json")


@dataclass
class Checkpoint:
    """What a run needs to go on as if nothing had happened.

    Attributes:
        engine: weights and moments.
        generator: the label generator's state.
        progress: plain values: epoch, step in the epoch, best result, patience, running sums.
        origin: what wrote it: versions, recipe, data, ranks, MLflow run. For a person to read; nothing depends on it.
    """

    engine: State
    generator: dict[str, Tensor]
    progress: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, keep: int, best_step: int | None) -> Path:
    """Writes ``folder/step-…`` and removes what is older than the last `keep`, the best one excepted.

    Raises:
        TransientError: the disk is full or refuses; what was there before is still whole.
    """
    step = checkpoint.engine.step
    target = step_folder(folder, step)
    partial = folder / f".partial-{target.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(checkpoint.engine.weights, partial / WEIGHTS)
        moments = {f"{key}.{name}": t for key in MOMENTS for name, t in checkpoint.engine.moments[key].items()}
        save_file(moments, partial / "optimizer.safetensors")
        save_file(checkpoint.generator, partial / "labels.safetensors")
        progress = {"engine_step": step, "loss_scale": checkpoint.engine.scale, "run": checkpoint.progress}
        (partial / "progress.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")
        write_manifest(partial, origin=checkpoint.origin)
        replaced = partial.with_name(f"{partial.name}-replaced")
        if target.exists():  # the same step, saved by an attempt that was killed after it
            target.rename(replaced)
        partial.rename(target)
        _fsync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TransientError(
            f"{target}: the checkpoint cannot be written: {error}; "
            f"{'the one before is whole' if saved(folder) else 'there is none before it'}. "
            "Free space, then go on with --resume, or begin anew in another --runs-dir"
        ) from error
    _retain(folder, keep, best_step)
    return target


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While this process has something of a checkpoint to finish before it ends, which is known by that in `folder`."""
    mark = folder / f".partial-held-{os.getpid()}"
    with suppress(OSError):
        mark.mkdir()
    try:
        yield
    finally:
        with suppress(OSError):
            mark.rmdir()


def is_held(folder: Path, pid: int) -> bool:
    """Whether a process of this machine writes a checkpoint, or has something of one to finish."""
    return any(folder.glob(f".partial-*-{pid}"))


def tidy(folder: Path) -> list[str]:
    """Removes partial checkpoints and puts damaged ones aside; gives a sentence about each of those.

    To be called by one process, before ranks start.

    Raises:
        ConfigError: one was written by a newer version. DataError: there are checkpoints, but none is whole.
    """
    for replaced in folder.glob(".partial-step-*-replaced"):  # a kill came before what was to take its place
        target = folder / "-".join(replaced.name.removeprefix(".partial-").split("-")[:2])
        if not target.exists():
            replaced.rename(target)
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
    faults = {path: fault for path in saved(folder) if (fault := damage(path)) is not None}
    newer = [path for path, fault in faults.items() if fault.startswith(NEWER)]
    if newer:
        raise ConfigError(f"{newer[0]}: {faults[newer[0]]}; go on with that version, or train it as a new run")
    if faults and len(faults) == len(saved(folder)):
        path, fault = max(faults.items())
        raise DataError(
            f"{path}: {fault}, and no older checkpoint is whole; train it as a new run, or remove {folder} to begin "
            "this one anew"
        )
    sentences = []
    for path, fault in faults.items():
        aside = put_aside(path)
        sentences.append(f"{path}: {fault}; it is put aside as {aside.name}, the newest whole one before it is used")
    if faults and (best := best_step(saved(folder)[-1])) and step_folder(folder, best) in faults:
        sentences.append(
            f"{step_folder(folder, best)}: was the best epoch's: the run cannot be evaluated unless a later epoch is "
            "better; train it as a new run where none is to come"
        )
    return sentences


def best_step(path: Path) -> int | None:
    """The step of the best epoch, as the whole checkpoint at `path` knows it."""
    run = json.loads((path / "progress.json").read_text(encoding="utf-8"))["run"]
    return run.get("best_step") or None


def put_aside(path: Path) -> Path:
    """Gives a damaged checkpoint another name, at which nobody takes it for one; that name."""
    aside = path.with_name(f".damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def saved(folder: Path) -> list[Path]:
    """Checkpoints by age, the newest last; after `tidy`, each as it was written."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def load_latest(folder: Path, agreed: Callable[[int], int] = int) -> Checkpoint | None:
    """The newest checkpoint in `folder`, None where there is none.

    Args:
        agreed: gives the step that all who load take, of that of the newest one that is seen here, -1 for none.

    Raises:
        DataError: it is not whole.
    """
    step = agreed(max(map(step_of, saved(folder)), default=-1))
    return None if step < 0 else load(step_folder(folder, step))


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights alone of the checkpoint at `path`.

    Raises:
        DataError: they are not as they were written.
    """
    fault = damage(path, (WEIGHTS,))
    if fault is not None:
        raise DataError(f"{path}: {fault}; use an older checkpoint of the run, or train it again")
    return load_file(path / WEIGHTS)


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
    weights = load_file(path / WEIGHTS)
    state = State(progress["engine_step"], weights, moments, progress.get("loss_scale", {}))  # older versions kept none
    return Checkpoint(state, load_file(path / "labels.safetensors"), progress["run"])


def keep_weights(path: Path, folder: Path) -> None:
    """The weights of the checkpoint at `path` as ``folder/weights.safetensors``, with the size and sha256 that they
    were written with in a manifest; it comes last, and is gone as long as they may differ."""
    folder.mkdir(exist_ok=True)
    for name in (MANIFEST, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    link_or_copy(path / WEIGHTS, folder / WEIGHTS)
    files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    text = json.dumps({"schema": SCHEMA, "files": {WEIGHTS: files[WEIGHTS]}}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def link_or_copy(file: Path, target: Path) -> None:
    """The same bytes under another name: a link, or a copy where links are not to be had."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def write_manifest(folder: Path, **more: Any) -> None:
    """``manifest.json``: size and sha256 of all files in `folder`, which are brought onto the disk; and `more`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): _fingerprint(path) for path in paths}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"schema": SCHEMA, **more, "files": files}, indent=1), encoding="utf-8")
    for path in [*paths, manifest, *{path.parent for path in paths}]:
        _fsync(path)


def damage(path: Path, files: tuple[str, ...] | None = FILES) -> str | None:
    """What is wrong with the folder at `path`, None where all bytes of `files` agree with its manifest.

    Args:
        files: names within it; None: all that the manifest has.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        return "no manifest.json: it was never finished"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if int(content["schema"]) > SCHEMA:
            return f"{NEWER} (schema {content['schema']}, this one reads {SCHEMA})"
        known = content["files"]
        expected = {name: (int(known[name]["bytes"]), known[name]["sha256"]) for name in files or known}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return "manifest.json cannot be read"
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        if _fingerprint(file)["sha256"] != sha256:
            return f"{name} differs from its sha256"
    return None


NEWER = "written by a newer mmsa-dist"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def _retain(folder: Path, keep: int, best_step: int | None) -> None:
    best = None if best_step is None else step_folder(folder, best_step)
    for path in saved(folder)[:-keep]:
        if path != best:
            gone = path.with_name(f".partial-{path.name}-gone")  # a kill in the middle must not leave half of it
            shutil.rmtree(gone, ignore_errors=True)
            with suppress(OSError):
                path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
