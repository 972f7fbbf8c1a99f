"""Whether two systems differ: paired over seeds, and paired over the samples of the test split.

Shapes: S seeds, N samples, R resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmsa_dist.registered.paired import RESAMPLES, resampled

Floats = npt.NDArray[np.float64]

SEED = 20_240_601
"""Of the resampling: the same runs give the same interval."""

FEWEST = 3
"""Seeds that a test over them needs."""

ROUNDING = 1e-9
"""Differences that differ by less, beside the values, are equal: what is left is how 0.8 - 0.7 is rounded."""


@dataclass(frozen=True)
class OverSeeds:
    """A paired t test of what two systems reached with the same seeds.

    Attributes:
        seeds: S. mean: of the differences. p: two-sided; None where all differences are equal, or S < `FEWEST`.
    """

    seeds: int
    mean: float
    p: float | None


@dataclass(frozen=True)
class OverSamples:
    """A paired bootstrap of the difference of mean errors.

    Attributes:
        samples: N. mean: of the differences. low, high: 95 % of the resampled means lie between. p: two-sided.
    """

    samples: int
    mean: float
    low: float
    high: float
    p: float


def over_seeds(one: Mapping[int, float | None], other: Mapping[int, float | None]) -> OverSeeds | None:
    """Student's paired t test; None without a seed that both have a value of.

    Args:
        one, other: seed -> value.
    """
    pairs = [(a, other[seed]) for seed, a in one.items() if a is not None and other.get(seed) is not None]
    if not pairs:
        return None
    differences = np.array([a - b for a, b in pairs if b is not None], dtype=np.float64)
    mean, count = float(differences.mean()), len(differences)
    spread = float(differences.std(ddof=1)) if count >= FEWEST else 0.0
    if spread <= ROUNDING * max(1.0, *(abs(value) for pair in pairs for value in pair if value is not None)):
        return OverSeeds(count, mean, None)
    from scipy.special import stdtr

    t = mean / (spread / np.sqrt(count))
    return OverSeeds(count, mean, float(2 * stdtr(count - 1, -abs(t))))


def over_samples(differences: Floats, resamples: int = RESAMPLES, seed: int = SEED) -> OverSamples:
    """The percentile bootstrap of a mean of paired differences.

    Args:
        differences: (N,) error of the one system less that of the other, of the same sample.
    """
    count, means = len(differences), resampled(differences, seed, resamples)
    low, high = np.percentile(means, [2.5, 97.5])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    # one more in each: that of the samples themselves, so that no p is zero
    return OverSamples(
        count, float(differences.mean()), float(low), float(high), min(1.0, 2 * (tail + 1) / (resamples + 1))
    )


def errors(kind: str, y: npt.ArrayLike, p: npt.ArrayLike) -> Floats:
    """(N,) each sample's error, whose mean is MAE; of classes the share of its tasks that are decided wrongly.

    Args:
        kind: of labels, as in `mmsa_dist.metrics`. y, p: (N,) or, of E classes, (N, E), p in log-odds.
    """
    truth, said = np.asarray(y, np.float32), np.asarray(p, np.float32)
    if kind == "iemocap":
        return np.asarray(((truth > 0) != (said > 0)).mean(axis=1, dtype=np.float64))
    if kind == "sims":
        truth, said = truth.clip(-1, 1), said.clip(-1, 1)
    return np.abs(said.astype(np.float64) - truth)
