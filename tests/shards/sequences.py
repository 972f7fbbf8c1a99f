"""Writes computational sequences as the CMU-MultimodalSDK deploys them: HDF5, compressed, metadata as JSON strings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Entries = Mapping[str, tuple[Any, Any]]
"""entry -> features (S, D) or (S, 1) words, intervals (S, 2)."""


def write_csd(path: Path, entries: Entries, name: str = "a sequence") -> Path:
    """Numbers keep their dtype; strings become byte strings, as in TimestampedWords."""
    metadata = {"root name": name, "dataset name": "made", "computational sequence version": "1.0"}
    with h5py.File(path, "w") as file:
        root = file.create_group(name)
        data = root.create_group("data")
        for entry, (features, intervals) in entries.items():
            group = data.create_group(entry)
            values = np.asarray(features)
            if values.dtype.kind == "U":
                values = np.char.encode(values, "utf-8")
            group.create_dataset("features", data=values, compression="gzip", compression_opts=9)
            group.create_dataset(
                "intervals", data=np.asarray(intervals, np.float64), compression="gzip", compression_opts=9
            )
        told = root.create_group("metadata")
        for key, value in metadata.items():
            told.create_dataset(key, (1,), dtype=h5py.string_dtype())[0] = json.dumps(value)
    return path


def regular(start: float, end: float, step: float) -> np.ndarray:
    """Intervals (S, 2) of frames one after another."""
    edges = start + step * np.arange(round((end - start) / step) + 1)
    return np.stack([edges[:-1], edges[1:]], 1)
