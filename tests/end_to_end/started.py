"""`mmsa-dist train` as users start it: real processes, to be killed for real."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmsa_dist.ledger import NAMES
from mmsa_dist.run_folder import read_events

if TYPE_CHECKING:
    from tests.nodes import Node

PATIENCE = 900.0
"""Seconds; cold imports on a busy machine take minutes."""
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
two_cpus = pytest.mark.skipif(CPUS < 2, reason="two workers need two CPUs")


class Run:
    """One `mmsa-dist train` in a process group of its own.

    Args:
        on: a machine of another network that the command is typed at; else it is this one.
    """

    def __init__(
        self, runs: Path, *words: str, module: tuple[str, ...] = ("mmsa_dist",), on: "Node | None" = None
    ) -> None:
        self.runs, self.began = runs, time.monotonic()
        runs.mkdir(exist_ok=True)
        self.log = runs / f"driver-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", *module, "train", *words]
        if "--resume" not in words:
            command += ["--runs-dir", str(runs)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*(on.enter if on else ()), *command], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**(on.variables if on else os.environ), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def folder(self) -> Path:
        return next(path for path in self.runs.iterdir() if (path / "recipe.yaml").is_file())

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE)

    def result(self) -> dict[str, Any]:
        assert self.wait() == 0, self.output
        return dict(json.loads((self.folder / "result.json").read_text()))

    def until_epoch(self, epoch: int) -> None:
        """Waits until the run's rank 0 has finished `epoch`."""
        self.until(lambda event: event["event"] == "epoch" and event["epoch"] >= epoch, f"no epoch {epoch}")

    def until_saved(self) -> None:
        """Waits until a checkpoint of the run is whole; on a slow disk that is epochs after its step."""
        self.until(lambda event: event["event"] == "saved", "no checkpoint")

    def until(self, seen: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Waits for an event of the run's rank 0."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the run ended too early:\n{self.output}")
            folders = [path for path in self.runs.iterdir() if path.is_dir()]
            if folders and any(map(seen, read_events(folders[0]))):
                return
            time.sleep(0.02)
        pytest.fail(f"{what} within {PATIENCE} s:\n{self.output}")

    def pid(self, rank: int) -> int:
        return int([e for e in read_events(self.folder, rank) if e["event"] == "start"][-1]["pid"])

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def spent(run: Run) -> dict[str, float]:
    """Where the run's time went; all of it must be booked."""
    seconds = json.loads((run.folder / "time.json").read_text())
    assert sum(seconds[f"{name}_s"] for name in NAMES) == pytest.approx(seconds["wall_s"], rel=0.01)
    assert seconds["wall_s"] < time.monotonic() - run.began
    assert all(seconds[f"{name}_s"] > 0 for name in ("start", "data", "step", "evaluation", "checkpoint"))
    return dict(seconds)


def gone(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process ends within that time, with all its threads: the first may be dead while others still hold
    its files, and with them a run's lock."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z" and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1:
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False
