"""Signals: who is asked to end does so in good order, and what comes afterwards is as if nothing had happened."""

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import checkpoint
from mmsa_dist.run_folder import read_events, read_json
from tests.end_to_end.started import Run, gone, spent, two_cpus

pytestmark = [pytest.mark.fault, two_cpus]
TWO = ("--workers", "2", "--launcher", "local")


@contextmanager
def started(runs: Path, *words: str, **values: Any) -> Iterator[Run]:
    run = Run(runs, *words, **values)
    try:
        yield run
    finally:
        run.kill()


def saved_at(run: Run) -> int:
    """The step after which the run was saved when it was asked to end."""
    step = int(read_json(run.folder / "stopped.json")["step"])
    assert f"saved after step {step}" in run.output
    assert checkpoint.saved(run.folder / "checkpoints")[-1].name == f"step-{step:08d}"
    assert read_events(run.folder)[-1]["event"] == "stopped"
    return step


@pytest.mark.parametrize(("number", "launcher", "code"), [(signal.SIGINT, "local", 130), (signal.SIGTERM, "ray", 143)])
def test_once_finishes_the_step_and_saves(
    number: int, launcher: str, code: int, words: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with started(tmp_path, *words, "--workers", "2", "--launcher", launcher) as run:
        run.until_epoch(2)
        ranks = [run.pid(0), run.pid(1)]
        os.kill(run.process.pid, number)
        assert run.wait() == code, run.output
        assert f"mmsa-dist train --resume {run.folder}" in run.output and "Traceback" not in run.output
        assert all(gone(pid) for pid in ranks)
        step = saved_at(run)
    again = Run(tmp_path, "--resume", str(run.folder), "--launcher", "local")
    assert again.result() == undisturbed
    assert f"going on after step {step}" in again.output
    lost = read_json(run.folder / "time.json")["lost_s"]
    assert lost == 0, f"{lost} s of work were lost, though the run was saved"


@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_terminal_that_closes_finishes_the_step_and_saves(launcher: str, words: list[str], tmp_path: Path) -> None:
    """The whole foreground group hears of it, and nothing can be printed any more."""
    command = [sys.executable, "-m", "mmsa_dist", "train", *words, "--workers", "2", "--launcher", launcher]
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [*command, "--runs-dir", str(tmp_path)])
    deadline, epoch = time.monotonic() + 300, False
    while not epoch and time.monotonic() < deadline:
        with suppress(OSError):
            select.select([terminal], [], [], 0.1)[0] and os.read(terminal, 1 << 16)
        epoch = any(event["event"] == "epoch" for run in tmp_path.glob("*") for event in read_events(run))
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert epoch and os.waitstatus_to_exitcode(status) == 129
    (run,) = tmp_path.glob("*")
    done = read_json(run / "stopped.json")
    assert done["why"] == "SIGHUP to the driver"
    assert checkpoint.saved(run / "checkpoints")[-1].name == f"step-{done['step']:08d}"


def test_twice_ends_at_once(words: list[str], tmp_path: Path) -> None:
    """Rank 1 stands still, so that no step can be finished: only the second signal can end the run."""
    with started(tmp_path, *words, *TWO) as run:
        run.until_epoch(1)
        ranks = [run.pid(0), run.pid(1)]
        os.kill(ranks[1], signal.SIGSTOP)
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(2)
        assert run.process.poll() is None and "a second signal ends at once" in run.output
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130, run.output
        assert all(gone(pid) for pid in ranks)
        assert f"mmsa-dist train --resume {run.folder}" in run.output


def test_a_rank_that_is_asked_to_end_is_no_failure(
    words: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """SIGTERM to rank 1 alone, as a scheduler sends it: all save, start again, and not one failure is allowed."""
    with started(tmp_path, *words, *TWO, "--launch.max-failures", "0") as run:
        run.until_epoch(2)
        os.kill(run.pid(1), signal.SIGTERM)
        assert run.result() == undisturbed
        assert "SIGTERM to rank 1; saved after step" in run.output
        assert spent(run)["restarts"] == 1


def test_torchrun_asks_its_ranks(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    module = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmsa_dist")
    with started(tmp_path, *words, "--launcher", "torchrun", module=module) as run:
        run.until_epoch(2)
        ranks = [run.pid(0), run.pid(1)]
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait() != 0
        assert all(gone(pid) for pid in ranks)
        saved_at(run)
    again = Run(tmp_path, "--resume", str(run.folder), "--launcher", "local", "--workers", "2")
    assert again.result() == undisturbed


@pytest.mark.slow
def test_torchrun_starts_its_ranks_again(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """With --max-restarts the same run goes on from its last checkpoint."""
    module = (
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "mmsa_dist",
    )  # fmt: skip
    with started(tmp_path, *words, "--launcher", "torchrun", module=module) as run:
        run.until_epoch(2)
        os.kill(run.pid(1), signal.SIGKILL)
        assert run.result() == undisturbed
        assert len(list(tmp_path.glob("*/recipe.yaml"))) == 1
        assert spent(run)["restarts"] == 1


def test_a_rank_that_stands_still_is_found(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """SIGSTOP of rank 1: rank 0 waits for it in a collective, says where it stands, and all start again."""
    with started(tmp_path, *words, *TWO, "--launch.step-timeout", "4") as run:
        run.until_epoch(2)
        run.until_saved()
        os.kill(run.pid(1), signal.SIGSTOP)
        assert run.result() == undisturbed
        assert "rank 0 stood still for" in run.output and "starting again from the last checkpoint" in run.output
        assert "is stopped by a signal, and answers nobody" in run.output
        stacks = (run.folder / "stacks" / "rank-0.txt").read_text()
        assert "Thread" in stacks and "loop.py" in stacks


@pytest.mark.slow
def test_a_driver_that_stands_still_changes_nothing(
    words: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """SIGSTOP for longer than a step may take: its ranks need it for nothing, and are not taken for silent."""
    with started(tmp_path, *words, *TWO, "--launch.step-timeout", "4", "--launch.max-failures", "0") as run:
        run.until_epoch(1)
        os.kill(run.process.pid, signal.SIGSTOP)
        time.sleep(8)
        os.kill(run.process.pid, signal.SIGCONT)
        assert run.result() == undisturbed
        assert spent(run)["restarts"] == 0


def test_time_is_a_reason_to_save(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks, whose clocks differ, agree on when: saved within epochs, and nothing else changes."""
    with started(tmp_path, *words, *TWO, "--checkpoint.every-seconds", "0.05") as run:
        assert run.result() == undisturbed
        events = read_events(run.folder)
        ends = {event["step"] for event in events if event["event"] == "epoch"}
        saved = [event for event in events if event["event"] == "saved"]
        assert {event["step"] for event in saved} > ends, "no step within an epoch was saved"
        assert all(event["blocked"] > 0 and event["seconds"] > 0 for event in saved)
