"""What `mmsa-dist doctor` sees on one machine, with real faults: full, read-only and slow disks, low limits, no GPU."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.doctor import gpus, machine, programs, reduce, software, storage
from cluster.doctor.agent import Agent
from cluster.doctor.finding import Finding
from cluster.doctor.nodes import archive
from tests.disk import disk_of

ROOT = Path(__file__).parents[2]
TOKEN = "mmsa-dist-doctor-test"


def only(findings: list[Finding]) -> Finding:
    (found,) = findings
    return found


def states(findings: list[Finding]) -> dict[str, str]:
    return {each.check: each.state for each in findings}


# --- storage ----------------------------------------------------------------------------------------------------------


def wanted(place: Path, mib: int = 2) -> dict[str, Any]:
    return {"place": str(place), "token": TOKEN, "node": 0, "mib": mib, "by": "another"}


def test_a_disk_is_written_renamed_and_left_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "not" / "yet"
    left = only(storage.leave(wanted(place)))
    found = storage.write(wanted(place))
    assert states(found) == dict.fromkeys(["write", "read", "atomic rename", "list and remove"], "ok")
    assert found[0].facts["bytes_per_s"] > 0
    assert only(storage.read(wanted(place))).state == "ok"
    storage.forget({**wanted(place), **left.facts})
    assert list(tmp_path.iterdir()) == [], "the folders that were made for it are gone too"


def test_what_others_keep_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = only(storage.leave(wanted(tmp_path)))
    storage.write(wanted(tmp_path))
    storage.forget({**wanted(tmp_path), **left.facts})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.fault
def test_a_full_disk_is_red_and_gets_its_room_back(tmp_path: Path) -> None:
    with disk_of(tmp_path / "small", "1m") as disk:
        storage.leave(wanted(disk))
        found = only(storage.write(wanted(disk)))
        assert (found.check, found.state, found.code) == ("write", "fail", 2)
        assert os.strerror(errno.ENOSPC) in found.found and "make room" in found.remedy
        storage.forget(wanted(disk))
        assert list(disk.iterdir()) == []


@pytest.mark.fault
def test_a_read_only_disk_is_red(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        found = only(storage.leave(wanted(disk / "runs")))
    assert (found.state, found.code) == ("fail", 2) and "for writing" in found.remedy


def test_a_folder_where_a_file_is_is_red(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = only(storage.leave(wanted(tmp_path / "file" / "runs")))
    assert found.state == "fail" and "--storage" in found.remedy


def test_a_disk_that_is_not_shared_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the other node there is a folder of the same name, or none."""
    monkeypatch.setattr(storage, "SEEN_WITHIN", 0.2)
    found = only(storage.read(wanted(tmp_path)))
    assert found.state == "fail" and "what another wrote is not seen here" in found.found and "mount" in found.remedy
    found = only(storage.write(wanted(tmp_path / "nowhere")))
    assert found.state == "fail" and "no folder on this node" in found.found
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    """Its time is over, as it writes more than it can in that."""
    agent = Agent(archive())
    try:
        request = wanted(tmp_path, mib=1_000_000)
        request["mib"] = 200_000
        answer = agent.ask("write", request, 2.0)
    finally:
        agent.close()
    assert answer == {"late": 2.0}
    assert list(tmp_path.iterdir()) == []


# --- buckets, data and MLflow, by programs of ours --------------------------------------------------------------------


def test_a_folder_by_its_address_goes_the_way_of_buckets(tmp_path: Path) -> None:
    request = {**wanted(tmp_path), "place": f"file://{tmp_path}/bucket"}
    assert states(storage.leave(request)) == {"mark": "ok"}
    assert states(storage.read(request)) == {"read from another node": "ok"}
    assert states(storage.write(request)) == dict.fromkeys(["write", "read", "list and remove"], "ok")
    storage.forget(request)
    assert list((tmp_path / "bucket").iterdir()) == []
    found = only(storage.read(request))
    assert (found.state, found.code) == ("fail", 3)


def test_an_mlflow_that_does_not_answer_is_red() -> None:
    found = only(programs.mlflow({"uri": "http://127.0.0.1:9"}))
    assert (found.state, found.code) == ("fail", 75)
    assert "no MLflow server answers" in found.found and "--tracking-uri" in found.remedy


def test_an_mlflow_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = only(programs.mlflow({"uri": f"sqlite:///{tmp_path}/runs/mlflow.db"}))
    assert found.state == "ok" and "the first run makes it" in found.found
    assert list(tmp_path.iterdir()) == []


def test_an_mlflow_that_is_there_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    """A registered model is gone when it is deleted; a run or an experiment would stay as a deleted one."""
    from mlflow.entities import ViewType

    from mmsa_dist.tracking import store

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = store.connect(uri)  # makes it
    found = only(programs.mlflow({"uri": uri}))
    assert found.state == "ok" and found.facts["write_s"] > 0
    assert list(client.search_registered_models()) == []
    assert [each.name for each in client.search_experiments(view_type=ViewType.ALL)] == ["Default"]


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(("limit", "state"), [(512, "fail"), (2048, "warn"), (8192, "ok")])
def test_few_open_files(limit: int, state: str) -> None:
    """In a process that has been given so few."""
    code = (
        "from cluster.doctor.machine import open_files as look; f = look(); print(f.state, f.facts['soft'], f.remedy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )  # fmt: skip
    said = done.stdout.split(maxsplit=2)
    assert said[:2] == [state, str(limit)]
    assert ("nofile" in done.stdout) == (state != "ok")


@pytest.mark.fault
def test_little_shared_memory(tmp_path: Path) -> None:
    with disk_of(tmp_path / "shm", "64m") as disk:  # what docker gives
        found = machine.shared_memory(disk)
    assert found and found.state == "fail" and "--shm-size" in found.remedy


@pytest.mark.fault
def test_a_disk_with_little_room(tmp_path: Path) -> None:
    with disk_of(tmp_path / "small", "3m") as disk:
        found = machine.disk("temporary", str(disk / "made" / "later"))
    assert found.state == "fail" and "TMPDIR" in found.remedy and str(disk) in found.found


def test_more_processors_given_away_than_there_are() -> None:
    found = machine.cpus(4096)
    assert found.state == "fail" and "--num-cpus=" in found.remedy
    assert machine.cpus(None).facts["usable"] <= len(os.sched_getaffinity(0))


def test_the_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.cpus(None).state == "warn" and machine.cpus(None).facts["usable"] == 0.5
    memory = machine.memory()
    assert memory and memory.state == "fail" and memory.facts["total_bytes"] == 2**30 and "cgroup" in memory.found


# --- GPUs, by an nvidia-smi that says so -----------------------------------------------------------------------------


def smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_gpus_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "echo 'NVIDIA H200, 143771, 0, 570.1'; echo 'NVIDIA H200, 143771, 140000, 570.1'", monkeypatch)
    found = {each.check: each for each in gpus.look({"gpus": 2.0})}
    assert found["GPUs"].found == "2 x NVIDIA H200, 140 GiB each, driver 570.1"
    assert found["free memory"].state == "warn" and "GPU 1 in use" in found["free memory"].found
    assert found["torch on GPUs"].state in ("warn", "fail") and "0 of 2" in found["torch on GPUs"].found


def test_a_driver_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", monkeypatch)
    found = only(gpus.look({}))
    assert found.state == "fail" and "version mismatch" in found.found and "driver" in found.remedy


def test_gpus_that_ray_gives_away_and_nobody_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, "exit 0", monkeypatch)
    assert only(gpus.look({"gpus": 8.0})).state == "fail"
    assert only(gpus.look({"gpus": 0.0})).state == "ok"


# --- all-reduce -------------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_peer_that_does_not_come_is_red() -> None:
    """Nobody listens where the others are to be met."""
    request = {"backend": "gloo", "rank": 1, "world": 2, "nodes": 2, "gpu": 0, "seconds": 2.0}
    found = only(reduce.look({**request, "rendezvous": "tcp://127.0.0.1:9"}))
    assert found.state == "fail" and found.found.startswith("meeting the others")
    assert "GLOO_SOCKET_IFNAME" in found.remedy


# --- software ---------------------------------------------------------------------------------------------------------


def test_the_versions_are_those_that_are_installed() -> None:
    facts = only(software.look({})).facts
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["versions"]["torch"] and len(facts["versions"]["code"]) == 12


def test_a_node_needs_nothing_of_ours() -> None:
    """What is sent to nodes looks at them without this package; only what runs our commands needs it, and says so."""
    code = """
import sys
sys.modules['cluster'] = None  # as on a node that lacks it
from ray import cloudpickle
agent, archive = cloudpickle.load(sys.stdin.buffer)
sys.path[:] = [path for path in sys.path if path]
agent = agent(archive)
print(agent.ask('machine', {}, 60.0))
agent.close()
"""
    from ray import cloudpickle

    from cluster.doctor import agent

    cloudpickle.register_pickle_by_value(agent)
    try:
        sent = cloudpickle.dumps((agent.Agent, archive()))
    finally:
        cloudpickle.unregister_pickle_by_value(agent)
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, timeout=300, cwd="/")
    assert b"'check': 'open files'" in done.stdout, done.stderr.decode()


def test_a_check_that_hangs_is_ended(tmp_path: Path) -> None:
    """The server takes the call, and never answers; what the check has started ends too."""
    import socket

    agent = Agent(archive())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        answer = agent.ask("mlflow", {"uri": f"http://127.0.0.1:{silent.getsockname()[1]}"}, 1.0)
    assert answer == {"late": 1.0} and time.monotonic() - began < 60
    agent.close()
    assert agent.ask("machine", {}, 1.0) == {"broken": "the doctor is leaving"}


def test_a_check_that_breaks_says_so() -> None:
    agent = Agent(archive())
    try:
        assert "KeyError" in agent.ask("no such check", {}, 60.0)["broken"]
    finally:
        agent.close()


@pytest.mark.parametrize(
    ("said", "state", "remedy"),
    [
        ("/usr/bin/python: No module named mmsa_dist", "skip", ""),
        ("error: its driver is missing (No module named 'psycopg2'); pip install 'mmsa-dist[postgres]'", "fail", "pip"),
        ("ModuleNotFoundError: No module named 'transformers'", "fail", "on the node"),
    ],
)
def test_what_is_missing_is_ours_or_red(said: str, state: str, remedy: str) -> None:
    from cluster.doctor.programs import _failed

    found = _failed("MLflow", "answers", subprocess.CompletedProcess(["python", "-m", "x"], 1, "", said), 2)
    assert found.state == state and remedy in found.remedy


def test_every_bad_line_has_a_remedy() -> None:
    with pytest.raises(AssertionError, match="says not what to do"):
        Finding("machine", "memory", "fail", "too little")
    assert json.dumps(Finding("machine", "memory", "ok", "much").dump())
