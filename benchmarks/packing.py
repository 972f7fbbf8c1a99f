"""Packing a large data set with one process and with one a core, beside webdataset's naive writer.

`benchmarks.data` compares every format's writer at a size at which starting processes is half of the work; here it is
little. Each round writes the same samples, as many as MOSEI has and like them, held in memory (5 GB), once each way,
float16, and deletes them. Each way is a fork of a process that has imported neither torch nor webdataset: what a rival
needs is imported before its clock starts, what ours needs while its clock runs, as in `mmsa-dist pack`.
The limit is converting (by torch), hashing and writing alone, by as many processes.
"""

import argparse
import functools
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.data.measure import Rate, rate
from benchmarks.data.sets import LIMIT, Resident, write_bytes, write_npy, write_ours
from benchmarks.record import Row, record

NAIVE = "webdataset, .npy members"
SHARD = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="of all splits (default: as many as MOSEI has, 22,856)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: the cores, %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="counted, after one that is not (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    processes = f"{options.processes} processes"
    one, many, limit = "ours, 1 process", f"ours, {processes}", f"{LIMIT}, {processes}"
    writers: dict[str, tuple[Callable[[Resident, Path, int], object], str]] = {
        NAIVE: (write_npy, "webdataset"),
        LIMIT: (write_bytes, "torch"),
        limit: (functools.partial(written_by, options.processes), "torch"),
        one: (write_ours, ""),
        many: (functools.partial(write_ours, workers=options.processes), ""),
    }
    source = Resident("mosei", options.samples)
    rates: dict[str, list[Rate]] = {name: [] for name in writers}
    with tempfile.TemporaryDirectory(prefix="mmsa-packing-") as folder:
        for turn in range(options.rounds + 1):
            for name, (write, needs) in writers.items():
                out = Path(folder) / name
                found = apart(functools.partial(written, source, write, out), needs)
                shutil.rmtree(out)
                if turn:
                    rates[name].append(found)
    how = (
        f"best of {options.rounds} after 1; {source.total:,} samples like MOSEI, {source.bytes / 1e9:.1f} GB of float16"
    )
    rows = []
    for name, found_rates in rates.items():
        clock = max(found.wall for found in found_rates)
        cpu = max(found.cpu for found in found_rates)
        rows.append(Row(f"packing: {name}", clock, "samples/s", how=f"{how}; {cpu:,.0f} samples/CPU-s"))

    def ratio(name: str, other: str, unit: Callable[[Rate], float]) -> float:
        return max(map(unit, rates[name])) / max(map(unit, rates[other]))

    naive, most = (ratio(name, NAIVE, lambda found: found.wall) for name in (many, limit))
    beside = f"{how}; {limit}: {most:.2f} x"
    rows.append(Row(f"{many} / {NAIVE}, by the clock", naive, "x", ">= 5", beside, naive >= 5))
    rows.append(Row(f"{limit} / {NAIVE}, by the clock", most, "x", how=f"{how}; the most that can be had"))
    rows.append(Row(f"{one} / {NAIVE}, by the clock", ratio(one, NAIVE, lambda found: found.wall), "x", how=how))
    rows.append(Row(f"{one} / {NAIVE}, per CPU-second", ratio(one, NAIVE, lambda found: found.cpu), "x", how=how))
    rows.append(Row(f"{many} / {one}, by the clock", ratio(many, one, lambda found: found.wall), "x", how=how))
    for row in rows:
        print(f"{row.what}: {row.value:.2f} {row.unit} ({row.how})")
    if not options.no_record:
        record("packing", rows)


def apart(work: Callable[[], int], needs: str) -> Rate:
    """`rate` of the work in a fork of its own, which imports a package before."""
    assert "torch" not in sys.modules
    fork = multiprocessing.get_context("fork")
    mine, its = fork.Pipe(duplex=False)

    def measured() -> None:
        if needs:
            importlib.import_module(needs)
        its.send(rate(work))

    process = fork.Process(target=measured)
    process.start()
    its.close()
    found: Rate = mine.recv()
    process.join()
    return found


def written_by(processes: int, source: Resident, out: Path, shard_bytes: int) -> None:
    """`write_bytes` by processes that share the samples; they have them in memory, as forks."""
    fork = multiprocessing.get_context("fork")
    writers = [
        fork.Process(target=write_bytes, args=(source, out / str(n), shard_bytes, n, processes))
        for n in range(processes)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0


def written(source: Resident, write: Callable[[Resident, Path, int], object], out: Path) -> int:
    write(source, out, SHARD)
    return source.total


if __name__ == "__main__":
    main()
