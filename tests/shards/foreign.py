"""Tars as somebody else writes them, with tarfile and NumPy alone."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from shards.foreign.build import Options, index_tars
from shards.foreign.mapping import FEATURES, OTHERS
from shards.index import Index
from shards.read import ShardReader
from shards.utterance import SPLITS, Utterance

WIDTHS = {"text": 6, "audio": 5, "vision": 3}
LABEL_AND_TEXT = {"label": "json:label", "raw_text": "json:text"}


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(arrays: Mapping[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def arrays(rng: np.random.Generator, dtype: str = "float32") -> dict[str, np.ndarray]:
    """One sample's features, of 1 to 9 steps."""
    return {m: rng.standard_normal((rng.integers(1, 10), w)).astype(dtype) for m, w in WIDTHS.items()}


def members(content: Mapping[str, np.ndarray], kind: str) -> dict[str, bytes]:
    """The features as members of one kind."""
    if kind == "npy":
        return {f"{name}.npy": npy(array) for name, array in content.items()}
    return {f"features.{kind}": npz(content)} if kind == "npz" else {"safetensors": save(dict(content))}


def described(label: Any, text: Any, **more: Any) -> dict[str, bytes]:
    return {"json": json.dumps({"label": label, "text": text, **more}).encode()}


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """(key, suffix -> content) …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, content in samples:
            for suffix, data in content.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_set(
    folder: Path, counts: Mapping[str, int], kind: str = "npy", dtype: str = "float32", tars: int = 1
) -> dict[str, dict[str, np.ndarray]]:
    """``train-0.tar`` …: key -> features. Labels are i / 10, transcripts "words of KEY"."""
    rng, made = np.random.default_rng(0), {}
    for split, count in counts.items():
        samples = []
        for i in range(count):
            key = f"{split}/v{i}"
            made[key] = arrays(rng, dtype)
            samples.append((key, members(made[key], kind) | described(i / 10, f"words of {key}")))
        for n in range(tars):
            write_tar(folder / f"{split}-{n}.tar", samples[n::tars])
    return made


def options(**given: Any) -> Options:
    """Places and splits by their names, and whatever else `Options` has."""
    places = {what: given.pop(what, None) for what in (*FEATURES, *OTHERS)}
    splits = {split: given.pop(split, ()) for split in SPLITS}
    return Options(places, splits, **given)


def indexed(folder: Path, out: Path | None = None, **given: Any) -> Index:
    return index_tars([folder], out, options(**given))[0]


def read(index: Index) -> dict[str, Utterance]:
    """All samples by their keys, with their transcripts."""
    with ShardReader(index) as reader:
        return {u.key: u for u in reader.samples(range(index.num_samples), with_text=True)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
