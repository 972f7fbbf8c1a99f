"""A real Ray cluster of several nodes on one machine, which join and die as a test says."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pytest

PATIENCE = 900.0
"""Seconds; cold imports on a busy machine take minutes."""


class Cluster:
    """Nodes of one CPU, each `ray start --block`; a context that ends them all. The first is the head."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: it holds sockets
        self.nodes: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def __enter__(self) -> Self:
        try:
            self._start("--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for node in reversed(self.nodes):
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def join(self, **environment: str) -> "subprocess.Popen[bytes]":
        """One more node."""
        return self._start(f"--address={self.address}", **environment)

    def _start(self, *words: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Again where a busy machine is slower than the 30 s that Ray gives a node."""
        command = [str(Path(sys.executable).with_name("ray")), "start", *words, "--node-ip-address=127.0.0.1"]
        command += ["--num-cpus=1", "--object-store-memory=80000000", f"--temp-dir={self.folder}", "--block"]
        log = self.folder / f"node-{len(self.nodes)}.log"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with log.open("wb") as file:
                node = subprocess.Popen(
                    [*command, "--disable-usage-stats"], cwd=self.folder, env={**os.environ, **environment},
                    stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self.nodes.append(node)
            while node.poll() is None and time.monotonic() < deadline:
                if b"Ray runtime started" in log.read_bytes():
                    return node
                time.sleep(0.2)
        pytest.fail(f"no node of Ray:\n{log.read_text()[-3000:]}")

    def wait(self, cpus: int) -> None:
        """Until the cluster has so many CPUs."""
        look = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); "
        look += "print('cpus', int(ray.cluster_resources().get('CPU', 0)))"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            seen = subprocess.run([sys.executable, "-c", look, self.address], capture_output=True, text=True)
            if f"cpus {cpus}" in seen.stdout:
                return
            time.sleep(1)
        pytest.fail(f"no cluster of {cpus} CPUs: {seen.stdout}{seen.stderr}")

    def kill(self, node: "subprocess.Popen[bytes]") -> None:
        """kill -9 of all of a node's processes."""
        if node.poll() is None:
            started = psutil.Process(node.pid)
            for process in [*started.children(recursive=True), started]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            node.wait()

    def signal_raylet(self, node: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
        """To a node's raylet alone."""
        (raylet,) = (p for p in psutil.Process(node.pid).children(recursive=True) if p.name() == "raylet")
        raylet.send_signal(number)
