"""Numbers of steps, as a file tells them."""

import numpy as np

from shards.errors import DataError

_LONGEST = 2**53
"""More steps than any file has, and the last whole number up to which float64 knows every one."""


def whole(at: str, told: np.ndarray) -> np.ndarray:
    """The lengths (N,) as int64.

    Args:
        at: what holds them, as messages name it.
        told: (N,) numbers of any type.

    Raises:
        DataError: one is negative, a fraction or not finite; names it.
    """
    values = told.astype(np.float64)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0) & (values == np.floor(values))))
    if len(wrong):
        raise DataError(f"{at}[{wrong[0]}] is {values[wrong[0]]:g}, expected a whole number of steps, 0 or more")
    return np.minimum(values, _LONGEST).astype(np.int64)
