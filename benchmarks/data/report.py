"""The rows and the table that the figures of `python -m benchmarks.data` become."""

import argparse
import statistics
from itertools import product
from typing import Any

from benchmarks.data.memory import LARGE, SMALL
from benchmarks.data.readers import NUMPY, OURS, RAW, READERS, SAFETENSORS
from benchmarks.data.sets import LIMIT
from benchmarks.record import Row, Table
from benchmarks.render import significant
from shards.suggest import counted

NAIVE = "webdataset, .npy members"
BOUNDS = {NUMPY: 0.8, SAFETENSORS: 3.0}
"""What ours is to be, in samples per CPU-second, of others."""


def report(options: argparse.Namespace, results: dict[str, Any]) -> tuple[list[Row], list[Table]]:
    """The rows with their bounds, and the table of all contestants."""
    rows: list[Row] = []
    tables: list[Table] = []
    if "reading" in results:
        rows += packing_rows(options, results)
        rates = kept(results["reading"], results["bytes_per_sample"] * options.samples)
        rows += reading_rows(options, rates, results["checksums"])
        tables.append(contest(options, rates))
    if "memory" in results:
        rows += memory_rows(results["memory"])
    if "resume" in results:
        rows += resume_rows(options, results["resume"], results.get("memory"))
    return rows, tables


def best(rates: list[dict[str, float]], clock: str = "cpu") -> float:
    """The highest rate: what else the machine does can only slow a piece of work down."""
    return max(rate[clock] for rate in rates)


def packing_rows(options: argparse.Namespace, results: dict[str, Any]) -> list[Row]:
    rates = results["packing"]
    how = f"best of {options.rounds} after 1"
    size = f"{options.samples:,} samples like MOSEI, {results['bytes_per_sample'] / 1000:,.0f} kB each"
    rows = []
    for name, found in rates.items():
        if found:
            clock = f"{how}; {best(found, 'wall'):,.0f} samples/s by the clock"
            rows.append(Row(f"packing ({size}): {name}", best(found), "samples/CPU-s", how=clock))

    def ratio(one: str, other: str, clock: str = "cpu") -> float:
        return best(rates[one], clock) / best(rates[other], clock)

    for clock, one, unit in (("cpu", "ours", "per CPU-second"), ("wall", "ours, 2 processes", "by the clock")):
        value = ratio(one, NAIVE, clock)
        rows.append(Row(f"packing: {one} / webdataset's naive writer, {unit}", value, "x", ">= 5", how, value >= 5))
    what = f"packing: {LIMIT} / webdataset's naive writer, per CPU-second"
    rows.append(Row(what, ratio(LIMIT, NAIVE), "x", how="the most that can be had"))
    rows.append(Row(f"packing: ours / {LIMIT}, per CPU-second", ratio("ours", LIMIT), "x", how=how))
    return rows


def reading_rows(options: argparse.Namespace, rates: dict[str, Any], checksums: dict[str, float]) -> list[Row]:
    first = str(min(options.readers))
    how = f"best of {options.sessions * options.rounds}, warm, {counted(int(first), 'reader')}"

    def value(name: str) -> float | None:
        return best(rates[name][first]["warm"]) if first in rates[name] else None

    mine = value(OURS)
    assert mine is not None
    rows = [Row("reading: ours", mine, "samples/CPU-s", how=how)]
    for name in READERS:
        theirs = value(name)
        if name in (OURS, RAW) or theirs is None:
            continue
        bound = BOUNDS.get(name, 0)
        ratio = mine / theirs
        met = ratio >= bound if bound else None
        what = f"reading, samples per CPU-second: ours / {name}"
        rows.append(Row(what, ratio, "x", f">= {bound:g}" if bound else "", how, met))
    times = {
        "warm": f"best of {options.sessions * options.rounds}",
        "cold": f"best of {options.sessions}, checksums too",
    }
    for readers, (state, how) in product(map(str, options.readers), times.items()):
        for other in (NUMPY, SAFETENSORS):
            both = [rates[name].get(readers, {}).get(state) for name in (OURS, other)]
            if all(both):
                ratio = best(both[0], "wall") / best(both[1], "wall")
                what = f"reading by the clock, {state}, {counted(int(readers), 'reader')}: ours / {other}"
                rows.append(Row(what, ratio, "x", f">= {BOUNDS[other]:g}", how, ratio >= BOUNDS[other]))
    rows.append(Row("checksums, once a file and node", checksums["cpu"], "samples/CPU-s", how="once"))
    return rows


def kept(rates: dict[str, Any], stored: float) -> dict[str, Any]:
    """`rates` without the cold epochs that were none: of the bytes that are stored too few came from the disk."""
    return {
        name: {
            # more than half of what is stored is for training
            readers: {**found, "cold": [rate for rate in found["cold"] if rate["disk"] > 0.5 * stored]}
            for readers, found in by_readers.items()
        }
        for name, by_readers in rates.items()
    }


def contest(options: argparse.Namespace, rates: dict[str, Any]) -> Table:
    """One row a contestant: samples/s, warm per CPU-second and by the clock, and cold by the clock."""
    settings = [str(readers) for readers in options.readers]
    kinds = (("warm", "cpu", "per CPU-s"), ("warm", "wall", "per s"), ("cold", "wall", "cold, per s"))
    head = ["samples", *(f"{title}, {readers}" for _, _, title in kinds for readers in settings)]
    rows = []
    for name, found in rates.items():
        cells = [
            f"{best(found[readers][state], clock):,.0f}" if found.get(readers, {}).get(state) else ""
            for state, clock, _ in kinds
            for readers in settings
        ]
        rows.append([name, *(cells if found else ["not installed", *cells[1:]])])
    best_of = f"best of {options.sessions * options.rounds} warm and of {options.sessions} cold epochs"
    title = (
        f"Reading batches of 64, by the number of readers (threads of ours, DataLoader workers of others); {best_of}; "
        "empty: not run, or the page cache answered what was to be cold."
    )
    return Table(title, head, rows)


def memory_rows(found: dict[str, Any]) -> list[Row]:
    rows = [
        Row(
            f"peak memory of a rank: {one['samples']:,} training samples in {one['shards']:,} shards",
            one["anonymous"] / 2**20,
            "MiB",
            how=f"RssAnon; {one['before'] / 2**20:,.0f} MiB of it are imports; {one['stored'] / 2**30:.1f} GiB stored",
        )
        for one in found.values()
    ]
    growth = found[LARGE]["anonymous"] / found[SMALL]["anonymous"]
    how = f"{(found[LARGE]['anonymous'] - found[SMALL]['anonymous']) / 2**20:+.1f} MiB; one run each"
    times = found[LARGE]["samples"] / found[SMALL]["samples"]
    what = f"peak memory of a rank: {times:,.0f} times the samples / once"
    return [*rows, Row(what, growth, "x", "<= 1.1", how, growth <= 1.1)]


def resume_rows(options: argparse.Namespace, found: dict[str, Any], memory: dict[str, Any] | None) -> list[Row]:
    middle = {name: statistics.median(seconds) for name, seconds in found["ours"].items()}
    how = f"median of {options.rounds} after 1, a process each, files cold and not verified before"
    start = middle.pop("beginning")
    rows = [Row("first batch of an epoch, cold", 1000 * start, "ms", how=how)]
    for place, seconds in middle.items():
        rival = found["webdataset"][place][0]
        beside = f"{1000 * seconds:,.0f} ms; webdataset reads its way there in {significant(rival)} s"
        what = f"first batch after a restart at {place} of the epoch / of an epoch, both cold"
        rows.append(Row(what, seconds / start, "x", "<= 2", beside, seconds <= 2 * start))
    return rows
