"""Joins a Ray cluster, or starts one on this machine; what goes wrong is said within seconds, in a sentence."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil

from shards.errors import ConfigError, TransientError

LOCAL = "local"
"""The address that starts a cluster of our own on this machine."""

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the processes of a Ray job."""

_TOO_SLOW = "timed out during startup"
"""Of Ray's message where a node that it starts is not up after 30 s, which on a loaded machine happens."""
_ATTEMPTS = 4
"""How often a cluster of our own is started until it is up: that bound is fixed in Ray."""


def check_listens(address: str, option: str) -> None:
    """Connects once; Ray itself would try for minutes.

    Args:
        address: ``host:port`` or ``ray://host:port``.
        option: that gave it, as messages name it.

    Raises:
        ConfigError: it is no such address. TransientError: nothing answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{option}: {address!r} is not host:port, ray://host:port or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise TransientError(
            f"{option}: no Ray cluster answers at {address}: {error.strerror or error}; start one (ray start --head) "
            "or leave the address out"
        ) from error


def join(address: str, option: str, **settings: Any) -> None:
    """`ray.init` with `settings`, without Ray's logs and its handler of SIGTERM.

    The processes of a cluster that starts here do not hear a terminal that closes: this one does, and ends them.
    A cluster that is to start here and does not in time is ended, and started again.

    Args:
        address: of the cluster, ``auto``, or `LOCAL`.
        option: that gave it, as messages name it.

    Raises:
        TransientError: the cluster does not answer, or cannot be started.
    """
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    before = _children()
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # which processes that begin now inherit
    try:
        for left in reversed(range(_ATTEMPTS)):
            try:
                ray.init(address=address, logging_level="error", log_to_driver=False, **settings)
                break
            except Exception as error:
                if address != LOCAL or _TOO_SLOW not in str(error) or not left:
                    raise
                _end(_children() - before)
                print("Ray was not up after 30 s, starting it again: this machine is busy", file=sys.stderr, flush=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise TransientError(
            f"no Ray cluster could be started on this machine: {reason}; see whether it has memory and processor time "
            "to spare, and try again"
            if address == LOCAL
            else f"{option}: no Ray cluster answers at {address}: {reason}; start one (ray start --head) or leave the "
            "address out"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own ends this process on the spot, with another exit code


@contextlib.contextmanager
def joined(address: str, **settings: Any) -> Iterator[None]:
    """Inside, this process is one of the cluster that ``--address`` names, or of one of our own, which ends with it.
    Who has joined a cluster before stays in that.

    Within a job the process leaves as it ends: when one that has the job's working directory leaves, Ray removes that,
    and with it the code and the relative paths of all that is still to be done.

    Args:
        settings: as `join` takes them.

    Raises:
        ConfigError: it is no address. TransientError: the cluster does not answer, or cannot be started.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    if address not in (LOCAL, "auto"):
        check_listens(address, "--address")
    join(address, "--ray", **settings, **({"include_dashboard": False} if address == LOCAL else {}))
    try:
        yield
    finally:
        if address == LOCAL or IN_JOB not in os.environ:
            ray.shutdown()


def set_environment() -> None:
    """What Ray reads from the environment as it is imported, where nobody has set it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def _end(processes: set[psutil.Process]) -> None:
    """Ends them at once, and what they started."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (*process.children(recursive=True), process):
                each.kill()
    psutil.wait_procs(processes, timeout=10)
