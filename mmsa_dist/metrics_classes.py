"""Metrics of classification, as MulT reports IEMOCAP: each emotion a decision of its own, there or not.

Shapes: N samples, E tasks (emotions). Truth is 0 or 1; predictions are log-odds, the difference of a task's two logits
(that of 1 less that of 0): above zero where argmax over the two is 1. On a tie argmax is the first of them, 0.

Source: MulT's evaluation of IEMOCAP (Tsai et al. 2019): per emotion accuracy and F1 weighted with the truth first. The
loss, the mean cross-entropy over samples and emotions, is what its training is stopped on.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mmsa_dist.errors import DataError
from mmsa_dist.shares import Floats, Values, accuracy, checked, cross, weighted_f1


class Running:
    """Metrics of E tasks of two classes, of samples that come a piece at a time.

    Args:
        tasks: E names.

    Attributes:
        samples: so far.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.samples = 0
        self._tasks = tuple(tasks)
        self._loss = 0.0  # sum over samples and tasks
        self._counts = {task: np.zeros((2, 2), np.int64) for task in self._tasks}

    def add(self, y: npt.ArrayLike, p: npt.ArrayLike) -> None:
        """Some more samples.

        Args:
            y: (N, E) 0 or 1. p: (N, E) log-odds of 1.

        Raises:
            TrainingError: a prediction is not finite. DataError: a label is neither 0 nor 1.
        """
        truth, odds = (values.reshape(-1, len(self._tasks)) for values in checked(y, p))
        if not np.isin(truth, (0, 1)).all():
            row, column = np.argwhere(~np.isin(truth, (0, 1)))[0]
            raise DataError(
                f"label {self._tasks[column]} is {truth[row, column]:g} at position {row}, expected 0 or 1; pack the "
                "data again"
            )
        self.samples += len(truth)
        self._loss += _cross_entropy(truth, odds)
        for task, true, given in zip(self._tasks, truth.T, odds.T, strict=True):
            self._counts[task] = self._counts[task] + cross(true.astype(np.int64), (given > 0).astype(np.int64), 2)

    def values(self) -> Values:
        """``loss``; ``acc`` and ``f1``, the means over the tasks; ``acc_TASK`` and ``f1_TASK`` of each. None without
        samples."""
        values: Values = {}
        for task, counts in self._counts.items():
            values |= {f"acc_{task}": accuracy(counts), f"f1_{task}": weighted_f1(counts)}
        mean = {kind: _mean(values[f"{kind}_{task}"] for task in self._tasks) for kind in ("acc", "f1")}
        loss = self._loss / (self.samples * len(self._tasks)) if self.samples else None
        return {"loss": loss, **mean, **values}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cross_entropy(y: Floats, odds: Floats) -> float:
    """Sum of log(1 + exp(-z)) for 1, log(1 + exp(z)) for 0: the softmax cross-entropy of the two logits."""
    return float(np.logaddexp(0, np.where(y > 0, -1.0, 1.0) * odds.astype(np.float64)).sum())
