"""Pickles that hold nothing but arrays and builtin containers; everything else is refused, unrun.

A pickle is a program: unpickling calls whatever it names. Here it meets replacements of the few callables that rebuild
a numpy array, and nothing else. They are replacements, because numpy's own can be fed a state (flags of a dtype, raw
bytes as object pointers) that corrupts memory.
"""

import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError


class _RefusedError(Exception):
    """The pickle names something that is not data."""


class _DType:
    """`numpy.dtype` as a pickle writes it: a name, then a state of which only the byte order counts."""

    def __init__(self, name: str, _align: bool = False, _copy: bool = False) -> None:
        self.real = np.dtype(name)
        if self.real.kind not in "biufSUO":
            raise _RefusedError(f"an array of {self.real}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.real = self.real.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose pickled state is checked before numpy sees it, and which takes one only once.

    numpy does not compare the list of an array of objects with its shape, and frees the old memory at a second state.
    """

    _filled = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        if self._filled or not isinstance(dtype, _DType) or not _is_shape(shape):
            raise pickle.UnpicklingError("the state of an array is malformed")
        wanted = list if dtype.real.hasobject else (bytes, bytearray)
        if not isinstance(data, wanted) or (isinstance(data, list) and len(data) != math.prod(shape)):
            raise pickle.UnpicklingError("the state of an array is not what its shape and type announce")
        self._filled = True
        super().__setstate__((1, shape, dtype.real, bool(fortran), data))  # type: ignore[arg-type]


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and all(type(steps) is int and steps >= 0 for steps in value)


def _reconstruct(_kind: object, _shape: object, _code: object) -> _Array:
    return _Array((0,), np.int8)


def _flat(data: bytes, dtype: _DType) -> np.ndarray:
    """A view of bytes. Of an array it could outlive the memory, which numpy frees when the array gets its state."""
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("the bytes of an array are malformed")
    return np.frombuffer(data, dtype.real)


def _scalar(dtype: _DType, data: bytes) -> Any:
    return _flat(data, dtype)[0]


def _frombuffer(
    data: bytes, dtype: _DType, shape: tuple[int, ...], order: Any, axes: tuple[int, ...] | None = None
) -> np.ndarray:
    flat = _flat(data, dtype)
    return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as protocol 2 uses it for the bytes of an array."""
    if encoding != "latin1":
        raise _RefusedError(f"the codec {encoding!r}")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # named, never called: `_reconstruct` gets it as an argument
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes no bytes
    **{
        (builtins, kind.__name__): kind
        for builtins in ("builtins", "__builtin__")
        for kind in (set, frozenset, bytearray)
    },
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _KNOWN[f"{_core}.multiarray", "scalar"] = _scalar
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python: in C's a few bytes can ask for a memo of 64 GB, and get it."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: object) -> Any:
        raise _RefusedError("an object outside the file")

    def load_build(self) -> None:
        """Gives an object its state; only the two kinds that have one here."""
        if not isinstance(self.stack[-2], _DType | _Array):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("a state for what has none")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


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
    BufferError,  # a bytearray that is to grow under an array
)
"""What unpickling raises on bytes that are not a whole pickle."""


def load(path: Path) -> Any:
    """Unpickles arrays, numbers, strings and builtin containers.

    Raises:
        DataError: no such file, not a pickle, damaged, or it names anything else (which is never called).
    """
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, _MAGIC)))
            if kind := next((text for magic, text in _MAGIC.items() if start.startswith(magic)), None):
                raise DataError(f"{path}: is {kind}; expected a feature pickle")
            file.seek(0)
            return _Unpickler(file, encoding="latin1").load()
    except _RefusedError as error:
        raise DataError(
            f"{path}: the pickle refers to {error}, which is not data; refused, and nothing of it was run. "
            "Allowed are numpy arrays, numbers, strings, lists, tuples, dicts and sets"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected a feature pickle") from error
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
