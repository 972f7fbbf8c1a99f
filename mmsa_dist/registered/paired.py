"""Two models on the same samples: how sure the difference of their test MAE is.

Shapes: N samples, R resamples.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmsa_dist.errors import DataError
from shards.sources.arrays import DAMAGE

RESAMPLES = 10_000
AT_ONCE = 1 << 22
"""Sample numbers that are drawn together: 32 MB."""

SHARE = 0.95
"""Of the resamples, how many the interval holds."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicted for the samples of a split.

    Attributes:
        keys: (N,) strings.
        y: (N,) float32 labels.
        p: (N,) float32 predictions.
    """

    keys: NDArray[np.str_]
    y: NDArray[np.float32]
    p: NDArray[np.float32]

    @classmethod
    def load(cls, path: Path) -> "Predictions | None":
        """``predictions/<split>.npz`` of a run; None where labels are classes, which have no MAE.

        Raises:
            DataError: it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if "tasks" in file:
                    return None
                return cls(file["key"], file["y"], file["p"])
        except (KeyError, *DAMAGE) as error:
            raise DataError(f"{path}: predictions cannot be read ({error}); remove the file, or train again") from error


@dataclass(frozen=True)
class Interval:
    """The difference of two MAEs, B - A, and where it lies in `SHARE` of the resamples."""

    difference: float
    low: float
    high: float
    samples: int

    @property
    def tells(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def interval(a: Predictions, b: Predictions, kind: str, seed: int = 0) -> Interval | str:
    """The paired bootstrap: samples are drawn with replacement, the same for both models.

    Args:
        kind: of the labels, `metrics.kind_for`: MAE of ``sims`` is of values clipped to -1..1.

    Returns:
        The interval; where the two cannot be paired why not, in words.
    """
    ours, theirs = np.argsort(a.keys, kind="stable"), np.argsort(b.keys, kind="stable")
    if not len(ours) or max(Counter(a.keys.tolist()).values()) > 1:
        return "the predictions do not name each sample once"
    if len(ours) != len(theirs) or (a.keys[ours] != b.keys[theirs]).any():
        common = len(np.intersect1d(a.keys, b.keys))
        return f"they were tested on other samples ({common:,} of {len(ours):,} and {len(theirs):,} in common)"
    if not np.array_equal(a.y[ours], b.y[theirs]):
        return "the same samples have other labels in the two data sets"
    apart = _errors(b.y[theirs], b.p[theirs], kind) - _errors(a.y[ours], a.p[ours], kind)
    means = resampled(apart, seed)
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Interval(float(apart.mean()), float(low), float(high), len(apart))


def _errors(y: NDArray[np.float32], p: NDArray[np.float32], kind: str) -> NDArray[np.float64]:
    """(N,) absolute errors, as `metrics.evaluate` has them."""
    if kind == "sims":
        y, p = y.clip(-1, 1), p.clip(-1, 1)
    return np.abs(p.astype(np.float64) - y)


def resampled(values: NDArray[np.float64], seed: int, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """(R,) means of N of the (N,) values, drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(values)
    rows = max(1, AT_ONCE // n)
    parts = [
        values[rng.integers(0, n, (min(rows, resamples - begin), n))].mean(axis=1)
        for begin in range(0, resamples, rows)
    ]
    return np.concatenate(parts)
