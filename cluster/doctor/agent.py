"""Runs checks on a node, each in a process of its own, for a time that it may take at most.

Sent to the nodes by value, so it imports nothing but the standard library, and nothing of ours.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LAST_WORDS = 10.0
"""Seconds that a check has to clean up when its time is over."""


class Agent:
    """On a node: a Ray actor there, or a plain object for this machine.

    Args:
        archive: the program that looks, as a zip that Python runs.

    Raises:
        OSError: the node's temporary folder cannot be written to.
    """

    def __init__(self, archive: bytes) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mmsa-doctor-"))
        self._archive = self._folder / "doctor.zip"
        self._archive.write_bytes(archive)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._closed = threading.Lock(), False

    def hello(self) -> str:
        """The node's host name."""
        return socket.gethostname()

    def now(self) -> float:
        """The node's clock, in seconds since 1970."""
        return time.time()

    def ask(self, check: str, wanted: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Runs one check of `look.CHECKS`.

        Returns:
            ``{"found": [a finding, …]}``, ``{"late": seconds}`` or ``{"broken": what it said last}``.
        """
        # what this process can import, its children can: Ray puts the job's working directory there
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if environment.get("CUDA_VISIBLE_DEVICES") == "" and "RAY_JOB_ID" in environment:
            del environment["CUDA_VISIBLE_DEVICES"]  # Ray hides GPUs from whoever asks for none
        request = {"check": check, "limit": seconds, "ray_folder": _ray_folder(), **wanted}
        with self._lock:
            if self._closed:
                return {"broken": "the doctor is leaving"}
            child = subprocess.Popen(
                [sys.executable, str(self._archive)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
            self._running.add(child)
        try:
            out, error = child.communicate(json.dumps(request), timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"late": seconds}
        finally:
            _end(child)
            with self._lock:
                self._running.discard(child)
        try:
            return {"found": json.loads(out)}
        except ValueError:
            said = error.strip().splitlines()
            return {"broken": said[-1] if said else f"exit code {child.returncode}"}

    def stop(self) -> None:
        """Ends what runs, in good order: each check removes what it has written."""
        with self._lock:
            left = list(self._running)
        for child in left:
            _signal(child, signal.SIGTERM)
        for child in left:
            _end(child)

    def close(self) -> None:
        """The same for good; the archive goes too."""
        with self._lock:
            self._closed = True
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _ray_folder() -> str | None:
    """Where Ray keeps objects and logs on this node; None outside of Ray."""
    if "RAY_JOB_ID" not in os.environ:
        return None
    import ray

    with contextlib.suppress(AttributeError):
        return str(ray._private.worker._global_node.get_session_dir_path())
    return "/tmp/ray"


def _end(child: "subprocess.Popen[str]") -> None:
    """Whatever it is waiting for: one that a dead disk holds is left behind, and keeps nobody waiting."""
    for number, patience in ((signal.SIGTERM, LAST_WORDS), (signal.SIGKILL, 2.0)):
        if child.poll() is None:
            _signal(child, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)
    _signal(child, signal.SIGKILL)  # what it has started


def _signal(child: "subprocess.Popen[str]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
