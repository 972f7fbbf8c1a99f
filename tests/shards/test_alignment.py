"""Which steps belong to an interval, and word means: by hand, and against loops over every pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from shards.sources.alignment import SHORTEST, within, word_means


def test_steps_of_an_interval_by_hand() -> None:
    """From 1 to 2 s: steps that only touch it stay out, what reaches into it counts, the order is that of time."""
    steps = np.array([[1.9, 2.5], [0, 1], [0.9, 1.1], [1.2, 1.3], [2, 3], [1.4, 1.4], [0, 9], [np.nan, 1.5]])
    assert within(steps, 1.0, 2.0).tolist() == [6, 2, 3, 0]


def test_word_means_by_hand() -> None:
    """Frames of half a second from 0 to 3; three words.

    "so" from 0.0 to 1.0 has frames 0 and 1: means (10 + 20) / 2 and (1 + 3) / 2. "it" from 1.2 to 1.8 reaches into
    frames 2 (1.0-1.5) and 3 (1.5-2.0): (30 + 40) / 2 and (5 + 7) / 2. "was" from 3.0 to 3.4 comes after the last frame.
    """
    features = np.array([[10, 1], [20, 3], [30, 5], [40, 7], [50, 9], [60, 11]], np.float32)
    frames = np.array([[0, 0.5], [0.5, 1], [1, 1.5], [1.5, 2], [2, 2.5], [2.5, 3]])
    means, count = word_means(features, frames, np.array([[0.0, 1.0], [1.2, 1.8], [3.0, 3.4]]))
    assert means.tolist() == [[15, 2], [35, 6], [0, 0]]
    assert count.tolist() == [2, 2, 0]


def test_a_value_that_is_not_finite_spoils_its_own_mean_only() -> None:
    features = np.array([[1, -np.inf], [np.nan, 4], [5, 6]])
    frames = np.array([[0, 1], [1, 2], [2, 3]])
    means, _ = word_means(features, frames, frames)
    assert_array_equal(means, features)


@pytest.mark.parametrize(("steps", "words"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_align(steps: int, words: int) -> None:
    frames = np.tile([0.0, 1.0], (max(steps, words), 1))
    means, count = word_means(np.ones((steps, 2)), frames[:steps], frames[:words])
    assert means.shape == (words, 2)
    assert not means.any() and not count.any()


times = st.integers(0, 40).map(lambda tenth: tenth / 10)
intervals = st.lists(st.tuples(times, times), max_size=12).map(lambda pairs: np.array(pairs, float).reshape(-1, 2))


@given(intervals, intervals)
def test_as_a_loop_over_every_pair(steps: np.ndarray, words: np.ndarray) -> None:
    """Also of steps that overlap, lie in one another, have no length or end before they start."""
    features = np.random.default_rng(len(steps)).integers(-99, 99, (len(steps), 3)).astype(float)
    means, count = word_means(features, steps, words)
    for (start, end), mean, number in zip(words, means, count, strict=True):
        shared = [n for n, (begin, stop) in enumerate(steps) if min(end, stop) - max(start, begin) > SHORTEST]
        assert number == len(shared)
        assert_allclose(mean, np.mean(features[shared], axis=0) if shared else np.zeros(3))
        assert within(steps, start, end).tolist() == sorted(shared, key=lambda n: steps[n, 0])
