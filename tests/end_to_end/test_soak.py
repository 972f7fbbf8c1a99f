"""Thirty kills at random moments of one run: it ends as if there had been none."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mmsa_dist.run_folder import read_events, read_json
from tests.end_to_end.started import PATIENCE, Run, spent, two_cpus

KILLS = 30
SEED = 20


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(3600)
@two_cpus
def test_thirty_kills_are_invisible(
    words: list[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Of either rank, while ranks start, train, evaluate or save: the same result to the bit as undisturbed."""
    more = [*words, "--epochs", "300", "--train.patience", "999", "--workers", "2", "--launcher", "local"]
    undisturbed = Run(tmp_path / "undisturbed", *more)
    expected = undisturbed.result()
    dice = random.Random(SEED)
    run = Run(tmp_path / "soak", *more, "--checkpoint.every-seconds", "1", "--launch.max-failures", str(KILLS))
    try:
        for kill in range(1, KILLS + 1):
            rank = dice.randrange(2)
            starts = wait_for_start(run, rank, kill)
            # mostly a while after the first step, at times before it
            if dice.random() < 0.8:
                wait_for_step(run, starts, kill)
            time.sleep(dice.uniform(0.0, 2.0))
            assert run.process.poll() is None, f"the run ended after {kill - 1} kills:\n{run.output}"
            with suppress(ProcessLookupError):
                os.kill(run.pid(rank), signal.SIGKILL)
        assert run.result() == expected
    finally:
        run.kill()
    found = spent(run)
    assert found["restarts"] == KILLS
    assert read_json(run.folder / "time.json")["lost_s"] > 0
    record_property("goodput", found["goodput"])
    print(
        f"goodput with {KILLS} kills in {found['wall_s']:.0f} s: {found['goodput']:.1%}; {found['lost_s']:.1f} s of "
        f"work lost, {found['restart_s']:.0f} s of restarts, {found['checkpoint_s']:.1f} s of checkpoints"
    )


def wait_for_start(run: Run, rank: int, attempt: int) -> float:
    """When rank `rank` of the attempt (from 1) began, once it has."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(StopIteration):  # no folder yet
            starts = [event["time"] for event in read_events(run.folder, rank) if event["event"] == "start"]
            if len(starts) >= attempt:
                return float(starts[-1])
        assert run.process.poll() is None, run.output
        time.sleep(0.02)
    pytest.fail(f"attempt {attempt} did not begin:\n{run.output}")


def wait_for_step(run: Run, since: float, attempt: int) -> None:
    """Until rank 0 has taken a step since then."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if any(e["event"] == "first_step" and e["time"] >= since for e in read_events(run.folder)):
            return
        assert run.process.poll() is None, run.output
        time.sleep(0.02)
    pytest.fail(f"attempt {attempt} took no step:\n{run.output}")
