"""A real Ray head with a token, as tests of what is sent to one share it, and our commands as processes beside it."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.client import probe
from cluster.errors import TransientError

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300
"""Seconds that a command may take on a busy machine."""

Ended = tuple[int, str, str]
"""Exit code, stdout and stderr of a command."""


@dataclass(frozen=True)
class Head:
    """A running Ray head: its dashboard's address, its folder, the file with its token, the process that owns it."""

    address: str
    folder: Path
    token: Path
    process: subprocess.Popen[bytes]

    def environment(self, **extra: str) -> dict[str, str]:
        """Of a command that has the head's token."""
        told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "PYTHONPATH": str(REPOSITORY)}
        return {**os.environ, **told, **extra}

    def command(self, *words: str) -> list[str]:
        """Of ours; its first words are told the head's address."""
        python = ["--python", sys.executable] if words[0] == "submit" else []
        named = words[:1] if words[0] == "submit" else words[:2]
        return [sys.executable, "-m", "mmsa_dist", *named, "--address", self.address, *python, *words[len(named) :]]

    def start(self, *words: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.Popen[str]:
        """Starts one of our commands as a process of its own."""
        return subprocess.Popen(
            self.command(*words),
            cwd=cwd,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submit(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Starts the real `mmsa-dist submit`."""
        return self.start("submit", *words, **environment)

    def result(self, *words: str, **environment: str) -> Ended:
        """Of `submit`."""
        return ended(self.submit(*words, **environment))

    def jobs(self, *words: str, **environment: str) -> Ended:
        """Of `mmsa-dist jobs`."""
        return ended(self.start("jobs", *words, **environment))


def ended(process: subprocess.Popen[str]) -> Ended:
    out, error = process.communicate(timeout=PATIENCE)
    return process.returncode, out, error


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def running_head() -> Iterator[Head]:
    """`ray start --head --block` on free ports, with a token; ended by its process id, nothing left behind.

    Ray gives a node half a minute to come up, which on a busy machine may be too little: it is tried three times.
    """
    for left in (2, 1, 0):
        port, dashboard, agent, client = free_ports(4)
        # the shortest folder there is: Ray puts sockets below it, whose paths may have 107 bytes
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            token, log = folder / "token", folder / "head.log"
            token.write_text(secrets.token_hex(32))
            command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
            command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
            command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
            command += [f"--temp-dir={temporary}", "--num-cpus=2", "--object-store-memory=100000000"]
            environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            with log.open("wb") as out:
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
            head = Head(f"http://127.0.0.1:{dashboard}", folder, token, process)
            try:
                if not _is_up(head, log):
                    assert left, f"the head did not start:\n{log.read_text()[-3000:]}"
                    continue
                yield head
                return
            finally:
                _end(process)


def _is_up(head: Head, log: Path) -> bool:
    """Waits until a head has started wholly; the dashboard alone answers earlier. False where it ended instead."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and head.process.poll() is None:
        if "Ray runtime started" in log.read_text():
            try:
                probe(head.address, timeout=20)
                return True
            except TransientError:
                pass
        time.sleep(0.3)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    for each in alive:
        each.kill()


def slow_program(folder: Path) -> Path:
    """A working dir whose `python -m mmsa_dist SECONDS CODE` prints, waits, prints and ends as it is told.

    Told to stop, it takes four seconds to save: Ray alone would kill it after three.
    """
    package = folder / "mmsa_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(4)\n"
        "    sys.exit('saved')\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('first line')\n"
        "time.sleep(float(sys.argv[1]))\n"
        "print('last line')\n"
        "if sys.argv[2] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    return folder


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Reads what a command prints until a line with `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the command ended without {text!r}: {process.communicate()}")
