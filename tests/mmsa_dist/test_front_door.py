"""How a command ends that is told to stop: its exit code, and that nothing half-written stays behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmsa_dist.__main__ import USAGE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("text", [USAGE, (ROOT / "README.md").read_text()], ids=["help", "README"])
def test_every_exit_code_is_named(text: str) -> None:
    said = re.search(r"Exit codes:.*?\.", text, re.DOTALL)
    assert said is not None
    assert re.findall(r"\d+", said[0]) == ["0", "2", "3", "4", "75", "129", "130", "143"]


@pytest.mark.parametrize("command", [["--help"], ["pack", "mmsa", "--help"]])
def test_a_reader_that_has_seen_enough_ends_the_command_in_silence(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does, before we write
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "mmsa_dist", *command], cwd=ROOT, stdout=nobody, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def packing(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A packing into `folder` that has begun to write, and has long to go with its first shard."""
    words = ["pack", "generated", "--like", "mosei", "--shard-size", "1000", "--out", str(folder / "out")]
    command = [sys.executable, "-m", "mmsa_dist", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(folder.glob(".out.packing-*/*")):
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_packing_that_is_stopped_before_its_first_shard_leaves_nothing(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = packing(tmp_path)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    said = "no shard was finished and nothing is left; start again\nstopped\n"
    assert (process.returncode, error) == (code, "" if number == signal.SIGHUP else said)  # who read pipes got it too
    assert list(tmp_path.iterdir()) == []


def test_a_rank_of_torchrun_ends_on_the_spot(tmp_path: Path) -> None:
    """It may wait in a collective, where no handler of Python's runs."""
    process = packing(tmp_path, RANK="0")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
