"""Where the numbers of an array stand in a file: ``.npy``, ``.npz`` (not compressed) and ``.safetensors``.

Nothing is decoded: a header is parsed, every bound in it is checked, and what cannot be read in place as it stands is
refused with the reason. Formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html,
https://github.com/huggingface/safetensors, and the ZIP specification (APPNOTE.TXT).
"""

import ast
import io
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOATS: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
INTEGERS: dict[str, np.dtype[Any]] = {"int32": np.dtype("<i4"), "int64": np.dtype("<i8")}
DTYPES = FLOATS | INTEGERS
"""What is read in place: features are of the first kind, token ids of the second."""

SUFFIXES = ("npy", "npz", "safetensors")

_NAMES = {dtype.str: name for name, dtype in DTYPES.items()}
_TENSORS = {"F16": "float16", "F32": "float32", "F64": "float64", "I32": "int32", "I64": "int64"}
_LONGEST_NPY = 10_000
"""Bytes of an npy header at most; NumPy draws the line there too."""
_LONGEST_TENSORS = 1 << 20
_LARGEST_DIRECTORY = 1 << 20
_MOST, _MOST_DIMENSIONS = 1 << 48, 32
"""Steps, bytes or dimensions beyond which a number is no size but nonsense (and its product takes for ever)."""
_PICKLES = ("pkl", "pickle", "pyd", "pt", "pth", "p", "joblib", "dill")
_PACKED = ("gz", "bz2", "xz", "zst", "lz4")


class UnfitError(Exception):
    """Why an array cannot be read where it stands: a clause to put behind its name."""


@dataclass(frozen=True, slots=True)
class Array:
    """Numbers in C order and little-endian, from byte `offset` of their file on.

    Attributes:
        dtype: one of `DTYPES`.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def view(self, payload: bytes) -> NDArray[Any]:
        """Its values; `payload` is the file."""
        return np.ndarray(self.shape, DTYPES[self.dtype], payload, self.offset)


def located(suffix: str, payload: bytes, wanted: str | None = None) -> dict[str, Array]:
    """The arrays in a file, by name; the one of an npy has the name ''.

    Args:
        suffix: of the member, e.g. ``audio.npy``: its last part says what it is.
        wanted: look only at the array of this name, whatever the others are.

    Raises:
        UnfitError: the file, or an array that is looked at, cannot be read in place.
    """
    refuse(suffix)
    match suffix.rpartition(".")[2]:
        case "npy":
            return {"": _npy(payload, 0, len(payload))}
        case "npz":
            return _npz(payload, wanted)
        case _:
            return _safetensors(payload, wanted)


def refuse(suffix: str) -> None:
    """Says of a member's name alone that it holds no array that is read in place.

    Raises:
        UnfitError: it does not.
    """
    kind = suffix.rpartition(".")[2]
    if kind in _PICKLES:
        raise UnfitError(f"is a pickle by its name (.{kind}), which can run code when it is read and never is")
    if kind in _PACKED:
        raise UnfitError(f"is compressed (.{kind})")
    if kind not in SUFFIXES:
        raise UnfitError(f"is of an unknown type (.{kind})")


# --- the formats


def _npy(data: bytes, begin: int, end: int) -> Array:
    """The array of the npy file in bytes `begin` to `end`."""
    head = data[begin : min(end, begin + 12)]
    if len(head) < 12 or head[:6] != b"\x93NUMPY":
        raise UnfitError("is no npy file")
    version, wide = head[6], head[6] > 1
    if version not in (1, 2, 3):
        raise UnfitError(f"is an npy file of the unknown version {version}")
    length = int.from_bytes(head[8 : 12 if wide else 10], "little")
    first = begin + (12 if wide else 10) + length
    if length > _LONGEST_NPY or first > end:
        raise UnfitError(f"has a header of {length:,} bytes, at most {min(_LONGEST_NPY, end - begin):,} are read")
    try:
        header = ast.literal_eval(data[first - length : first].decode("utf-8" if version == 3 else "latin-1"))
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise UnfitError("has a header that does not parse") from error
    if not isinstance(descr, str) or descr not in _NAMES:
        raise UnfitError(_of_type(descr))
    if not isinstance(shape, tuple):
        raise UnfitError("has a header that does not parse")
    if fortran and len(shape) > 1:
        raise UnfitError("is in Fortran order (column by column)")
    return _checked(Array(first, _NAMES[descr], shape), end, exactly=True)


def _npz(data: bytes, wanted: str | None) -> dict[str, Array]:
    # the directory's size, where `zipfile` will look for it: it would read millions of entries without a question
    size = int.from_bytes(data[-10:-6], "little")
    if data[-22:-18] != b"PK\5\6" or data[-2:] != b"\0\0" or data[-42:-38] == b"PK\6\7" or size > _LARGEST_DIRECTORY:
        raise UnfitError("is no npz file as np.savez writes it, or damaged")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise UnfitError(f"is no readable npz file ({error})") from error
    found: dict[str, Array] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if wanted is not None and name != wanted:
            continue
        if name in found:
            raise UnfitError(f"has two arrays called {name!r}")
        found[name] = _stored(data, entry)
    return found


def _stored(data: bytes, entry: zipfile.ZipInfo) -> Array:
    """The array in an entry of a zip file."""
    if entry.flag_bits & 1:
        raise UnfitError("is encrypted")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UnfitError("is compressed (np.savez_compressed)")
    at = entry.header_offset
    if at < 0 or at + 30 > len(data) or data[at : at + 4] != b"PK\3\4":
        raise UnfitError("is a damaged npz file")
    names = int.from_bytes(data[at + 26 : at + 28], "little") + int.from_bytes(data[at + 28 : at + 30], "little")
    begin = at + 30 + names
    end = begin + entry.file_size
    if entry.file_size != entry.compress_size or end > len(data):
        raise UnfitError("is a damaged npz file")
    if zlib.crc32(memoryview(data)[begin:end]) != entry.CRC:
        raise UnfitError("is a damaged npz file: its CRC is wrong")
    return _npy(data, begin, end)


def _safetensors(data: bytes, wanted: str | None) -> dict[str, Array]:
    length = int.from_bytes(data[:8], "little")
    limit = min(_LONGEST_TENSORS, len(data) - 8)
    if length > limit:
        raise UnfitError(f"has a header of {length:,} bytes, at most {max(0, limit):,} are read")
    try:
        header = json.loads(data[8 : 8 + length].decode())
        header.pop("__metadata__", None)
        entries = {n: (e["dtype"], e["shape"], e["data_offsets"]) for n, e in header.items() if wanted in (None, n)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnfitError("has a header that does not parse") from error
    found: dict[str, Array] = {}
    for name, (dtype, shape, offsets) in entries.items():
        if not isinstance(dtype, str) or dtype not in _TENSORS:
            raise UnfitError(_of_type(dtype))
        if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or not _whole(offsets):
            raise UnfitError("has a header that does not parse")
        array = _checked(Array(8 + length + offsets[0], _TENSORS[dtype], tuple(shape)), len(data))
        if array.nbytes != offsets[1] - offsets[0]:
            raise UnfitError(f"has {offsets[1] - offsets[0]:,} bytes for {dtype} of shape {shape}")
        found[name] = array
    return found


def _checked(array: Array, end: int, exactly: bool = False) -> Array:
    """The array, once its bytes are known to lie before `end`, or to end there."""
    if not _whole(array.shape) or len(array.shape) > _MOST_DIMENSIONS:
        raise UnfitError(f"has the shape {str(array.shape)[:60]}")
    last = array.offset + array.nbytes
    if last > end or (exactly and last != end):
        raise UnfitError(f"is {array.dtype} of shape {array.shape}, but has {end - array.offset:,} bytes")
    return array


def _whole(numbers: tuple[object, ...] | list[object]) -> bool:
    return all(type(number) is int and 0 <= number <= _MOST for number in numbers)


def _of_type(dtype: object) -> str:
    return f"is of type {str(dtype)[:60]!r}, expected little-endian {', '.join(DTYPES)}"
