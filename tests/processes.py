"""What tests that end processes wait for."""

import time
from collections.abc import Callable

import psutil


def wait_until(ready: Callable[[], bool], seconds: float = 300) -> None:
    """Looks again and again, as some states last for milliseconds; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


def lives(process: psutil.Process) -> bool:
    """Whether it does: one that has ended may still be listed until its parent has asked for its exit code."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
