"""Whether samples lie on disk in the order of their labels, which shuffling within a window of shards cannot undo."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ENOUGH = 0.2
"""A correlation beyond it is told."""
ERRORS = 4.0
"""And beyond so many of its standard errors, which chance reaches less than once in ten thousand times."""


def of_labels(labels: NDArray[Any], shards: NDArray[Any]) -> dict[str, float | None]:
    """How far the place on disk tells the label.

    Args:
        labels: (samples,) in the order on disk, NaN where there is none.
        shards: (samples,) which shard each is in.

    Returns:
        "rank": Spearman's correlation of label and place, -1..1. "shards": the share of the variance that the shards'
        means explain, less what chance explains (epsilon squared, Kelley 1935), 0..1: tars of one label each, in any
        order. Each is None where it is not beyond chance, or not worth a word.
    """
    known = ~np.isnan(labels)
    values, homes = labels[known].astype(np.float64), shards[known]
    samples = len(values)
    if samples < 3 or not values.std():
        return {"rank": None, "shards": None}
    rank = float(np.corrcoef(np.arange(samples), _ranks(values))[0, 1])
    explained = _between(values, homes)
    return {
        "rank": round(rank, 4) if abs(rank) > max(ENOUGH, ERRORS / samples**0.5) else None,
        "shards": round(explained, 4) if explained > ENOUGH**2 else None,
    }


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(samples,) place of each in ascending order; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    ranks: NDArray[np.float64] = middle[which]
    return ranks


def _between(values: NDArray[np.float64], homes: NDArray[Any]) -> float:
    """Epsilon squared of the shards; 0 where chance alone may do as much."""
    _, which, counts = np.unique(homes, return_inverse=True, return_counts=True)
    samples, shards = len(values), len(counts)
    if not 1 < shards < samples:
        return 0.0
    means = np.bincount(which, values) / counts
    within = float(((values - means[which]) ** 2).mean() / values.var())
    # between alike shards it is about chi-squared / samples; its quantile after Wilson and Hilferty (1931)
    free = shards - 1
    chance = free * (1 - 2 / (9 * free) + ERRORS * (2 / (9 * free)) ** 0.5) ** 3 / (samples - shards)
    return 1 - within * (samples - 1) / (samples - shards) if 1 - within > chance else 0.0
