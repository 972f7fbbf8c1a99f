"""Runs as users start them, and what happens to them when processes die: real processes, real kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.ledger import NAMES
from mmsa_dist.run_folder import read_events
from tests.data import packed

pytestmark = pytest.mark.fault
PATIENCE = 900.0
"""Seconds; cold imports on a busy machine take minutes."""
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
two_cpus = pytest.mark.skipif(CPUS < 2, reason="two workers need two CPUs")


class Run:
    """One `mmsa-dist train` in a process group of its own."""

    def __init__(self, runs: Path, *words: str, module: tuple[str, ...] = ("mmsa_dist",)) -> None:
        self.runs, self.began = runs, time.monotonic()
        runs.mkdir(exist_ok=True)
        self.log = runs / f"driver-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", *module, "train", *words]
        if "--resume" not in words:
            command += ["--runs-dir", str(runs)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
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
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the run ended too early:\n{self.output}")
            folders = [path for path in self.runs.iterdir() if path.is_dir()]
            if folders and any(e["event"] == "epoch" and e["epoch"] >= epoch for e in read_events(folders[0])):
                return
            time.sleep(0.02)
        pytest.fail(f"no epoch {epoch} within {PATIENCE} s:\n{self.output}")

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
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if (
            Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        ):
            return True
        time.sleep(0.1)
    return False


EPOCHS = 12


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of some seconds: Self-MM with its label generator and dropout, two ranks, ZeRO-2."""
    data = packed(tmp_path_factory.mktemp("faults"), samples=150)
    rates = [f"--optim.lr.{group}=1e-3" for group in ("text", "audio", "vision", "rest")]
    return [
        "self_mm", "--data", str(data), "--zero", "2", "--epochs", str(EPOCHS), "--train.patience", "99",
        "--tracking.no-enabled", "--batch-size", "12", *rates,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    run = Run(tmp_path_factory.mktemp("undisturbed"), *words, "--workers", "2", "--launcher", "local")
    yield run.result()
    run.kill()


@two_cpus
def test_a_killed_rank_is_invisible(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 of rank 1 in mid-run: started again from the last checkpoint, the same result to the bit."""
    run = Run(tmp_path, *words, "--workers", "2", "--launcher", "local")
    run.until_epoch(3)
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.result() == undisturbed
    assert (
        "rank 1 was ended by SIGKILL" in run.output and "starting again from the last checkpoint (1 of 2)" in run.output
    )
    assert "Traceback" not in run.output
    epochs = [e["epoch"] for e in read_events(run.folder) if e["event"] == "epoch"]
    assert sorted(set(epochs)) == list(range(1, EPOCHS + 1))
    booked = spent(run)
    assert booked["restarts"] == 1 and booked["restart_s"] > 1 and booked["lost_s"] > 0
    assert f"time {booked['wall_s']:.0f} s (1 restart): " in run.output


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
@pytest.mark.parametrize(("number", "launcher", "code"), [(signal.SIGINT, "local", 130), (signal.SIGTERM, "ray", 143)])
def test_an_interrupt_says_how_to_go_on(
    number: int, launcher: str, code: int, words: list[str], tmp_path: Path
) -> None:
    run = Run(tmp_path, *words, "--workers", "2", "--launcher", launcher)
    run.until_epoch(2)
    ranks = [run.pid(0), run.pid(1)]
    os.kill(run.process.pid, number)
    assert run.wait() == code, run.output
    assert f"mmsa-dist train --resume {run.folder}" in run.output
    assert all(gone(pid) for pid in ranks)


@two_cpus
@pytest.mark.ray
def test_ray_gives_the_same_and_survives_a_kill(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Under Ray Train: the local launcher's result to the bit, though rank 0 was killed on the way."""
    run = Run(tmp_path, *words, "--workers", "2", "--launcher", "ray")
    try:
        run.until_epoch(2)
        os.kill(run.pid(0), signal.SIGKILL)
        assert run.result() == undisturbed
        assert "starting again from the last checkpoint" in run.output
    finally:
        run.kill()


@two_cpus
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
