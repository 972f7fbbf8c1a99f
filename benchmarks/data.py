"""Packing and streaming: samples/s, beside the raw files (the limit) and plain webdataset (the rival); a rank's memory.

All on the same generated data, one thread each unless a row says otherwise, files in the page cache, in rounds: every
contestant runs once a round, and its best round stands. A rate is per second of CPU time (user + system); wall-clock
rates are in the raw figures.

Streaming ends with batches of `BATCH` samples padded to float32 torch tensors, and everybody does the whole of it:

- raw read: the shards' bytes into a buffer, nothing else;
- memory map, numpy / torch: the practical limit. One flat float16 file per modality, offsets in memory, read in the
  order of our plan, converted by numpy / by torch; no labels, no keys, no checks;
- ours: `shards.loader.Loader` over an epoch of the plan, shuffled, checked, with labels, masks and keys;
- webdataset: the same shards through plain `webdataset.WebDataset` in file order, unshuffled; safetensors by
  `safetensors.torch.load`; and shards of three .npy members, which is how one writes them without further thought.

Memory is that of a process of its own that reads the train split: the peak of anonymous memory (RssAnon), noted after
each batch. Mapped files are not in it: they are the page cache's, which gives them back when somebody needs the memory.
"""

import argparse
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from safetensors.torch import load as load_safetensors

from benchmarks.record import ROOT, Row, record
from benchmarks.render import measured, table, wanted
from shards.batch import BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.plan import training_plan
from shards.read import ShardReader
from shards.sources.generated import GeneratedSource
from shards.utterance import MODALITIES, SPLITS, Utterance
from shards.write import pack

BATCH = 64
OURS = "ours, read in the training thread"
SHARDS = 24
"""About so many in the smaller data set whose reader's memory is measured: more than a reader holds open."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--like", default="mosei", help="published data set whose shape the generated one has")
    parser.add_argument("--samples", type=int, default=2000, help="samples of the data set (and four times as many)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that is not counted")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.read:
        print(json.dumps(read_memory(options.read, options.epochs)))
        return
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), options)
    rows = report(options, results)
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    record("data", rows, raw=results)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Everything, as it goes into the raw figures."""
    source = Resident(options.like, options.samples)
    packers: dict[str, Callable[[Path], object]] = {
        "pack": lambda out: pack(source, out),
        "webdataset": lambda out: write_npy(source, out),
    }
    packing: dict[str, list[Rate]] = {name: [] for name in packers}
    for _ in range(1 + options.rounds):
        for name, write in packers.items():
            packing[name].append(rate(partial(written, source, write, folder / name)))
    index = Index.load(folder / "pack")
    with ExitStack() as stack:
        readers = contestants(index, folder, stack)
        reading: dict[str, list[Rate]] = {name: [] for name in readers}
        for _ in range(1 + options.rounds):
            for name, read in readers.items():
                reading[name].append(rate(read))
    return {
        "bytes_per_sample": source.bytes // source.total,
        "batch": BATCH,
        "packing": {name: [vars(r) for r in rates[1:]] for name, rates in packing.items()},
        "reading": {name: [vars(r) for r in rates[1:]] for name, rates in reading.items()},
        "memory": memory(folder, options, source.bytes // SHARDS),
    }


def report(options: argparse.Namespace, results: dict[str, object]) -> list[Row]:
    """The rows of the figures' table."""
    packing, reading, memory_of = results["packing"], results["reading"], results["memory"]
    assert isinstance(packing, dict) and isinstance(reading, dict) and isinstance(memory_of, dict)
    how = f"best of {options.rounds} after 1, files cached"
    size = f"{options.samples:,} samples like {options.like.upper()}, {results['bytes_per_sample'] / 1000:,.0f} kB each"  # type: ignore[operator]

    def row(what: str, figures: list[dict[str, float]]) -> Row:
        return Row(what, best(figures), "samples/CPU-s", how=how)

    def ratio(what: str, mine: list[dict[str, float]], others: list[dict[str, float]], bound: float) -> Row:
        value = best(mine) / best(others)
        return Row(what, value, "", f">= {bound:g}" if bound else "", how, value >= bound if bound else None)

    rows = [row(f"`mmsa-dist pack` ({size})", packing["pack"])]
    rows.append(row("webdataset's TarWriter, three .npy members, no index", packing["webdataset"]))
    rows += [row(f"reading: {name}", figures) for name, figures in reading.items()]
    mine = reading[OURS]
    rows += [
        ratio("ours / memory map + numpy conversion", mine, reading["memory map, numpy"], 0.8),
        ratio("ours / memory map + torch conversion", mine, reading["memory map, torch"], 0),
        ratio("ours / plain webdataset, same shards", mine, reading["webdataset, our shards"], 3),
        ratio("ours / plain webdataset, .npy members", mine, reading["webdataset, .npy members"], 0),
    ]
    growth = memory_of["four times"]["anonymous"] / memory_of["once"]["anonymous"]
    rows += [
        Row(
            f"peak memory of a rank that reads {memory_of[name]['samples']:,} samples",
            memory_of[name]["anonymous"] / 2**20,
            "MiB",
            how=f"RssAnon; {memory_of[name]['before'] / 2**20:,.0f} MiB of it are imports",
        )
        for name in ("once", "four times")
    ]
    rows.append(
        Row(
            "growth of that peak when the data set grows fourfold", growth, "x", "<= 1.1", "one run each", growth <= 1.1
        )
    )
    return rows


def best(rates: list[dict[str, float]]) -> float:
    """The highest rate: what else the machine does can only add to the CPU time of a piece of work."""
    return max(rate["cpu"] for rate in rates)


# --- what is measured


@dataclass(frozen=True)
class Rate:
    """Samples per second: of CPU time, and of wall-clock time."""

    cpu: float
    wall: float


def rate(work: Callable[[], int]) -> Rate:
    """How fast `work` handles the samples whose number it returns."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    samples = work()
    return Rate(samples / (cpu_seconds() - cpu), samples / (time.perf_counter() - wall))


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


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

    def utterances(self) -> Iterator[Utterance]:
        return (u for held in self._held.values() for u in held)


def written(source: Resident, write: Callable[[Path], object], out: Path) -> int:
    """Writes the samples to `out`, which is emptied first; how many they are."""
    shutil.rmtree(out, ignore_errors=True)
    write(out)
    return source.total


def write_npy(source: Resident, out: Path) -> None:
    """What the webdataset manual shows: one .npy member a modality, float16."""
    out.mkdir()
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxsize=64 * 2**20, verbose=0) as sink:
        for number, u in enumerate(source.utterances()):
            arrays = {f"{name}.npy": npy(array.astype(np.float16)) for name, array in u.modalities.items()}
            sink.write({"__key__": f"{number:08d}", "json": json.dumps({"labels": u.labels}).encode(), **arrays})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def contestants(index: Index, folder: Path, stack: ExitStack) -> dict[str, Callable[[], int]]:
    """Name -> one epoch over the train split; returns how many samples it read. `stack` closes what is open."""
    urls = [str(index.tar_path(n)) for n in index.shards_of("train")]
    naive = sorted(str(path) for path in (folder / "webdataset").glob("*.tar"))
    flat = Flat(index, folder)
    reader = stack.enter_context(ShardReader(index))
    loaders = [stack.enter_context(Loader(reader, BatchSpec.of(index), readers)) for readers in (0, 1, 2)]
    return {
        "raw read of the shards": partial(raw, urls, len(index.numbers("train"))),
        "memory map, numpy": partial(flat.epoch, with_torch=False),
        "memory map, torch": partial(flat.epoch, with_torch=True),
        OURS: partial(ours, index, loaders[0]),
        "ours, 1 reader thread": partial(ours, index, loaders[1]),
        "ours, 2 reader threads": partial(ours, index, loaders[2]),
        "webdataset, our shards": partial(through_webdataset, urls, from_safetensors),
        "webdataset, .npy members": partial(through_webdataset, naive, from_npy),
    }


def raw(paths: list[str], samples: int) -> int:
    buffer = memoryview(bytearray(1 << 20))
    for path in paths:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (webdataset's urls are strings)
            while file.readinto(buffer):
                pass
    return samples


def ours(index: Index, loader: Loader) -> int:
    plan = training_plan(index, "train", seed=0, epoch=0, global_batch=BATCH)
    for _ in loader.train(plan, rank=0, world=1):
        pass
    return plan.num_samples


class Flat:
    """The train split as one float16 file a modality: what a memory map can do at best."""

    def __init__(self, index: Index, folder: Path) -> None:
        self._index = index
        self._begin: dict[str, list[int]] = {name: [0] for name in index.modalities}
        files = {name: (folder / f"{name}.f16").open("wb") for name in index.modalities}
        with ShardReader(index) as reader:
            for number in index.numbers("train"):
                for name, array in reader.sample(number).modalities.items():
                    files[name].write(array.tobytes())
                    self._begin[name].append(self._begin[name][-1] + array.size)
        for file in files.values():
            file.close()
        # copy-on-write: torch takes only writable arrays without complaint
        self._values = {name: np.memmap(file.name, np.float16, "c") for name, file in files.items()}

    def epoch(self, with_torch: bool) -> int:
        plan = training_plan(self._index, "train", 0, 0, BATCH)
        for s in range(plan.num_steps):
            numbers = plan.step(s).tolist()
            for name, modality in self._index.modalities.items():
                self._padded(name, numbers, modality.width, with_torch)
        return plan.num_samples

    def _padded(self, name: str, numbers: list[int], width: int, with_torch: bool) -> torch.Tensor:
        begin, values = self._begin[name], self._values[name]
        arrays = [values[begin[n] : begin[n + 1]].reshape(-1, width) for n in numbers]
        out = np.zeros((len(arrays), max(map(len, arrays)), width), np.float32)
        target = torch.from_numpy(out)
        for row, array in enumerate(arrays):
            if with_torch:
                target[row, : len(array)] = torch.from_numpy(array)
            else:
                out[row, : len(array)] = array
        return target


def through_webdataset(urls: list[str], decode: Callable[[dict[str, bytes]], dict[str, torch.Tensor]]) -> int:
    seen = 0
    batch: list[dict[str, torch.Tensor]] = []
    labels = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        batch.append(decode(sample))
        labels.append(json.loads(sample["json"])["labels"]["M"])
        if len(batch) == BATCH:
            seen += collated(batch, labels)
            batch, labels = [], []
    return seen + (collated(batch, labels) if batch else 0)


def from_safetensors(sample: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return load_safetensors(sample["safetensors"])


def from_npy(sample: dict[str, bytes]) -> dict[str, torch.Tensor]:
    members = {name: sample[f"{name}.npy"] for name in MODALITIES}
    return {n: torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False)) for n, data in members.items()}


def collated(batch: list[dict[str, torch.Tensor]], labels: list[float]) -> int:
    """Padded to float32 as well as it can be done: one allocation and one converting copy a modality."""
    for name in MODALITIES:
        arrays = [sample[name] for sample in batch]
        out = torch.from_numpy(np.zeros((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), np.float32))
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
    torch.tensor(labels)
    return len(batch)


# --- memory


def memory(folder: Path, options: argparse.Namespace, shard_bytes: int) -> dict[str, dict[str, int]]:
    """Peak memory of a rank, for the data set and for one four times as large in shards of the same size.

    The smaller one is read four times: as many batches, so that only the size of the data set differs.
    """
    results = {}
    for name, times in {"once": 1, "four times": 4}.items():
        out = folder / f"memory-{times}"
        pack(GeneratedSource(options.like, times * options.samples), out, shard_bytes=shard_bytes)
        command = [sys.executable, "-m", "benchmarks.data", "--read", str(out), "--epochs", str(4 // times)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    return results


def read_memory(folder: Path, epochs: int) -> dict[str, int]:
    """Reads the train split with one reader thread and notes this process's memory after each batch, in bytes."""
    index = Index.load(folder)
    before = status("RssAnon")
    anonymous, mapped = [before], [0]
    with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), readers=1) as loader:
        for epoch in range(epochs):
            for _ in loader.train(training_plan(index, "train", 0, epoch, BATCH), rank=0, world=1):
                anonymous.append(status("RssAnon"))
                mapped.append(status("RssFile"))
    samples = len(index.numbers("train"))
    return {"samples": samples, "before": before, "anonymous": max(anonymous), "mapped": max(mapped)}


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"error: /proc/self/status has no {field}; this figure needs Linux")


if __name__ == "__main__":
    main()
