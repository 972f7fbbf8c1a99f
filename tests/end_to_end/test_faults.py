"""Runs as users start them, and what happens to them when processes die: real processes, real kills."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import checkpoint
from mmsa_dist.run_folder import read_events
from tests.disk import disk_of
from tests.end_to_end.conftest import EPOCHS
from tests.end_to_end.started import Run, gone, spent, two_cpus

pytestmark = pytest.mark.fault


@two_cpus
def test_a_killed_rank_is_invisible(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 of rank 1 in mid-run: started again from the last checkpoint, the same result to the bit."""
    run = Run(tmp_path, *words, "--workers", "2", "--launcher", "local")
    run.until_epoch(3)
    run.until_saved()
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.result() == undisturbed
    assert (
        "rank 1 was ended by SIGKILL" in run.output and "starting again from the last checkpoint (1 of 2)" in run.output
    )
    assert "Traceback" not in run.output
    epochs = [e["epoch"] for e in read_events(run.folder) if e["event"] == "epoch"]
    assert sorted(set(epochs)) == list(range(1, EPOCHS + 1))
    log = (run.folder / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  .", line) for line in log)
    assert sorted(line[21:] for line in log) == sorted(line.rstrip() for line in said(run) if line.strip())
    booked = spent(run)
    assert booked["restarts"] == 1 and booked["restart_s"] > 1 and booked["lost_s"] > 0
    assert f"time {booked['wall_s']:.0f} s (1 restart): " in run.output


def said(run: Run) -> list[str]:
    """What it printed from where it had a folder on."""
    lines = run.output.splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("run ")) :]


@two_cpus
def test_a_killed_driver_leaves_nothing_and_resumes(
    words: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(tmp_path, *words, "--workers", "2", "--launcher", "local")
    run.until_epoch(3)
    ranks = [run.pid(0), run.pid(1)]
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert all(gone(pid) for pid in ranks), "ranks must not outlive their launcher"
    folder = str(run.folder)

    changed = Run(tmp_path, "--resume", folder, "--optim.lr.rest", "0.5")
    assert changed.wait() == 2
    assert "optim.lr.rest: 0.001 -> 0.5" in changed.output

    again = Run(tmp_path, "--resume", folder)
    assert again.result() == undisturbed
    done = Run(tmp_path, "--resume", folder)
    assert done.wait() == 2 and "is finished" in done.output


@two_cpus
@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_can_go_on(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint that did not fit is gone, the one before is whole, and with room again nothing is lost."""
    with disk_of(tmp_path / "disk", "30m") as disk:
        run = Run(disk, *words, "--workers", "2", "--launcher", "local")
        filler = disk / "filler"
        try:
            run.until_epoch(3)
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):  # until there is no room
                    pass
            assert run.wait() == 75, run.output
        finally:
            run.kill()
        checkpoints = run.folder / "checkpoints"
        assert not list(checkpoints.glob(".partial*"))
        assert checkpoint.damage(checkpoint.saved(checkpoints)[-1]) is None
        said = run.output.splitlines()[-1]
        assert said.startswith("error: ") and str(run.folder) in said
        assert "o space left on" in said and "Free space, then go on with --resume" in said
        assert "Traceback" not in run.output
        filler.unlink()
        assert Run(disk, "--resume", str(run.folder)).result() == undisturbed


@two_cpus
@pytest.mark.ray
def test_ray_gives_the_same_and_survives_a_kill(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Under Ray Train: the local launcher's result to the bit, though rank 0 was killed on the way."""
    run = Run(tmp_path, *words, "--workers", "2", "--launcher", "ray")
    try:
        run.until_epoch(2)
        run.until_saved()
        os.kill(run.pid(0), signal.SIGKILL)
        assert run.result() == undisturbed
        assert "starting again from the last checkpoint" in run.output
    finally:
        run.kill()


@two_cpus
@pytest.mark.slow
def test_torchrun_gives_the_same(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    module = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmsa_dist")
    run = Run(tmp_path, *words, "--launcher", "torchrun", module=module)
    assert run.result() == undisturbed
    assert spent(run)["restarts"] == 0


@two_cpus
def test_an_exception_on_one_rank_is_said_and_not_tried_again(words: list[str], tmp_path: Path) -> None:
    """A damaged shard that only some rank reads: the sentence, exit code 3, no restart, no hang."""
    import shutil

    source = Path(words[words.index("--data") + 1])
    data = tmp_path / "damaged"
    shutil.copytree(source, data)
    shard = sorted(data.glob("train-*.tar"))[2]
    shard.write_bytes(shard.read_bytes()[:-512])
    changed = [str(data) if word == str(source) else word for word in words]
    run = Run(tmp_path / "runs", *changed, "--workers", "2", "--launcher", "local")
    assert run.wait() == 3, run.output
    assert shard.name in run.output and "starting again" not in run.output and "Traceback" not in run.output
