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
