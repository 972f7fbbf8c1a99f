"""A rank fails while a checkpoint's parts are on their way to rank 0: real processes, in a window made wide."""

from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.run_folder import read_events
from tests.end_to_end.started import Run, two_cpus

pytestmark = [pytest.mark.fault, two_cpus]


def slow(words: list[str], done: Path, fails: str) -> list[str]:
    """A run of Self-MM whose rank 1 fails once; no time-out ends what stands still."""
    return [
        "tests.end_to_end.slow_parts:SlowParts", *words[1:], "--epochs", "3", "--workers", "2", "--launcher", "local",
        "--train.monitor", "mae", "--launch.timeout", "3000", "--launch.step-timeout", "3000",
        "--model.done", str(done), "--model.fails", fails,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unfailing(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unfailing")
    (folder / "done").touch()
    run = Run(folder / "runs", *slow(words, folder / "done", "die"))
    try:
        return run.result()
    finally:
        run.kill()


def noticed(run: Run, done: Path) -> float:
    """Seconds from a rank's failure to the end of all ranks."""
    ends = [event["time"] for event in read_events(run.folder, None) if event["event"] == "attempt_end"]
    return float(min(end for end in ends if end > done.stat().st_mtime) - done.stat().st_mtime)


def test_a_killed_rank(words: list[str], unfailing: dict[str, Any], tmp_path: Path) -> None:
    """Rank 0, which receives, ends too; the run starts again from the checkpoint before and loses not a bit."""
    run = Run(tmp_path / "runs", *slow(words, tmp_path / "done", "die"))
    try:
        assert run.result() == unfailing
    finally:
        run.kill()
    assert "rank 1 was ended by SIGKILL" in run.output and "starting again from the last" in run.output
    assert noticed(run, tmp_path / "done") < 30


def test_a_rank_that_raises(words: list[str], unfailing: dict[str, Any], tmp_path: Path) -> None:
    """Its error ends the run, at once and not its peer's; the checkpoint that was on its way arrives."""
    run = Run(tmp_path / "runs", *slow(words, tmp_path / "done", "raise"))
    try:
        assert run.wait() == 4
    finally:
        run.kill()
    assert "error: rank 1 failed: ValueError: as it was asked to; its traceback is in" in run.output
    assert noticed(run, tmp_path / "done") < 30
    again = Run(tmp_path / "runs", "--resume", str(run.folder))
    try:
        assert again.result() == unfailing
    finally:
        again.kill()
    failed = next(event["time"] for event in read_events(run.folder, None) if event["event"] == "attempt_end")
    ended = [event for event in read_events(run.folder) if event["event"] == "epoch" and event["time"] < failed]
    assert f"going on after step {ended[-1]['step']}" in again.output, again.output
