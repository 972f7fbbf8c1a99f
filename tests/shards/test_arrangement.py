"""Labels that tell their place on disk, and those that do not."""

import numpy as np
import pytest

from shards.arrangement import of_labels

RNG = np.random.default_rng(0)
SHUFFLED = RNG.uniform(-3, 3, 400)
SHARDS = np.repeat(np.arange(8), 50)


def test_sorted_labels_correlate_with_their_place() -> None:
    assert of_labels(np.sort(SHUFFLED), SHARDS)["rank"] == 1.0
    assert of_labels(np.sort(SHUFFLED)[::-1], SHARDS)["rank"] == -1.0
    noisy = of_labels(np.sort(SHUFFLED) + RNG.normal(0, 2, 400), SHARDS)["rank"]
    assert noisy is not None and 0.4 < noisy < 0.9


def test_tars_of_one_label_each_in_no_order() -> None:
    label = np.array([1.0, -1, 2, -2, -2, 2, -1, 1])[SHARDS]
    assert of_labels(label + RNG.normal(0, 0.1, 400), SHARDS) == {"rank": None, "shards": pytest.approx(1, abs=0.02)}


def test_chance_is_not_told() -> None:
    for samples, shards in ((4, 2), (12, 12), (30, 3), (400, 8), (400, 100)):
        for seed in range(200):
            labels = np.random.default_rng(seed).uniform(-3, 3, samples)
            assert of_labels(labels, np.arange(samples) * shards // samples) == {"rank": None, "shards": None}


def test_ties_share_a_rank() -> None:
    labels = np.repeat([0.0, 1.0], 200)
    assert of_labels(labels, SHARDS)["rank"] == pytest.approx(0.866, abs=0.001)  # sqrt(3) / 2


@pytest.mark.parametrize("labels", [[], [np.nan] * 5, [1.0] * 9, [1.0, 2.0]])
def test_too_little_to_tell(labels: list[float]) -> None:
    assert of_labels(np.array(labels), np.zeros(len(labels))) == {"rank": None, "shards": None}


def test_samples_without_a_label_are_left_out() -> None:
    labels = np.sort(SHUFFLED)
    labels[::3] = np.nan
    assert of_labels(labels, SHARDS)["rank"] == 1.0
