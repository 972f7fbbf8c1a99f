"""What a failure costs, and what being ready for one does.

- Checkpoints: Self-MM behind an encoder of BERT-base's shape (random weights, 110 M parameters), two local ranks, saved
  every few steps: for how long training stands still, and how long writing takes beside it. At the interval that loses
  the least (Young/Daly, with one failure an hour) the share of the time for which training stands still follows.
- Kills: kill -9 of rank 1 in the middle of a run, until rank 0 has taken the next step, under each launcher.
- Goodput at one failure an hour, of these parts: what standing still, starting again, and half an interval of work that
  is lost leave of the hour.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import encoder
from benchmarks.record import ROOT, Row, record

COMMAND = [sys.executable, "-m", "mmsa_dist"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
HOUR = 3600.0
PATIENCE = 600.0
LAUNCHERS = {"ray": "Ray Train", "local": "the local launcher"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="kills under each launcher (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmsa-recovery-") as made:
        folder = Path(made)
        data = generated(folder)
        saved = checkpoints(folder, data, options.layers)
        kills = {name: [killed(folder, data, name) for _ in range(options.repeats)] for name in LAUNCHERS}
    blocked = statistics.median(event["blocked"] for event in saved["events"])
    writing = statistics.median(event["seconds"] for event in saved["events"])
    interval = math.sqrt(2 * max(blocked, 1e-3) * HOUR)
    share = 100 * blocked / interval
    size, often = saved["bytes"] / 1e9, len(saved["events"])
    rows = [
        Row(f"a checkpoint of {size:.2f} GB, 2 ranks: training stands still", blocked, "s", how=f"median of {often}"),
        Row(f"a checkpoint of {size:.2f} GB: written beside training", writing, "s", how=f"median of {often}"),
        Row(
            "checkpoints at the interval that loses the least: training stands still", share, "% of the time", "< 1 %",
            f"{blocked:.2f} s every {interval:.0f} s: one failure an hour", share < 1,
        ),
    ]  # fmt: skip
    for name, each in kills.items():
        middle = statistics.median(each)
        rows.append(
            Row(
                f"kill -9 of a rank under {LAUNCHERS[name]}: until the next step", middle, "s", "<= 30 s",
                f"median of {len(each)}", middle <= 30,
            )
        )  # fmt: skip
    worst = max(statistics.median(each) for each in kills.values())
    goodput = 100 * (1 - (worst + interval / 2) / HOUR) * (1 - share / 100)
    how = f"computed: {worst:.0f} s to start again, {interval / 2:.0f} s of work lost, checkpoints as above"
    rows.append(Row("goodput at one failure an hour", goodput, "%", ">= 95 %", how, goodput >= 95))
    for row in rows:
        print(f"{row.what}: {row.value:.2f} {row.unit} ({row.how})")
    if not options.no_record:
        record("recovery", rows, raw={"checkpoints": saved, "kills": kills})


def generated(folder: Path) -> Path:
    command = [*COMMAND, "pack", "generated", "--like", "mosi", "--samples", "300", "--out", str(folder / "data")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def checkpoints(folder: Path, data: Path, layers: int) -> dict[str, Any]:
    """What the events of a run say of each of its checkpoints, and how large one is."""
    text = ["--text.encoder", str(encoder(folder, layers)), "--text.no-pretrained"]
    more = ["--epochs", "1", "--batch-size", "12", "--checkpoint.every-steps", "4", "--train.no-test"]
    run = start(folder / "checkpoints", data, "local", [*text, *more])
    if code := run.process.wait():
        raise SystemExit(f"error: a run ended with {code}:\n{run.log.read_text()}")
    events = [{key: event[key] for key in ("step", "blocked", "seconds")} for event in run.events("saved")]
    newest = max((run.folder / "checkpoints").glob("step-*"))
    return {"events": events, "bytes": sum(path.stat().st_size for path in newest.iterdir())}


def killed(folder: Path, data: Path, launcher: str) -> float:
    """Seconds from the kill of rank 1 to the next step of rank 0."""
    place = Path(tempfile.mkdtemp(dir=folder))
    run = start(place, data, launcher, ["--epochs", "200", "--train.patience", "200"])
    try:
        run.wait("epoch", 2)
        pid = run.events("start", rank=1)[-1]["pid"]
        began = time.time()
        os.kill(pid, signal.SIGKILL)
        return float(run.wait("first_step", 2)["time"]) - began
    finally:
        run.process.send_signal(signal.SIGTERM)
        run.process.wait()


class Started:
    """A run that goes on."""

    def __init__(self, runs: Path, words: list[str]) -> None:
        runs.mkdir(exist_ok=True)
        self.runs, self.log = runs, runs / "driver.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*COMMAND, *words], cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)

    @property
    def folder(self) -> Path:
        return next(path.parent for path in self.runs.glob("*/recipe.yaml"))

    def events(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        found = []
        for file in self.runs.glob(f"*/events/rank-{rank}.jsonl"):
            for line in file.read_text().splitlines():
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:
                    continue  # being written
                found += [event] if event["event"] == kind else []
        return found

    def wait(self, kind: str, number: int) -> dict[str, Any]:
        """The event that is the `number`th (from 1) of its kind, once it is there."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if len(found := self.events(kind)) >= number:
                return found[number - 1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self.process.kill()
        raise SystemExit(f"error: no {kind} {number} came:\n{self.log.read_text()}")


def start(runs: Path, data: Path, launcher: str, more: list[str]) -> Started:
    words = ["train", "self_mm", "--data", str(data), "--runs-dir", str(runs), "--launcher", launcher, "--workers", "2"]
    return Started(runs, [*words, "--tracking.no-enabled", *more])


if __name__ == "__main__":
    main()
