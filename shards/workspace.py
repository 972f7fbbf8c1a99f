"""The folder that a packing works in, and how it becomes the data set: whole, or not at all.

Several packings may work at the same time, into the same folder even: each has a workspace of its own, and the target
changes in one step. What a packing that was killed has left is taken over by the next into the same folder: where that
has the same job, with the shards that are finished; else it is removed.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.errors import ConfigError
from shards.files import exchange, is_utf8, sync_folder
from shards.index import FILE
from shards.utterance import SPLITS

JOB = "job.json"
"""Says in a workspace what is packed there."""

DONE = ".done.json"
"""Suffix of the record of a finished shard."""

_OURS = re.compile(rf"{re.escape(FILE)}|({'|'.join(SPLITS)})-\d{{5,}}\.(tar|arrow)")


def resolved(out: Path) -> Path:
    """The target as an absolute path, without links.

    Raises:
        ConfigError: its links go in a circle, or its name could not be opened later.
    """
    try:
        out = out.resolve()
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"--out {str(out)!r}: its links lead nowhere ({error}); choose another folder") from error
    if not is_utf8(out):
        raise ConfigError(f"--out {str(out)!r}: its name has bytes that are no UTF-8; choose another folder")
    return out


def check_target(out: Path, overwrite: bool) -> None:
    """Says before the work what would forbid `publish` after it.

    Raises:
        ConfigError: `out` is taken, by files that may not be replaced; or a disk is mounted there, or the user in it.
    """
    for parent in out.parents:
        if parent.is_file():
            raise ConfigError(f"--out {out} cannot be made: {parent} is a file; choose another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder that does not exist yet")
    if os.path.ismount(out):
        raise ConfigError(f"--out {out} is where a disk is mounted; choose a folder in it, e.g. {out / 'mosi'}")
    if _works_in(out):
        raise ConfigError(
            f"--out {out} is the folder you are in, or one above it; choose one in it, e.g. {out / 'mosi'}"
        )
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if names and not overwrite:
        raise ConfigError(
            f"--out {out} is not empty ({len(names)} files); choose another folder, or --overwrite to replace it"
        )
    if foreign:
        raise ConfigError(
            f"--out {out} holds {foreign[0]!r}, which no packing wrote; --overwrite replaces packed data only: "
            "choose another folder"
        )


def _works_in(out: Path) -> bool:
    """Whether `out` is swapped away under the user's feet."""
    with suppress(OSError):  # the current folder is gone already
        return Path.cwd().is_relative_to(out)
    return False


@contextmanager
def workspace(out: Path, job: dict[str, Any], keeping: tuple[type[BaseException], ...] = ()) -> Iterator[Path]:
    """A hidden folder beside `out`, gone afterwards unless it was renamed.

    Args:
        out: the target.
        job: what determines the bytes of the shards, as JSON can tell it; the folder holds it in `JOB`.
        keeping: errors that leave it behind, with the shards that are finished, for the next packing of this job.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    lock, kept = None, False
    try:
        # held while we live: a killed packing's folder can be told from a working one's
        folder, lock = _claimed(out, json.dumps(job, sort_keys=True), made)
        made = [folder]
        yield folder
    except keeping:
        kept = bool(made and finished(made[0]))
        if kept:
            _tidy(made[0])
        raise
    finally:
        if not kept:
            for folder in made:
                shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def finished(folder: Path) -> list[str]:
    """Stems of the shards that are finished: their record (see `shards.packing.shard`) is written last."""
    return sorted(path.name.removesuffix(DONE) for path in folder.glob(f"*{DONE}"))


def publish(folder: Path, out: Path, overwrite: bool) -> None:
    """Gives the finished folder its name; what was there is removed after the change, not before.

    Raises:
        ConfigError: `out` was filled since `check_target`.
    """
    for path in folder.iterdir():  # the job, the records, and what a writer began whose driver is dead
        if not _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    sync_folder(folder)
    if overwrite and out.exists():
        check_target(out, overwrite)
        turn = _lock(out.parent, wait=True)
        try:
            exchange(folder, out)  # the workspace, which now holds the old data, is removed by its owner
            _clear_exchanged(out)
        finally:
            _unlock(turn)
    else:
        try:
            folder.rename(out)  # onto nothing or an empty folder; the system refuses any other
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ConfigError(
                f"--out {out}: another packing finished there meanwhile; choose another folder, or --overwrite to "
                "replace it"
            ) from error
    sync_folder(out.parent)


def _clear_exchanged(out: Path) -> None:
    """Removes old data that stayed behind where `exchange` takes several steps and was killed between them."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.\d+\.old")
    for path in out.parent.iterdir():
        if ours.fullmatch(path.name) and (path / FILE).is_file() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _claimed(out: Path, job: str, made: list[Path]) -> tuple[Path, int | None]:
    """The workspace of this job that a killed packing left, tidied, or a new one; and what locks it. Others' go.

    One packing at a time does this: between its making and its locking a folder looks like a stale one.

    Args:
        made: gets a new one as soon as it is there: a signal may come at any moment.
    """
    turn = _lock(out.parent, wait=True)
    try:
        prefix = f".{out.name}.packing-"
        ours = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")  # as mkdtemp has it: another's target may be a.packing-b
        taken: tuple[Path, int | None] | None = None
        # of several, the one with most in it
        left = [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]
        for stale in sorted(left, key=lambda folder: -len(finished(folder))):
            if (lock := _lock(stale)) is None:
                continue
            if not taken and _job_of(stale) == job:
                taken = stale, lock
            else:
                shutil.rmtree(stale, ignore_errors=True)
                _unlock(lock)
        if taken:
            _tidy(taken[0])
            return taken
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        made.append(folder)
        folder.chmod(0o777 & ~_umask())
        lock = _lock(folder)
        (folder / JOB).write_text(job, encoding="utf-8")
        return folder, lock
    finally:
        _unlock(turn)


def _job_of(folder: Path) -> str:
    """The job that a workspace is of, '' where it does not say, or somebody else made it."""
    try:
        if folder.lstat().st_uid != os.geteuid() or folder.is_symlink():
            return ""
        return (folder / JOB).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _tidy(folder: Path) -> None:
    """Removes whatever belongs to no finished shard."""
    keep = {JOB} | {f"{stem}{suffix}" for stem in finished(folder) for suffix in (DONE, ".tar", ".arrow")}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()


def _lock(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that locks the folder; None where another process holds it, it is gone, or locks are not to be had.

    Args:
        wait: until the other process lets go of it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    _held.add(descriptor)
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        _held.discard(descriptor)
        os.close(descriptor)


_held: set[int] = set()
"""Descriptors of this process that lock a folder."""


def _let_go() -> None:
    """A forked writer that is busy longer than its driver lives must not keep the next from what that left."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
