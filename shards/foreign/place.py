"""Where the index of foreign tars goes, and how it gets there: tables first, ``index.json`` last, all at once.

A table's name has a part of its checksum, so that a new index's tables lie beside those of the old one until the new
``index.json`` takes its place.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from unicodedata import category

from shards.errors import ConfigError, DataError, MmsaError, TransientError
from shards.files import is_utf8, write_atomic
from shards.foreign.scan import TABLES, Scanned
from shards.index import FILE, Index
from shards.remote.url import names_address
from shards.workspace import resolved

_TABLE = re.compile(r"(?P<dot>\.)?.+\.[0-9a-f]{12}\.arrow(?(dot)\.\d+\.tmp)")
"""What `Place.add` calls a table, and a table that is not whole yet."""


class Place:
    """The folder of an index.

    Args:
        tars: that are indexed.
        out: a folder for the index that links to the tars; None puts it into their own.
        overwrite: an index of such tars that is there may be replaced.

    Attributes:
        folder: of the index.
        urls: names of the tars in it, in their order.

    Raises:
        ConfigError: it is taken, or may not be written.
    """

    def __init__(self, tars: Sequence[Path], out: Path | None, overwrite: bool) -> None:
        if out and names_address(out):
            raise ConfigError(f"--out {out} is an address; put the index into a folder here, then copy it there whole")
        self._tars = [tar.absolute().parent.resolve() / tar.name for tar in tars]  # a link keeps its own name
        common = Path(os.path.commonpath([tar.parent for tar in self._tars]))
        self.folder = resolved(out) if out else common
        self._links = self.folder != common
        self.urls = [tar.relative_to(common).as_posix() for tar in self._tars]
        self._overwrite = overwrite
        self._made: list[Path] = []
        self._targets: dict[Path, Path] = {}  # link -> tar
        try:
            self._old = self._existing()
            self._check()
        except OSError as error:
            raise self._failed(error) from error

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Makes the folder. When what is done inside fails, all that was written there is gone afterwards."""
        made = [path for path in (self.folder / TABLES, self.folder) if not path.exists()]
        try:
            (self.folder / TABLES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        try:
            with self._alone() as alone:
                if alone:
                    self._old = self._existing()  # it may be there only now
                    self._sweep()
                yield self
        except BaseException as error:
            for path in self._made:
                path.unlink(missing_ok=True)
            for folder in [*{path.parent for path in self._made}, *made]:
                with suppress(OSError):  # others are in it
                    folder.rmdir()
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise

    def add(self, number: int, scanned: Scanned) -> None:
        """Writes the table of a tar; where the tar is elsewhere, `save` will link to it."""
        if self._links:
            link, tar = self.folder / scanned.shard.url, self._tars[number].resolve()
            self._check_free(link, tar)
            self._targets[link] = tar
        table = self.folder / scanned.shard.table
        table.parent.mkdir(parents=True, exist_ok=True)
        if not table.exists():
            self._made.append(table)
        write_atomic(table, scanned.table)

    def save(self, index: Index) -> None:
        """The links and the index, and then nothing of the old one is left."""
        with self._linked():
            index.save()
        self._made = []
        kept = {shard.table for shard in index.shards} | {shard.url for shard in index.shards}
        for old in self._old.shards if self._old else ():
            for name in {old.table, old.url} - kept:
                path = self.folder / name
                if name == old.table or path.is_symlink():  # a tar is never removed
                    path.unlink(missing_ok=True)

    # --- what may not be

    def _check(self) -> None:
        seen: dict[Path, str] = {}
        for tar, url in zip(self._tars, self.urls, strict=True):
            if wrong := _wrong(url):
                raise ConfigError(f"{str(tar)!r}: its name has {wrong}, which an index cannot hold; rename it")
            other = seen.setdefault(tar.resolve(), url)
            if other != url:
                raise ConfigError(f"{url} and {other} are the same file; give it once")
        if not is_utf8(self.folder):
            raise ConfigError(f"{str(self.folder)!r}: its name has bytes that are no UTF-8; rename it")
        target = self.folder if self.folder.exists() else next(p for p in self.folder.parents if p.exists())
        if not target.is_dir() or not os.access(target, os.W_OK | os.X_OK):
            raise self._unwritable(None)

    def _existing(self) -> Index | None:
        if not (self.folder / FILE).exists():
            return None
        if not self._overwrite:
            raise ConfigError(
                f"{self.folder / FILE} is there already; --overwrite replaces it, --out FOLDER puts the new one "
                "elsewhere"
            )
        try:
            index = Index.load(self.folder)
        except DataError as error:
            raise ConfigError(
                f"{self.folder / FILE} is not an index that this tool could read ({error}); remove it yourself, or "
                "put the new one elsewhere with --out FOLDER"
            ) from error
        if not index.foreign:
            raise ConfigError(
                f"{self.folder} was packed by mmsa-dist, so it has its index; to index it differently use --out FOLDER"
            )
        return index

    def _failed(self, error: OSError) -> MmsaError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            return self._unwritable(error)
        return TransientError(
            f"{self.folder}: {error.strerror}; what was written is removed again, the tars are untouched: make room, "
            "or put the index elsewhere with --out FOLDER"
        )

    def _unwritable(self, error: OSError | None) -> ConfigError:
        why = f" ({error.strerror})" if error else ""
        if self._links:
            return ConfigError(f"--out {self.folder} cannot be written{why}; choose another folder")
        return ConfigError(
            f"{self.folder}, where the tars are, cannot be written{why}; --out FOLDER puts the index elsewhere, with "
            "links to the tars"
        )

    # --- writing

    def _check_free(self, link: Path, tar: Path) -> None:
        if not link.is_symlink():
            taken = link.exists()
        else:  # an old index of ours may have made it
            taken = self._old is None and Path(os.path.realpath(link)) != tar
        if taken:
            raise ConfigError(f"{link} is there already, and is not the tar to be indexed; choose another --out")

    @contextmanager
    def _linked(self) -> Iterator[None]:
        """All links lead to their tars; and where they led before, when what is done inside fails."""
        before: dict[Path, Path] = {}
        try:
            for link, tar in self._targets.items():
                self._check_free(link, tar)
                if link.is_symlink():
                    before[link] = link.readlink()
                else:
                    self._made.append(link)
                    link.parent.mkdir(parents=True, exist_ok=True)
                _point(link, tar)
            yield
        except BaseException:
            for link, old in before.items():
                _point(link, old)
            raise

    def _sweep(self) -> None:
        """Removes the tables of an indexing that was killed: no index names them."""
        named = {self.folder / shard.table for shard in self._old.shards} if self._old else set()
        for path in sorted((self.folder / TABLES).rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # something is in it
                    path.rmdir()
            elif path not in named and _TABLE.fullmatch(path.name):
                path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether it is certain that nobody else writes there."""
        descriptor = os.open(self.folder / TABLES, os.O_RDONLY)
        certain = False
        try:
            with suppress(OSError):  # not every file system has locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    certain = True
                except BlockingIOError:
                    raise ConfigError(
                        f"{self.folder}: another mmsa-dist index is writing there; wait until it has ended"
                    ) from None
            yield certain
        finally:
            os.close(descriptor)


def _point(link: Path, target: Path) -> None:
    """Makes the link lead there, in one step."""
    temporary = link.with_name(f".{os.getpid()}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _wrong(url: str) -> str | None:
    """What an index cannot hold in the name of a tar."""
    if not is_utf8(url):
        return "bytes that are no UTF-8"
    if "\\" in url:
        return "a backslash"
    return "control characters" if any(category(letter) == "Cc" for letter in url) else None
