"""What tells a file from the one that it was: an input that is changed while it is packed would be neither."""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shards.errors import DataError


@dataclass(frozen=True)
class Stamp:
    """A file as it was at one time.

    Attributes:
        path: of it.
        told: its device, inode, size in bytes, and times of modification and change in ns.
    """

    path: Path
    told: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, path: Path, expected: str = "a feature pickle") -> Self:
        """The file as it is now.

        Args:
            expected: what it is to be, for the sentence where it is missing.

        Raises:
            DataError: there is none; or it is a pipe or a device, on which a reader would wait for ever.
        """
        try:
            found = path.stat()
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file; expected {expected}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        _check_kind(path, found)
        return cls(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))

    def check(self) -> None:
        """That it is the same still.

        Raises:
            DataError: it is not, or not there any more.
        """
        if Stamp.of(self.path) != self:
            raise DataError(
                f"{self.path}: changed while it was packed; nothing of it is kept: pack it again when it is whole"
            )


def check_file(path: Path) -> None:
    """That a reader would not wait for ever, nor read it once and its checksum of nothing: what is missing it says.

    Raises:
        DataError: it is a pipe or a device.
    """
    with suppress(OSError):
        _check_kind(path, path.stat())


def _check_kind(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path}: is a pipe or a device, expected a file; write it to the disk first")
