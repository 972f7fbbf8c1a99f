"""How fast a piece of work is: by CPU time with that of child processes, by the clock, and what came from the disk."""

import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Rate:
    """Samples per second of CPU time (user + system) and of the clock; and what was read from the disk, in bytes."""

    cpu: float
    wall: float
    disk: int


def rate(work: Callable[[], int]) -> Rate:
    """How fast `work` handles the samples whose number it returns."""
    # what is asked for the longest is asked first before the work and last after it: looking is no part of it
    disk, children = disk_bytes(), children_seconds()
    own, began = own_seconds(), time.perf_counter()
    samples = work()
    wall, own = time.perf_counter() - began, own_seconds() - own
    children = children_seconds() - children
    return Rate(samples / max(1e-6, own + children), samples / wall, disk_bytes() - disk)


def own_seconds() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def children_seconds() -> float:
    """CPU seconds of all its children, ended or living."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = used.ru_utime + used.ru_stime
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def disk_bytes() -> int:
    """What this process and its living children have read from the disk."""
    total = 0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with suppress(psutil.Error, AttributeError):
            total += process.io_counters().read_bytes
    return total


def forget(folder: Path) -> None:
    """Drops the files below `folder` from the page cache: what reads them next reads the disk.

    Pages that a process has mapped stay, so whoever maps them closes them before.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_memory(field: str = "RssAnon") -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"error: /proc/self/status has no {field}; this figure needs Linux")
