"""Counts of true and predicted classes, and the shares that papers make of them, for all kinds of labels.

Shapes: N samples, C classes. A share of no samples is None.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmsa_dist.errors import DataError, TrainingError

Floats = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]
Values = dict[str, float | None]


class Confusion(NamedTuple):
    """counts: (C, C) int64, the truth's class down, the prediction's across. labels: the classes' names, ascending."""

    counts: Classes
    labels: tuple[str, ...]


def checked(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Truth and prediction, flattened.

    Raises:
        TrainingError: a prediction is not finite.
        DataError: a label is not finite.
    """
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which has its sentence below
        truth = np.asarray(y, dtype=np.float32).reshape(-1)
        prediction = np.asarray(p, dtype=np.float32).reshape(-1)
    if len(truth) != len(prediction):
        raise ValueError(f"{len(truth)} labels for {len(prediction)} predictions")
    for values, what, error in ((prediction, "predictions", TrainingError), (truth, "labels", DataError)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            remedy = "lower the learning rate or clip the gradient" if error is TrainingError else "leave them out"
            raise error(
                f"{len(wrong)} of {len(values)} {what} are not finite, the first at position {wrong[0]} "
                f"({values[wrong[0]]}): no metric is defined; {remedy}"
            )
    return truth, prediction


def cross(y: Classes, p: Classes, classes: int) -> Classes:
    """(C, C): how often each true class was predicted as each class."""
    return np.bincount(y * classes + p, minlength=classes * classes).reshape(classes, classes)


def accuracy(counts: Classes) -> float | None:
    """Share of samples on the diagonal."""
    total = counts.sum()
    return float(counts.trace() / total) if total else None


def weighted_f1(counts: Classes) -> float | None:
    """Mean of the classes' F1 weighted by how often each is true (scikit-learn's ``average="weighted"``).

    F1 = 2 TP / (2 TP + FP + FN) is 0 / 0 only for a class that is neither true nor predicted; its weight is 0.
    """
    total = counts.sum()
    if not total:
        return None
    true, predicted = counts.sum(1), counts.sum(0)
    f1 = 2 * counts.diagonal() / np.maximum(true + predicted, 1)
    return float(f1 @ true / total)


class Comoments:
    """Sums for the correlation of two series that come a piece at a time, in float64.

    Each piece is centred on its own means before it is merged (Chan, Golub and LeVeque 1983), so that squares of
    float32 values neither overflow nor vanish, and nothing is lost where means are large beside deviations.
    """

    def __init__(self) -> None:
        self._n = 0
        self._means = np.zeros(2)
        self._sums = np.zeros((2, 2))
        """Of squares and products of the deviations from the means."""
        self._low, self._high = np.full(2, np.inf), np.full(2, -np.inf)

    def add(self, y: Floats, p: Floats) -> None:
        """(N,) values of each."""
        if not len(y):
            return
        pair = (y.astype(np.float64), p.astype(np.float64))
        means = np.array([values.mean() for values in pair])
        dy, dp = (values - mean for values, mean in zip(pair, means, strict=True))
        apart, total = means - self._means, self._n + len(y)
        self._sums += np.array([[dy @ dy, dy @ dp], [dp @ dy, dp @ dp]])
        if self._n:
            self._sums += np.outer(apart, apart) * (self._n * len(y) / total)
        self._means += apart * (len(y) / total)
        self._n = total
        self._low = np.minimum(self._low, [values.min() for values in pair])
        self._high = np.maximum(self._high, [values.max() for values in pair])

    def correlation(self) -> float | None:
        """Pearson's r; None of fewer than two, or where one of the series is constant."""
        if self._n < 2 or (self._low == self._high).any():
            return None
        (yy, yp), (_, pp) = self._sums
        return float(np.clip(yp / (np.sqrt(yy) * np.sqrt(pp)), -1, 1))  # rounding only
