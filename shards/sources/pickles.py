"""Pickles that hold nothing but arrays and builtin containers; everything else is refused, unrun.

A pickle is a program: unpickling calls whatever it names. Here it meets replacements of the few callables that rebuild
a numpy array, and nothing else. They are replacements, because numpy's own can be fed a state (flags of a dtype, raw
bytes as object pointers) that corrupts memory.

The file is mapped, and the numbers of an array stay in it: they are read when they are used, by the system, which may
forget them again. So a file of 12 GB takes no memory of the process, and opens in a moment.
"""

import math
import mmap
import os
import pickle
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.sources.stamp import Stamp


class _RefusedError(Exception):
    """The pickle names something that is not data."""


class _DType:
    """`numpy.dtype` as a pickle writes it: a name, then a state of which only the byte order counts."""

    def __init__(self, name: str, _align: bool = False, _copy: bool = False) -> None:
        if not isinstance(name, str):
            raise _RefusedError("a type of numbers that has fields")
        self.real = np.dtype(name)
        if self.real.kind not in "biufSUO" or self.real.names:
            raise _RefusedError(f"an array of {self.real}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.real = self.real.newbyteorder(state[1])


class ByteString(str):
    """A string of Python 2 that is not ASCII: its bytes, each as one character. It is an array's, or text."""

    __slots__ = ()


class _Unfilled:
    """An array that the pickle has announced, but whose state has not come yet: what it then became is `array`."""

    array: np.ndarray | None = None


class _Memo(dict[int, Any]):
    """What the pickle refers back to: for an array, not the object that stood in for it."""

    def __getitem__(self, key: int) -> Any:
        value = super().__getitem__(key)
        return value if not isinstance(value, _Unfilled) or value.array is None else value.array


def _filled(state: tuple[Any, ...]) -> np.ndarray:
    """The array of a state, which is checked before numpy sees it; where it can be, a view of the state's bytes.

    numpy does not compare the list of an array of objects with its shape.
    """
    _version, shape, dtype, fortran, data = state
    if not isinstance(dtype, _DType) or not _is_shape(shape):
        raise pickle.UnpicklingError("the state of an array is malformed")
    if isinstance(data, str):
        data = data.encode("latin1")  # Python 2's bytes
    count = math.prod(shape)
    if dtype.real.hasobject:
        if not isinstance(data, list) or len(data) != count:
            raise pickle.UnpicklingError("the objects of an array are not what its shape announces")
        array = np.ndarray((0,), np.int8)
        array.__setstate__((1, shape, dtype.real, bool(fortran), data))  # type: ignore[arg-type]
        return array
    if not isinstance(data, _BYTES) or memoryview(data).nbytes != count * dtype.real.itemsize:
        raise pickle.UnpicklingError("the bytes of an array are not what its shape and type announce")
    if not count * dtype.real.itemsize:
        _check_hollow(shape, dtype.real)
    _check_letters(data, dtype.real)
    return np.ndarray(shape, dtype.real, data, order="F" if fortran else "C")


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and all(type(steps) is int and steps >= 0 for steps in value)


def _check_hollow(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Of what takes no bytes, the file's size does not bound how much there is to visit."""
    if max(shape, default=0) > _HOLLOW or (not dtype.itemsize and math.prod(shape) > _HOLLOW):
        raise pickle.UnpicklingError("an array without bytes announces more entries than any has")


def _check_letters(data: Any, dtype: np.dtype[Any]) -> None:
    """numpy makes strings of any numbers; reading such a string fails, or ends the process."""
    if dtype.kind == "U" and memoryview(data).nbytes:
        points = np.frombuffer(data, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if points.max() > sys.maxunicode:
            raise pickle.UnpicklingError("the letters of an array of strings are none")


def _reconstruct(_kind: object, _shape: object, _code: object) -> _Unfilled:
    return _Unfilled()


def _flat(data: bytes, dtype: _DType) -> np.ndarray:
    """A view of bytes."""
    if not isinstance(data, _BYTES):
        raise pickle.UnpicklingError("the bytes of an array are malformed")
    if dtype.real.itemsize and len(data) % dtype.real.itemsize == 0:
        _check_letters(data, dtype.real)
    return np.frombuffer(data, dtype.real)


def _scalar(dtype: _DType, data: bytes) -> Any:
    return _flat(data, dtype)[0]


def _frombuffer(
    data: bytes, dtype: _DType, shape: tuple[int, ...], order: Any, axes: tuple[int, ...] | None = None
) -> np.ndarray:
    flat = _flat(data, dtype)
    if not _is_shape(shape):
        raise pickle.UnpicklingError("the shape of an array is malformed")
    if not flat.size:
        _check_hollow(shape, dtype.real)
    return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as protocol 2 uses it for the bytes of an array."""
    if encoding != "latin1":
        raise _RefusedError(f"the codec {encoding!r}")
    return text.encode("latin1")


def _bytearray(data: Any = b"", encoding: str = "latin1") -> Any:
    """The bytes of a `bytearray`, as they are: nothing here changes them. Of a number it would make as many zeros."""
    if isinstance(data, str):
        return _encode(data, encoding.replace("-", ""))
    if not isinstance(data, _BYTES):
        raise _RefusedError(f"a bytearray of {describe(data)}")
    return data


def _check_keys(keys: Iterable[Any]) -> None:
    """Python visits all that a tuple holds for its place in a dict or set: of tuples in tuples that has no end."""
    for key in keys:
        if isinstance(key, tuple) and any(isinstance(part, tuple | frozenset) for part in key):
            raise _RefusedError("a key of tuples in tuples")


def _set(items: Any = ()) -> set[Any]:
    items = list(items)
    _check_keys(items)
    return set(items)


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


_BYTES = (bytes, bytearray, memoryview)

_HOLLOW = 1 << 20
"""Steps along an axis of an array that has no bytes, at most."""

_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # named, never called: `_reconstruct` gets it as an argument
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes no bytes
    **{
        (builtins, name): kind
        for builtins in ("builtins", "__builtin__")
        for name, kind in (("set", _set), ("frozenset", _frozenset), ("bytearray", _bytearray))
    },
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _KNOWN[f"{_core}.multiarray", "scalar"] = _scalar
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _frombuffer


_LARGE = 4096
"""Bytes from which on they stay in the file: a page of memory."""


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python: in C's a few bytes can ask for a memo of 64 GB, and get it."""

    def __init__(self, file: mmap.mmap) -> None:
        super().__init__(file, encoding="latin1")
        self.memo = _Memo()
        self._file, self._view = file, memoryview(file)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: object) -> Any:
        raise _RefusedError("an object outside the file")

    def load_build(self) -> None:
        """Gives an object its state; only the two kinds that have one here."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        built = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(built, _Unfilled):
            built.array = self.stack[-1] = _filled(state)  # type: ignore[attr-defined]
        elif isinstance(built, _DType):
            built.__setstate__(state)
        else:
            raise pickle.UnpicklingError("a state for what has none")

    def load_buffer(self) -> None:
        raise _RefusedError("an object outside the file")

    def load_frame(self) -> None:
        """Frames say how far to read ahead, which a mapped file need not; older Pythons put whole arrays in one."""
        self._number("<Q")

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])  # type: ignore[attr-defined]
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])  # type: ignore[attr-defined]
        super().load_dict()  # type: ignore[misc]

    def load_additems(self) -> None:
        _check_keys(self.stack)  # type: ignore[attr-defined]
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        _check_keys(self.stack)  # type: ignore[attr-defined]
        super().load_frozenset()  # type: ignore[misc]

    def load_long_bytes(self) -> None:
        self._load_bytes(self._number("<Q"))

    def load_bytes(self) -> None:
        self._load_bytes(self._number("<I"))

    def load_string(self) -> None:
        """Bytes or a string of Python 2: a long one is an array's."""
        size = self._number("<i")
        self._load_bytes(size)
        if 0 <= size < _LARGE:
            self.append(self._decode_string(self.stack.pop()))  # type: ignore[attr-defined]

    def _decode_string(self, value: bytes) -> str:
        """A short one, also where the unpickler itself has read it."""
        text = value.decode("latin1")
        return text if text.isascii() else ByteString(text)

    def _load_bytes(self, size: int) -> None:
        start = self._file.tell()
        if not 0 <= size <= len(self._file) - start:
            raise EOFError
        if size < _LARGE:
            self.append(self._file.read(size))  # type: ignore[attr-defined]
        else:
            self._file.seek(size, os.SEEK_CUR)
            self.append(self._view[start : start + size])  # type: ignore[attr-defined]

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._file.read(struct.calcsize(code)))[0])

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.NEXT_BUFFER[0]: load_buffer,
        pickle.READONLY_BUFFER[0]: load_buffer,
        pickle.FRAME[0]: load_frame,
        pickle.BINBYTES[0]: load_bytes,
        pickle.BINBYTES8[0]: load_long_bytes,
        pickle.BYTEARRAY8[0]: load_long_bytes,
        pickle.BINSTRING[0]: load_string,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }


_MAGIC = {
    b"PK\x03\x04": "a zip archive (.npz, or torch.save)",
    b"\x89HDF": "an HDF5 file (.csd, .h5)",
    b"\x1f\x8b": "a gzip file; decompress it first",
    b"\x93NUMPY": "a .npy file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it first",
}

_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    *(EOFError, AttributeError, LookupError, ImportError, TypeError, ValueError, OverflowError, RecursionError),
    BufferError,  # bytes that are to grow under an array
    SystemError,  # numpy, of a string whose letters are none
)
"""What unpickling raises on bytes that are not a whole pickle."""


def load(path: Path) -> Any:
    """Unpickles arrays, numbers, strings and builtin containers.

    Returns:
        What was pickled. Arrays are read-only views of the mapped file, perhaps not aligned in memory: copy what is
        worked on. So the file must stay as it is while they are in use: other bytes written into it are read as its
        own (see `Stamp`), and where it is cut short, touching what is gone ends the process (SIGBUS). Long bytes are
        memoryviews.

    Raises:
        DataError: no such file, a pipe or a device, not a pickle, damaged, or it names anything else, which is never
            called.
    """
    Stamp.of(path)  # there is a file, on which nobody waits for ever
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, _MAGIC)))
            if kind := next((text for magic, text in _MAGIC.items() if start.startswith(magic)), None):
                raise DataError(f"{path}: is {kind}; expected a feature pickle")
            return _Unpickler(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).load()
    except _RefusedError as error:
        raise DataError(
            f"{path}: the pickle refers to {error}, which is not data; refused, and nothing of it was run. "
            "Allowed are numpy arrays, numbers, strings, lists, tuples, dicts and sets"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into memory, or is damaged; expected a feature pickle") from error
    except _DAMAGE as error:
        raise DataError(
            f"{path}: cannot be unpickled: it is another kind of file, or cut short; expected a feature pickle"
        ) from error


def describe(value: object) -> str:
    """A value's kind and size, for messages about what was found instead of what was expected."""
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, list | tuple | dict | set | frozenset):
        return f"a {type(value).__name__} of {len(value):,}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


__all__ = ["describe", "load"]
