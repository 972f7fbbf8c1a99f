"""A tar read strictly, once and in order: its members, its checksum, and nothing taken on trust.

`tarfile` would believe a header that asks for gigabytes, and takes a tar that was cut between two members for a shorter
one. Here a tar ends where it says that it ends, and whatever is not a plain file stops the reading.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from types import TracebackType
from typing import Self

from shards.errors import DataError, TransientError

_PIECE = 1 << 20
_LONGEST_HEADER = 1 << 16
"""Bytes of an extended header at most: names are shorter by far."""

_FILE, _FOLDER = b"0\0", b"5"
_EXTENDED, _GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"7": "a contiguous file of an old system",
    b"S": "a sparse file",
}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip, then tar"),
}


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in the tar: `size` bytes from `offset` on; its header begins at `begin`."""

    name: str
    begin: int
    offset: int
    size: int


class TarReader:
    """Reads one tar from its beginning to its end.

    Attributes:
        size: of the file, in bytes.

    Raises:
        DataError: in any method: the file is not a whole, plain tar; says where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        self.size = os.fstat(self._file.fileno()).st_size
        self._at = 0
        self._hash = hashlib.sha256()
        self._member: Member | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of everything read so far: of the whole file once `members` has ended."""
        return self._hash.hexdigest()

    def members(self) -> Iterator[Member]:
        """The plain files, in their order; folders are passed over."""
        self._check_kind()
        told: dict[str, str] = {}  # by extended headers, for the next member
        while True:
            begin = self._at
            header = self._take(BLOCKSIZE, "the header of its next member")
            if not any(header):
                return self._check_end()
            self._check_sum(header, begin)
            kind, size = header[156:157], _number(header[124:136])
            if kind in (_EXTENDED, _GLOBAL, _LONG_NAME, _LONG_LINK):
                self._extend(told, kind, size, begin)
                continue
            name = told.pop("path", None) or self._name(header, begin)
            size, told = self._size(told.pop("size", None), size, name), {}
            if kind in _FILE:
                self._member = Member(name, begin, self._at, size)
                yield self._member
                if self._member:
                    self._pass_over(size)
                self._pass_over(-size % BLOCKSIZE)
            elif kind != _FOLDER or size:
                what = _REFUSED.get(kind, f"of the unknown type {kind!r}" if kind != _FOLDER else "a folder with bytes")
                raise DataError(
                    f"{self.path}: member {name!r} is {what}; shards hold plain files only: write the tar anew"
                )

    def payload(self) -> bytes:
        """The bytes of the member that `members` has just given. Once each."""
        assert self._member is not None
        member, self._member = self._member, None
        return self._take(member.size, f"member {member.name!r}")

    # --- what is not a member

    def _check_kind(self) -> None:
        head = os.pread(self._file.fileno(), 6, 0)
        for magic, (what, remedy) in _COMPRESSED.items():
            if head.startswith(magic):
                raise DataError(
                    f"{self.path}: is compressed ({what}), so no sample in it can be found without reading all before "
                    f"it; {remedy} it first"
                )

    def _check_sum(self, header: bytes, at: int) -> None:
        """The sum of the header's bytes, its own field taken as blanks; some old programs summed signed bytes."""
        told, plain = _number(header[148:156]), header[:148] + b" " * 8 + header[156:]
        if told not in (sum(plain), sum(plain) - 256 * sum(byte > 127 for byte in plain)):
            raise DataError(
                f"{self.path}: no member's header at byte {at:,} (its checksum is wrong): it is no tar, or damaged; "
                "copy it again"
            )

    def _extend(self, told: dict[str, str], kind: bytes, size: int, at: int) -> None:
        if not 0 <= size <= _LONGEST_HEADER:
            raise DataError(
                f"{self.path}: the extended header at byte {at:,} says that it has {size:,} bytes, at most "
                f"{_LONGEST_HEADER:,} are read; write the tar anew"
            )
        data = self._take(size, "an extended header")
        self._take(-size % BLOCKSIZE, "an extended header")
        if kind == _LONG_NAME:
            told["path"] = self._text(data.rstrip(b"\0"), at)
        elif kind != _LONG_LINK:
            records = self._records(data, at)
            wrong = [key for key in records if key.startswith("GNU.sparse")]
            wrong += [key for key in ("path", "size") if kind == _GLOBAL and key in records]
            if wrong:
                raise DataError(
                    f"{self.path}: the extended header at byte {at:,} says {wrong[0]!r}, as sparse or joined files "
                    "do; shards hold plain files only: write the tar anew"
                )
            if kind == _EXTENDED:
                told |= {key: value for key, value in records.items() if key in ("path", "size")}

    def _records(self, data: bytes, at: int) -> dict[str, str]:
        """``LENGTH KEY=VALUE\\n`` …, as POSIX has it."""
        records: dict[str, str] = {}
        while data:
            digits, _, _ = data[:8].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            key, equals, value = data[len(digits) + 1 : length].partition(b"=")
            if not len(digits) + 1 < length <= len(data) or not equals or not value.endswith(b"\n"):
                raise DataError(f"{self.path}: the extended header at byte {at:,} does not parse; write the tar anew")
            known = key in (b"path", b"size")
            records[key.decode("utf-8", "replace")] = self._text(value[:-1], at) if known else ""
            data = data[length:]
        return records

    def _name(self, header: bytes, at: int) -> str:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        return self._text(prefix + b"/" + name if prefix else name, at)

    def _text(self, name: bytes, at: int) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: the name {name[:80]!r} at byte {at:,} is no UTF-8; rename it") from error

    def _size(self, extended: str | None, size: int, name: str) -> int:
        """Of a member, known to lie within the file."""
        if extended is not None:
            size = int(extended) if extended.isascii() and extended.isdigit() and len(extended) < 20 else -1
        if "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise DataError(
                f"{self.path}: member {name[:200]!r} has a path that leads out of the shard; write the tar anew"
            )
        if size < 0:
            raise DataError(f"{self.path}: member {name[:200]!r} has no valid size in its header; write the tar anew")
        if self._at + size > self.size:
            raise DataError(
                f"{self.path}: member {name[:200]!r} should have {size:,} bytes, the file ends after "
                f"{self.size - self._at:,}: it is truncated; copy it again"
            )
        return size

    def _check_end(self) -> None:
        """Behind the end there is nothing: of tars joined with `cat` all but the first would be lost without a word."""
        end = self._at
        while self._at < self.size:
            if any(self._take(min(_PIECE, self.size - self._at), "its end")):
                raise DataError(
                    f"{self.path}: ends at byte {end:,} but more follows, as in tars that were joined with cat; "
                    "join them with tar --concatenate, or index each"
                )

    # --- bytes

    def _take(self, size: int, what: str) -> bytes:
        """The next bytes. Every size that comes here is known to be small, or to lie within the file."""
        pieces, left = [], size
        while left:
            try:
                piece = self._file.read(left)
            except OSError as error:
                raise TransientError(f"{self.path}: cannot be read at byte {self._at:,}: {error.strerror}") from error
            if not piece:
                raise DataError(
                    f"{self.path}: ends at byte {self._at:,}, in {what}: it is truncated (a whole tar ends with empty "
                    "blocks); copy it again"
                )
            self._hash.update(piece)
            self._at += len(piece)
            left -= len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _pass_over(self, size: int) -> None:
        while size:
            size -= len(self._take(min(_PIECE, size), "a member"))


def _number(field: bytes) -> int:
    """A number in a header: octal digits, or big-endian behind a byte 0x80 (GNU); -1 where it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.partition(b"\0")[0].strip() or b"0"
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
