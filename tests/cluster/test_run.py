"""`mmsa-dist cluster run`: it waits for nodes, goes on with what was begun, and hands on code and signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import TransientError
from cluster.run import IN_JOB, Room, Run, carried_out, continued, main

TRAIN = ["train", "ufen_mtfn", "--data", "d", "--recipe", "mosi", "--workers", "1:4"]
ROOT = Path(__file__).resolve().parents[2]


def begun(
    runs: Path,
    name: str,
    age: float,
    *,
    result: bool = False,
    model: str | None = None,
    command: list[str] | None = None,
) -> Path:
    run = runs / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    told = ["/venv/mmsa_dist/__main__.py", *(command or [*TRAIN, "--runs-dir", str(runs)])]
    (run / "environment.json").write_text(json.dumps({"command": told}))
    os.utime(run / "recipe.yaml", (time.time() - age, time.time() - age))
    if result:
        (run / "result.json").write_text("{}")
        (run / "mlflow.json").write_text(json.dumps({"uri": "u", "model": model}))
    return run


def test_the_first_attempt_begins(tmp_path: Path) -> None:
    command = [*TRAIN, "--runs-dir", str(tmp_path / "none")]
    assert continued(command) == command


@pytest.mark.parametrize("spelt", ["two words", "one word"])
def test_the_next_goes_on_with_the_newest_run_by_its_own_recipe(spelt: str, tmp_path: Path) -> None:
    begun(tmp_path, "old", 50)
    new = begun(tmp_path, "new", 10)
    (begun(tmp_path, "a-sweep", 5) / "space.yaml").touch()
    folder = ["--runs-dir", str(tmp_path)] if spelt == "two words" else [f"--runs-dir={tmp_path}"]
    words = continued([*TRAIN, *folder])
    assert words == ["train", "ufen_mtfn", "--data", "d", "--workers", "1:4", *folder, "--resume", str(new)]


@pytest.mark.parametrize("done", [False, True])
def test_a_run_of_another_command_is_left_alone(done: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a shared disk others train too: their newest run is neither this command's result nor to be gone on with."""
    for number, other in enumerate((["train", "mult", "--data", "d"], [*TRAIN, "--seed", "2"], ["reproduce", "iam"])):
        begun(tmp_path, f"other-{number}", number, result=done, model="models:/m/1", command=other)
    (begun(tmp_path, "silent", 0) / "environment.json").unlink()
    command = [*TRAIN, "--runs-dir", str(tmp_path)]
    assert continued(command) == command
    assert "is of this command: a new one begins" in capsys.readouterr().out


def test_an_option_that_takes_no_value_hides_none_of_the_next(tmp_path: Path) -> None:
    begun(tmp_path, "other", 5, command=[*TRAIN, "--tracking.enabled", "--seed", "2"])
    command = [*TRAIN, "--tracking.enabled", "--epochs", "2", "--runs-dir", str(tmp_path)]
    assert continued(command) == command


def test_what_changes_no_result_may_differ(tmp_path: Path) -> None:
    began = ["train", "ufen_mtfn", "--data=d", "--recipe", "mosi", "--workers", "2", "--checkpoint.every-seconds", "60"]
    run = begun(tmp_path, "mine", 5, command=[*began, "--launch.timeout=9", "--tracking.no-enabled"])
    words = continued([*TRAIN, "--runs-dir", str(tmp_path), "--zero", "3"])
    assert words is not None and words[-2:] == ["--resume", str(run)]


def test_a_finished_run_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path, "done", 10, result=True, model="models:/m/1")
    assert continued([*TRAIN, "--runs-dir", str(tmp_path)]) is None
    assert f"{run} is finished" in capsys.readouterr().out


def test_a_run_that_mlflow_has_not_heard_of_is_recorded(tmp_path: Path) -> None:
    run = begun(tmp_path, "done", 10, result=True)
    words = continued([*TRAIN, "--runs-dir", str(tmp_path)])
    assert words is not None and words[-2:] == ["--resume", str(run)]


@pytest.mark.parametrize(
    "command", [["sweep", "mult"], ["verify", "d"], ["train", "--resume", "r"], ["train", "--resume=r"]]
)
def test_other_commands_begin_as_they_are(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path / "runs", "old", 50)
    monkeypatch.chdir(tmp_path)
    assert continued(command) == command


def test_the_commands_exit_code_is_ours() -> None:
    assert carried_out(["--version"]) == 0
    assert carried_out(["trian"]) == 2


SLOW = """
import signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print("ready", flush=True)
while not heard: time.sleep(0.02)
time.sleep(1)
print(f"heard {len(heard)}", flush=True)
sys.exit(9)
"""
BY = """
import sys
from cluster import run
sys.exit(run.carried_out(["slow"]))
"""


@pytest.mark.parametrize("in_job", [False, True])
def test_the_command_hears_a_signal_once(in_job: bool, tmp_path: Path) -> None:
    """Alone we hand it on; within a Ray job all processes get it, and a second one would end the run unsaved."""
    package = tmp_path / "mmsa_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **({IN_JOB: "{}"} if in_job else {})}
    command = [sys.executable, "-c", BY]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if in_job:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (9, "heard 1\n")


def test_no_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused.*mmsa-dist submit"):
        main(["--", "train"])
    assert time.monotonic() - began < 60, "Ray itself would try for ten minutes"


def test_the_jobs_files_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray removes the working directory of a job where a process that has it as its own leaves the cluster."""
    told: list[str | None] = []
    monkeypatch.setenv(IN_JOB, "{}")
    monkeypatch.setattr("ray.init", lambda *address, **settings: told.append(os.environ.get(IN_JOB)))
    Room(Run(address="auto"), 1, 1)._connect()
    assert told == [None] and os.environ[IN_JOB] == "{}", "the command that comes next is of the job again"


def test_nodes_are_counted_by_what_they_have() -> None:
    room = Room(Run(nodes="1:4", cpus=8, gpus=2), 1, 4)

    def there(room: Room, *nodes: dict[str, float]) -> int:
        return room._there([{"Alive": True, "Resources": node} for node in nodes])

    assert there(room) == there(room, {}) == 0
    assert there(room, {"CPU": 33.0, "GPU": 8.0}) == 4
    assert there(room, {"CPU": 64.0, "GPU": 5.0}) == 2
    assert there(Room(Run(cpus=8), 1, 1), {"CPU": 15.0}) == 1
    assert there(Room(Run(cpus=6), 1, 1), {"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}) == 0, "none of them has six"
    assert room._there([{"Alive": False, "Resources": {"CPU": 8.0, "GPU": 2.0}}]) == 0


CLUSTER = """
import json, sys
import ray
from shards.ray_cluster import LOCAL, join
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

def asked():
    if is_autoscaler_v2():
        state = get_cluster_resource_state(internal_kv_get_gcs_client())
        return sum(each.count for part in state.cluster_resource_constraints for each in part.resource_requests)
    return len(json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]"))

join(LOCAL, "--ray", num_cpus=2, include_dashboard=False)  # started again where a busy machine is too slow
print(ray.get_runtime_context().gcs_address, flush=True)
for line in sys.stdin:
    print(asked(), flush=True)
"""


@pytest.mark.ray
def test_it_waits_for_nodes_asks_for_them_and_lets_them_go(tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None and cluster.stdin is not None
        try:
            address = cluster.stdout.readline().strip()
            assert address, "no cluster"
            command = [sys.executable, "-m", "mmsa_dist", "cluster", "run", "--address", address]

            def run(*words: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    [*command, *words], env=environment, capture_output=True, text=True, timeout=300, check=False
                )

            def asked() -> int:
                assert cluster.stdin is not None and cluster.stdout is not None
                print(file=cluster.stdin, flush=True)
                return int(cluster.stdout.readline())

            done = run("--nodes", "2", "--cpus", "1", "--", "trian")
            assert done.returncode == 2 and "2 of 2 nodes with 1 CPUs" in done.stdout, done.stdout + done.stderr
            assert "did you mean 'train'" in done.stderr
            done = run("--nodes", "1:3", "--cpus", "1", "--patience", "3", "--", "--version")
            assert done.returncode == 0, done.stderr
            assert "waiting for nodes: 2 of 1:3 with 1 CPUs" in done.stdout and "2 of 3 nodes" in done.stdout
            assert asked() == 0, "the nodes are let go"
            waiting = subprocess.Popen(
                [*command, "--nodes", "3", "--cpus", "1", "--timeout", "10", "--", "--version"],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert waiting.stdout is not None
            assert waiting.stdout.readline().startswith("waiting for nodes: 2 of 3")
            assert asked() == 3, "an autoscaler that adds nodes hears how many"
            _, error = waiting.communicate(timeout=300)
            assert waiting.returncode == 75 and "error: 2 of 3 nodes with 1 CPUs after 10 s" in error
            assert asked() == 0
        finally:
            with contextlib.suppress(BrokenPipeError):
                cluster.stdin.close()
            cluster.wait(60)
