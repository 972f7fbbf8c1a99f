"""What the order of an epoch costs, from 10^5 to 10^8 samples: time of one step's ids, memory and size of the plan.

A plan is made anew for every measurement (the first step computes what is kept per shard), then asked for steps all
over the epoch, each in a block of its own, and for the step after each. Memory is what Python and NumPy have allocated
for it (tracemalloc). Samples lie in shards of about 350, as 64 MB of MOSEI-like float16 features hold.
Loading the index of so many shards is measured in a process of its own, by CPU seconds and resident memory.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import ROOT, Row, record
from benchmarks.render import measured, table, wanted
from shards.order import ShardOrder, packed_counts
from shards.plan import Plan

PER_SHARD = 350
BATCH = 512
STEPS = 50
"""Steps asked for, spread over the epoch."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7, 10**8], help="samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(loaded(options.load)))
        return
    raw = {str(size): measure(size, options.repeats) for size in options.sizes}
    rows = [row for size in options.sizes for row in report(size, raw[str(size)], options)]
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        record("plan", rows, raw=raw)


def report(size: int, found: dict[str, Any], options: argparse.Namespace) -> list[Row]:
    """The rows of one size; the largest is a headline."""
    what, last = f"{size:,} samples in {found['shards']:,} shards", size == max(options.sizes)
    how = f"median of {options.repeats}"
    later = statistics.median(found["step_s"]) * 1e3
    return [
        Row(f"{what}: first step of an epoch", statistics.median(found["first_s"]) * 1e3, "ms", how=how, headline=last),
        Row(f"{what}: a step anywhere in it", later, "ms", "< 5", f"median of {STEPS}", later < 5, last),
        Row(f"{what}: the step after that", statistics.median(found["next_s"]) * 1e3, "ms", how=f"median of {STEPS}"),
        Row(f"{what}: memory of the plan, at most", found["peak_bytes"] / 2**20, "MiB", how=how, headline=last),
        Row(f"{what}: the plan pickled", found["pickled_bytes"] / 2**20, "MiB"),
        Row(f"{what}: loading the index", found["load_cpu_s"], "CPU s", how="one process", headline=last),
        Row(
            f"{what}: memory of the index",
            found["load_bytes"] / 2**20,
            "MiB",
            how="growth of the peak of RSS",
            headline=last,
        ),
    ]


def measure(size: int, repeats: int) -> dict[str, Any]:
    """Everything about one size, as it goes into the raw figures."""
    rng = np.random.default_rng(0)
    counts = rng.integers(PER_SHARD - 50, PER_SHARD + 50, -(-size // PER_SHARD), endpoint=True)
    held = packed_counts(counts.tolist())

    def plan(epoch: int = 1) -> Plan:
        return Plan(ShardOrder("", "train", 0, held, seed=1, epoch=epoch, window=8), BATCH)

    fresh = [plan(epoch) for epoch in range(repeats)]
    first = [seconds(lambda p=p: p.step(p.num_steps // 2)) for p in fresh]  # type: ignore[misc]
    warm = plan()
    warm.step(0)
    places = rng.integers(0, warm.num_steps - 2, STEPS).tolist()
    peaks = []
    for epoch in range(repeats):
        tracemalloc.start()
        other = plan(epoch)
        for place in places[:5]:
            other.step(place)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return {
        "shards": len(counts),
        "first_s": first,
        "step_s": [seconds(lambda at=place: warm.step(at)) for place in places],  # type: ignore[misc]
        "next_s": [seconds(lambda at=place: (warm.step(at), warm.step(at + 1))) / 2 for place in places],  # type: ignore[misc]
        "peak_bytes": statistics.median(peaks),
        "pickled_bytes": len(pickle.dumps(warm)),
        **index_load(counts.tolist()),
    }


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def index_load(counts: list[int]) -> dict[str, float]:
    """What loading an index of such shards costs a process."""
    with tempfile.TemporaryDirectory() as folder:
        made_index(counts, Path(folder))
        command = [sys.executable, "-m", "benchmarks.plan", "--load", folder]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def made_index(counts: list[int], folder: Path) -> None:
    """An index of a data set that is not there."""
    from shards.index import Index, Shard

    shards = tuple(
        Shard(
            url=f"train-{i:06d}.tar", bytes=64_000_000 + i, sha256=f"{i:064x}", samples=count, split="train",
            table=f"train-{i:06d}.arrow", table_bytes=30_000, table_sha256=f"{i + 1:064x}",
        )
        for i, count in enumerate(counts)
    )  # fmt: skip
    Index(
        name="made", synthetic=True, dtype="float16", modalities={}, tasks=("M",), label_range=(-3, 3),
        has_raw_text=True, has_tokens=False, splits={"train": sum(counts), "valid": 0, "test": 0}, shards=shards,
        statistics={}, non_finite={}, source={}, tool_version="0", seed=0, folder=folder,
    ).save()  # fmt: skip


def loaded(folder: Path) -> dict[str, float]:
    """CPU seconds and bytes of resident memory for loading the index, the library's own imports not counted."""
    from shards.index import Index

    before, began = peak_bytes(), time.process_time()
    index = Index.load(folder)
    assert index.num_samples
    return {"load_cpu_s": time.process_time() - began, "load_bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """The most memory this program has held, in bytes. Not getrusage's: that one begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
