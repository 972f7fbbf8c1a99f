"""One shard being written: a standard WebDataset tar, its Arrow table, and where each payload lies in the tar.

A sample is two members, ``<escaped key>.json`` and ``<escaped key>.safetensors``. Everything that could differ between
two packings (times, owners, modes) is fixed, so the same samples give the same bytes.
"""

import hashlib
import json
import math
import os
import re
import socket
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self
from urllib.parse import quote, unquote

import numpy as np

from shards.errors import DataError
from shards.files import begin_writing, sync_folder
from shards.index import Shard
from shards.tables import table_bytes, table_schema
from shards.utterance import MODALITIES, Utterance

JSON, TENSORS = ".json", ".safetensors"
"""Suffixes of a sample's members, in their order."""

_PLAIN = re.compile(r"[A-Za-z0-9_$-]+")
"""A key that is its own member name."""

_AHEAD = 8 * 2**20
"""Bytes after which the disk is set to work: it writes while the next samples are made ready."""


def escape_key(key: str) -> str:
    """A key as a member name: WebDataset cuts at the first dot and reads a slash as a folder, so both are escaped.

    Raises:
        DataError: the key is empty or no valid unicode.
    """
    if _PLAIN.fullmatch(key):
        return key
    try:
        escaped = quote(key, safe="$").replace(".", "%2E").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise DataError(f"id {key!r} is not valid unicode; rename it") from error
    if not escaped:
        raise DataError("a sample has an empty id; every sample needs one of its own")
    return escaped


def unescape_key(name: str) -> str:
    """The key that `escape_key` made `name` of."""
    return unquote(name, errors="strict")


class Members(NamedTuple):
    """A sample as it stands in the tar: both members with their headers and padding, joined.

    Attributes:
        data: all bytes of it.
        json_offset, json_size, offset, size: where the payloads of the two members lie in `data`.
    """

    data: bytes
    json_offset: int
    json_size: int
    offset: int
    size: int

    @classmethod
    def of(cls, utterance: Utterance, tasks: tuple[str, ...]) -> Self:
        """Describes and joins the sample; `utterance.modalities` are stored in the dtype they have."""
        name = escape_key(utterance.key)
        labels = {task: _short(utterance.labels[task]) for task in tasks if task in utterance.labels}
        described = {"key": utterance.key, "split": utterance.split, "labels": labels}
        if utterance.raw_text is not None:
            described["raw_text"] = utterance.raw_text
        text = _JSON.encode(described).encode()
        arrays = utterance.modalities
        if utterance.tokens is not None:
            arrays = {**arrays, "tokens": utterance.tokens}
        tensors, size = safetensors(arrays)
        header = _header(name + JSON, len(text))
        before = b"".join([header, text, _padding(len(text)), _header(name + TENSORS, size)])
        data = b"".join([before, *tensors, _padding(size)])
        return cls(data, len(header), len(text), len(before), size)


class ShardWriter:
    """Writes samples of one split into ``<stem>.tar``; `close` adds ``<stem>.arrow`` and returns the shard's entry.

    Until then the tar has another name: under its own there is never a part of it.

    Args:
        folder: where both files go.
        stem: their name without suffix, e.g. ``train-00000``.
        tasks: labels that the data set has.
    """

    def __init__(self, folder: Path, stem: str, split: str, tasks: tuple[str, ...]) -> None:
        self.bytes = self._begun = 0
        self._folder, self._stem, self._split, self._tasks = folder, stem, split, tasks
        self._hash = hashlib.sha256()
        self._rows: list[tuple[Any, ...]] = []
        self._file = (folder / f"{stem}.tar{_unfinished()}").open("wb")

    @property
    def samples(self) -> int:
        return len(self._rows)

    def add(self, utterance: Utterance) -> None:
        """Appends a sample; `utterance.modalities` are stored in the dtype they have."""
        data, json_offset, json_size, offset, size = Members.of(utterance, self._tasks)
        modalities, labels, tokens = utterance.modalities, utterance.labels, utterance.tokens
        row = (
            utterance.key,
            self.bytes + offset,
            size,
            self.bytes + json_offset,
            json_size,
            utterance.split,
            *[len(modalities[m]) if m in modalities else 0 for m in MODALITIES],
            0 if tokens is None else len(tokens),
            *[labels.get(task, math.nan) for task in self._tasks],
        )
        self._write(data)
        self._rows.append(row)

    def close(self) -> Shard:
        """Ends the tar, writes the table, both onto the disk."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))
        tar, table = self._folder / f"{self._stem}.tar", self._folder / f"{self._stem}.arrow"
        _finish(self._file, tar)
        schema = table_schema(self._tasks)
        columns = table_bytes(dict(zip(schema.names, zip(*self._rows, strict=True), strict=True)), schema)
        with (self._folder / f"{self._stem}.arrow{_unfinished()}").open("wb") as file:
            file.write(columns)
            _finish(file, table)
        sync_folder(self._folder)
        return Shard(
            url=tar.name,
            bytes=self.bytes,
            sha256=self._hash.hexdigest(),
            samples=self.samples,
            split=self._split,
            table=table.name,
            table_bytes=len(columns),
            table_sha256=hashlib.sha256(columns).hexdigest(),
        )

    def abandon(self) -> None:
        """Removes the half of a tar that there is."""
        with suppress(OSError):  # a full disk is full again when the rest of the buffer is flushed
            self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)
        if self.bytes - self._begun >= _AHEAD:
            begin_writing(self._file.fileno(), self._begun, self.bytes - self._begun)
            self._begun = self.bytes


def safetensors(arrays: dict[str, np.ndarray]) -> tuple[list[bytes | memoryview], int]:
    """The arrays as one safetensors file, byte for byte what `safetensors.numpy.save` gives, but without its copies.

    Args:
        arrays: name (plain letters) -> array of float32, float16 or int32.

    Returns:
        Pieces to be joined, and how many bytes they are.
    """
    header = Header.of([(name, CODES[array.dtype], array.shape[1:]) for name, array in arrays.items()])
    ordered = [np.ascontiguousarray(arrays[name]) for name in header.names]
    numbers: list[int] = []
    begin = 0
    for array in ordered:
        end = begin + array.nbytes
        numbers += (len(array), begin, end)
        begin = end
    told = header.filled(numbers)
    return [told, *(array.data for array in ordered)], len(told) + begin


@dataclass(frozen=True, slots=True)
class Header:
    """What precedes the numbers of certain tensors: their names and types are fixed, their first dimensions are not.

    Attributes:
        names: of the tensors as they follow one another: wide types first, of equals by type, then by name.
        pattern: of the JSON, with three numbers left open for each: T, first byte, last byte.
    """

    names: tuple[str, ...]
    pattern: str

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Self:
        """For tensors of this name, type as in `CODES`, and shape after T, in any order."""
        return cls._of(tuple(tensors))

    @classmethod
    @lru_cache(maxsize=256)
    def _of(cls, tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> Self:
        ordered = sorted(tensors, key=lambda tensor: (-_SIZES[tensor[1]], tensor[1], tensor[0]))
        entries = []
        for name, code, width in ordered:
            shape = ",".join(["%d", *map(str, width)])
            entries.append(f'"{name}":{{"dtype":"{code}","shape":[{shape}],"data_offsets":[%d,%d]}}')
        return cls(tuple(name for name, *_ in ordered), f"{{{','.join(entries)}}}")

    def filled(self, numbers: list[int]) -> bytes:
        """The header with these numbers, three for each tensor."""
        text = (self.pattern % tuple(numbers)).encode("ascii")
        size = -(-len(text) // 8) * 8
        return size.to_bytes(8, "little") + text.ljust(size)


CODES: dict[np.dtype[Any], str] = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32", np.dtype(np.float16): "F16"}
"""What we store, as safetensors calls it."""

_SIZES = {code: dtype.itemsize for dtype, code in CODES.items()}

_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _header(name: str, size: int) -> bytes:
    """What `tarfile` writes before a member of this (ASCII) name, at a tenth of the cost where the name is short."""
    if len(name) > tarfile.LENGTH_NAME or size >= 8**11:
        return _info(name, size).tobuf(tarfile.PAX_FORMAT)
    told, digits = name.encode("ascii"), b"%011o" % size
    checksum = _EMPTY_SUM + sum(told) + sum(digits)
    return b"".join([told, _EMPTY[len(told) : 124], digits, _EMPTY[135:148], b"%06o\0 " % checksum, _EMPTY[156:]])


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info


_EMPTY = _info("", 0).tobuf(tarfile.PAX_FORMAT)
"""A header without a name: name at 0, size at 124 (11 octal digits), checksum at 148 (6 digits, NUL, blank)."""

_EMPTY_SUM = sum(_EMPTY[:124]) + sum(_EMPTY[135:148]) + 8 * ord(" ") + sum(_EMPTY[156:])
"""Sum of the bytes that never change, the checksum itself taken as blanks."""


def _padding(size: int) -> bytes:
    """Up to the next block."""
    return bytes(-size % tarfile.BLOCKSIZE)


def _unfinished() -> str:
    """Suffix of a file that is being written, by this process of this machine."""
    return f".{socket.gethostname()}-{os.getpid()}.part"


def _finish(file: BinaryIO, path: Path) -> None:
    """Onto the disk, closed, and then only given its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(path)


def _short(label: float) -> float | None:
    """The label as stored (float32) in its shortest spelling: 2.4, not 2.4000000953674316; None for a missing one."""
    return None if math.isnan(label) else float(str(np.float32(label)))
