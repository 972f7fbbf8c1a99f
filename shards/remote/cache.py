"""Objects on this machine under their content hash, in a folder of bounded size that all processes share.

An object is ``objects/<2 hex>/<sha256>``: there whole or not at all, whatever was killed, and never confused with
another of the same name. It is written to a *part* beside it, which the writer holds locked; whoever wants the same
object waits for that lock, and takes a dead writer's part over. A part belongs to one running kernel, for which locks
surely hold: two nodes on one file system at worst both download. The least recently used objects make room for new
ones; one that is mapped lives on until it is unmapped, so to evict it is safe.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from io import FileIO
from pathlib import Path
from threading import get_ident
from uuid import uuid4

from shards.errors import ConfigError, MmsaError, TransientError
from shards.files import open_lock
from shards.remote.faults import LocalError
from shards.remote.store import Patience, download
from shards.trust import cache_folder

DEFAULT_LIMIT = 50 * 10**9

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DEAD = 3600.0
"""Seconds without a byte after which a part has no writer, wherever that was: it writes, tries again or gives up."""


@dataclass(frozen=True)
class Wanted:
    """An object: where it is, and what it must be."""

    url: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cache:
    """The objects below `folder`, together at most `limit` bytes (a download under way comes on top).

    Args:
        setting: the environment variable that puts it elsewhere.
    """

    folder: Path = field(default_factory=lambda: cache_folder() / "objects")
    limit: int = field(default_factory=lambda: _limit())
    setting: str = "MMSA_CACHE"

    def path(self, sha256: str) -> Path:
        """Where an object is, when it is there."""
        return self.folder / sha256[:2] / sha256

    def holds(self, wanted: Wanted) -> bool:
        """Whether the object is there; that it was asked for counts as its use."""
        path = self.path(wanted.sha256)
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unusable(error) from None
        if status.st_size != wanted.bytes:
            self.drop(wanted.sha256)
            return False
        with suppress(OSError):  # another user's, or evicted just now
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return True

    def drop(self, sha256: str) -> None:
        """Forgets an object.

        Raises:
            ConfigError: it is another user's, or a folder has its name.
        """
        try:
            self.path(sha256).unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def fetch(self, wanted: Wanted, wait: bool = True) -> bool:
        """Makes the object be there; True where it was downloaded here and now.

        Args:
            wait: until another process or thread of this node, which is just downloading it, has done so.

        Raises:
            DataError: it is not what was packed. ConfigError: it may not be read, or has no room in the cache.
            TransientError: it did not come, or the disk is full.
        """
        pause = 0.005
        while not self.holds(wanted):
            if wanted.bytes > self.limit:
                raise ConfigError(
                    f"{wanted.url}: has {wanted.bytes:,} bytes, but the cache may hold {self.limit:,}; raise "
                    "MMSA_CACHE_BYTES, to a few times the size of a shard at least"
                )
            with self._claimed(wanted) as part:
                if part is not None:
                    return not self.holds(wanted) and self._fill(part, wanted)
            if not wait:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return False

    # --- parts

    @contextmanager
    def _claimed(self, wanted: Wanted) -> Iterator["_Part | None"]:
        """The part of an object, for this thread alone; None while another has it. It is gone afterwards."""
        path = self.path(wanted.sha256).with_name(f".{wanted.sha256}.{_kernel()}.part")
        part = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = _Part.claim(path, Patience.of_environment().silence)
        except OSError as error:
            self._met(error.errno or errno.EIO, wanted)
        try:
            yield part
        finally:
            if part is not None:
                part.close()

    def _fill(self, part: "_Part", wanted: Wanted) -> bool:
        """Downloads the object into its part, and gives the part its name.

        False where another node was faster: over a network, to replace a file may take it from who has it mapped.
        """
        while True:
            try:
                self._make_room(wanted.bytes)
                download(wanted.url, wanted.bytes, wanted.sha256, part.clear, part.write)
                part.keep()
                with self._one_at_a_time():
                    if self.holds(wanted):
                        return False
                    self._make_room(wanted.bytes)
                    part.path.replace(self.path(wanted.sha256))
                part.seal()
                return True
            except LocalError as local:
                number = local.errno
            except OSError as error:
                number = error.errno or errno.EIO
            if number == errno.ENOENT:  # somebody cleaned up a part that looked dead
                raise TransientError(f"{part.path}: was removed while it was written; run again")
            self._met(number, wanted)

    def _met(self, number: int, wanted: Wanted) -> None:
        """Answers an error of the own disk: a full one by evicting, so that another try is worth it.

        Raises:
            TransientError: nothing is left to evict. ConfigError: it is not full but unusable.
        """
        if number not in _FULL:
            raise self._unusable(OSError(number, os.strerror(number)))
        if not self._evict(wanted.bytes):
            raise TransientError(
                f"{self.folder}: no room on this disk for {wanted.url} with {wanted.bytes:,} bytes, and nothing "
                f"left to evict; free some, or set {self.setting} to a folder on another disk"
            )

    # --- room

    def _make_room(self, needed: int) -> None:
        """Evicts until `needed` bytes more are within the limit."""
        held = sum(size for _, size, _ in self._objects())
        if held + needed > self.limit:
            self._evict(held + needed - self.limit)

    def _evict(self, excess: int) -> int:
        """Removes the least recently used objects, `excess` bytes or all; returns how many bytes."""
        freed = 0
        for _, size, path in sorted(self._objects()):
            if freed >= excess:
                break
            with suppress(OSError):  # another process evicts too; or it is another user's
                path.unlink()
                freed += size
        return freed

    def _objects(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of each object. Removes parts that died on the way."""
        found = []
        for path in self.folder.glob("??/*"):
            with suppress(OSError):
                status = path.stat()
                if not path.name.startswith("."):
                    found.append((status.st_atime, status.st_size, path))
                elif time.time() - status.st_mtime > _DEAD:
                    path.unlink()
        return found

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Holds the cache's own lock; works without where the file system has none."""
        lock = open_lock(self.folder / ".room")
        try:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _unusable(self, error: OSError) -> MmsaError:
        return ConfigError(
            f"{self.folder}: cannot be used as cache of remote shards ({os.strerror(error.errno or errno.EIO)}); set "
            f"{self.setting} to a folder that can be written"
        )


class _Part:
    """A file that is being written, locked where the file system can."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file

    @classmethod
    def claim(cls, path: Path, silence: float) -> "_Part | None":
        """The part at `path`, or one of our own where locks do not work or its holder sleeps; None while it is held."""
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # a stopped process holds its locks: after a few silences without a byte nobody waits for it any longer
            asleep = time.time() - os.fstat(file.fileno()).st_mtime > 4 * silence
            file.close()
            return cls._own(path) if asleep else None
        except OSError:  # there are no locks here
            file.close()
            path.unlink(missing_ok=True)
            return cls._own(path)
        with suppress(FileNotFoundError):
            os.utime(file.fileno())  # who died long ago has left it: it lives again, and is not to be cleared away
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return cls(path, file)
        file.close()  # it has just become the object
        return None

    @classmethod
    def _own(cls, path: Path) -> "_Part":
        path = path.with_name(f"{path.stem}.{os.getpid()}-{get_ident()}-{uuid4().hex[:8]}.part")
        return cls(path, FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+"))

    def clear(self) -> None:
        """Starts from nothing."""
        with _local():
            self._file.seek(0)
            self._file.truncate()

    def write(self, data: bytes) -> None:
        with _local():
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def keep(self) -> None:
        """Makes it survive a power cut."""
        with _local():
            os.fsync(self._file.fileno())
            os.utime(self._file.fileno(), ns=(time.time_ns(),) * 2)  # used now; the clock of a file system is coarser

    def seal(self) -> None:
        """Nobody writes it again. Not before it has its name: who waits for a part opens it to write."""
        with suppress(OSError):
            os.fchmod(self._file.fileno(), 0o444)

    def close(self) -> None:
        """Ends the claim; a part that has not become an object goes."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                self.path.unlink()
        self._file.close()


@contextmanager
def _local() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
    else:
        return
    raise LocalError(number)


@cache
def _kernel() -> str:
    """A name of the running kernel: within it, and only there, locks surely hold."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return os.uname().nodename


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _limit() -> int:
    """``MMSA_CACHE_BYTES``: a number, perhaps with K, M, G or T."""
    given = os.environ.get("MMSA_CACHE_BYTES", "").strip()
    if not given:
        return DEFAULT_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", given.upper())
    if not match or not float(match[1]):
        raise ConfigError(f"MMSA_CACHE_BYTES: {given!r} is not a number of bytes, like 20000000000 or 20G")
    return int(float(match[1]) * _UNITS[match[2]])
