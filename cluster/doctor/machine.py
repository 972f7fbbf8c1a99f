"""Processors, memory, limits and disks of a node. Runs there."""

import contextlib
import math
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.doctor.finding import Finding, State, told_bytes

GIB = 2**30
RANK = 1.5 * GIB
"""Bytes of memory that a rank takes before it has read anything: mostly imports."""
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def look(wanted: dict[str, Any]) -> list[Finding]:
    """All of a machine.

    Args:
        wanted: ``cpus`` that Ray believes to be here, or None; ``runs``, where they are to go, a folder or an address;
            ``remote_data``, whether data comes through the cache; ``ray_folder``, Ray's own, or None.
    """
    found = [cpus(wanted.get("cpus")), memory(), shared_memory(), open_files(), processes(), disk("temporary", None)]
    runs, ray_folder = wanted.get("runs"), wanted.get("ray_folder")
    if ray_folder:
        found.append(disk("Ray", ray_folder))
    if runs and "://" not in runs:
        found.append(disk("runs", runs))
    if wanted.get("remote_data"):
        cache = os.environ.get("MMSA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        found.append(disk("data cache", str(Path(cache).expanduser())))
    return [each for each in found if each]


def cpus(ray: float | None) -> Finding:
    """Processors that this process may use, and those that Ray gives away."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _quota()
    usable = min(own, quota) if quota else own
    load = os.getloadavg()[0]
    text = f"{usable:g} usable" + (f" of {own} (cgroup limit)" if usable < own else "") + f", load {load:.1f}"
    facts = {"usable": usable, "load": load, "ray": ray}
    if ray and ray > math.ceil(usable):
        return Finding(
            "machine", "processors", "fail", f"{text}; Ray gives away {ray:g}",
            f"start Ray there with --num-cpus={max(1, int(usable))}, or raise the container's CPU limit: ranks would "
            "wait for one another", facts=facts,
        )  # fmt: skip
    if usable < 1:
        return Finding(
            "machine", "processors", "warn", text, "raise the container's CPU limit to 1 or more", facts=facts
        )
    return Finding("machine", "processors", "ok", text, facts=facts)


def _quota() -> float | None:
    """CPUs that the cgroup grants, None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        granted, period = (CGROUP / "cpu.max").read_text().split()
        return int(granted) / int(period)
    with contextlib.suppress(OSError, ValueError):  # cgroup v1
        granted_us = int((CGROUP / "cpu/cpu.cfs_quota_us").read_text())
        return granted_us / int((CGROUP / "cpu/cpu.cfs_period_us").read_text()) if granted_us > 0 else None
    return None


def memory() -> Finding | None:
    """What is free of the machine's memory, or of the cgroup's."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None  # not Linux
    read = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free, what = read["MemTotal"], read["MemAvailable"], ""
    for limit_file, used_file in (
        ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    ):  # fmt: skip
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((CGROUP / name).read_text()) for name in (limit_file, used_file))
            if limit < total:
                total, free, what = limit, min(free, limit - used), " (cgroup limit)"
    text = f"{told_bytes(free)} free of {told_bytes(total)}{what}"
    facts = {"total_bytes": total, "free_bytes": free}
    if free < RANK:
        remedy = f"end what fills it, or take a larger machine: one rank needs {told_bytes(RANK)} before any data"
        return Finding("machine", "memory", "fail", text, remedy, facts=facts)
    return Finding("machine", "memory", "ok", text, facts=facts)


def shared_memory(path: Path = Path("/dev/shm")) -> Finding | None:
    """Where Ray keeps objects, NCCL its buffers and loader processes their batches."""
    try:
        size = shutil.disk_usage(path)
    except OSError:
        return None
    text, facts = f"{told_bytes(size.free)} free of {told_bytes(size.total)}", {"total_bytes": size.total}
    remedy = (
        "give the container more: docker run --shm-size=8g, or in Kubernetes an emptyDir with medium: Memory at "
        "/dev/shm; or remove what lies there"
    )
    state: State = "fail" if size.free < GIB // 8 else "warn" if size.free < GIB else "ok"
    return Finding("machine", "/dev/shm", state, text, remedy if state != "ok" else "", facts=facts)


def open_files() -> Finding:
    """`ulimit -n`: sockets to every peer, a file for each mapped shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    text, facts = f"{soft:,} (may be raised to {told})", {"soft": soft, "hard": hard}
    remedy = "ulimit -n 65536 before Ray is started there"
    if hard != resource.RLIM_INFINITY and hard < 65536:
        remedy = "raise nofile in /etc/security/limits.conf, LimitNOFILE= of the service or docker run --ulimit nofile"
    state: State = "fail" if 0 <= soft < 1024 else "warn" if 0 <= soft < 4096 else "ok"
    return Finding("machine", "open files", state, text, remedy if state != "ok" else "", facts=facts)


def processes() -> Finding | None:
    """`ulimit -u`, which counts threads: Ray and torch start hundreds."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft == resource.RLIM_INFINITY or soft >= 4096:
        return None
    remedy = "ulimit -u 65536 before Ray is started there (nproc in /etc/security/limits.conf)"
    return Finding("machine", "processes", "warn", f"{soft:,} at most, threads included", remedy, facts={"soft": soft})


def disk(name: str, path: str | None) -> Finding:
    """Room on a disk: of the folder, or of its nearest parent that is there."""
    place = Path(path or tempfile.gettempdir()).absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    try:
        size, inodes = shutil.disk_usage(there), os.statvfs(there)
    except OSError as error:
        remedy = f"see `df {there}` on the node; remount or replace the disk"
        return Finding("machine", f"disk: {name}", "fail", f"{there}: {error.strerror}", remedy)
    used = 1 - size.free / max(1, size.total)
    text = f"{told_bytes(size.free)} free of {told_bytes(size.total)} at {there}"
    facts = {"free_bytes": size.free, "total_bytes": size.total, "path": str(there)}
    remedy = f"make room at {there}"
    if name == "temporary":
        remedy += ", or set TMPDIR to a larger disk"
    elif name == "Ray":
        remedy += ", or start Ray with --temp-dir on a larger disk; Ray stops writing to one that is 95 % full"
    if inodes.f_files and inodes.f_favail < 10_000:
        return Finding("machine", f"disk: {name}", "fail", f"{inodes.f_favail:,} more files fit {there}", remedy)
    if size.free < GIB // 2:
        return Finding("machine", f"disk: {name}", "fail", text, remedy, facts=facts)
    if size.free < 5 * GIB or (name == "Ray" and used > 0.95):
        return Finding("machine", f"disk: {name}", "warn", text, remedy, facts=facts)
    return Finding("machine", f"disk: {name}", "ok", text, facts=facts)
