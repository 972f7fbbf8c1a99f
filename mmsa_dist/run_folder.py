"""The folder a run leaves: everything in it can be read without us.

``recipe.yaml plan.json environment.json data.json events/rank-*.jsonl events/driver.jsonl checkpoints/ best/
predictions/ time.json result.json``
"""

import errno
import fcntl
import json
import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import yaml

from mmsa_dist.errors import ConfigError, TransientError

log = logging.getLogger(__name__)

PACKAGES = ("mmsa-dist", "torch", "deepspeed", "ray", "mlflow", "transformers", "safetensors", "numpy")


def check_name(name: str) -> None:
    """
    Raises:
        ConfigError: no folder can be called so.
    """
    if not name or len(name.encode()) > LONGEST or any(c in name for c in "/\\\0") or name.startswith("."):
        raise ConfigError(f"run name {name!r} cannot be a folder's name; use letters, digits, '-' and '_'")


LONGEST = 200
"""Bytes of a run's name: file systems take 255 in all."""


def create(runs_dir: Path, name: str, recipe: dict[str, Any]) -> Path:
    """A new run folder ``<name>-<time>-<random>`` with its recipe and environment.

    Raises:
        ConfigError: the name cannot be a folder's. TransientError: the folder cannot be written.
    """
    check_name(name)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = (runs_dir / f"{name}-{stamp}-{secrets.token_hex(2)}").resolve()
    fill(folder, recipe, new=True)
    return folder


def fill(folder: Path, recipe: dict[str, Any], *, new: bool = False) -> None:
    """A run folder with its recipe and environment.

    Args:
        new: it must not be there yet.

    Raises:
        TransientError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=not new)
        for part in ("events", "checkpoints", "predictions"):
            (folder / part).mkdir(exist_ok=not new)
        write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        write_json(folder / "environment.json", environment())
    except OSError as error:
        raise TransientError(
            f"{folder}: the run's folder cannot be written: {error.strerror}; choose another with --runs-dir"
        ) from error


def environment() -> dict[str, Any]:
    """Where a run takes place; no secrets."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "command": sys.argv,
        "job": ray_job(),
        "packages": {package: found(package) for package in PACKAGES},
    }


def ray_job() -> str | None:
    """The Ray job that this process is part of, by the id that it was submitted with; None outside of one."""
    try:
        told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(told)


@contextmanager
def locked(folder: Path, patience: float = 5.0) -> Iterator[None]:
    """Holds the run in `folder` for this process and its local ranks; the system lets go of it when they die.

    Args:
        patience: seconds to wait for another holder, whose ranks may be about to end.

    Raises:
        ConfigError: another process trains it.
    """
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break  # a file system without locks: then there is none
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise ConfigError(
                        f"{folder}: the run is being trained by {file.read().strip() or 'another process'}; "
                        "let it end, or end it, first"
                    ) from None
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        held = folder.resolve()
        _LOCKS[held] = file.fileno()
        try:
            yield
        finally:
            _LOCKS.pop(held, None)


_LOCKS: dict[Path, int] = {}
"""Folders of runs that this process holds -> the open lock."""


def lock_of(folder: Path) -> list[int]:
    """The descriptor of the lock that this process holds on the run, for ranks, which hold it as long as they live;
    empty where it holds none."""
    return [_LOCKS[folder.resolve()]] if folder.resolve() in _LOCKS else []


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class Events:
    """One JSON object a line, appended; a killed writer leaves at most one broken last line.

    A disk that is full ends no run here: events are lost then, with one warning.

    Args:
        rank: None for the driver.
        booked: gives what is told with every event of where the time went (`ledger`).

    Attributes:
        place: epoch and step of it where training stands, for other threads; None before the first step.
        kept: when the newest checkpoint was taken, in Unix time; None where none was.
    """

    def __init__(self, folder: Path, rank: int | None, booked: Callable[[], dict[str, float]] | None = None) -> None:
        self.rank, self._booked = rank, booked
        self.place: tuple[int, int] | None = None
        self.kept: float | None = None
        self._last: float | None = None
        self._lost = False
        self._file: TextIO = events_file(folder, rank).open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        if self._booked:
            values["booked"] = self._booked()
        told = {"event": event, "time": time.time(), **values}
        self.kept = taken(told) or self.kept
        try:
            self._file.write(json.dumps(told) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._lost:
                log.warning("%s: events are lost: %s", self._file.name, error.strerror)
            self._lost = True

    def step(self, epoch: int, step: int, of: int, loss: float) -> None:
        """Where training stands: the first step, then at most two a second."""
        now, self.place = time.monotonic(), (epoch, step)
        if self._last is None:
            self.write("first_step", epoch=epoch, step=step, of=of, loss=loss)
        elif now - self._last >= 0.5 or step == of:
            self.write("step", epoch=epoch, step=step, of=of, loss=loss)
        else:
            return
        self._last = now

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def taken(event: Mapping[str, Any]) -> float | None:
    """When the checkpoint was taken that `event` says is on the disk; None of any other event."""
    return float(event["time"] - event.get("seconds", 0.0)) if event["event"] == "saved" else None


def events_file(folder: Path, rank: int | None) -> Path:
    return folder / "events" / ("driver.jsonl" if rank is None else f"rank-{rank}.jsonl")


def read_events(folder: Path, rank: int | None = 0) -> list[dict[str, Any]]:
    """All whole events of a rank, or of the driver (None)."""
    path = events_file(folder, rank)
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the line that a kill cut short
    return events
