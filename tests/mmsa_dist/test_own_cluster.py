"""Two Ray clusters on one machine: ours is asked about our processes, though the other one is newer."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

OURS = """
import subprocess, sys
import ray
from mmsa_dist.places import connect
from mmsa_dist.recipe import from_dict

connect(from_dict({"system": "self_mm", "data": {"path": "none"}}), dashboard=True)


@ray.remote(num_cpus=0)
class Living:
    def state(self):
        from ray.util.state import get_actor

        known = get_actor(ray.get_runtime_context().get_actor_id(), timeout=60)
        return known and known.state


def asked():
    living = Living.remote()
    return ray.get(living.state.remote())


other = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
try:
    for line in other.stdout:
        if "runtime started" in line:
            break
    print(asked())
finally:
    other.terminate()
    other.wait()
"""


@pytest.mark.ray
def test_a_living_actor_is_found_in_its_own_cluster() -> None:
    """Ray Train's clean-up takes a run whose controller it does not find for one that died."""
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--block", "--port=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    start += ["--dashboard-port=0", "--dashboard-agent-listen-port=0", "--ray-client-server-port=0", "--num-cpus=1"]
    # Ray notes the newest cluster in its folder: this one is of this test alone, and short as it holds sockets
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-c", OURS, *start, "--object-store-memory=100000000"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1:] == ["ALIVE"], done.stdout[-2000:] + done.stderr[-3000:]
