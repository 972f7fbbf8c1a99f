"""What `render slurm` writes: as bash and shellcheck read it, and run for real with a Slurm of one machine."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.description import Description
from cluster.manifests.slurm import script
from tests.cluster.descriptions import FULL, LEAST, changed
from tests.cluster.slurm import Batch, ended, here, program
from tests.cluster.test_images import tool
from tests.data import packed

CASES = {
    "full": FULL,
    "least": LEAST,
    "awkward": changed(LEAST, command=["train", "mult", "--data", "/a b/$c", "--name", "it's `x`"]),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def text(request: pytest.FixtureRequest) -> str:
    return script(Description.model_validate(request.param))


def test_bash_reads_it(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)


def test_shellcheck_finds_nothing(text: str) -> None:
    command = [tool("shellcheck"), "--shell=bash", "--exclude=SC2016", "-"]  # words that are to stay as they are
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_is_asked_for_what_is_described() -> None:
    options = re.findall(r"^#SBATCH (.*)$", script(Description.model_validate(FULL)), re.MULTILINE)
    assert {
        *("--job-name=mosi", "--nodes=1-4", "--ntasks-per-node=1", "--cpus-per-task=16", "--mem=64G"),
        *("--gpus-per-node=nvidia-l4:2", "--time=01:30:00", "--partition=gpu", "--account=me", "--qos=low"),
        *("--signal=B:TERM@120", "--requeue", "--no-kill", "--open-mode=append", "--output=mosi-%j.log"),
    } == set(options)
    one = re.findall(r"^#SBATCH (.*)$", script(Description.model_validate(LEAST)), re.MULTILINE)
    assert "--nodes=1" in one and "--no-kill" not in one
    assert not [option for option in one if re.match("--(gpus|partition|account|qos)", option)]


def test_options_come_before_the_first_command(text: str) -> None:
    """Slurm reads none behind it."""
    first = next(n for n, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert "#SBATCH" not in "\n".join(text.splitlines()[first:])
    assert not re.search(r"^#SBATCH .*#", text, re.MULTILINE), "Slurm may take a comment for a word"


# --- what the script itself decides, with a head and a job that end as they are told to -------------------------------

RAY = """#!/bin/bash
echo "ray $*" >>"$STAND_IN/calls"
case $1 in
start)
    [[ -z ${HEAD_ENDS:-} ]] || exit 1
    [[ $* == *--head* ]] || exec sleep 1000
    exec PYTHON -c 'import socket, sys, time
ports = [word for word in sys.argv if word.startswith(("--dashboard-port=", "--dashboard-agent-listen-port="))]
servers = [socket.create_server(("127.0.0.1", int(port.partition("=")[2]))) for port in ports]
time.sleep(1000)' "$@" ;;
job) touch "$STAND_IN/stop" ;;
esac
"""
MMSA = """#!/bin/bash
echo "python $*" >>"$STAND_IN/calls"
read -ra nodes <<<"$SLURM_JOB_NODELIST"
until (($(grep -c '^ray start' "$STAND_IN/calls") == ${#nodes[@]})); do sleep 0.05; done
until [[ -e $STAND_IN/stop || -n ${ENDS:-} ]]; do sleep 0.05; done
[[ -z ${ENDS:-} ]] || exit "$ENDS"
exit "${STOPPED:-143}"
"""


def standing_in(place: Path, command: str, nodes: int = 2) -> Batch:
    """The script with stand-ins for Ray and for us as well: what it decides by itself takes no seconds."""
    folder = place / "bin"
    folder.mkdir()
    program(folder / "python", MMSA)
    program(folder / "ray", RAY.replace("PYTHON", sys.executable))
    parts = {"command": command, "shared": {"path": str(place / "all")}}
    return Batch(place, here(str(folder / "python"), **parts), nodes)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return standing_in(tmp_path, "train mult --data /d")


def until(seen: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_jobs_exit_code_is_the_scripts(batch: Batch, code: int) -> None:
    assert ended(batch.start(ENDS=str(code)), 60) == code, batch.output
    assert "requeue" not in " ".join(batch.calls)
    assert batch.left() == []
    (submitted,) = (call for call in batch.calls if call.startswith("python -m mmsa_dist submit"))
    assert "-- cluster run --nodes 1:2 --cpus 1 -- train mult --data /d --runs-dir" in submitted
    starts = [call for call in batch.calls if call.startswith("ray start")]
    assert len(starts) == 2 and "--dashboard-host=127.0.0.1" in starts[0] and "--head" not in starts[1]


@pytest.mark.parametrize(
    ("left", "restarts", "stopped", "queued", "code"),
    [
        (100, 0, 143, True, 143),
        (100, 9, 143, True, 143),
        (100, 10, 143, False, 143),  # as often as it may
        (3000, 0, 143, False, 143),  # somebody ended it
        (100, 0, 0, False, 0),  # it had finished by then
    ],
)
def test_a_job_is_queued_again_when_its_time_is_up_and_only_then(
    batch: Batch, left: int, restarts: int, stopped: int, queued: bool, code: int
) -> None:
    process = batch.start(left, restarts, STOPPED=str(stopped))
    until(lambda: any(call.startswith("python") for call in batch.calls))
    process.terminate()
    assert ended(process, 60) == code, batch.output
    assert any(
        call.startswith(f"ray job stop --address http://127.0.0.1:{20001 + batch.job * 10}") for call in batch.calls
    )
    assert (f"scontrol requeue {batch.job}" in batch.calls) is queued
    assert batch.left() == []


def test_a_head_that_ends_while_it_starts_is_said(batch: Batch) -> None:
    assert ended(batch.start(HEAD_ENDS="1"), 60) == 75
    assert "error: the head ended while it started, 4 times" in batch.output
    assert batch.output.count("starting it again") == 3
    assert batch.left() == []


def test_one_node_needs_no_workers(tmp_path: Path) -> None:
    batch = standing_in(tmp_path, "verify /d", nodes=1)
    assert ended(batch.start(ENDS="0"), 60) == 0
    assert len([call for call in batch.calls if call.startswith("srun")]) == 1
    assert batch.left() == []


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
def test_a_real_head_and_worker_run_the_command_and_leave_nothing(tmp_path: Path) -> None:
    """It waits for both nodes, submits, gives the command's own exit code, and no process or file stays behind."""
    (tmp_path / "empty").mkdir()
    parts: dict[str, Any] = {"command": f"inspect {tmp_path / 'empty'}", "shared": {"path": str(tmp_path / "all")}}
    batch = Batch(tmp_path, here(**parts, workers={"least": 2, "most": 2, "cpus": 1}))
    code = ended(batch.start())
    assert code == 3, batch.output
    assert "2 of 2 nodes with 1 CPUs" in batch.output
    assert "index.json" in batch.output, "the log of the command was followed"
    assert batch.left() == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_whose_time_is_up_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    data = packed(tmp_path / "data", samples=60)
    command = [
        "train",
        "ufen_mtfn",
        "--data",
        str(data),
        "--epochs",
        "60",
        "--tracking.no-enabled",
        "--train.patience",
        "60",
    ]
    batch = Batch(tmp_path, here(command=command, shared={"path": str(tmp_path / "all")}))
    runs = Path(batch.description.runs)
    first = batch.start(seconds_left=100)
    until(lambda: first.poll() is not None or any(runs.glob("*/checkpoints/step-*/manifest.json")), 600)
    first.terminate()
    assert ended(first) == 143, batch.output
    assert f"scontrol requeue {batch.job}" in batch.calls and batch.left() == []
    (run,) = (path.parent for path in runs.glob("*/recipe.yaml"))
    assert not (run / "result.json").exists()
    assert ended(batch.start(restarts=1)) == 0, batch.output
    assert f"going on with {run}" in batch.output and (run / "result.json").exists()
    assert "could not be told" not in batch.output, "nodes are given back where there is an autoscaler"
    assert [path.parent for path in runs.glob("*/recipe.yaml")] == [run], "no second run"
    assert batch.left() == []
