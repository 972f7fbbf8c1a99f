"""Mixes of several data sets: every set has its share of every batch, and each pass over a set every sample once."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.mix import Mix
from shards.order import MixedOrder, dealt
from shards.plan import Plan, training_plan
from tests.shards.plans import RULE, cost, epoch_of, make_index, plans

shares = st.lists(st.integers(1, 1000), min_size=1, max_size=6).map(tuple)


@given(shares, st.integers(0, 2**40))
def test_sets_are_dealt_evenly(shares: tuple[int, ...], begin: int) -> None:
    lengths = np.arange(begin, begin + 500)
    taken = np.stack(dealt(lengths, shares))
    steps = np.diff(taken, axis=1)
    assert set(steps.ravel()) <= {0, 1} and (steps.sum(axis=0) == 1).all(), "one set gives the next sample"
    assert (taken.sum(axis=0) == lengths).all()
    total = sum(shares)
    for share, of_set in zip(shares, taken.tolist(), strict=True):  # Python's integers do not overflow
        assert all(
            abs(t * total - int(n) * share) <= total * max(1, len(shares) / 2)
            for t, n in zip(of_set, lengths, strict=True)
        )


@given(plans(mix=True), st.integers(1, 4))
def test_each_pass_over_a_set_of_a_mix_has_every_sample_once(plan: Plan, epochs: int) -> None:
    """Over epochs that follow one another from the first; where a pass ends, the next begins."""
    order = plan.order
    assert isinstance(order, MixedOrder)
    size, total = order.num_samples, sum(order.shares)
    turns = [replace(order, epoch=epoch).between(0, size).tolist() for epoch in range(1, epochs + 1)]
    run = [n for turn in turns for n in turn]
    for part, share in zip(order.parts, order.shares, strict=True):
        mine = [n for n in run if part.first <= n < part.first + part.num_samples]
        assert abs(len(mine) - len(run) * share / total) <= 1
        for begin in range(0, len(mine), part.num_samples):
            once = mine[begin : begin + part.num_samples]
            assert len(set(once)) == len(once)
    if all(share * size == part.num_samples * total for part, share in zip(order.parts, order.shares, strict=True)):
        assert all(len(set(turn)) == size for turn in turns), "shares as the sizes: passes and epochs end together"


@given(plans(mix=True, pool=0))
def test_every_batch_has_its_share_of_every_set(plan: Plan) -> None:
    assert isinstance(plan.order, MixedOrder)
    for s in range(plan.num_steps):
        numbers = plan.step(s)
        for part, of in zip(plan.order.parts, plan.order.shares, strict=True):
            mine = ((part.first <= numbers) & (numbers < part.first + part.num_samples)).sum()
            assert abs(mine - len(numbers) * of / sum(plan.order.shares)) <= 2


def test_sets_of_a_mix_and_their_passes_have_orders_of_their_own() -> None:
    one = make_index({"train": [50] * 4, "valid": [1]})
    mix = Mix([one.model_copy(update={"name": name}) for name in "ab"])
    numbers = epoch_of(training_plan(mix, "train", 0, 1, 16)) + epoch_of(training_plan(mix, "train", 0, 2, 16))
    assert sorted(numbers) == sorted([*range(400), *range(400)])
    orders = {
        tuple(n % 200 for n in epoch if (n < 200) == first)
        for epoch in (numbers[:400], numbers[400:])
        for first in (0, 1)
    }
    assert len(orders) == 4


def test_the_order_of_a_mix_is_the_one_that_earlier_runs_had() -> None:
    parts = [make_index({"train": [4, 3], "valid": [1]}), make_index({"train": [2, 2, 1], "valid": [2]})]
    mix = Mix([part.model_copy(update={"name": name}) for part, name in zip(parts, "ab", strict=True)], (1, 2))
    assert epoch_of(training_plan(mix, "train", 7, 2, 5, window=2)) == [7, 5, 8, 8, 2, 7, 9, 4, 10, 11, 3, 11]
    plan = replace(training_plan(mix, "train", 7, 2, 5, pool=2, rule=RULE), costs=cost)
    assert epoch_of(plan) == [7, 8, 8, 2, 9, 10, 4, 11, 11, 5, 3, 9]
