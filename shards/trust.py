"""No file is used before its size and checksum are what the index says; each is read for that once per node.

What was verified is remembered in a folder of the user's own, under everything that would change with the file. Ranks
of a node that meet a new file at the same time take turns: one reads it, the others find it remembered.
"""

import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards.errors import DataError
from shards.files import sha256_of

_Result = TypeVar("_Result")

_UNSETTLED_NS = 100_000_000
"""A file changed so recently may change again without another modification time (the clock of a file system is coarse):
it is verified but not remembered."""

_verified: set[str] = set()
"""What this process has verified, should there be no folder to remember it in."""


def cache_folder() -> Path:
    """What this machine remembers of data sets: ``$MMSA_CACHE``, else a folder in the user's cache."""
    own = os.environ.get("MMSA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmsa-dist"


def marker_folder() -> Path:
    """Where verified files are remembered."""
    return cache_folder() / "verified"


@dataclass(frozen=True)
class Expected:
    """What the index says of a file."""

    path: Path
    bytes: int
    sha256: str

    def check_size(self) -> os.stat_result:
        """The file's status.

        Raises:
            DataError: it is missing, or of another size.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}), but the index lists it with {self.bytes} bytes; "
                "copy the folder whole or pack again"
            ) from error
        if status.st_size != self.bytes:
            raise DataError(
                f"{self.path}: has {status.st_size} bytes, expected {self.bytes}: it is truncated or not the file that "
                "was packed; copy it again or pack again"
            )
        return status

    def check(self) -> None:
        """Raises DataError unless size and checksum are right; reads the file unless this node has done so before."""
        marker = self._marker(self.check_size())
        if marker.name in _verified or marker.exists():
            return
        with _one_at_a_time(marker):
            if marker.exists():
                return
            found = sha256_of(self.path)
            if found != self.sha256:
                raise DataError(
                    f"{self.path}: sha256 is {found}, expected {self.sha256}: its bytes are damaged or not the ones "
                    "that were packed; copy it again or pack again"
                )
            after = self.check_size()
            if self._marker(after) == marker and time.time_ns() - self._changed_ns(after) > _UNSETTLED_NS:
                remember(marker)

    def use(self, opener: Callable[[Path], _Result], verify: bool = True) -> _Result:
        """`opener` of the file's path, once the file is known to be right (its size only, without `verify`).

        Raises:
            DataError: it is not.
        """
        if verify:
            self.check()
        else:
            self.check_size()
        try:
            return opener(self.path)
        except FileNotFoundError:  # gone in this moment
            self.check_size()
            raise

    def _marker(self, status: os.stat_result) -> Path:
        """The file whose existence says that exactly this file, on this node, was verified."""
        what = "\0".join(map(str, self._stamp(status)))
        return marker_folder() / hashlib.sha256(what.encode()).hexdigest()

    def _stamp(self, status: os.stat_result) -> tuple[object, ...]:
        """What would be another if the file had changed."""
        return (
            socket.gethostname(),
            self.path.resolve(),
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            self._changed_ns(status),
            self.sha256,
        )

    def _changed_ns(self, status: os.stat_result) -> int:
        """When it was last written to, whatever a copying tool made of its modification time."""
        return status.st_ctime_ns


@contextmanager
def _one_at_a_time(marker: Path) -> Iterator[None]:
    """Holds the lock of a marker; where no folder can be written, works without (each process then verifies)."""
    with ExitStack() as stack:
        # not every file system has folders to write or locks; one of few lock files: nothing to clean up
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = stack.enter_context(marker.with_name(f"lock-{marker.name[:2]}").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remember(marker: Path) -> None:
    """Says that the file of this marker was verified."""
    _verified.add(marker.name)
    with suppress(OSError):  # a full or read-only disk costs other processes reading the file again
        marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        marker.touch()
