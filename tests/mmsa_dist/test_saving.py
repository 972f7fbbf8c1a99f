"""Where a run ends while a checkpoint is on its way to the disk: nothing of it is lost, and the true error is told."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmsa_dist import checkpoint, launch
from mmsa_dist.config import CheckpointConfig
from mmsa_dist.diagnosis import diagnose
from mmsa_dist.errors import TransientError
from mmsa_dist.ledger import Ledger
from mmsa_dist.loop import Progress
from mmsa_dist.portable import MOMENTS, State
from mmsa_dist.run_folder import Events, read_events
from mmsa_dist.saving import Saver
from mmsa_dist.worker import Told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for part in ("events", "checkpoints"):
        (tmp_path / part).mkdir()
    return tmp_path


def session(folder: Path, until: threading.Event, error: Exception | None = None) -> Any:
    """Rank 0's, as far as a saver knows it, whose checkpoint is whole once `until` is set."""
    state = State(7, {"w": torch.ones(3)}, {kind: {"w": torch.ones(3)} for kind in MOMENTS})

    def assembled(part: Any) -> State:
        assert until.wait(60)
        if error:
            raise error
        return state

    return SimpleNamespace(
        rank=0, folder=folder, origin={}, recipe=SimpleNamespace(checkpoint=CheckpointConfig()),
        generator=SimpleNamespace(state_dict=lambda keep: {}),
        engine=SimpleNamespace(part=lambda: state, assembled=assembled),
    )  # fmt: skip


def failed(folder: Path, error: Exception | None = None) -> None:
    """A rank that fails while its checkpoint is on its way, which goes on only once the failure is told."""
    told, until = Told(folder, 0), threading.Event()
    events = Events(folder, 0, Ledger().booked)

    def seen() -> None:
        while not ((folder / "failures").is_dir() and checkpoint.is_held(folder / "checkpoints", os.getpid())):
            time.sleep(0.01)
        until.set()

    threading.Thread(target=seen, daemon=True).start()
    with told, Saver(session(folder, until, error), events, Ledger()) as saver, told:
        saver.save(Progress())
        raise ValueError("the true one")


def test_a_failure_is_told_before_the_checkpoint_is_waited_for(run: Path) -> None:
    """And the checkpoint, which is whole, is said to be: what it holds is not booked as lost."""
    with pytest.raises(ValueError, match="the true one"):
        failed(run)
    assert not list((run / "checkpoints").glob(".*")), "the launcher is told that there is nothing to wait for"
    assert checkpoint.saved(run / "checkpoints") == [run / "checkpoints" / "step-00000007"]
    (saved,) = (event for event in read_events(run) if event["event"] == "saved")
    assert saved["step"] == 7 and saved["kept"]["checkpoint"] >= 0


def test_what_fails_in_its_wake_is_not_what_is_told(run: Path) -> None:
    with pytest.raises(ValueError, match="the true one"):
        failed(run, TransientError("the disk is full"))
    (failure,) = (json.loads(path.read_text()) for path in (run / "failures").iterdir())
    assert failure["message"] == "the true one" and "the true one" in str(diagnose(run, ""))


RANK = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
does, path = sys.argv[2:]
if does == "fail":
    while not (list(folder.glob("checkpoints/.partial-*")) and (folder / path).exists()):  # its peers are at it
        time.sleep(0.02)
    sys.exit(1)
path = folder / path.replace("PID", str(os.getpid()))
path.mkdir(parents=True)
if does == "finish":
    time.sleep(3)
    path.rename(folder / "whole")
    sys.exit(1)
time.sleep(600)
"""


@pytest.mark.parametrize("sign", [".partial-step-00000007-PID", ".partial-held-PID"])
def test_the_launcher_lets_a_rank_finish(sign: str, run: Path) -> None:
    """One that writes a checkpoint, or has something to finish of one; the silent one is ended meanwhile."""
    ranks = [("fail", "other"), ("finish", f"checkpoints/{sign}"), ("be silent", "other")]
    processes = [subprocess.Popen([sys.executable, "-c", RANK, str(run), *words]) for words in ranks]
    began = time.monotonic()
    assert launch._wait(processes, run) == "rank 0 ended with exit code 1"
    assert (run / "whole").is_dir() and time.monotonic() - began < 60
    first, finished, silent = (process.wait() for process in processes)
    assert (first, silent) == (1, -9) and finished in (1, -9), "once it is whole nobody waits for it to end by itself"


@pytest.mark.parametrize("killed", [0, 1])
def test_of_ranks_that_are_gone_at_one_look_the_killed_one_is_named(killed: int, run: Path) -> None:
    """Its peers end of it with an error of theirs; a driver that is held up sees all of them at once."""
    ends = ["import sys; sys.exit(1)"] * 2
    ends[killed] = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    processes = [subprocess.Popen([sys.executable, "-c", end]) for end in ends]
    for process in processes:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert launch._wait(processes, run) == f"rank {killed} was ended by SIGKILL"
