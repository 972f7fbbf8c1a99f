"""Cold start and waiting of an epoch from a web server with a latency, beside the same from the warm cache and a disk.

``python -m benchmarks.remote``: generated data, a server on loopback that answers each request after 50 ms, one rank
that reads and collates batches of 64 and then "trains" for a fixed time a step. What it waited is what the data cost.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.record import Row, record
from shards.batch import BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.plan import training_plan
from shards.read import ShardReader
from shards.sources.generated import GeneratedSource
from shards.write import MEGABYTE, pack

LATENCY = 0.05
STEP = 0.1
"""Seconds that a step of training takes here."""
BATCH = 64
REPEATS = 3


class Slow(SimpleHTTPRequestHandler):
    """Answers after a while."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(LATENCY)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def epoch(place: str) -> dict[str, float]:
    """One training epoch: seconds to the first batch, seconds waited after it, and their share of the rest."""
    began = time.perf_counter()
    index = Index.load(place)
    plan = training_plan(index, "train", seed=1, epoch=1, global_batch=BATCH)
    with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), readers=1) as loader:
        steps = loader.train(plan, 0, 1)
        next(steps)
        first = time.perf_counter() - began
        waited, rest = 0.0, time.perf_counter()
        while True:
            time.sleep(STEP)
            asked = time.perf_counter()
            if next(steps, None) is None:
                break
            waited += time.perf_counter() - asked
    rest = time.perf_counter() - rest
    return {"first": first, "waited": waited, "rest": rest, "stall": waited / rest}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of the folder, in a process of its own."""
    here, there = Pipe()
    process = Process(target=serve, args=(folder, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def serve(folder: Path, tell: Connection) -> None:
    """Serves for ever."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(folder)))
    tell.send(server.server_port)
    server.serve_forever()


def measure(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Each way, several times; a cold one has a cache of its own, which no other has filled."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "disk": []}
    with served(folder) as address:
        for turn in range(REPEATS + 1):
            with tempfile.TemporaryDirectory() as cache:
                os.environ["MMSA_CACHE"] = cache
                for way, place in (("cold", address), ("warm", address), ("disk", str(folder))):
                    run = epoch(place)
                    found[way] += [run] if turn else []  # the first turn imports what is needed
    return found


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3000, help="generated utterances over all splits")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data"
        source = GeneratedSource("mosei", samples=options.samples, seed=1)
        index, _ = pack(source, out, shard_bytes=8 * MEGABYTE)
        size = sum(shard.bytes for shard in index.shards)
        found = measure(out)
    names = {
        "cold": f"from a web server, {LATENCY * 1000:.0f} ms away, nothing cached",
        "warm": "the same, all cached",
        "disk": "from the folder itself, files not yet verified",
    }
    about = f"median of {REPEATS} after 1; {len(index.shards)} shards, {size / 1e6:.0f} MB"
    rows = [
        Row(f"{what}, {names[way]}", scale * statistics.median(run[key] for run in found[way]), unit, how=how)
        for way in found
        for what, key, scale, unit, how in (
            ("First batch", "first", 1.0, "s", about),
            ("Waiting for data after it", "stall", 100.0, "%", f"of steps of {STEP * 1000:.0f} ms, batches of {BATCH}"),
        )
    ]
    if not options.no_record:
        record("remote", rows, raw={"runs": found, "bytes": size, "shards": len(index.shards)})
    for row in rows:
        print(f"{row.what}: {row.value:.3f} {row.unit}")


if __name__ == "__main__":
    main()
