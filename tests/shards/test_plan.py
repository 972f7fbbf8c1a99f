"""Law 2 (exactly once) and what the plan promises beside it, over random data sets and numbers of ranks."""

import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import DataError
from shards.index import Index, Shard
from shards.plan import EvaluationPlan, Plan, evaluation_plan, share, training_plan
from shards.utterance import SPLITS


def make_index(counts: dict[str, list[int]]) -> Index:
    """An index of shards with so many samples; a plan needs no files."""
    shards = [
        Shard(
            url=f"{split}-{i}.tar",
            bytes=0,
            sha256=f"{i:064x}",
            samples=count,
            split=split,
            table=f"{split}-{i}.arrow",
            table_bytes=0,
            table_sha256="0" * 64,
        )
        for split in SPLITS
        for i, count in enumerate(counts.get(split, []))
    ]
    return Index(
        name="made",
        synthetic=True,
        dtype="float16",
        modalities={},
        tasks=("M",),
        label_range=(-3, 3),
        has_raw_text=True,
        has_tokens=False,
        splits={split: sum(counts.get(split, [])) for split in SPLITS},
        shards=tuple(shards),
        statistics={},
        non_finite={},
        source={},
        tool_version="0",
        seed=0,
        folder=Path(),
    )


shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=30)
indexes = st.builds(lambda train, valid: make_index({"train": train, "valid": valid}), shard_sizes, shard_sizes)
seeds = st.integers(0, 2**64)
worlds = st.integers(1, 8)
accumulations = st.integers(1, 4)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return training_plan(
        draw(indexes),
        draw(st.sampled_from(["train", "valid"])),
        seed=draw(seeds),
        epoch=draw(st.integers(0, 100)),
        global_batch=draw(st.integers(1, 70)),
        window=draw(st.integers(1, 10)),
    )


def epoch_of(plan: Plan) -> list[int]:
    return [int(number) for s in range(plan.num_steps) for number in plan.step(s)]


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
    resumed = pickle.loads(pickle.dumps(plan))
    tail = [int(number) for s in range(start, plan.num_steps) for number in resumed.step(s)]
    assert tail == whole[start * plan.global_batch :]


@given(plans(), st.randoms(use_true_random=False))
def test_a_step_is_the_same_whatever_was_asked_before(plan: Plan, random: Random) -> None:
    steps = list(range(plan.num_steps)) * 2
    random.shuffle(steps)
    asked = {s: plan.step(s).tolist() for s in steps}
    fresh = Plan(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
    assert asked == {s: fresh.step(s).tolist() for s in asked}


@given(plans())
def test_equal_and_hashable_by_what_it_depends_on(plan: Plan) -> None:
    plan.step(0)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan and len({plan, copy}) == 1
    assert len(pickle.dumps(plan)) == len(pickle.dumps(copy))  # what was computed does not travel


@given(plans())
def test_a_block_needs_at_most_window_shards(plan: Plan) -> None:
    begins = plan.first + np.cumsum([0, *plan.counts[:-1]])
    shards = [int(np.searchsorted(begins, number, side="right")) - 1 for number in epoch_of(plan)]
    last_use = {shard: position for position, shard in enumerate(shards)}
    first_use = {shard: position for position, shard in reversed(list(enumerate(shards)))}
    for position in range(len(shards)):
        in_use = sum(first_use[shard] <= position <= last_use[shard] for shard in last_use)
        assert in_use <= plan.window


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
    assert plan.num_blocks == 1
    for s in range(plan.num_steps):  # each step draws from all eight shards: 10 expected, hypergeometric sd 2.8
        per_shard = np.bincount(plan.step(s) // 100, minlength=8)
        assert per_shard.min() >= 1 and per_shard.max() <= 24


def test_the_order_is_the_one_that_earlier_runs_had() -> None:
    """A golden order: a run that is resumed under another version must go on in the same order."""
    plan = training_plan(make_index({"train": [4, 3, 5, 2], "valid": [2]}), "train", 7, 2, global_batch=6, window=2)
    assert epoch_of(plan) == [12, 6, 4, 13, 5, 0, 10, 2, 1, 9, 3, 11, 8, 7]


def test_one_step_of_a_hundred_million_samples() -> None:
    """Law 7: a step costs what its batch and a block cost, at the end of the epoch as at its beginning."""
    index = make_index({"train": [400]})
    plan = Plan(index.fingerprint, "train", 0, (400,) * 250_000, seed=1, epoch=0, global_batch=512, window=8)
    assert plan.num_samples == 100_000_000
    last = plan.step(plan.num_steps - 1)
    assert len(last) == 100_000_000 % 512
    assert len(np.unique(np.concatenate([plan.step(0), plan.step(97_000), last]))) == 1024 + len(last)
    assert plan._block.cache_info().currsize <= 2  # type: ignore[attr-defined]


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
