"""`mmsa-dist doctor` on a real Ray cluster: two nodes on one machine, one of which has another torch."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.data import packed

pytestmark = [pytest.mark.ray, pytest.mark.fault, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
OTHER = "2.12.1"
"""The torch of the second node, as it says itself."""
PATIENCE = 600.0


class Cluster:
    """A head and a worker, each `ray start --block`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: it holds sockets
        self.nodes: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        told = self.folder / "older" / f"torch-{OTHER}.dist-info"
        told.mkdir(parents=True)
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OTHER}\n")

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        self._join("--head", f"--port={port}", "--include-dashboard=false")
        self._join(f"--address={self.address}", PYTHONPATH=str(self.folder / "older"))

    def _join(self, *words: str, **environment: str) -> None:
        """One node; again where a busy machine is slower than the 30 s that Ray gives it."""
        command = [str(Path(sys.executable).with_name("ray")), "start", *words, "--node-ip-address=127.0.0.1"]
        command += ["--num-cpus=1", "--object-store-memory=80000000", f"--temp-dir={self.folder}", "--block"]
        log = self.folder / f"node-{len(self.nodes)}.log"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with log.open("wb") as file:
                node = subprocess.Popen(
                    command, cwd=self.folder, env={**os.environ, **environment}, stdout=file, stderr=file,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self.nodes.append(node)
            while node.poll() is None and time.monotonic() < deadline:
                if b"Ray runtime started" in log.read_bytes():
                    return
                time.sleep(0.2)
        pytest.fail(f"no node of Ray:\n{log.read_text()[-3000:]}")

    def close(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                started = psutil.Process(node.pid)
                for process in [*started.children(recursive=True), started]:
                    process.kill()
                node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def doctor(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "mmsa_dist", "doctor", "--address", self.address, "--timeout", "300", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of all its nodes, and of who joins it
        made = Cluster()
        try:
            made.start()
            yield made
        finally:
            made.close()


def test_every_node_is_looked_at(cluster: Cluster, tmp_path: Path) -> None:
    data, shared = packed(tmp_path), tmp_path / "shared"
    words = ["--data", str(data), "--storage", str(shared / "runs"), "--storage-mib", "4", "--skip", "trial", "--json"]
    done = cluster.doctor(*words)
    assert done.stdout.startswith("{"), done.stderr
    told = json.loads(done.stdout)
    assert len(told["nodes"]) == 2 and all(re.fullmatch(r"\S+ \(\w{6}\)", node) for node in told["nodes"])
    by_line: dict[str, list[dict[str, Any]]] = {}
    for each in told["findings"]:
        by_line.setdefault(f"{each['group']}, {each['check']}", []).append(each)
    # versions: the torch of the second alone
    assert [each["state"] for each in by_line["software, torch"]] == ["ok", "fail"]
    assert (
        OTHER in by_line["software, torch"][1]["found"]
        and "pip install torch==" in by_line["software, torch"][1]["remedy"]
    )
    assert [each["state"] for each in by_line["software, mmsa-dist"]] == ["ok", "ok"]
    assert done.returncode == 2 and told["red"] == 1, [each for each in told["findings"] if each["state"] == "fail"]
    # each node by itself, and what lies between them
    for line in ("cluster, clock", "machine, disk: Ray", "storage, atomic rename", "data, one shard"):
        assert [each["state"] for each in by_line[line]] == ["ok", "ok"], by_line[line]
    (reduced,) = by_line["network, all-reduce, gloo"]
    assert reduced["facts"]["world"] == 2 and reduced["state"] in ("ok", "warn")
    (read,) = by_line["storage, read from another node"]
    assert (read["node"], read["state"]) == (told["nodes"][1], "ok")
    assert not shared.exists() and not list(Path(tempfile.gettempdir()).glob("mmsa-doctor-*"))


def test_a_node_that_is_held_is_a_red_line_and_holds_nobody(cluster: Cluster) -> None:
    """The second node's raylet is stopped: it is in the cluster, and starts no process."""
    raylets = [
        process
        for process in psutil.Process(cluster.nodes[-1].pid).children(recursive=True)
        if process.name() == "raylet"
    ]
    for raylet in raylets:
        raylet.suspend()
    try:
        done = cluster.doctor("--skip", "network", "storage", "mlflow", "data", "trial")
    finally:
        for raylet in raylets:
            raylet.resume()
    assert len(raylets) == 1
    assert done.returncode == 75, done.stdout + done.stderr
    assert "FAIL" in done.stdout and "ray status" in done.stdout and "not ready: 1 red line" in done.stdout
