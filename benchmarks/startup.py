"""Seconds until something happens: `mmsa-dist --help`, and `mmsa-dist train` until its first optimizer step.

Each figure is the median over repeats after one warm-up (files in the page cache, MLflow's database made). The first
step's time comes from the run folder, where rank 0 notes it; the start is when the command is started. Machines start
processes at speeds that differ by three, so a bare program of the same libraries (`benchmarks.bare`) runs in turn with
ours: what it takes nobody who uses them can do without.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import ROOT, Row, record

COMMAND = [sys.executable, "-m", "mmsa_dist"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCHERS = {"ray": ("Ray Train", 20.0), "local": ("the local launcher", 6.0)}
"""Name for a person, and within how many seconds the first step is wanted."""
BESIDES = {"ray": " and Ray Train", "local": ""}
SAMPLES = 300
"""Size of the data set; the time to the first step does not depend on it."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each launcher after one warm-up")
    parser.add_argument("--workers", type=int, default=2, help="ranks of each run")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    helps = [help_seconds() for _ in range(1 + 3 * options.repeats)][1:]
    rows = [
        Row(
            what="`mmsa-dist --help`",
            value=statistics.median(helps),
            unit="s",
            wanted="< 0.5 s",
            how=f"median of {len(helps)} after 1",
            met=statistics.median(helps) < 0.5,
        )
    ]
    raw: dict[str, list[float]] = {"help": helps}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shards"
        pack = ["pack", "generated", "--like", "mosi", "--samples", str(SAMPLES), "--out", str(data)]
        subprocess.run([*COMMAND, *pack], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for launcher, (name, bound) in LAUNCHERS.items():
            both = [
                (first_step_seconds(launcher, options.workers, data), bare_seconds(launcher, options.workers, data))
                for _ in range(1 + options.repeats)
            ][1:]
            times, bare = ([pair[nth] for pair in both] for nth in range(2))
            raw |= {launcher: times, f"{launcher}, bare": bare}
            how = f"median of {len(times)} after 1"
            rows.append(
                Row(
                    what=f"`mmsa-dist train` to the first step, {options.workers} ranks under {name}",
                    value=statistics.median(times),
                    unit="s",
                    wanted=f"<= {bound:.0f} s",
                    how=how,
                    met=statistics.median(times) <= bound,
                )
            )
            longer = statistics.median(ours - least for ours, least in both)
            rows.append(
                Row(
                    what=f"the same beside a bare program of torch, DeepSpeed{BESIDES[launcher]}",
                    value=statistics.median(ours / least for ours, least in both),
                    unit="x",
                    how=f"{how}, in turn: {statistics.median(bare):.1f} s; ours {longer:.1f} s longer",
                    headline=True,
                )
            )
    for row in rows:
        print(f"{row.what}: {row.value:.2f} {row.unit} ({row.how})")
    if not options.no_record:
        record("startup", rows, raw={"seconds": raw})


def help_seconds() -> float:
    """Wall-clock of the installed console script, else of the module."""
    script = Path(sys.executable).with_name("mmsa-dist")
    command = [str(script)] if script.exists() else COMMAND
    began = time.perf_counter()
    subprocess.run([*command, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step_seconds(launcher: str, workers: int, data: Path) -> float:
    """Starts a short run and gives the seconds from the command to rank 0's first step."""
    runs = data.parent / f"runs-{launcher}"
    before = set(runs.glob("*"))
    train = ["train", "ufen_mtfn", "--data", str(data), "--runs-dir", str(runs), "--launcher", launcher]
    options = ["--workers", str(workers), "--epochs", "1", "--register", "none"]
    began = time.time()
    done = subprocess.run(
        [*COMMAND, *train, *options], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(train)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    (run,) = {path.parent.parent for path in runs.glob("*/events/rank-0.jsonl")} - before
    for line in (run / "events" / "rank-0.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "first_step":
            return float(event["time"]) - began
    raise SystemExit(f"error: {run} notes no first step")


def bare_seconds(launcher: str, workers: int, data: Path) -> float:
    """The same of the bare program."""
    told = data.parent / "bare"
    began = time.time()
    command = [sys.executable, "-m", "benchmarks.bare", launcher, str(workers), str(told)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return float(told.read_text()) - began


if __name__ == "__main__":
    main()
