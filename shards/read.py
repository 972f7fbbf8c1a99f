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
from dataclasses import dataclass, replace
from tarfile import BLOCKSIZE
from threading import Lock
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.closing import Closing
from shards.errors import DataError, TransientError
from shards.foreign.arrays import DTYPES, FLOATS, INTEGERS
from shards.foreign.fields import field_of
from shards.index import Index
from shards.tar import CODES, TENSORS, Header, escape_key
from shards.utterance import Utterance

_KEPT = 8192
"""Samples of a data set whose descriptions a reader keeps: a kilobyte each, and the interpreter's time to make them
anew in each epoch, which training would wait for. Of a larger one they would be many and seldom met again."""
_MAX_HEADER = 1 << 14  # bytes; four tensors need about 300
_MAX_JSON = 1 << 24
_NAME = 100
"""Bytes of a member's name in its tar header; of a longer one they are its beginning."""


class ShardReader(Closing):
    """Reads samples by number. Threads may share one.

    Args:
        index: of the data set.
        verify: check each file's sha256 before its first use, once per node (its size always is).
        open_shards: files kept mapped; twice the plan's window, so that a step that straddles blocks opens none twice.
    """

    def __init__(self, index: Index, verify: bool = True, open_shards: int = 16) -> None:
        assert open_shards > 0, open_shards
        self.index = index
        self.verify = verify
        self.open_shards = open_shards
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = Lock()

    def sample(self, number: int, with_text: bool = False) -> Utterance:
        """The sample with this number.

        Its arrays are views into the mapped shard, float16 or float32 as stored, and others may be given the very same
        sample: copy what is to be changed. Labels are the table's float32 values.

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
            while len(self._open) > self.open_shards:
                self._open.popitem(last=False)
            return found

    def _opened(self, shard_no: int) -> "_Shard":
        table = self.index.table(shard_no, self.verify)
        tar = self.index.expected_tar(shard_no)
        kind = _ForeignShard if self.index.foreign else _Shard
        return tar.use(lambda _: kind(self.index, shard_no, table), self.verify)


class _Shard:
    """One mapped tar with its table. (Should the file shrink while it is mapped, touching it ends the process.)"""

    def __init__(self, index: Index, shard_no: int, table: pa.Table) -> None:
        self._index = index
        self._path = index.tar_path(shard_no)
        self._split = index.shards[shard_no].split
        size = index.shards[shard_no].bytes
        # lists, a few hundred rows: one element of an Arrow or NumPy array costs more than all the parsing of a sample
        rows = {name: table.column(name).to_pylist() for name in table.column_names if name != "split"}
        self._keys: list[str] = rows["key"]
        self._members = self._ranges(rows["json_offset"], rows["json_size"], size)
        self._labels = {task: rows[f"label_{task}"] for task in index.tasks}
        self._describe(rows, size)
        self._data = self._mapped(size)
        self._kept = index.num_samples <= _KEPT
        self._known: dict[int, Utterance] = {}

    def _describe(self, rows: dict[str, list[Any]], size: int) -> None:
        """What is known of the tensors."""
        self._payloads = self._ranges(rows["offset"], rows["size"], size)
        floats = np.dtype(self._index.dtype)
        held = self._index.modalities.items()
        self._tensors = [_Tensors.of(m, rows[f"length_{m}"], (d.width,), floats) for m, d in held]
        self._tensors.append(_Tensors.of("tokens", rows["n_tokens"], (), np.dtype(np.int32)))
        self._header = Header.of((t.name, t.code, t.width) for t in self._tensors)
        self._stored = sorted(self._tensors, key=lambda t: self._header.names.index(t.name))
        lengths = np.array([t.steps for t in self._stored], dtype=np.int64).T
        if (wrong := (lengths < 0).any(axis=1)).any():
            row = int(wrong.argmax())
            raise self._wrong(row, f"{lengths[row].tolist()} steps in the table", "none below zero")
        ends = np.cumsum(lengths * [t.step for t in self._stored], axis=1)
        # what a header of ours says of each tensor: its steps, its first byte, its last
        self._places = np.stack([lengths, ends - lengths * [t.step for t in self._stored], ends], axis=2)

    def sample(self, row: int, with_text: bool) -> Utterance:
        """The sample in this row of the table; that of a small data set is described once, as long as this is open."""
        sample = self._known.get(row)
        if sample is None:
            sample = self._sample(row)
            if self._kept:
                self._known[row] = sample
        if with_text and self._index.has_raw_text:
            return replace(sample, raw_text=self._text(row))
        return sample

    def _sample(self, row: int) -> Utterance:
        arrays = self._arrays(row)
        tokens = arrays.pop("tokens", None)
        labels = ((task, values[row]) for task, values in self._labels.items())
        return Utterance(
            key=self._keys[row],
            split=self._split,
            modalities=arrays,
            labels={task: label for task, label in labels if not math.isnan(label)},
            tokens=tokens,
        )

    def _ranges(self, offsets: list[int], sizes: list[int], end: int) -> list[tuple[int, int]]:
        """Where members' payloads begin and end, all within the file; (0, 0) where there is none."""
        ranges = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
        for row, (first, last) in enumerate(ranges):
            if not BLOCKSIZE <= first <= last <= end and (last or not self._index.foreign):
                raise self._wrong(row, f"bytes {first} to {last} in the table", f"some of {BLOCKSIZE} to {end}")
        return ranges

    def _mapped(self, size: int) -> mmap.mmap:
        try:
            with self._path.open("rb") as file:
                # copy-on-write, not read-only: torch takes only writable arrays. What is written never reaches the file
                return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except ValueError as error:  # it has shrunk since its size was checked; to map and touch it would be a SIGBUS
            raise DataError(f"{self._path}: {error}, expected {size} bytes; copy it again or pack again") from error
        except (FileNotFoundError, PermissionError):  # what that means is known elsewhere: see Expected.use
            raise
        except OSError as error:
            raise TransientError(
                f"{self._path}: cannot be mapped ({error.strerror}); see ulimit -n and the free memory"
            ) from error

    def _arrays(self, row: int) -> dict[str, NDArray[Any]]:
        """Views of the sample's tensors, by name: exactly those that table and index announce."""
        begin, end = self._payloads[row]
        # labels stand in the table, features in the tar: that they are the same sample's is worth a comparison
        member = self._data[begin - BLOCKSIZE : begin - BLOCKSIZE + _NAME].rstrip(b"\0")
        own = (escape_key(self._keys[row]) + TENSORS).encode()[:_NAME]
        if member != own:
            raise self._wrong(row, f"its data belongs to member {member!r}", repr(own))
        tensors, header, numbers = self._stored, self._header, self._places[row].ravel().tolist()
        if 0 in numbers[::3]:
            tensors = [t for t in self._stored if t.steps[row]]
            header = Header.of((t.name, t.code, t.width) for t in tensors)
            numbers = [n for at in range(0, len(numbers), 3) if numbers[at] for n in numbers[at : at + 3]]
        text = header.filled(numbers)
        first, data = begin + len(text), self._data
        if data[begin:first] != text or first + (numbers[-1] if numbers else 0) != end:
            return self._arrays_as_told(row)
        return {
            t.name: np.ndarray((length, *t.width), t.dtype, data, first + offset)
            for t, length, offset in zip(tensors, numbers[::3], numbers[1::3], strict=True)
        }

    def _arrays_as_told(self, row: int) -> dict[str, NDArray[Any]]:
        """`_arrays` where the header is not the one that our packer writes: it is parsed, and every bound checked."""
        begin, header = self._told(row)
        end = self._payloads[row][1]
        arrays: dict[str, NDArray[Any]] = {}
        for tensors in self._tensors:
            steps = tensors.steps[row]
            spec = header.pop(tensors.name, None)
            if spec is None and not steps:
                continue
            try:
                dtype, shape, (first, last) = spec["dtype"], spec["shape"], spec["data_offsets"]
            except (KeyError, TypeError, ValueError) as error:
                raise self._wrong(
                    row, f"{tensors.name} described as {spec!r}", "dtype, shape and data_offsets"
                ) from error
            if dtype != tensors.code or shape != [steps, *tensors.width]:
                expected = f"{tensors.code} of shape {[steps, *tensors.width]}"
                raise self._wrong(row, f"{tensors.name} is {dtype} of shape {shape}", expected)
            size = steps * tensors.step
            if type(first) is not int or first < 0 or last != first + size or begin + last > end:
                expected = f"{size} bytes within {end - begin}"
                raise self._wrong(row, f"{tensors.name} is in bytes {first} to {last}", expected)
            arrays[tensors.name] = np.ndarray((steps, *tensors.width), tensors.dtype, self._data, begin + first)
        if header.keys() - {"__metadata__"}:
            expected = f"at most {', '.join(tensors.name for tensors in self._tensors)}"
            raise self._wrong(row, f"it has tensors called {', '.join(map(repr, header))}", expected)
        return arrays

    def _told(self, row: int) -> tuple[int, dict[str, Any]]:
        """Where the sample's numbers begin in the file, and the header: name -> dtype, shape, data_offsets.

        The format of safetensors: 8 bytes with the header's length (little-endian), the header (JSON), the numbers;
        https://github.com/huggingface/safetensors.
        """
        begin, end = self._payloads[row]
        length = int.from_bytes(self._data[begin : begin + 8], "little")
        limit = min(_MAX_HEADER, end - begin - 8)
        if length > limit:
            raise self._wrong(row, f"its tensors have a header of {length} bytes", f"at most {limit}")
        try:
            header = json.loads(str(self._data[begin + 8 : begin + 8 + length], "utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._wrong(row, f"its tensors' header does not parse ({error})", "JSON") from error
        if not isinstance(header, dict):
            raise self._wrong(row, f"its tensors' header is a {type(header).__name__}", "a JSON object")
        return begin + 8 + length, header

    def _text(self, row: int) -> str | None:
        """The transcript in the sample's JSON member."""
        first, last = self._members[row]
        if last - first > _MAX_JSON:
            raise self._wrong(row, f"its JSON member has {last - first} bytes", f"at most {_MAX_JSON}")
        try:
            member = json.loads(self._data[first:last])
            key, text = member["key"], member.get("raw_text")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise self._wrong(row, f"its JSON member does not parse ({error})", "an object with a key") from error
        if key != self._keys[row] or not isinstance(text, str | None):
            raise self._wrong(
                row, f"its JSON member is of {key!r} with a text {type(text).__name__}", "the same key and a text"
            )
        return text

    def _wrong(self, row: int, found: str, expected: str) -> DataError:
        return DataError(
            f"{self._path}: sample {self._keys[row]!r}: {found}, expected {expected}; the shard and its index "
            f"disagree: run mmsa-dist verify {self._index.where}, then copy the data set again or pack again"
        )


class _ForeignShard(_Shard):
    """A tar that somebody else wrote: its table says at which byte each sample's numbers begin."""

    def __init__(self, index: Index, shard_no: int, table: pa.Table) -> None:
        super().__init__(index, shard_no, table)
        self._kept = False  # some of its arrays are copies, and not to be held

    def _describe(self, rows: dict[str, list[Any]], size: int) -> None:
        held = self._index.modalities.items()
        self._numbers = [_Numbers.of(m, rows[f"length_{m}"], (d.width,), rows) for m, d in held]
        self._numbers.append(_Numbers.of("tokens", rows["n_tokens"], (), rows))
        for numbers in self._numbers:
            kinds = INTEGERS if numbers.name == "tokens" else FLOATS
            for row, (steps, dtype, begin) in enumerate(
                zip(numbers.steps, numbers.dtypes, numbers.offsets, strict=True)
            ):
                if not steps:
                    continue
                if steps < 0 or dtype not in kinds:
                    found = f"{numbers.name} has {steps} steps of {dtype!r}"
                    raise self._wrong(row, found, f"some of {', '.join(kinds)}")
                end = begin + steps * math.prod(numbers.width) * kinds[dtype].itemsize
                if not BLOCKSIZE <= begin <= end <= size:
                    found = f"{numbers.name} is in bytes {begin} to {end}"
                    raise self._wrong(row, found, f"some of {BLOCKSIZE} to {size}")

    def _arrays(self, row: int) -> dict[str, NDArray[Any]]:
        """Views of the sample's numbers; a copy where some are not finite, or where they stand at an odd byte."""
        arrays: dict[str, NDArray[Any]] = {}
        for numbers in self._numbers:
            if not (steps := numbers.steps[row]):
                continue
            dtype, begin = DTYPES[numbers.dtypes[row]], numbers.offsets[row]
            shape = (steps, *numbers.width)
            if begin % dtype.itemsize:
                size = math.prod(shape) * dtype.itemsize
                array = np.ndarray(size, np.uint8, self._data, begin).copy().view(dtype).reshape(shape)
            else:
                array = np.ndarray(shape, dtype, self._data, begin)
            if numbers.flaws[row]:
                array = np.where(np.isfinite(array), array, np.zeros((), dtype))
            arrays[numbers.name] = array.astype(np.int32, copy=False) if numbers.name == "tokens" else array
        return arrays

    def _text(self, row: int) -> str | None:
        """The transcript: a text member, or a field of a JSON one."""
        first, last = self._members[row]
        if not last:
            return None
        if last - first > _MAX_JSON:
            raise self._wrong(row, f"its transcript's member has {last - first} bytes", f"at most {_MAX_JSON}")
        place = self._index.layout["raw_text"]
        member, _, name = place.partition(":")
        try:
            text = self._data[first:last].decode()
            told = field_of(json.loads(text), name) if member.endswith("json") else text.strip()
        except (ValueError, RecursionError) as error:
            raise self._wrong(row, f"its transcript ({place}) does not parse ({error})", "text") from error
        if not isinstance(told, str):
            raise self._wrong(row, f"its transcript ({place}) is a {type(told).__name__}", "text")
        return told


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What the table and the index say of one tensor of each sample.

    Attributes:
        name: in the safetensors header.
        steps: T of each sample, 0 where it lacks the tensor.
        width: the shape after T: (D,), or () for token ids.
        code, dtype: the type of its numbers, as safetensors and as NumPy call it.
        step: bytes of one step.
    """

    name: str
    steps: list[int]
    width: tuple[int, ...]
    code: str
    dtype: np.dtype[Any]
    step: int

    @classmethod
    def of(cls, name: str, steps: list[int], width: tuple[int, ...], dtype: np.dtype[Any]) -> Self:
        return cls(name, steps, width, CODES[dtype], dtype, math.prod(width) * dtype.itemsize)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What the table says of one modality, or the token ids, of each sample of a foreign tar.

    Attributes:
        name: of it.
        steps: T of each sample, 0 where absent.
        width: the shape after T: (D,), or () for token ids.
        offsets, dtypes: where its numbers begin in the tar, and their type.
        flaws: how many of them are not finite.
    """

    name: str
    steps: list[int]
    width: tuple[int, ...]
    offsets: list[int]
    dtypes: list[str]
    flaws: list[int]

    @classmethod
    def of(cls, name: str, steps: list[int], width: tuple[int, ...], rows: dict[str, list[Any]]) -> Self:
        return cls(name, steps, width, rows[f"offset_{name}"], rows[f"dtype_{name}"], rows[f"non_finite_{name}"])
