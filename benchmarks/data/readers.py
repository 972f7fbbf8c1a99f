"""The contestants of reading: each gives batches of `BATCH` samples, padded, as float32 torch tensors, with labels.

A contestant is opened with a number of readers (threads of ours, DataLoader workers of the others; 0 reads in the
calling process) and then reads the train split as often as it is asked to.
"""

import json
import mmap
import pickle
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from safetensors.torch import load as load_safetensors
from torch.utils.data import DataLoader, Dataset

from benchmarks.data.foreign import streaming
from benchmarks.data.sets import LITDATA, MOSAIC
from shards.batch import BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.plan import training_plan
from shards.read import ShardReader
from shards.utterance import MODALITIES

BATCH = 64

Epoch = Callable[[], int]
"""Reads the train split once; how many samples that were."""


@dataclass(frozen=True)
class Reader:
    """One contestant.

    Attributes:
        folder: what it reads, below the run's folder.
        open: (folder, readers) -> a context that gives its epoch.
        needs: a package that this environment may lack.
        alone: it has no readers: it is a limit, not a contestant.
    """

    folder: str
    open: Callable[[Path, int], Any]
    needs: str = ""
    alone: bool = False


# --- the limits


@contextmanager
def raw(folder: Path, readers: int) -> Generator[Epoch]:
    """The bytes of the train shards into a buffer, nothing else."""
    index = Index.load(folder)
    buffer = memoryview(bytearray(1 << 20))

    def epoch() -> int:
        for n in index.shards_of("train"):
            with index.tar_path(n).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return index.splits["train"]

    yield epoch


def flat(with_torch: bool) -> Callable[[Path, int], Any]:
    """Flat float16 files through a memory map, in a shuffled order, converted by numpy or by torch."""

    @contextmanager
    def opened(folder: Path, readers: int) -> Generator[Epoch]:
        widths = {name: Index.load(folder.parent / "ours").modalities[name].width for name in MODALITIES}
        begins = {name: np.load(folder / f"{name}.npy").tolist() for name in widths}
        files = {name: (folder / f"{name}.f16").open("rb") for name in widths}
        # copy-on-write: torch takes only writable arrays without complaint
        maps = {name: mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for name, file in files.items()}
        values = {name: np.frombuffer(mapped, np.float16) for name, mapped in maps.items()}
        count = len(begins["text"]) - 1

        def padded(name: str, numbers: list[int]) -> torch.Tensor:
            begin, of = begins[name], values[name]
            arrays = [of[begin[n] : begin[n + 1]].reshape(-1, widths[name]) for n in numbers]
            out = np.zeros((len(arrays), max(map(len, arrays)), widths[name]), np.float32)
            target = torch.from_numpy(out)
            for row, array in enumerate(arrays):
                if with_torch:
                    target[row, : len(array)] = torch.from_numpy(array)
                else:
                    out[row, : len(array)] = array
            return target

        def epoch() -> int:
            order = np.random.default_rng(0).permutation(count).tolist()
            for first in range(0, count, BATCH):
                for name in widths:
                    padded(name, order[first : first + BATCH])
            return count

        yield epoch
        values.clear()
        for file in files.values():
            file.close()

    return opened


# --- ours


@contextmanager
def ours(folder: Path, readers: int) -> Generator[Epoch]:
    """An epoch of the plan: shuffled, checked, with labels, masks and keys."""
    index = Index.load(folder)
    with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), readers) as loader:

        def epoch() -> int:
            plan = training_plan(index, "train", seed=0, epoch=0, global_batch=BATCH)
            for _ in loader.train(plan, rank=0, world=1):
                pass
            return plan.num_samples

        yield epoch


# --- the rivals, in the order of their files (none of them has to shuffle)


def collated(samples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to float32 as well as it can be done: one allocation and one converting copy a modality."""
    batch = {}
    for name in MODALITIES:
        arrays = [sample[name] for sample in samples]
        out = torch.from_numpy(np.zeros((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), np.float32))
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
        batch[name] = out
    batch["label"] = torch.tensor([float(sample["label"]) for sample in samples])
    return batch


def loaded(dataset: Any, readers: int, batch_size: int | None = BATCH, collate: Any = None, **more: Any) -> DataLoader:
    """A DataLoader whose workers live over all epochs."""
    return DataLoader(
        dataset, batch_size=batch_size, num_workers=readers, collate_fn=collate, persistent_workers=readers > 0, **more
    )


def counted(batches: Any) -> int:
    return sum(len(batch["label"]) for batch in batches)


def from_safetensors(sample: dict[str, bytes]) -> dict[str, Any]:
    return {**load_safetensors(sample["safetensors"]), "label": json.loads(sample["json"])["labels"]["M"]}


def from_npy(sample: dict[str, bytes]) -> dict[str, Any]:
    arrays = {n: np.load(BytesIO(sample[f"{n}.npy"]), allow_pickle=False) for n in MODALITIES}
    return {**arrays, "label": json.loads(sample["json"])["labels"]["M"]}


def plain_webdataset(pattern: str, decode: Callable[[dict[str, bytes]], dict[str, Any]]) -> Callable[[Path, int], Any]:
    """`webdataset.WebDataset`, batched in the worker as its manual advises."""

    @contextmanager
    def opened(folder: Path, readers: int) -> Generator[Epoch]:
        urls = sorted(map(str, folder.glob(pattern)))
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(decode)
        loader = loaded(dataset.batched(BATCH, collation_fn=collated), readers, batch_size=None)
        yield lambda: counted(loader)

    return opened


@contextmanager
def mosaic(folder: Path, readers: int) -> Generator[Epoch]:
    """`StreamingDataset` on local files."""
    base = streaming()
    base.util.clean_stale_shared_memory()
    dataset = base.StreamingDataset(local=str(folder / "train"), batch_size=BATCH, shuffle=False)
    loader = loaded(dataset, readers, collate=collated)
    yield lambda: counted(loader)


@contextmanager
def litdata(folder: Path, readers: int) -> Generator[Epoch]:
    """`StreamingDataset` and `StreamingDataLoader` on local files."""
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found]

    dataset = StreamingDataset(str(folder / "train"), shuffle=False, drop_last=False)
    loader = StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=readers, collate_fn=collated, persistent_workers=readers > 0
    )
    yield lambda: counted(loader)


class InMemory(Dataset[dict[str, torch.Tensor]]):
    """The shape of MMSA's loader: arrays of the whole split in memory, a dict of tensors a sample, torch collates."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._held = pickle.load(file)["train"]

    def __len__(self) -> int:
        return len(self._held["regression_labels"])

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        sample = {name: torch.tensor(self._held[name][number]) for name in MODALITIES}
        return {**sample, "label": torch.tensor(self._held["regression_labels"][number])}


@contextmanager
def in_memory(folder: Path, readers: int) -> Generator[Epoch]:
    """The whole pickle is read when it is opened; padding stays as long as the file has it."""
    loader = loaded(InMemory(folder / "unaligned.pkl"), readers, shuffle=True)
    yield lambda: counted(loader)


RAW, NUMPY, OURS, SAFETENSORS = (
    "raw read of the shards", "memory map + numpy", "ours", "webdataset, our shards (safetensors)"
)  # fmt: skip
READERS = {
    RAW: Reader("ours", raw, alone=True),
    NUMPY: Reader("flat", flat(with_torch=False), alone=True),
    "memory map + torch": Reader("flat", flat(with_torch=True), alone=True),
    OURS: Reader("ours", ours),
    SAFETENSORS: Reader("ours", plain_webdataset("train-*.tar", from_safetensors)),
    "webdataset, .npy members": Reader("npy", plain_webdataset("train/*.tar", from_npy)),
    MOSAIC: Reader("mds", mosaic, needs="streaming"),
    LITDATA: Reader("lit", litdata, needs="litdata"),
    "MMSA's loader (all in memory)": Reader("mmsa", in_memory),
}
