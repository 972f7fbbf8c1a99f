"""A Slurm of one machine: `srun` and `scontrol` that do here what they would do on nodes, for the script to find."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.description import Description
from cluster.manifests.slurm import script

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("localhost", "localhost")
"""Two nodes, both here."""

SRUN = """#!/bin/bash
echo "srun $*" >>"$STAND_IN/calls"
while [[ $1 == --* ]]; do shift; done
SLURMD_NODENAME=localhost exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$STAND_IN/calls"
if [[ $1 == show ]]; then printf '%s\\n' $SLURM_JOB_NODELIST; fi
"""


def program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Batch:
    """The script of a description, as sbatch would start it.

    Args:
        programs: others to be found before the real ones, by name.
    """

    def __init__(self, folder: Path, description: dict[str, Any], nodes: int = 2, **programs: str) -> None:
        self.folder, self.stand_in = folder, folder / "slurm"
        self.stand_in.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
            program(self.stand_in / name, text)
        self.description = Description.model_validate(description)
        self.script = folder / f"{self.description.name}.sbatch"
        self.script.write_text(script(self.description), encoding="utf-8")
        self.job, self.nodes = free_job(), nodes
        self.log = folder / "log"

    def start(self, seconds_left: float = 3600, restarts: int = 0, **environment: str) -> subprocess.Popen[bytes]:
        """Begins an attempt whose time is up in `seconds_left`."""
        slurm = {
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NODELIST": " ".join(NAMES[: self.nodes]),
            "SLURM_JOB_END_TIME": str(int(time.time() + seconds_left)),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        paths = {"PATH": f"{self.stand_in}:{os.environ['PATH']}", "STAND_IN": str(self.stand_in)}
        paths["PYTHONPATH"] = str(ROOT)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["bash", str(self.script)], cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, **slurm, **paths, **environment}, start_new_session=True,
            )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        """What Slurm was asked to do."""
        path = self.stand_in / "calls"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def left(self) -> list[str]:
        """Processes and files that are still there though the script has ended."""
        marks = (f"/tmp/ray-{self.job}-", f"mosi-{self.job}")
        found = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        files = [*Path("/tmp").glob(f"ray-{self.job}-*"), *Path(self.description.runs).glob(".token-*")]
        return [*(line[:300] for line in found if any(mark in line for mark in marks)), *map(str, files)]


def free_job() -> int:
    """A job number whose ports nobody has."""
    for job in range(os.getpid() % 1000, 1200):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", 20000 + job * 10))
                second.bind(("127.0.0.1", 20001 + job * 10))
                return job
            except OSError:
                continue
    pytest.fail("no free ports")


def ended(process: subprocess.Popen[bytes], seconds: float = 600) -> int:
    """The script's exit code; a script that does not end is ended with all that it has started."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True)
        for each in family:
            each.kill()
        process.send_signal(signal.SIGKILL)
        process.wait()
        pytest.fail(f"the script did not end in {seconds} s")


def here(python: str = sys.executable, **parts: Any) -> dict[str, Any]:
    """A description for this machine."""
    return {"name": "mosi", "workers": {"least": 1, "most": 2, "cpus": 1}, "slurm": {"python": python}, **parts}
