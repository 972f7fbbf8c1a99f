"""float32 to float16, to the nearest and ties to even, bit for bit the same by either of two ways.

NumPy takes twenty times as long as torch, whose import takes seconds: torch works where it is imported already (a large
packing does so, see `worth_torch`).
"""

import sys
from collections.abc import Callable
from functools import cache

import numpy as np

_WORTH = 2 * 2**30
"""Stored bytes a process from which on converting with NumPy takes longer than importing torch."""

_SERIAL = 32_768
"""Numbers in a piece: torch would start its pool of threads for more, which no forked process survives."""

_INFINITY, _MINUS_INFINITY = 0x7C00, 0xFC00
"""The bits of both, as an unsigned number; those of a NaN of the same sign are more, those of a number less."""


def worth_torch(stored_bytes: int, workers: int = 1) -> None:
    """Imports torch where so much is to be stored that it saves time: workers share the converting, not the import."""
    if stored_bytes > workers * _WORTH:
        import torch  # noqa: F401


def to_float16(*arrays: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """The arrays, of any shapes, as float16, contiguous; what is too large for it becomes infinite.

    Returns:
        They, and whether every value is finite; then so is every value of `arrays`.
    """
    out = np.empty(sum([array.size for array in arrays]), np.float16)
    by_torch = _by_torch() if "torch" in sys.modules else None
    halves, end = [], 0
    for array in arrays:
        begin, end = end, end + array.size
        halves.append(out[begin:end].reshape(array.shape))
        if by_torch and array.dtype == np.float32:
            by_torch(array.reshape(-1), out[begin:end])
        else:
            with np.errstate(over="ignore"):
                halves[-1][...] = array
    return halves, _all_finite(out)


@cache
def _by_torch() -> Callable[[np.ndarray, np.ndarray], None]:
    from torch import from_numpy

    def convert(values: np.ndarray, out: np.ndarray) -> None:
        if not values.flags.writeable:  # of a mapped file; torch warns of those
            values = values.copy()
        for begin in range(0, len(values), _SERIAL):
            end = begin + _SERIAL
            from_numpy(out[begin:end]).copy_(from_numpy(values[begin:end]))

    return convert


def _all_finite(halves: np.ndarray) -> bool:
    """Whether no number of a contiguous array is infinite or NaN; of none, it is true."""
    largest = np.maximum.reduce(halves.view(np.int16), initial=0)
    least = np.maximum.reduce(halves.view(np.uint16), initial=0)
    return bool(largest < _INFINITY and least < _MINUS_INFINITY)
