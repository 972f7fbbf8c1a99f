"""Mean and standard deviation of a stream of arrays, in float64 and in one pass.

Shapes: T steps, D width.
"""

from typing import Self

import numpy as np


class Moments:
    """Running mean and standard deviation per dimension, merged array by array (Chan, Golub, LeVeque 1979).

    Sums of squares would lose everything where the mean is large beside the deviation; this does not.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)  # sum of squared deviations from the mean

    @classmethod
    def from_parts(cls, count: int, mean: list[float], squares: list[float]) -> Self:
        """What `parts` gave, as moments again."""
        moments = cls(len(mean))
        moments.count, moments._mean, moments._squares = count, np.array(mean), np.array(squares)
        return moments

    def parts(self) -> tuple[int, list[float], list[float]]:
        """(rows, mean [D], sum of squared deviations [D]): all there is to know, in plain numbers."""
        return self.count, self._mean.tolist(), self._squares.tolist()

    def add(self, array: np.ndarray) -> None:
        """Takes the T rows of `array` (T, D) in."""
        rows = array.astype(np.float64)
        mean = np.einsum("td->d", rows)
        mean /= len(rows)
        rows -= mean
        self._join(len(rows), mean, np.einsum("td,td->d", rows, rows))

    def merge(self, other: "Moments") -> None:
        """Takes all rows in that `other` has seen. The last bits depend on the order of merging."""
        if other.count:
            self._join(other.count, other._mean, other._squares)

    def result(self) -> dict[str, list[float]]:
        """{"mean": [D], "std": [D]}; the deviation of the rows themselves (divided by their number)."""
        return {"mean": self._mean.tolist(), "std": np.sqrt(self._squares / max(1, self.count)).tolist()}

    def _join(self, rows: int, mean: np.ndarray, squares: np.ndarray) -> None:
        total = self.count + rows
        difference = mean - self._mean
        between = difference * difference
        between *= self.count * rows / total
        between += squares
        self._squares += between
        difference *= rows / total
        self._mean += difference
        self.count = total
