"""Writing pickles of arrays that are larger than the memory, as numpy itself would write them.

The names in them are numpy 1's, which numpy 2 knows too: programs of the field's older days read them.

Shapes: N rows.
"""

import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np


@dataclass(frozen=True)
class Streamed:
    """An array that is pickled piece by piece.

    Attributes:
        dtype: of its numbers.
        shape: of the whole.
        rows: the N entries of its first axis, in order; taken once.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    rows: Iterable[np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Streamed":
        """Of an array that is there."""
        return cls(array.dtype, array.shape, (array,))


@dataclass(frozen=True)
class _Name:
    module: str
    name: str


class Pickler(pickle._Pickler):
    """Protocol 4 of plain values and `Streamed` arrays."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=4)
        self._file = file

    def save_name(self, name: _Name) -> None:
        self.save(name.module)  # type: ignore[attr-defined]
        self.save(name.name)  # type: ignore[attr-defined]
        self.write(pickle.STACK_GLOBAL)  # type: ignore[attr-defined]

    def save_streamed(self, array: Streamed) -> None:
        """What `ndarray.__reduce__` says: an empty array, and then its state, of which the last are the bytes."""
        save, write = self.save, self.write  # type: ignore[attr-defined]
        save(_Name("numpy.core.multiarray", "_reconstruct"))
        save((_Name("numpy", "ndarray"), (0,), b"b"))
        write(pickle.REDUCE)
        write(pickle.MARK)
        for part in (1, array.shape, array.dtype, False):
            save(part)
        self._save_bytes(array)
        write(pickle.TUPLE)
        write(pickle.BUILD)

    def _save_bytes(self, array: Streamed) -> None:
        size = int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
        self._write_large_bytes(pickle.BINBYTES8 + struct.pack("<Q", size), b"")  # type: ignore[attr-defined]
        written = 0
        for row in array.rows:
            assert row.dtype == array.dtype, (row.dtype, array.dtype)
            written += self._file.write(np.ascontiguousarray(row).reshape(-1).view(np.uint8).data)
        assert written == size, (written, size)

    dispatch: ClassVar[dict[type, Callable[..., None]]] = {
        **pickle._Pickler.dispatch,
        _Name: save_name,
        Streamed: save_streamed,
    }
