"""The same samples in every contestant's format, and how fast each is written.

Everybody gets float16 features, labels and shards of the same size; MMSA's pickle is float32 and padded, as it is.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.foreign import streaming
from shards.half import to_float16
from shards.sources.generated import GeneratedSource
from shards.utterance import MODALITIES, SPLITS, Utterance
from shards.write import pack

LITDATA, MOSAIC = "litdata", "mosaicml-streaming"


class Resident(GeneratedSource):
    """Generated samples held in memory, so that packing is measured and not their generation."""

    def __init__(self, like: str, samples: int) -> None:
        super().__init__(like, samples)
        made = super().read
        self._held = {split: [made(split, n) for n in range(self.counts[split])] for split in SPLITS}
        self.total = sum(self.counts.values())
        self.bytes = 2 * sum(a.size for u in self.utterances() for a in u.modalities.values())

    def read(self, split: str, number: int) -> Utterance:
        return self._held[split][number]

    def utterances(self, split: str | None = None) -> Iterator[Utterance]:
        """All of them, or one split's."""
        return (u for name, held in self._held.items() if split in (None, name) for u in held)


@dataclass(frozen=True)
class Format:
    """How one contestant stores the samples.

    Attributes:
        folder: below the run's folder.
        write: (source, folder, bytes a shard) -> all there is, train samples readable.
        needs: a package that this environment may lack.
        timed: packing into it is compared; the others are written once, to be read.
    """

    folder: str
    write: Callable[[Resident, Path, int], object]
    needs: str = ""
    timed: bool = True


def write_ours(source: Resident, out: Path, shard_bytes: int, workers: int = 1) -> None:
    pack(source, out, shard_bytes=shard_bytes, workers=workers)


def write_two(source: Resident, out: Path, shard_bytes: int) -> None:
    write_ours(source, out, shard_bytes, workers=2)


def write_npy(source: Resident, out: Path, shard_bytes: int) -> None:
    """What the webdataset manual shows: one .npy member a modality."""
    import webdataset  # which imports torch

    for split in SPLITS:
        (out / split).mkdir(parents=True)
        with webdataset.ShardWriter(str(out / split / "%05d.tar"), maxsize=shard_bytes, verbose=0) as sink:
            for number, u in enumerate(source.utterances(split)):
                arrays = {f"{name}.npy": npy(array.astype(np.float16)) for name, array in u.modalities.items()}
                sink.write({"__key__": f"{number:08d}", "json": json.dumps({"labels": u.labels}).encode(), **arrays})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_mds(source: Resident, out: Path, shard_bytes: int) -> None:
    """A column a modality, of any length; labels as a number."""
    writer = streaming().MDSWriter
    columns = {**dict.fromkeys(MODALITIES, "ndarray:float16"), "label": "float32"}
    for split in SPLITS:
        with writer(out=str(out / split), columns=columns, size_limit=shard_bytes) as sink:
            for u in source.utterances(split):
                sink.write({**halves(u), "label": np.float32(u.labels["M"])})


def write_litdata(source: Resident, out: Path, shard_bytes: int) -> None:
    """The writer under litdata's `optimize`, without its processes and progress bars: the best it can do."""
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    for split in SPLITS:
        sink = BinaryWriter(str(out / split), chunk_bytes=shard_bytes)
        for number, u in enumerate(source.utterances(split)):
            sink[number] = {**halves(u), "label": u.labels["M"]}
        sink.done()
        sink.merge()


def halves(utterance: Utterance) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float16) for name, array in utterance.modalities.items()}


def write_pickle(source: Resident, out: Path, shard_bytes: int) -> None:
    """MMSA's layout: every array padded to the longest, float32, all in one file."""
    out.mkdir()
    held: dict[str, dict[str, Any]] = {}
    longest = {name: max(len(u.modalities[name]) for u in source.utterances()) for name in source.widths}
    for split in SPLITS:
        samples = list(source.utterances(split))
        held[split] = {
            name: np.zeros((len(samples), longest[name], width), np.float32) for name, width in source.widths.items()
        }
        for row, u in enumerate(samples):
            for name, array in u.modalities.items():
                held[split][name][row, : len(array)] = array
        held[split]["regression_labels"] = np.array([u.labels["M"] for u in samples], np.float32)
        held[split]["id"] = [u.key for u in samples]
    with (out / "unaligned.pkl").open("wb") as file:
        pickle.dump(held, file, protocol=4)


def write_flat(source: Resident, out: Path, shard_bytes: int) -> None:
    """The train split as one float16 file a modality, and where each sample begins."""
    out.mkdir()
    for name in source.widths:
        begins = np.cumsum([0, *(u.modalities[name].size for u in source.utterances("train"))])
        np.save(out / f"{name}.npy", begins)
        with (out / f"{name}.f16").open("wb") as file:
            for u in source.utterances("train"):
                file.write(u.modalities[name].astype(np.float16).tobytes())


def write_bytes(source: Resident, out: Path, shard_bytes: int, first: int = 0, every: int = 1) -> None:
    """What no packing that keeps checksums can save: the samples to float16, hashed, written, onto the disk.

    Args:
        first, every: one process's part of the samples, where several share them.
    """
    out.mkdir(parents=True)
    utterances = islice(source.utterances(), first, None, every)
    for shard in range(1 + source.bytes // (every * shard_bytes)):
        digest, size = hashlib.sha256(), 0
        with (out / f"{shard:05d}").open("wb") as file:
            for u in utterances:
                for half in to_float16(*u.modalities.values())[0]:
                    data = half.data.cast("B")
                    digest.update(data)
                    size += file.write(data)
                if size >= shard_bytes:
                    break
            file.flush()
            os.fsync(file.fileno())


LIMIT = "float16, sha256 and write alone"

FORMATS = {
    LIMIT: Format("bytes", write_bytes),
    "ours": Format("ours", write_ours),
    "ours, 2 processes": Format("ours-2", write_two),
    "webdataset, .npy members": Format("npy", write_npy),
    MOSAIC: Format("mds", write_mds, needs="streaming"),
    LITDATA: Format("lit", write_litdata, needs="litdata"),
    "MMSA pickle": Format("mmsa", write_pickle, timed=False),
    "flat": Format("flat", write_flat, timed=False),
}
"""Name -> format; LIMIT and "flat" are no contestants, but the limits of packing and of reading from a map."""


def written(source: Resident, name: str, folder: Path, shard_bytes: int) -> int:
    """Writes the samples in one format, into a folder that is emptied first; how many they are."""
    out = folder / FORMATS[name].folder
    shutil.rmtree(out, ignore_errors=True)
    FORMATS[name].write(source, out, shard_bytes)
    return source.total
