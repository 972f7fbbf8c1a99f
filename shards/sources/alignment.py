"""Which steps of a sequence belong to an interval of time, and their mean over each word. All of it at once, by numpy.

The rules are those of the CMU-MultimodalSDK, so that its users find their sequences again: a step belongs to every
interval that it shares more than 10 microseconds with, and counts there whole, however little that is.

Shapes: S steps of a sequence, W words, D width. Intervals (S, 2) are start and end in seconds, in any order.
"""

import numpy as np

SHORTEST = 1e-5
"""Seconds. Two intervals that share no more than this only touch."""


def within(intervals: np.ndarray, start: float, end: float) -> np.ndarray:
    """Numbers (n,) of the steps that belong to the time from `start` to `end`, the earliest first.

    An interval whose start or end is no number belongs nowhere.
    """
    starts, ends = intervals[:, 0], intervals[:, 1]
    found = np.flatnonzero(np.minimum(ends, end) - np.maximum(starts, start) > SHORTEST)
    return found[np.argsort(starts[found], kind="stable")]


def word_means(features: np.ndarray, intervals: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the steps that belong to each word.

    Args:
        features: (S, D).
        intervals: (S, 2), those of the steps.
        words: (W, 2), those of the words.

    Returns:
        Means (W, D) in float64, zeros for a word without a step; and steps (W,) of each word. A value that is not
        finite makes the mean of its word and column so, and no other.
    """
    shared = np.minimum(words[:, None, 1], intervals[None, :, 1]) - np.maximum(words[:, None, 0], intervals[None, :, 0])
    word, step = np.nonzero(shared > SHORTEST)  # pairs that belong together, in order of the words
    count = np.bincount(word, minlength=len(words))
    means = np.zeros((len(words), features.shape[1]))
    spoken = np.flatnonzero(count)
    if len(spoken):
        first = (np.cumsum(count) - count)[spoken]
        with np.errstate(invalid="ignore"):  # inf - inf
            means[spoken] = np.add.reduceat(features[step], first, axis=0, dtype=np.float64) / count[spoken, None]
    return means, count
