"""Paired tests, against formulas and brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmsa_dist.metrics import evaluate
from tune.papers.compared import FEWEST, errors, over_samples, over_seeds


def test_the_paired_t_test_of_a_textbook() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.464 with 2 degrees of freedom, whose p has a closed form."""
    t = 2 / (1 / np.sqrt(3))
    p = 1 - t / np.sqrt(t**2 + 2)
    found = over_seeds({1: 2.0, 2: 4.0, 3: 6.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert found is not None and (found.seeds, found.mean) == (3, 2.0)
    assert found.p == pytest.approx(p)


@given(arrays(np.float64, st.tuples(st.just(2), st.integers(FEWEST, 8)), elements=st.floats(-3, 3, width=16)))
def test_the_t_test_is_scipys(values: np.ndarray) -> None:
    from scipy.stats import ttest_rel

    one, other = (dict(enumerate(row.tolist())) for row in values)
    found = over_seeds(one, other)
    assert found is not None
    if np.ptp(values[0] - values[1]) == 0:
        assert found.p is None
    else:
        assert found.p == pytest.approx(ttest_rel(values[0], values[1]).pvalue, rel=1e-6, abs=1e-12)


def test_differences_that_are_equal_but_for_rounding_are_equal() -> None:
    one, other = {0: 0.8, 1: 0.7, 2: 0.6}, {0: 0.7, 1: 0.6, 2: 0.5}
    assert len({one[seed] - other[seed] for seed in one}) > 1, "what is told from rounding here"
    found = over_seeds(one, other)
    assert found is not None and found.p is None and found.mean == pytest.approx(0.1)


def test_two_seeds_are_too_few_and_only_common_defined_ones_count() -> None:
    found = over_seeds({1: 1.0, 2: 2.0, 3: None, 4: 3.0}, {1: 0.0, 2: 1.5, 3: 1.0})
    assert found is not None and (found.seeds, found.mean, found.p) == (2, 0.75, None)
    assert over_seeds({1: 1.0}, {2: 1.0}) is None
    assert over_seeds({1: None}, {1: 1.0}) is None


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    """Of 4 samples all 256 resamples can be listed: the interval's ends are their percentiles."""
    differences = np.array([-0.3, 0.1, 0.5, 0.9])
    every = np.array([np.mean(each) for each in product(differences, repeat=4)])
    found = over_samples(differences, resamples=40_000)
    assert found.mean == pytest.approx(0.3) and found.samples == 4
    assert found.low == pytest.approx(np.percentile(every, 2.5), abs=0.02)
    assert found.high == pytest.approx(np.percentile(every, 97.5), abs=0.02)
    assert found.p == pytest.approx(2 * (every <= 0).mean(), abs=0.01)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(-3, 3, width=16)))
def test_the_bootstrap_is_the_same_every_time_and_turns_with_its_sign(differences: np.ndarray) -> None:
    one, again, turned = over_samples(differences, 200), over_samples(differences, 200), over_samples(-differences, 200)
    assert one == again
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-one.mean, -one.high, -one.low))
    assert one.low <= one.high and 0 < one.p <= 1 and turned.p == pytest.approx(one.p)


def test_the_bootstrap_does_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).normal(0.1, 1, 50)
    whole = over_samples(differences, 500)
    monkeypatch.setattr("mmsa_dist.registered.paired.AT_ONCE", 64)
    assert over_samples(differences, 500) == whole


@given(arrays(np.float32, st.tuples(st.just(2), st.integers(1, 30)), elements=st.floats(-4, 4, width=16)))
def test_the_mean_of_errors_is_the_metric(values: np.ndarray) -> None:
    for kind in ("mosi", "sims"):
        assert errors(kind, *values).mean() == pytest.approx(evaluate(kind, *values)["mae"], rel=1e-6)
    truth, odds = (values[0] > 0).astype(np.float32)[:, None].repeat(4, 1), values[1][:, None].repeat(4, 1)
    accuracy = evaluate("iemocap", truth, odds)["acc"]
    assert accuracy is not None and errors("iemocap", truth, odds).mean() == pytest.approx(1 - accuracy)
