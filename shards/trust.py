"""No file is used before its size and checksum are what the index says; each is read for that once per node.

What was verified is remembered in a folder of the user's own, under everything that would change with the file. Ranks
of a node that meet a new file at the same time take turns: one reads it, the others find it remembered.
"""

import errno
import fcntl
import hashlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import TypeVar

from shards.errors import ConfigError, DataError, MmsaError, TransientError
from shards.files import open_lock, sha256_of

_Result = TypeVar("_Result")

_UNSETTLED_NS = 100_000_000
"""A file changed so recently may change again without another modification time (the clock of a file system is coarse):
it is verified but not remembered."""

_verified: set[str] = set()
"""What this process has verified, should there be no folder to remember it in."""

QUARANTINE = " (train --data.quarantine and predict --quarantine leave such shards out)"
"""End of a message on a damaged file."""

_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}
"""Errors that say nothing of the data: too many open files, no memory, a disk or its server that does not answer."""


def unreadable(path: Path, error: OSError) -> MmsaError:
    """What it means that a file cannot be read: to try again, or that the data are not there for this user."""
    if error.errno in _PASSING:
        more = "; raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        return TransientError(f"{path}: cannot be read just now ({error.strerror}){more}, and try again")
    return DataError(
        f"{path}: cannot be read ({error.strerror}); let this user read it, copy the folder whole or pack again"
    )


def cache_folder() -> Path:
    """What this machine remembers of data sets: ``$MMSA_CACHE``, else a folder in the user's cache.

    Raises:
        ConfigError: there is no such folder that nobody else can write.
    """
    if own := os.environ.get("MMSA_CACHE"):
        return _anchored(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return _anchored(caches) / "mmsa-dist"
    try:
        return Path.home() / ".cache" / "mmsa-dist"
    except RuntimeError:  # no HOME, and a user that the machine has no name for, as in some containers
        return _homeless()


@cache
def _anchored(folder: str) -> Path:
    """The folder as it was meant when it was first named, wherever the process goes later."""
    return Path(folder).absolute()


def _homeless() -> Path:
    """A folder for temporary files that is this user's alone."""
    folder = Path(gettempdir()) / f"mmsa-dist-{os.geteuid()}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    except OSError:
        ours = False
    if not ours:  # whoever can write there could say that damaged files are verified
        raise ConfigError(f"{folder}: is not a folder of this user alone; set MMSA_CACHE to one that is, or set HOME")
    return folder


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
            if error.errno in _PASSING:
                raise unreadable(self.path, error) from error
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}), but the index lists it with {self.bytes} bytes; "
                "copy the folder whole or pack again"
            ) from error
        if status.st_size != self.bytes:
            raise DataError(
                f"{self.path}: has {status.st_size} bytes, expected {self.bytes}: it is truncated or not the file that "
                f"was packed; copy it again or pack again{QUARANTINE}"
            )
        return status

    def check(self) -> None:
        """Reads the file, unless this node has done so before.

        Raises:
            DataError: size or checksum are not right. TransientError: it cannot be read just now.
        """
        marker = self._marker(self.check_size())
        if marker.name in _verified or _exists(marker):
            return
        with _one_at_a_time(marker):
            if _exists(marker):
                return
            try:
                found = sha256_of(self.path)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if found != self.sha256:
                raise DataError(
                    f"{self.path}: sha256 is {found}, expected {self.sha256}: its bytes are damaged or not the ones "
                    f"that were packed; copy it again or pack again{QUARANTINE}"
                )
            after = self.check_size()
            if self._marker(after) == marker and time.time_ns() - self._changed_ns(after) > _UNSETTLED_NS:
                remember(marker)

    def use(self, opener: Callable[[Path], _Result], verify: bool = True) -> _Result:
        """`opener` of the file's path, once the file is known to be right (its size only, without `verify`).

        Raises:
            DataError: it is not, or may not be read. TransientError: it cannot be read just now.
        """
        if verify:
            self.check()
        else:
            self.check_size()
        try:
            return self._opened(opener)
        except FileNotFoundError:  # gone in this moment
            self.check_size()
            raise

    def _opened(self, opener: Callable[[Path], _Result]) -> _Result:
        try:
            return opener(self.path)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno is None:  # a library's own, of what stands in the file
                raise
            raise unreadable(self.path, error) from error

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


def _exists(marker: Path) -> bool:
    """Whether it is there; no where we may not look."""
    try:
        return marker.exists()
    except OSError:
        return False


@contextmanager
def _one_at_a_time(marker: Path) -> Iterator[None]:
    """Holds the lock of a marker; where no folder can be written, works without (each process then verifies)."""
    with ExitStack() as stack:
        # not every file system has folders to write or locks; one of few lock files: nothing to clean up
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = open_lock(marker.with_name(f"lock-{marker.name[:2]}"))
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remember(marker: Path) -> None:
    """Says that the file of this marker was verified."""
    _verified.add(marker.name)
    with suppress(OSError):  # a full or read-only disk costs other processes reading the file again
        marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        marker.touch()
