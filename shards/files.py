"""Files that are there whole or not at all: temporary name, fsync, rename."""

import ctypes
import hashlib
import os
from contextlib import suppress
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path`: a reader sees the old file or the new one, never a part. Leaves nothing on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def begin_writing(descriptor: int, begin: int, size: int) -> None:
    """Lets the kernel begin to write these bytes onto the disk, so that `os.fsync` finds less to wait for.

    A hint, and no promise: it is Linux's `sync_file_range`, and elsewhere nothing.
    """
    write = 2  # SYNC_FILE_RANGE_WRITE
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).sync_file_range(descriptor, ctypes.c_int64(begin), ctypes.c_int64(size), write)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read once in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_lock(path: Path) -> int:
    """A descriptor of a file that is there to be locked, made where it is missing. No link is followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def is_utf8(name: str | Path) -> bool:
    """Whether the name can be written down: a file's may hold any bytes, an index and Arrow want UTF-8."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def exchange(one: Path, other: Path) -> None:
    """Swaps the names of two folders on one file system, so that at no time there is nothing under either.

    Where the system cannot do that in one step (it is Linux's `renameat2`), it takes three renames.
    """
    at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with suppress(AttributeError, OSError):
        if ctypes.CDLL(None).renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap) == 0:
            return
    aside = other.with_name(f".{other.name}.{os.getpid()}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
