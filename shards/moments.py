"""Mean and standard deviation of a stream of arrays, in float64 and in one pass.

Shapes: T steps, D width.
"""

import numpy as np


class Moments:
    """Running mean and standard deviation per dimension, merged array by array (Chan, Golub, LeVeque 1979).

    Sums of squares would lose everything where the mean is large beside the deviation; this does not.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)  # sum of squared deviations from the mean

    def add(self, array: np.ndarray) -> None:
        """Takes the T rows of `array` (T, D) in."""
        rows = array.astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        total = self.count + len(rows)
        difference = mean - self._mean
        self._squares += np.einsum("td,td->d", rows, rows) + difference**2 * (self.count * len(rows) / total)
        self._mean += difference * (len(rows) / total)
        self.count = total

    def result(self) -> dict[str, list[float]]:
        """{"mean": [D], "std": [D]}; the deviation of the rows themselves (divided by their number)."""
        return {"mean": self._mean.tolist(), "std": np.sqrt(self._squares / max(1, self.count)).tolist()}
