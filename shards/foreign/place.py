"""Where the index of foreign tars goes, and how it gets there: tables first, ``index.json`` last, all at once.

A table's name has a part of its checksum, so that a new index's tables lie beside those of the old one until the new
``index.json`` takes its place.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from shards.errors import ConfigError, DataError, MmsaError, TransientError
from shards.files import write_atomic
from shards.foreign.scan import TABLES, Scanned
from shards.index import FILE, Index


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
        self._tars = [tar.absolute().parent.resolve() / tar.name for tar in tars]  # a link keeps its own name
        common = Path(os.path.commonpath([tar.parent for tar in self._tars]))
        self.folder = out.resolve() if out else common
        self._links = self.folder != common
        self.urls = [tar.relative_to(common).as_posix() for tar in self._tars]
        self._old = self._existing(overwrite)
        self._made: list[Path] = []
        self._check()

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Makes the folder. When what is done inside fails, all that was written there is gone afterwards."""
        made = [path for path in (self.folder / TABLES, self.folder) if not path.exists()]
        try:
            (self.folder / TABLES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        try:
            with self._alone():
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
        """Writes the table of a tar, and links to the tar where it is elsewhere."""
        if self._links:
            self._link(self.folder / scanned.shard.url, self._tars[number].resolve())
        table = self.folder / scanned.shard.table
        table.parent.mkdir(parents=True, exist_ok=True)
        if not table.exists():
            self._made.append(table)
        write_atomic(table, scanned.table)

    def save(self, index: Index) -> None:
        """The index, and then nothing of the old one is left."""
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
            try:
                url.encode()
                wrong = "a backslash" if "\\" in url else None
            except UnicodeEncodeError:
                wrong = "bytes that are no UTF-8"
            if wrong:
                raise ConfigError(f"{str(tar)!r}: its name has {wrong}, which an index cannot hold; rename it")
            other = seen.setdefault(tar.resolve(), url)
            if other != url:
                raise ConfigError(f"{url} and {other} are the same file; give it once")
        target = self.folder if self.folder.exists() else next(p for p in self.folder.parents if p.exists())
        if not target.is_dir() or not os.access(target, os.W_OK | os.X_OK):
            raise self._unwritable(None)

    def _existing(self, overwrite: bool) -> Index | None:
        if not (self.folder / FILE).exists():
            return None
        if not overwrite:
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

    def _link(self, link: Path, tar: Path) -> None:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.resolve() == tar:
            return
        ours = self._old is not None and link.is_symlink()
        if (link.exists() or link.is_symlink()) and not ours:
            raise ConfigError(f"{link} is there already, and is not the tar to be indexed; choose another --out")
        if ours:
            link.unlink()
        else:
            self._made.append(link)
        link.symlink_to(tar)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self.folder / TABLES, os.O_RDONLY)
        try:
            with suppress(OSError):  # not every file system has locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"{self.folder}: another mmsa-dist index is writing there; wait until it has ended"
                    ) from None
            yield
        finally:
            os.close(descriptor)
