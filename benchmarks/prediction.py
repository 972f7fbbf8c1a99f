"""How fast a large set is predicted: by one process, and by `--ray` with one process a core, from the same shards.

Self-MM, trained for an epoch on generated data of MOSI's shapes, predicts a larger generated set. Counted are samples
per second of the wall clock between the first rows and the last, so that neither loading nor starting Ray is in it; how
long `--ray` takes until its first rows is a row of its own. Each process computes with one thread, as a rank does.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Row, record

COMMAND = [sys.executable, "-m", "mmsa_dist"]
SYSTEM = "self_mm"
TRAINED_ON = 300
"""Samples that the model is trained on; predicting takes no notice."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_000, help="that are predicted (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    parser.add_argument("--repeats", type=int, default=3, help="of each, in turn (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1")  # before torch; the workers of --ray have one each too
    with tempfile.TemporaryDirectory(prefix="mmsa-prediction-") as made:
        folder = Path(made)
        run = trained(folder)
        data = generated(folder / "large", options.samples)
        pairs = [(here(run, data), on_ray(run, data, options.workers, folder)) for _ in range(options.repeats)]
    alone = sorted(alone for alone, _ in pairs)[options.repeats // 2]
    rates, starts = (sorted(each[n] for _, each in pairs) for n in (0, 1))
    spread, start = rates[options.repeats // 2], starts[options.repeats // 2]
    how = f"median of {options.repeats}, {options.samples:,} samples of MOSI's shapes, one thread a process"
    rows = [
        Row("prediction, one process", alone, "samples/s", how=how),
        Row(f"prediction with --ray, {options.workers} processes", spread, "samples/s", how=how),
        Row(f"--ray with {options.workers} processes / one process", spread / alone, "x", how=how, headline=True),
        Row("--ray on this machine: until the first rows", start, "s", how=f"median of {options.repeats}"),
    ]
    for row in rows:
        print(f"{row.what}: {row.value:,.2f} {row.unit} ({row.how})")
    if not options.no_record:
        record("prediction", rows, raw={"here": [a for a, _ in pairs], "on_ray": [list(each) for _, each in pairs]})


def generated(place: Path, samples: int) -> Path:
    """A packed data set of MOSI's shapes."""
    words = ["pack", "generated", "--like", "mosi", "--samples", str(samples), "--out", str(place)]
    subprocess.run([*COMMAND, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return place


def trained(folder: Path, *more: str) -> Path:
    """The folder of a finished run below `folder`, whose runs lie in ``folder/runs``; `more` words for `train`."""
    data = generated(folder / "small", TRAINED_ON)
    words = ["train", SYSTEM, "--data", str(data), "--runs-dir", str(folder / "runs"), "--launcher", "local"]
    words += ["--epochs", "1", "--workers", "1", *(more or ["--tracking.no-enabled"])]
    done = subprocess.run([*COMMAND, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: training ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    (result,) = (folder / "runs").glob("*/result.json")
    return result.parent


def here(run: Path, data: Path) -> float:
    """Samples a second of the loop in one process."""
    from mmsa_dist.predict import predicted_here
    from mmsa_dist.prediction.inputs import open_input
    from mmsa_dist.predictor import Predictor

    predictor, source = Predictor.load(run), open_input(str(data))
    rows = predicted_here(predictor, source, list(source.counts), 64)
    return rate((time.perf_counter(), len(each.keys)) for _, each in rows)


def on_ray(run: Path, data: Path, workers: int, folder: Path) -> tuple[float, float]:
    """Samples a second of so many processes, and seconds until the first rows."""
    from mmsa_dist.prediction.inputs import open_input
    from mmsa_dist.prediction.job import model_files
    from mmsa_dist.prediction.kept import Kept
    from mmsa_dist.prediction.on_ray import job_of, predict_parts
    from mmsa_dist.predictor import Predictor
    from shards.ray_cluster import LOCAL

    source, files = open_input(str(data)), model_files(run)
    job = job_of(source, str(data), list(source.counts), 64, Predictor.load(run), files)
    assert source.index is not None
    parts, told = job.divide(source.index), list[tuple[float, int]]()
    began = time.perf_counter()

    def tell(samples: int, written: int) -> None:
        told.append((time.perf_counter(), samples))

    with Kept(folder / "predictions.csv", job, parts) as kept:
        predict_parts(job, kept, parts, files, LOCAL, workers, "cpu", tell)
        kept.remove()
    return rate(iter(told)), told[0][0] - began


def rate(done: Iterator[tuple[float, int]]) -> float:
    """Samples a second, of times at which so many were done: from the first time to the last."""
    times: list[Any] = list(done)
    return float(sum(samples for _, samples in times[1:]) / (times[-1][0] - times[0][0]))


if __name__ == "__main__":
    main()
