"""A Ray cluster of our own that does not start in time is ended, and started again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shards import ray_cluster

START = """
import os
from shards.ray_cluster import LOCAL, join

join(LOCAL, "--ray", num_cpus=1, include_dashboard=False)
import psutil, ray

raylets = [p.pid for p in psutil.Process(os.getpid()).children() if "raylet" in p.name()]
print(ray.cluster_resources()["CPU"], *raylets, flush=True)
"""


def the_raylet(parent: psutil.Process, seconds: float = 60) -> psutil.Process:
    """The first raylet that a process starts."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for child in parent.children():
            try:
                if child.name() == "raylet":
                    return child
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)
    raise AssertionError(f"no raylet after {seconds} s")


@pytest.mark.ray
def test_a_node_that_hangs_while_it_starts_is_ended_and_started_again(tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", START], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            hung = the_raylet(psutil.Process(process.pid))
            hung.suspend()  # as on a machine that has no time for it
            out, _ = process.communicate(timeout=600)
        finally:
            process.kill()
        errors.seek(0)
        said = errors.read()
    assert process.returncode == 0, said[-3000:]
    assert "starting it again: this machine is busy" in said
    cpus, raylet = out.split()
    assert cpus == "1.0" and int(raylet) != hung.pid
    assert not hung.is_running(), "what was started in vain is still there"


@pytest.mark.parametrize(
    ("address", "in_job", "leaves"), [("auto", False, True), ("auto", True, False), (ray_cluster.LOCAL, True, True)]
)
def test_a_job_keeps_its_files_until_it_ends(
    address: str, in_job: bool, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray removes the working directory of a job where a process that has it as its own leaves the cluster."""
    left: list[int] = []
    monkeypatch.setattr("ray.init", lambda **settings: None)
    monkeypatch.setattr("ray.shutdown", lambda: left.append(1))
    monkeypatch.delenv(ray_cluster.IN_JOB, raising=False)
    if in_job:
        monkeypatch.setenv(ray_cluster.IN_JOB, "{}")
    with ray_cluster.joined(address):
        assert not left
    assert bool(left) == leaves
