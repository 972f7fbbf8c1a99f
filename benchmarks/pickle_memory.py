"""Memory and time of a feature pickle: opened, packed and written back here, and read as MMSA reads it.

A pickle in the layout of unaligned MOSEI is generated; each job then runs in a process of its own, one after another:

* ours, open: `MmsaSource`, what every packing begins with (it maps the file, and reads it once for its checksum);
* ours, pack: a whole packing by one process, which reads every sample in shuffled order;
* ours, unpack: that data set back into a pickle;
* MMSA: ``pickle.load`` and ``astype(float32)`` of text, audio and vision for each split, all kept, as its data loader
  does for its three data sets (https://github.com/thuiar/MMSA, data_loader.py).

Memory is counted twice: of the process alone (RssAnon, the most seen every 10 ms), and with the pages of mapped files
that happened to be in memory at the time (VmHWM), which the system takes back when it needs them.

MMSA's way takes twice the file; where the machine has not that much memory free it is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.record import ROOT, Row, record

STEPS = {"text": (50, 768), "audio": (500, 74), "vision": (500, 35)}
SHARES = {"train": 16326, "valid": 1871, "test": 4659}
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pickle_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--gigabytes", type=float, nargs="+", default=[2.5, 12], help="sizes of pickles, one after another"
    )
    parser.add_argument("--folder", type=Path, help="where to put it; three times its size is needed")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measured(JOBS[options.job], options.folder)))
        return
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            size = generated(Path(folder), gigabytes)
            fits = 2.2 * size < psutil.virtual_memory().available
            found = {job: run(job, folder) for job in ("open", "pack", "unpack", *(["mmsa"] if fits else []))}
        new = rows_of(size, size * SHARES["train"] / sum(SHARES.values()), found)
        for row in new:
            print(f"{row.what}: {row.value:,.3g} {row.unit} {row.wanted}", flush=True)
        rows += new
        raw[f"{gigabytes:g} GB"] = {"bytes": size, "jobs": found}
    if not options.no_record:
        record("pickle_memory", rows, raw=raw)


def rows_of(size: int, split: float, found: dict[str, dict[str, float]]) -> list[Row]:
    what = f"a {size / GB:.1f} GB MMSA pickle"
    names = {"open": "opened", "pack": "packed by one process", "unpack": "written back by unpack"}
    rows = [
        Row(
            what=f"{what}, {name}: memory of the process, over the file's size",
            value=found[job]["own"] / size,
            wanted="<= 1 + one split" if job == "pack" else "",
            how="one run, imports included",
            met=found[job]["own"] <= size + split if job == "pack" else None,
        )
        for job, name in names.items()
    ]
    rows.append(
        Row(
            what=f"{what}, packed: memory with the mapped file's pages, over the file's size",
            value=found["pack"]["resident"] / size,
            wanted="<= 1 + one split",
            how="one run, imports included",
            met=found["pack"]["resident"] <= size + split,
        )
    )
    if "mmsa" in found:
        rows.append(
            Row(
                what=f"{what}, read as MMSA reads it: memory of the process, over the file's size",
                value=found["mmsa"]["own"] / size,
                how="one run, imports included",
                headline=True,
            )
        )
        names |= {"mmsa": "read as MMSA reads it"}
    rows += [
        Row(f"{what}, {name}: time", found[job]["cpu"] * GB / size, "CPU-s/GB", how="one run, file cached")
        for job, name in names.items()
    ]
    return rows


def generated(folder: Path, gigabytes: float) -> int:
    """Writes ``features.pkl`` of about that size, sample by sample; its bytes."""
    from shards.pickled import Pickler, Streamed

    rng = np.random.default_rng(0)
    sample = sum(steps * width for steps, width in STEPS.values()) * 4

    def rows(count: int, steps: int, width: int) -> Iterator[np.ndarray]:
        for _ in range(count):
            yield rng.standard_normal((steps, width), dtype=np.float32)

    content: dict[str, Any] = {}
    for split, share in SHARES.items():
        count = max(1, round(gigabytes * GB / sample * share / sum(SHARES.values())))
        content[split] = {
            "id": [f"{split}{n // 10}$_${n % 10}" for n in range(count)],
            "raw_text": [f"synthetic {n}" for n in range(count)],
            **{m: Streamed(np.dtype(np.float32), (count, *shape), rows(count, *shape)) for m, shape in STEPS.items()},
            "regression_labels": Streamed.of(rng.uniform(-3, 3, count).astype(np.float32)),
            **{f"{m}_lengths": rng.integers(100, 501, count).tolist() for m in ("audio", "vision")},
        }
    path = folder / "features.pkl"
    with path.open("wb") as file:
        Pickler(file).dump(content)
    return path.stat().st_size


def run(job: str, folder: str) -> dict[str, float]:
    """A job in a process of its own: what `measured` gives."""
    command = [sys.executable, "-m", "benchmarks.pickle_memory", "--job", job, "--folder", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {job} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(job: Callable[[Path], object], folder: Path) -> dict[str, float]:
    """Seconds of a job, CPU seconds, and the most bytes that this process held: its own, and with mapped files."""
    with peak("RssAnon") as own:
        began, worked = time.perf_counter(), time.process_time()
        held = job(folder)
        seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    del held
    return {"seconds": seconds, "cpu": cpu, "own": max(own), "resident": status("VmHWM")}


@contextmanager
def peak(field: str) -> Iterator[list[int]]:
    """Looks at a field of this process's status every 10 ms."""
    seen, ended = [status(field)], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            seen[0] = max(seen[0], status(field))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        seen[0] = max(seen[0], status(field))
        ended.set()
        thread.join()


def status(field: str) -> int:
    """Bytes, of Linux's /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"error: this system does not tell {field}")


# --- the jobs


def open_(folder: Path) -> object:
    from shards.sources.mmsa import MmsaSource

    return MmsaSource(folder / "features.pkl")


def pack(folder: Path) -> object:
    from shards.sources.mmsa import MmsaSource
    from shards.write import pack as write

    return write(MmsaSource(folder / "features.pkl"), folder / "set", dtype="float32", workers=1)


def unpack(folder: Path) -> object:
    from shards.index import Index
    from shards.unpack import unpack as write

    return write(Index.load(folder / "set"), folder / "back.pkl")


def mmsa(folder: Path) -> object:
    import pickle

    def data_set(split: str) -> dict[str, np.ndarray]:
        with (folder / "features.pkl").open("rb") as file:
            data = pickle.load(file)
        return {name: data[split][name].astype(np.float32) for name in STEPS}

    return [data_set(split) for split in SHARES]


JOBS: dict[str, Callable[[Path], object]] = {"open": open_, "pack": pack, "unpack": unpack, "mmsa": mmsa}


if __name__ == "__main__":
    main()
