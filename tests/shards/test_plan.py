"""Law 2 (exactly once) and what the plan promises beside it, over random data sets and numbers of ranks."""

import pickle
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.costs import CostRule
from shards.errors import DataError
from shards.index import Index
from shards.order import ShardOrder, packed_counts
from shards.plan import EvaluationPlan, Plan, evaluation_plan, share, training_plan
from tests.shards.plans import (
    RULE,
    accumulations,
    copied,
    cost,
    epoch_of,
    indexes,
    make_index,
    plans,
    real,
    seeds,
    worlds,
)


@given(indexes, st.sampled_from(["train", "valid"]), seeds, st.integers(0, 9), st.integers(1, 70), st.integers(1, 10))
def test_every_sample_of_the_split_once_an_epoch(
    index: Index, split: str, seed: int, epoch: int, batch: int, window: int
) -> None:
    plan = training_plan(index, split, seed, epoch, batch, window)
    assert sorted(epoch_of(plan)) == list(index.numbers(split))
    sizes = [len(plan.step(s)) for s in range(plan.num_steps)]
    assert all(size == batch for size in sizes[:-1]) and 1 <= sizes[-1] <= batch


@given(plans(), worlds, accumulations)
def test_ranks_share_each_global_batch(plan: Plan, world: int, accumulation: int) -> None:
    for s in range(plan.num_steps):
        numbers = plan.step(s)
        ranks = [share(numbers, rank, world, accumulation) for rank in range(world)]
        pieces = [piece for rank in ranks for piece in rank]
        # as many micro-batches of the same size on every rank: no rank waits for one that has finished
        assert {len(rank) for rank in ranks} == {accumulation}
        assert len({len(piece.numbers) for piece in pieces}) == 1
        # ranks and micro-batches in order are the global batch, then filler of weight 0
        joined = np.concatenate([piece.numbers for piece in pieces])
        weight = np.concatenate([piece.weight for piece in pieces])
        assert joined[: len(numbers)].tolist() == numbers.tolist()
        assert weight.tolist() == [1.0] * len(numbers) + [0.0] * (len(joined) - len(numbers))
        assert set(joined[len(numbers) :]) <= {numbers[0]}
        assert len(joined) - len(numbers) < world * accumulation
        # the mean over ranks and micro-batches of sum(weight * loss) / norm is the mean loss of the global batch
        assert {piece.norm for piece in pieces} == {int(weight.sum()) / (world * accumulation)}


@given(plans(), st.data())
def test_ranks_may_change_at_any_step(plan: Plan, data: st.DataObject) -> None:
    """Killed or stopped between any two steps, any number of times, and gone on with at another number of ranks."""
    stops = data.draw(st.dictionaries(st.integers(0, plan.num_steps - 1), worlds, max_size=6), label="step: ranks")
    world, seen = 1, []
    for s in range(plan.num_steps):
        if s in stops:
            world, plan = stops[s], copied(plan)
        numbers = [n for rank in range(world) for piece in share(plan.step(s), rank, world) for n in real(piece)]
        assert numbers == plan.step(s).tolist()
        seen += numbers
    assert seen == epoch_of(plan)


@given(plans(), worlds, accumulations, worlds, accumulations)
def test_a_mean_over_samples_does_not_depend_on_ranks(plan: Plan, w1: int, a1: int, w2: int, a2: int) -> None:
    numbers = plan.step(plan.num_steps - 1)

    def loss(world: int, accumulation: int) -> float:
        pieces = [piece for rank in range(world) for piece in share(numbers, rank, world, accumulation)]
        return float(np.mean([(piece.weight * np.sin(piece.numbers)).sum() / piece.norm for piece in pieces]))

    assert loss(w1, a1) == pytest.approx(np.sin(numbers).mean(), abs=1e-12)
    assert loss(w2, a2) == pytest.approx(loss(w1, a1), abs=1e-12)


@given(plans(), st.data())
def test_resuming_at_any_step_gives_the_tail(plan: Plan, data: st.DataObject) -> None:
    whole = epoch_of(plan)
    start = data.draw(st.integers(0, plan.num_steps - 1))
    resumed = copied(plan)
    tail = [int(number) for s in range(start, plan.num_steps) for number in resumed.step(s)]
    assert tail == whole[start * plan.global_batch :]


@given(plans(), st.randoms(use_true_random=False))
def test_a_step_is_the_same_whatever_was_asked_before(plan: Plan, random: Random) -> None:
    steps = list(range(plan.num_steps)) * 2
    random.shuffle(steps)
    asked = {s: plan.step(s).tolist() for s in steps}
    fresh = copied(plan)
    assert asked == {s: fresh.step(s).tolist() for s in asked}


@given(plans())
def test_equal_and_hashable_by_what_it_depends_on(plan: Plan) -> None:
    plan.step(0)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan and len({plan, copy}) == 1
    assert len(pickle.dumps(plan)) == len(pickle.dumps(copy))  # what was computed does not travel


@given(plans(mix=False, pool=0))
def test_a_block_needs_at_most_window_shards(plan: Plan) -> None:
    order = plan.order
    assert isinstance(order, ShardOrder)
    begins = order.first + np.cumsum([0, *np.frombuffer(order.counts, "<i4")[:-1]])
    shards = [int(np.searchsorted(begins, number, side="right")) - 1 for number in epoch_of(plan)]
    last_use = {shard: position for position, shard in enumerate(shards)}
    first_use = {shard: position for position, shard in reversed(list(enumerate(shards)))}
    for position in range(len(shards)):
        in_use = sum(first_use[shard] <= position <= last_use[shard] for shard in last_use)
        assert in_use <= order.window


@given(plans(mix=False), st.integers(1, 4))
def test_pools_hold_what_the_order_holds_and_batches_are_alike(plan: Plan, pool: int) -> None:
    """Sorting by length moves a sample within its pool and no further, and cuts the pool at lengths."""
    plain = replace(plan, pool=0, rule=None, costs=None)
    plan = replace(plan, pool=pool, rule=RULE, costs=cost)
    for begin in range(0, plan.num_steps, pool):
        steps = range(begin, min(begin + pool, plan.num_steps))
        batches = [plan.step(s) for s in steps]
        assert sorted(np.concatenate(batches)) == sorted(np.concatenate([plain.step(s) for s in steps]))
        whole = [cost(batch) for batch in batches if len(batch) == plan.global_batch]
        assert all((np.diff(costs) >= 0).all() for costs in whole)
        ordered = sorted(whole, key=lambda costs: (costs[0], costs[-1]))
        assert all(one[-1] <= other[0] for one, other in pairwise(ordered))
    last = plan.num_steps - 1
    if len(plan.step(last)) < plan.global_batch:  # what does not fill a batch is a random rest, not the longest
        assert plan.step(last).tolist() == plain.step(last).tolist()


def test_batches_of_a_pool_come_in_any_order() -> None:
    """Not from short to long: else every pool would begin and end alike."""
    plan = training_plan(make_index({"train": [100] * 10}), "train", 0, 1, 10, pool=5, rule=RULE)
    plan = replace(plan, costs=cost)
    places = [int(np.argsort([cost(plan.step(5 * pool + i)).sum() for i in range(5)])[0]) for pool in range(20)]
    assert set(places) == set(range(5))


def test_a_copied_plan_says_that_it_needs_its_tables() -> None:
    plan = training_plan(make_index({"train": [9]}), "train", 0, 1, 4, pool=2, rule=RULE)
    assert plan.describe()["order"] == "blocks-1+lengths-1" and plan.describe()["length"] == {"length_text": 1}
    with pytest.raises(AssertionError, match=r"plan\.on\(index\)"):
        pickle.loads(pickle.dumps(plan)).step(0)
    assert plan != replace(plan, pool=3) != replace(plan, rule=CostRule((("n_tokens", 1),)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    index = make_index({"train": [50] * 40})
    orders = {
        (seed, epoch): tuple(epoch_of(training_plan(index, "train", seed, epoch, 64, window=40)))
        for seed in (0, 1, 2**32, 2**40)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(2000)) for order in orders.values())
    # of two independent orders about one sample in 2000 stands at the same place
    first, second = (np.array(orders[0, epoch]) for epoch in (0, 1))
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.1


def test_samples_of_a_block_are_mixed_through_and_through() -> None:
    plan = training_plan(make_index({"train": [100] * 8}), "train", seed=3, epoch=0, global_batch=80, window=8)
    assert plan.describe()["blocks"] == 1
    for s in range(plan.num_steps):  # each step draws from all eight shards: 10 expected, hypergeometric sd 2.8
        per_shard = np.bincount(plan.step(s) // 100, minlength=8)
        assert per_shard.min() >= 1 and per_shard.max() <= 24


def test_the_order_is_the_one_that_earlier_runs_had() -> None:
    """A golden order: a run that is resumed under another version must go on in the same order."""
    plan = training_plan(make_index({"train": [4, 3, 5, 2], "valid": [2]}), "train", 7, 2, global_batch=6, window=2)
    assert epoch_of(plan) == [12, 6, 4, 13, 5, 0, 10, 2, 1, 9, 3, 11, 8, 7]


def test_one_step_of_a_hundred_million_samples() -> None:
    """Law 7: a step costs what its batch and a block cost, at the end of the epoch as at its beginning."""
    order = ShardOrder("", "train", 0, packed_counts([400] * 250_000), seed=1, epoch=0, window=8)
    plan = Plan(order, global_batch=512)
    assert plan.num_samples == 100_000_000
    last = plan.step(plan.num_steps - 1)
    assert len(last) == 100_000_000 % 512
    assert len(np.unique(np.concatenate([plan.step(0), plan.step(97_000), last]))) == 1024 + len(last)
    assert order._block.cache_info().currsize <= 2  # type: ignore[attr-defined]
    assert len(pickle.dumps(plan)) < 4.1 * 250_000


def test_describe_is_enough_to_make_the_plan_again() -> None:
    index = make_index({"train": [5, 6], "valid": [3]})
    plan = training_plan(index, "train", seed=4, epoch=9, global_batch=4, window=1)
    about = plan.describe()
    assert about["samples"] == 11 and about["steps_per_epoch"] == 3 and about["shards"] == about["blocks"] == 2
    again = training_plan(index, about["split"], about["seed"], 9, about["global_batch"], about["window"])
    assert again == plan and about["fingerprint"] == index.fingerprint


def test_an_empty_or_unknown_split_gets_a_sentence() -> None:
    index = make_index({"train": [5]})
    with pytest.raises(DataError, match=r"made: split 'valid' has no samples \(the data set holds: train 5\)"):
        training_plan(index, "valid", 0, 0, 4)
    with pytest.raises(DataError, match="'valid' has no samples"):
        evaluation_plan(index, "valid", 4)
    with pytest.raises(DataError, match="did you mean 'train'"):
        training_plan(index, "trian", 0, 0, 4)


@given(indexes, st.integers(1, 70), worlds)
def test_evaluation_sees_each_sample_once_in_order(index: Index, batch: int, world: int) -> None:
    plan = evaluation_plan(index, "valid", batch)
    ranks = [list(plan.batches_for(rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # no rank waits for one that has finished
    turns = [piece for turn in zip(*ranks, strict=True) for piece in turn]
    seen = [int(n) for piece in turns for n, w in zip(piece.numbers, piece.weight, strict=True) if w]
    assert seen == list(index.numbers("valid"))
    assert all(len(piece.numbers) == plan.batch for piece in turns)
    assert all(piece.norm == max(1, piece.weight.sum()) for piece in turns)
    assert len(turns) - plan.num_batches < world


@given(indexes, st.integers(1, 70), worlds)
def test_evaluation_batches_do_not_depend_on_ranks(index: Index, batch: int, world: int) -> None:
    plan = evaluation_plan(index, "valid", batch)

    def batches(ranks: int) -> list[tuple[list[int], list[float], float]]:
        turns = zip(*(plan.batches_for(rank, ranks) for rank in range(ranks)), strict=True)
        pieces = [piece for turn in turns for piece in turn if piece.weight.any()]
        return [(p.numbers.tolist(), p.weight.tolist(), p.norm) for p in pieces]

    assert batches(world) == batches(1)


def test_evaluation_plan_compares_and_pickles() -> None:
    plan = evaluation_plan(make_index({"test": [3, 4]}), "test", 64)
    assert plan == EvaluationPlan(first=0, count=7, batch=7) == pickle.loads(pickle.dumps(plan))
