"""Random access to the samples of a packed data set: by number, from memory-mapped tars, without copying.

A sample's arrays are views into its shard's mapping; what converts them to float32 (`shards.batch`) is the only copy.
The safetensors payload is parsed here, in a few microseconds and with every bound checked, because a foreign or damaged
header must end in a sentence; nothing is decoded that the index did not announce.

Shapes: T steps of a sample in a modality, D width.
"""

import json
import math
import mmap
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from tarfile import BLOCKSIZE
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import DataError, TransientError
from shards.index import Index
from shards.tar import TENSORS, escape_key
from shards.trust import Expected
from shards.utterance import MODALITIES, Utterance

_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
_DIMENSIONS = {"text": 2, "audio": 2, "vision": 2, "tokens": 1}
_MAX_HEADER = 1 << 14  # bytes; four tensors need about 300
_MAX_JSON = 1 << 24
_NAME = 100
"""Bytes of a member's name in its tar header; of a longer one they are its beginning."""


class ShardReader:
    """Reads samples by number. Threads may share one.

    Args:
        index: of the data set.
        verify: check each file's sha256 before its first use, once per node (its size always is).
        open_shards: files kept mapped; twice the plan's window, so that a step that straddles blocks opens none twice.
    """

    def __init__(self, index: Index, verify: bool = True, open_shards: int = 16) -> None:
        assert open_shards > 0, open_shards
        self.index = index
        self._verify = verify
        self._capacity = open_shards
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = Lock()

    def sample(self, number: int, with_text: bool = False) -> Utterance:
        """The sample with this number.

        Its arrays are views into the mapped shard, float16 or float32 as stored: copy what is to be changed. Labels are
        the table's float32 values.

        Args:
            with_text: also read the transcript, where the data set has some (parses the sample's JSON member).

        Raises:
            DataError: the shard or its table is missing, damaged, or they disagree.
        """
        shard_no, row = self.index.locate(int(number))
        return self._shard(shard_no).sample(row, with_text)

    def samples(self, numbers: Iterable[int], with_text: bool = False) -> list[Utterance]:
        """`sample` for each of `numbers`, in their order."""
        return [self.sample(number, with_text) for number in numbers]

    def close(self) -> None:
        """Forgets all mapped files; each is unmapped when the last array that looks into it is gone."""
        with self._lock:
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shard(self, shard_no: int) -> "_Shard":
        with self._lock:
            found = self._open.get(shard_no)
            if found is not None:
                self._open.move_to_end(shard_no)
                return found
        # outside the lock: while one thread verifies a file, others read theirs
        opened = self._opened(shard_no)
        with self._lock:
            found = self._open.setdefault(shard_no, opened)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)
            return found

    def _opened(self, shard_no: int) -> "_Shard":
        shard = self.index.shards[shard_no]
        tar = Expected(self.index.tar_path(shard_no), shard.bytes, shard.sha256)
        table = Expected(self.index.table_path(shard_no), shard.table_bytes, shard.table_sha256)
        for file in (table, tar):
            if self._verify:
                file.check()
            else:
                file.check_size()
        return _Shard(self.index, shard_no)


class _Shard:
    """One mapped tar with its table."""

    def __init__(self, index: Index, shard_no: int) -> None:
        self._index = index
        self._path = index.tar_path(shard_no)
        size = index.shards[shard_no].bytes
        table = index.table(shard_no)
        try:
            table.validate(full=True)  # a damaged Arrow file must not send us outside its buffers
        except pa.ArrowException as error:
            raise DataError(f"{index.table_path(shard_no)}: damaged ({error}); copy it again or pack again") from error
        self._keys = table.column("key").combine_chunks()
        columns = {name: table.column(name).to_numpy() for name in table.column_names if name not in ("key", "split")}
        self._offset, self._size = columns["offset"], columns["size"]
        self._json_offset, self._json_size = columns["json_offset"], columns["json_size"]
        self._labels = {task: columns[f"label_{task}"] for task in index.tasks}
        self._lengths = {name: columns[f"length_{name}"] for name in MODALITIES} | {"tokens": columns["n_tokens"]}
        self._split = index.shards[shard_no].split
        for offset, length in ((self._offset, self._size), (self._json_offset, self._json_size)):
            outside = np.flatnonzero((offset < 0) | (length < 0) | (length > size) | (offset > size - length))
            if len(outside):
                row = int(outside[0])
                raise self._wrong(
                    row, f"bytes {offset[row]} + {length[row]} in the table", f"a range within {size} bytes"
                )
        try:
            with self._path.open("rb") as file:
                # copy-on-write, not read-only: torch takes only writable arrays. What is written never reaches the file
                self._data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except ValueError as error:  # it has shrunk since its size was checked; to map and touch it would be a SIGBUS
            raise DataError(f"{self._path}: {error}, expected {size} bytes; copy it again or pack again") from error
        except OSError as error:
            raise TransientError(
                f"{self._path}: cannot be mapped ({error.strerror}); see ulimit -n and free memory"
            ) from error

    def sample(self, row: int, with_text: bool) -> Utterance:
        arrays = self._arrays(row)
        labels = {task: float(values[row]) for task, values in self._labels.items()}
        tokens = arrays.pop("tokens", None)
        return Utterance(
            key=self._key(row),
            split=self._split,
            modalities=arrays,
            labels={task: label for task, label in labels.items() if not math.isnan(label)},
            raw_text=self._text(row) if with_text and self._index.has_raw_text else None,
            tokens=tokens,
        )

    def _arrays(self, row: int) -> dict[str, NDArray[Any]]:
        """Views of the sample's tensors, by name, checked against the table and the index."""
        offset, size = int(self._offset[row]), int(self._size[row])
        # labels stand in the table, features in the tar: that they are the same sample's is worth a comparison
        begin = offset - BLOCKSIZE
        member, own = (
            self._data[begin : begin + _NAME].rstrip(b"\0"),
            (escape_key(self._key(row)) + TENSORS).encode()[:_NAME],
        )
        if member != own:
            raise self._wrong(row, f"its data belongs to member {member!r}", repr(own))
        try:
            tensors = _tensors(self._data, offset, size)
        except _BadPayloadError as error:
            raise self._wrong(row, f"its safetensors member has {error.found}", error.expected) from error
        arrays = {}
        for tensor in tensors:
            arrays[tensor.name] = np.frombuffer(self._data, tensor.dtype, tensor.count, tensor.offset).reshape(
                tensor.shape
            )
        for name, lengths in self._lengths.items():
            array, expected = arrays.get(name), int(lengths[row])
            found = 0 if array is None else len(array)
            if found != expected:
                raise self._wrong(row, f"{name} has {found} steps", f"the table's {expected}")
            if array is not None and name != "tokens" and array.shape[1] != self._width(name):
                raise self._wrong(row, f"{name} is {array.shape[1]} wide", f"the index's {self._width(name)}")
        return arrays

    def _key(self, row: int) -> str:
        key: str = self._keys[row].as_py()
        return key

    def _width(self, modality: str) -> int:
        known = self._index.modalities.get(modality)
        return known.width if known else 0

    def _text(self, row: int) -> str | None:
        """The transcript in the sample's JSON member."""
        offset, size = int(self._json_offset[row]), int(self._json_size[row])
        if size > _MAX_JSON:
            raise self._wrong(row, f"its JSON member has {size} bytes", f"at most {_MAX_JSON}")
        try:
            member = json.loads(self._data[offset : offset + size])
            key, text = member["key"], member.get("raw_text")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise self._wrong(row, f"its JSON member does not parse ({error})", "an object with a key") from error
        if key != self._key(row) or not isinstance(text, str | None):
            raise self._wrong(
                row, f"its JSON member is of {key!r} with a text {type(text).__name__}", "the same key and a text"
            )
        return text

    def _wrong(self, row: int, found: str, expected: str) -> DataError:
        return DataError(
            f"{self._path}: sample {self._key(row)!r}: {found}, expected {expected}; the shard and its index "
            f"disagree: run mmsa-dist verify {self._index.folder}, then copy the data set again or pack again"
        )


class _BadPayloadError(Exception):
    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found, expected)
        self.found, self.expected = found, expected


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor in a file: `count` numbers at byte `offset`."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    offset: int


def _tensors(data: mmap.mmap, offset: int, size: int) -> list[_Tensor]:
    """The tensors of the safetensors payload at ``data[offset : offset + size]``.

    The format: 8 bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape, data_offsets),
    the numbers; https://github.com/huggingface/safetensors.
    """
    if size < 8:
        raise _BadPayloadError(f"{size} bytes", "at least 8")
    length = int.from_bytes(data[offset : offset + 8], "little")
    limit = min(_MAX_HEADER, size - 8)
    if length > limit:
        raise _BadPayloadError(f"a header of {length} bytes", f"at most {limit}")
    begin = offset + 8 + length
    try:
        header = json.loads(data[offset + 8 : begin])
        return [_tensor(name, spec, begin, offset + size) for name, spec in header.items() if name != "__metadata__"]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _BadPayloadError(f"a header that does not parse ({error})", "a JSON object of tensors") from error


def _tensor(name: str, spec: dict[str, Any], begin: int, end: int) -> _Tensor:
    """One entry of a header, whose offsets count from `begin`; the payload ends at `end`."""
    dimensions = _DIMENSIONS.get(name)
    if dimensions is None:
        raise _BadPayloadError(f"a tensor called {name!r}", f"some of {', '.join(_DIMENSIONS)}")
    dtype = _DTYPES.get(spec["dtype"])
    if dtype is None or (dtype.kind == "i") != (name == "tokens"):
        raise _BadPayloadError(f"{name} of dtype {spec['dtype']}", "F16 or F32 (I32 for tokens)")
    shape, (first, last) = tuple(spec["shape"]), spec["data_offsets"]
    if len(shape) != dimensions or not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise _BadPayloadError(f"{name} of shape {shape} at {first, last}", f"{dimensions} dimensions and two offsets")
    count = math.prod(shape)
    if first > last or begin + last > end or last - first != count * dtype.itemsize:
        wanted = f"{count * dtype.itemsize} for its shape {shape}, within {end - begin}"
        raise _BadPayloadError(f"{name} in bytes {first} to {last}", wanted)
    return _Tensor(name, dtype, shape, count, begin + first)
