"""Whether a folder can hold runs: written, renamed atomically, listed, read, here and from another node. Runs there.

Everything is made below one hidden folder with the doctor's token in its name, and removed whatever happens.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.doctor import programs
from cluster.doctor.finding import ASIDE, Finding

MIB = 2**20
SLOW = 20e6
"""Bytes a second below which a line is yellow: a checkpoint of a gigabyte would take a minute."""
SEEN_WITHIN = 20.0
"""Seconds until what one node wrote has to be seen by the others; NFS remembers folders for some."""
MARK = "mark"


class _BrokenError(Exception):
    """A step that did not do what it should. Its text is the clause."""


def leave(wanted: dict[str, Any]) -> list[Finding]:
    """Writes the mark that other nodes are to read; the facts hold the folders that had to be made for it.

    Args:
        wanted: ``place``, a folder or an address; ``token``.
    """
    place, token = wanted["place"], wanted["token"]
    if programs.is_url(place):
        return programs.storage("leave", wanted)
    made: list[str] = []
    folder = Path(place)
    try:
        for parent in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            parent.mkdir()
            made.append(str(parent))
        (folder / _name(token)).mkdir()
        (folder / _name(token) / MARK).write_text(token)
    except OSError as error:
        forget({**wanted, "made": made})
        return [_said("write", place, error)]
    return [Finding("storage", "mark", "ok", "", facts={"made": made})]


def forget(wanted: dict[str, Any]) -> list[Finding]:
    """Removes what `leave` and `write` have made, as far as it is there; called however the doctor ends."""
    place, token = wanted["place"], wanted["token"]
    if programs.is_url(place):
        return programs.storage("forget", wanted)
    for left in (Path(place) / _name(token), *Path(place).glob(f"{_name(token)}-*")):
        shutil.rmtree(left, ignore_errors=True)
    for folder in reversed(wanted.get("made", [])):
        try:
            Path(folder).rmdir()
        except OSError:
            break  # somebody uses it by now
    return []


def read(wanted: dict[str, Any]) -> list[Finding]:
    """Reads the mark of another node, named ``by``."""
    place, token, by = wanted["place"], wanted["token"], wanted["by"]
    if programs.is_url(place):
        return programs.storage("read", wanted)
    mark, began = Path(place) / _name(token) / MARK, time.monotonic()
    while True:
        try:
            if mark.read_text() == token:
                break
            said = "holds something else"
        except OSError as error:
            said = error.strerror or str(error)
        if time.monotonic() - began > SEEN_WITHIN:
            remedy = f"mount the same disk at {place} on every node (NFS, EFS, a volume), or name a bucket (s3://…)"
            text = f"what {by} wrote is not seen here after {SEEN_WITHIN:.0f} s: {said}"
            return [Finding("storage", "read from another node", "fail", text, remedy)]
        time.sleep(0.1)
        with suppress(OSError):
            os.scandir(place).close()  # makes NFS ask its server
    waited = time.monotonic() - began
    text = f"what {by} wrote is read" + (f" after {waited:.1f} s" if waited > 0.5 else "")
    return [Finding("storage", "read from another node", "ok", text, facts={"seconds": waited})]


def write(wanted: dict[str, Any]) -> list[Finding]:
    """Writes, renames, lists, reads and removes, in a folder of this node's own.

    Args:
        wanted: ``place``, ``token``, ``node`` (a number), ``mib`` to write.
    """
    place = wanted["place"]
    if programs.is_url(place):
        return programs.storage("write", wanted)
    if not Path(place).is_dir():
        remedy = f"mount the same disk at {place} on every node, or name a bucket (s3://…)"
        return [Finding("storage", "write", "fail", f"{place}: is no folder on this node", remedy)]
    folder = Path(place) / f"{_name(wanted['token'])}-{wanted['node']}"
    found: list[Finding] = []
    steps: list[tuple[str, Callable[[Path, int], Finding]]] = [
        ("write", _write), ("read", _read), ("atomic rename", _rename), ("list and remove", _remove)
    ]  # fmt: skip
    try:
        folder.mkdir()
        for _, step in steps:
            found.append(step(folder, wanted["mib"] * MIB))
    except OSError as error:
        found.append(_said(steps[len(found)][0], place, error))
    except _BrokenError as error:
        remedy = f"{place} is no file system that training can rely on; use a local disk, NFS 4, Lustre or a bucket"
        found.append(Finding("storage", steps[len(found)][0], "fail", f"{place}: {error}", remedy))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _name(token: str) -> str:
    return f".{token}"


def _piece(number: int) -> bytes:
    """A mebibyte that no disk compresses, another for each number."""
    return hashlib.shake_128(number.to_bytes(4, "big")).digest(MIB)


def _write(folder: Path, size: int) -> Finding:
    pieces = [_piece(number) for number in range(4)]
    began = time.perf_counter()
    with (folder / "large").open("wb") as file:
        for number in range(size // MIB):
            file.write(pieces[number % 4])
        file.flush()
        os.fsync(file.fileno())
    return _speed("write", folder.parent, size, time.perf_counter() - began)


def _read(folder: Path, size: int) -> Finding:
    pieces = [_piece(number) for number in range(4)]
    seconds = 0.0
    with (folder / "large").open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        for number in range(size // MIB):
            began = time.perf_counter()
            piece = file.read(MIB)
            seconds += time.perf_counter() - began
            if piece != pieces[number % 4]:
                raise _BrokenError(f"what was written is not what is read, at {told(number)}")
    return _speed("read", folder.parent, size, seconds)


def told(number: int) -> str:
    """Where in the file a piece is."""
    return f"{number} MiB"


def _speed(check: str, place: Path, size: int, seconds: float) -> Finding:
    rate = size / max(1e-9, seconds)
    text, facts = f"{rate / 1e6:,.0f} MB/s at {place}", {"bytes_per_s": rate}
    if rate < SLOW:
        remedy = f"a checkpoint of 1 GB takes {1e9 / rate:,.0f} s: use a faster disk, or save less often "
        remedy += "(--checkpoint.every-seconds)"
        return Finding("storage", check, "warn", text, remedy, facts=facts)
    return Finding("storage", check, "ok", text, facts=facts)


def _rename(folder: Path, size: int) -> Finding:
    """A file over another one, and a folder with what is in it, as a checkpoint is made whole."""
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    os.replace(new, old)  # noqa: PTH105
    if old.read_text() != "new" or new.exists():
        raise _BrokenError("a file that was renamed over another did not take its place")
    partial, whole = folder / "partial", folder / "whole"
    partial.mkdir()
    (partial / "file").write_text("kept")
    partial.rename(whole)
    if partial.exists() or (whole / "file").read_text() != "kept":
        raise _BrokenError("a folder that was renamed is not at its new place as it was")
    return Finding("storage", "atomic rename", "ok", "a file over another, a folder with its files")


def _remove(folder: Path, size: int) -> Finding:
    names = sorted(path.name for path in folder.iterdir())
    if names != ["large", "old", "whole"]:
        raise _BrokenError(f"lists {names}, where large, old and whole were written")
    shutil.rmtree(folder)
    if folder.exists():
        raise _BrokenError("what was removed is still there")
    return Finding("storage", "list and remove", "ok", "nothing is left behind")


_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM)


def _said(check: str, place: str, error: OSError) -> Finding:
    text = f"{error.filename or place}: {error.strerror}"
    remedy, code = f"see to the disk at {place} (`dmesg`, `mount`), then run the doctor again", ASIDE
    if error.errno in _FULL:
        remedy, code = f"make room at {place} (`df -h`, `df -i`, `quota`), or name another --storage", 2
    elif error.errno in _DENIED:
        remedy, code = f"let user {os.getuid()} write to {place} (chown, chmod), or name another --storage", 2
    elif error.errno == errno.EROFS:
        remedy, code = f"mount the disk of {place} for writing (mount -o remount,rw)", 2
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        remedy, code = f"name a folder that every node has with --storage, not {place}", 2
    return Finding("storage", check, "fail", text, remedy, code=code)
