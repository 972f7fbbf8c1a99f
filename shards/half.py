"""float32 to float16, to the nearest and ties to even, bit for bit the same by either of two ways.

NumPy takes twenty times as long as torch, whose import takes seconds: torch works where it is imported already (a large
packing does so, see `worth_torch`).
"""

import sys

import numpy as np

_WORTH = 2 * 2**30
"""Stored bytes from which on converting with NumPy takes longer than importing torch."""

_SERIAL = 32_768
"""Numbers in a piece: torch would start its pool of threads for more, which no forked process survives."""

_EXPONENT = np.uint16(0x7C00)
"""All bits of the exponent, set in what is not finite; all bits but the sign are no more than that in a number."""


def worth_torch(stored_bytes: int) -> None:
    """Imports torch where so much is to be stored that it saves time."""
    if stored_bytes > _WORTH:
        import torch  # noqa: F401


def to_float16(values: np.ndarray) -> np.ndarray:
    """`values` of any shape as float16, contiguous; what is too large for it becomes infinite."""
    if "torch" not in sys.modules or values.dtype != np.float32:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values, dtype=np.float16)
    from torch import from_numpy

    out = np.empty(values.shape, np.float16)
    flat_in, flat_out = np.ascontiguousarray(values).reshape(-1), from_numpy(out.reshape(-1))
    for begin in range(0, flat_in.size, _SERIAL):
        piece = flat_in[begin : begin + _SERIAL]
        if not piece.flags.writeable:  # of a mapped file; torch warns of those
            piece = piece.copy()
        flat_out[begin : begin + _SERIAL].copy_(from_numpy(piece))
    return out


def all_finite(halves: np.ndarray) -> bool:
    """Whether no value of a contiguous float16 array is infinite or NaN; of none, it is true."""
    magnitude = halves.view(np.uint16) & np.uint16(0x7FFF)
    return bool(magnitude.max(initial=0) < _EXPONENT)
