"""What a sweep costs beside its trials, what stopping trials early saves, and what a table costs that is there already.

The same trials, drawn at random from Self-MM's space over generated data of MOSI's shapes, as many at a time as there
are cores: once each to its end, once with ASHA.

- Overhead: the time that the ranks of all trials took, packed without a gap, over the time from the first trial to the
  end of the last. What is missing to one is processes that start, ranks that import, placement and the driver's record.
- ASHA: the best validation result that it finds, and the epochs, the seconds of ranks and the CPU-seconds that it
  spends, beside all trials run to their ends. CPU-seconds are those of the whole command: the driver, Ray's processes,
  ranks, and, where the winner was stopped early, its way to its end.
- `reproduce` again: a table of two rows and two seeds of TAM-ULAG's, all of whose runs are there; the whole command.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import ROOT, Row, Table, record
from mmsa_dist.run_folder import read_events
from tune.outcome import TRIAL, read_outcomes

COMMAND = [sys.executable, "-m", "mmsa_dist"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Swept:
    """What a sweep left.

    Attributes:
        best: validation MAE. epochs: of all trials. ranks_s: seconds that their ranks lived. cpu_s: CPU-seconds of the
            whole command. wall_s: from the first trial that was drawn to the end of the last.
    """

    best: float
    epochs: int
    ranks_s: float
    cpu_s: float
    wall_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=9, help="of a trial at most (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1_000, help="of the data set (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=2, help="trials at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="calls of reproduce (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmsa-sweeps-") as made:
        folder = Path(made)
        data = generated(folder, options.samples)
        found = {stopping: swept(folder, data, stopping, options) for stopping in ("none", "asha")}
        cached = reproduced_again(folder, data, options.repeats)
    whole, asha = found["none"], found["asha"]
    what = f"{options.trials} trials of {options.epochs} epochs, {options.at_once} at a time"
    how = "one sweep each, the same draws"
    rows = [
        Row(
            f"{what}: ranks' time at ideal packing / wall time", whole.ranks_s / options.at_once / whole.wall_s, how=how
        ),
        Row("ASHA beside trials that run to their ends: epochs trained", asha.epochs / whole.epochs, "x", how=how),
        Row("ASHA beside trials that run to their ends: seconds of ranks", asha.ranks_s / whole.ranks_s, "x", how=how),
        Row("ASHA beside trials that run to their ends: CPU-seconds", asha.cpu_s / whole.cpu_s, "x", how=how),
        Row("ASHA beside trials that run to their ends: best validation MAE", asha.best / whole.best, "x", how=how),
        Row(
            "reproduce, a table of 4 runs that are all there: the whole command",
            statistics.median(cached),
            "s",
            how=f"median of {len(cached)}, {min(cached):.1f} to {max(cached):.1f} s",
        ),
    ]
    for row in rows:
        print(f"{row.what}: {row.value:.3f} {row.unit} ({row.how})")
    table = Table(
        f"Sweeps of {options.trials} trials",
        ["stopping", "best valid MAE", "epochs", "seconds of ranks", "CPU-seconds", "seconds in all"],
        [
            [k, f"{v.best:.4f}", f"{v.epochs}", f"{v.ranks_s:.0f}", f"{v.cpu_s:.0f}", f"{v.wall_s:.0f}"]
            for k, v in found.items()
        ],
    )
    if not options.no_record:
        record(
            "sweeps",
            rows,
            tables=[table],
            raw={**{name: vars(each) for name, each in found.items()}, "cached_s": cached},
        )


def generated(folder: Path, samples: int) -> Path:
    command = [
        *COMMAND,
        "pack",
        "generated",
        "--like",
        "mosi",
        "--samples",
        str(samples),
        "--out",
        str(folder / "data"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def swept(folder: Path, data: Path, stopping: str, options: argparse.Namespace) -> Swept:
    runs = folder / stopping
    words = ["self_mm", "--data", str(data), "--runs-dir", str(runs), "--search", "random", "--stopping", stopping]
    words += ["--trials", str(options.trials), "--epochs", str(options.epochs), "--train.patience", str(options.epochs)]
    words += ["--max-concurrent", str(options.at_once), "--grace", "1", "--register", "none", "--train.no-test"]
    cpu_s = run(folder, "sweep", *words)
    (sweep,) = runs.glob("sweep-*")
    outcomes = read_outcomes(sweep / "trials", "mae")
    lives = [lived(outcome.folder) for outcome in outcomes]
    begun = min((outcome.folder / "data.json").stat().st_mtime for outcome in outcomes)
    best = min(outcome.best for outcome in outcomes if outcome.best is not None)
    return Swept(
        best=best,
        epochs=sum(outcome.epochs for outcome in outcomes),
        ranks_s=sum(last - first for first, last in lives),
        cpu_s=cpu_s,
        wall_s=max(last for _, last in lives) - begun,
    )


def reproduced_again(folder: Path, data: Path, repeats: int) -> list[float]:
    """Seconds of each call of a command whose runs are all there; the call that trains them is none of them."""
    words = ["tam_ulag", "--table", "6", "--rows", "TAM-ULAG", "w/o ULAG", "--seeds", "2", "--data", str(data)]
    words += ["--epochs", "1", "--model.text-pooling", "mean", "--runs-dir", str(folder / "table")]
    run(folder, "reproduce", *words)
    seconds = []
    for _ in range(repeats):
        began = time.monotonic()
        run(folder, "reproduce", *words)
        seconds.append(time.monotonic() - began)
    return seconds


def run(folder: Path, *words: str) -> float:
    """A command of ours to its end; gives the CPU-seconds that it and all processes below it took, looked at twice a
    second: what a process does in its last half second is not seen.

    Raises:
        SystemExit: it failed.
    """
    with (folder / "said.txt").open("w+b") as said:
        process = subprocess.Popen([*COMMAND, *words], cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=said)
        top, spent = psutil.Process(process.pid), dict[tuple[int, float], float]()
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for each in [top, *top.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        times = each.cpu_times()
                        spent[each.pid, each.create_time()] = times.user + times.system
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"error: {words[0]} ended with {process.returncode}:\n{said.read().decode()[-5000:]}")
    return sum(spent.values())


def lived(trial: Path) -> tuple[float, float]:
    """When the rank of a trial began, and when it was last heard of in the search; the winner goes on later."""
    events: list[dict[str, Any]] = read_events(trial)
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    own = events[: starts[1]] if len(starts) > 1 else events
    assert (trial / TRIAL).is_file()
    return float(own[0]["time"]), float(own[-1]["time"])


if __name__ == "__main__":
    main()
