"""Two Ray clusters on one machine: ours is asked about our processes, though the other one is newer."""

import os
import socket
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

connect(from_dict({"system": "self_mm", "data": {"path": "none"}}), dashboard=sys.argv.pop(1) == "True")


@ray.remote(num_cpus=0)
class Living:
    def state(self):
        from ray.util.state import get_actor
        from ray.util.state.exception import RayStateApiException

        try:
            known = get_actor(ray.get_runtime_context().get_actor_id(), timeout=60)
        except RayStateApiException:
            return "nobody answers"
        return known and known.state


def asked():
    living = Living.remote()
    return ray.get(living.state.remote())


other = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
try:
    if any("runtime started" in line for line in other.stdout):  # until it is
        print(asked())
finally:
    other.terminate()
    other.wait()
"""


@pytest.mark.ray
@pytest.mark.parametrize(("dashboard", "state"), [(True, "ALIVE"), (False, "nobody answers")])
def test_a_living_actor_is_not_looked_for_in_another_cluster(dashboard: bool, state: str) -> None:
    """Ray Train's clean-up takes a run whose controller it does not find for one that died. Without a dashboard ours
    is asked at the usual port, where the other one's is (or that of whoever came first)."""
    ray = str(Path(sys.executable).with_name("ray"))
    port = "--dashboard-port=0" if dashboard else "--dashboard-port=8265"
    start = [ray, "start", "--head", "--block", "--port=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        start += [port, f"--ray-client-server-port={free.getsockname()[1]}"]
    start += ["--dashboard-agent-listen-port=0", "--num-cpus=1", "--object-store-memory=100000000"]
    # Ray notes the newest cluster in its folder: this one is of this test alone, and short as it holds sockets
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-c", OURS, str(dashboard), *start]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1:] == [state], done.stdout[-2000:] + done.stderr[-3000:]
