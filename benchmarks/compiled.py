"""Whether `torch.compile` pays: a system's training compiled, beside the same system as it is.

Both learn from the same resident micro-batches of 16, lengths ragged as in MOSI, in one process and thread, first as
the system is, then compiled with dynamic shapes, which is what batches of changing lengths need. The best epoch of each
stands, after the first two; what the first one takes when compiled is mostly compilation.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

from benchmarks.record import Row, record
from benchmarks.render import measured, table, wanted
from benchmarks.systems import Job, prepare, seconds
from mmsa_dist.worker import take_cores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", default=["iam", "self_mm"], help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, default=6, help="micro-batches of an epoch (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="counted epochs of each (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    take_cores(1)
    raw: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="mmsa-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # nothing is compiled yet
        data = prepare(Path(folder), None)
        for name in options.systems:
            raw[name] = compare(name, data, options.batches, options.epochs)
            print(name, raw[name], flush=True)
    rows = []
    for name, found in raw.items():
        how = f"best of {options.epochs} epochs of {options.batches} x 16 after 2"
        gain = found["plain"] / found["compiled"]
        rows.append(Row(f"{name}: training, compiled / as it is", gain, "x", how=how, headline=True))
        rows.append(Row(f"{name}: first epoch compiled, by the clock", found["first"], "s"))
    rows.append(Row("gain of all, median", statistics.median(f["plain"] / f["compiled"] for f in raw.values()), "x"))
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        record("compiled", rows, raw=raw)


def compare(name: str, data: Path, batches: int, epochs: int) -> dict[str, float]:
    """CPU seconds of an epoch as it is and compiled, and what the first compiled one took by the clock."""
    job = Job(name, ["--data", str(data)])
    job.build()
    some = list(islice(job.batches(1), batches))

    def epoch() -> None:
        job.learn(2, some)

    epoch()
    epoch()
    plain = min(seconds(epoch) for _ in range(epochs))
    job.system.compile(dynamic=True)
    began = time.perf_counter()
    epoch()
    first = time.perf_counter() - began
    epoch()
    return {"plain": plain, "compiled": min(seconds(epoch) for _ in range(epochs)), "first": first}


if __name__ == "__main__":
    main()
