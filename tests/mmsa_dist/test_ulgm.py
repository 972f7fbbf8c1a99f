"""ULGM against its definition, on every number of ranks and over restarts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsa_dist.errors import ConfigError
from mmsa_dist.label_generators import LabelGenerator, make_generator
from mmsa_dist.label_generators.base import join_step
from mmsa_dist.systems.base import Prediction
from shards.batch import Batch
from tests.mmsa_dist.ulgm_reference import WIDTHS, Reference, Run, same, ulgm

Ranks = Callable[..., list[Any]]
State = dict[str, Tensor]


def centres(state: State, k: str) -> np.ndarray:
    """(2, d), NaN where a class has no sample."""
    return (state[f"sum.{k}"] / state[f"count.{k}"][:, None]).numpy()


def check(state: State, reference: Reference, first: int) -> None:
    for k in reference.widths:
        if k != "M":
            wanted = [reference.labels[k][first + row] for row in range(len(state["ids"]))]
            np.testing.assert_allclose(state[f"label.{k}"].numpy(), wanted, atol=1e-6, rtol=0)
        for i, positive in enumerate((True, False)):
            assert state[f"count.{k}"][i] == len(reference.members(k, positive))
            centre = reference.centre(k, positive)
            if centre is not None:
                np.testing.assert_allclose(centres(state, k)[i], centre, atol=1e-9, rtol=0)


# --- the definition


@settings(max_examples=60)
@given(
    samples=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    global_batch=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    first=st.sampled_from([0, 5]),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
    zeros=st.sampled_from([0.0, 0.4]),
    zero_is_positive=st.booleans(),
    label_range=st.sampled_from([(-3.0, 3.0), (-1.0, 1.0)]),
    tasks=st.sampled_from(["MTAV", "MT", "MAV"]),
)
def test_equals_the_definition(
    samples: int,
    seed: int,
    global_batch: int,
    accumulation: int,
    first: int,
    absent: float,
    zeros: float,
    zero_is_positive: bool,
    label_range: tuple[float, float],
    tasks: str,
) -> None:
    """Any data: few samples, classes without any, filler, absent modalities; checked at every step of four epochs."""
    widths = {k: WIDTHS[k] for k in tasks}
    run = Run(samples, seed, global_batch, label_range, first, absent, zeros, widths)
    generator, reference = ulgm(run, zero_is_positive=zero_is_positive), run.reference(zero_is_positive)
    for epoch in range(1, 5):
        for step, seen in enumerate(run.steps(epoch, accumulation=accumulation)):
            generator.observe(epoch, *seen)
            reference.step(epoch, run.seen(epoch, step))
            check(generator.state_dict(), reference, first)
        generator.end_epoch()
        check(generator.state_dict(), reference, first)


def test_equals_the_definition_over_hundreds_of_steps_with_class_changes() -> None:
    run = Run(samples=37, seed=3, global_batch=4, absent=0.2)
    generator, reference = ulgm(run), run.reference()
    changes = steps = 0
    for epoch in range(1, 41):  # 10 steps each
        for step, seen in enumerate(run.steps(epoch)):
            before = generator.state_dict()
            generator.observe(epoch, *seen)
            reference.step(epoch, run.seen(epoch, step))
            state = generator.state_dict()
            check(state, reference, 0)
            changes += sum(int((state[f"label.{k}"].sign() != before[f"label.{k}"].sign()).sum()) for k in "TAV")
            steps += 1
        if epoch > 30:  # three hundred steps without: rounding must not add up before an epoch's end either
            generator.end_epoch()
    assert steps == 400 and changes > 20, (steps, changes)


def one(*numbers: int, weight: list[float] | None = None, text: list[bool] | None = None) -> Batch:
    """A batch of samples of which only the numbers matter."""
    size = len(numbers)
    return Batch(
        values={},
        lengths={},
        present={"text": torch.tensor([True] * size if text is None else text)},
        labels={"M": torch.full((size,), 0.25)},
        numbers=torch.tensor(numbers, dtype=torch.int64),
        weight=torch.ones(size) if weight is None else torch.tensor(weight),
        norm=float(size),
        keys=[str(n) for n in numbers],
    )


def says(m: list[float], t: list[float]) -> Prediction:
    """One-dimensional features of the fused and the text head."""
    return Prediction(tasks={}, features={"M": torch.tensor(m)[:, None], "T": torch.tensor(t)[:, None]})


def two_samples(**options: Any) -> LabelGenerator:
    """Labels +2 and -2, one-dimensional features: fused at +1 and -1, text at +2 and -2, after epoch 1."""
    generator = make_generator(
        "ulgm",
        numbers=[0, 1],
        ids=[10, 11],
        labels=[2.0, -2.0],
        widths={"M": 1, "T": 1},
        label_range=(-3, 3),
        **options,
    )
    generator.observe(1, [one(0, 1)], [says([1.0, -1.0], [2.0, -2.0])])
    return generator


def test_by_hand() -> None:
    generator = two_samples()
    assert generator.state_dict()["label.T"].tolist() == [2.0, -2.0]  # epoch 1 makes no labels
    generator.observe(2, [one(0)], [says([0.5], [0.0])])
    # centres were M +1 -1, T +2 -2. alpha_m = (1.5 - 0.5) / 0.5 = 2, alpha_s = (2 - 2) / 2 = 0
    # new = 0.5 (0 / 2) 2 + 0.5 (2 + 0 - 2) = 0;  y = 1/3 * 2 + 2/3 * 0
    assert generator.state_dict()["label.T"].tolist() == pytest.approx([2 / 3, -2.0])
    generator.observe(3, [one(0)], [says([0.5], [0.0])])
    # centres are now M +0.5 -1, T 0 -2 (the sample's newest features). alpha_m = 1.5 / 1e-8, alpha_s = 2 / 1e-8
    # new = 0.5 * 4/3 * 2 + 0.5 (2 + 0.5e8) clamped to 3;  y = 2/4 * 2/3 + 2/4 * 3
    assert generator.state_dict()["label.T"].tolist() == pytest.approx([0.5 * 2 / 3 + 0.5 * 3, -2.0])


def test_new_labels_come_from_the_centres_before_the_batch() -> None:
    """Both samples move far away in the same batch: only the old centres give this answer."""
    generator = two_samples()
    generator.observe(2, [one(0, 1)], [says([3.0, -3.0], [6.0, -6.0])])
    # sample 0: alpha_m = (4 - 2) / 2 = 1, alpha_s = (8 - 4) / 4 = 1 -> new = 0.5 * 1 * 2 + 0.5 * 2 = 2
    # sample 1: alpha_m = (2 - 4) / 4 = alpha_s = (4 - 8) / 8 = -1/2   -> new = -2
    assert generator.state_dict()["label.T"].tolist() == pytest.approx([2.0, -2.0])
    assert centres(generator.state_dict(), "T").tolist() == [[6.0], [-6.0]]


def test_a_new_label_is_clamped_to_the_label_range_and_never_nan() -> None:
    generator = two_samples()
    generator.observe(2, [one(0, 1)], [says([1e-9, -1e-9], [2.0, -2.0])])  # alpha_m of almost zero
    labels = generator.state_dict()["label.T"]
    assert labels.isfinite().all()
    assert labels[0] == pytest.approx(1 / 3 * 2 + 2 / 3 * 3)
    generator = two_samples()
    generator.observe(2, [one(0)], [says([-0.5], [0.0])])
    # alpha_m = (0.5 - 1.5) / 1.5 = -2/3, alpha_s = 0 -> new = 0 + 0.5 (2 + 2/3) = 4/3, inside
    assert generator.state_dict()["label.T"][0] == pytest.approx(1 / 3 * 2 + 2 / 3 * 4 / 3)


def test_samples_not_visited_yet_are_in_no_centre() -> None:
    generator = make_generator(
        "ulgm", numbers=[0, 1, 2], ids=[1, 2, 3], labels=[1.0, 2.0, -1.0], widths={"M": 1, "T": 1}, label_range=(-3, 3)
    )
    generator.observe(1, [one(0)], [says([4.0], [6.0])])
    state = generator.state_dict()
    assert centres(state, "M")[0] == 4.0 and centres(state, "T")[0] == 6.0  # not 2 and 3, with a zero vector
    assert state["count.M"].tolist() == state["count.T"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_without_one_of_the_classes_labels_stay(sign: float) -> None:
    generator = make_generator(
        "ulgm", numbers=[0, 1], ids=[1, 2], labels=[sign, 2 * sign], widths={"M": 1, "T": 1}, label_range=(-3, 3)
    )
    for epoch in (1, 2, 3):
        generator.observe(epoch, [one(0, 1)], [says([1.0 * epoch, 2.0], [3.0, 0.5])])
        generator.end_epoch()
    assert generator.state_dict()["label.T"].tolist() == [sign, 2 * sign]


def test_an_emptied_class_has_no_centre_whatever_rounding_leaves_of_it() -> None:
    """Two negative samples, one small and one tiny, turn positive: the sum of the rest is no zero, and no centre."""
    truth = [2.0, 1.5, 1.0, -0.01, -0.02]
    generator = make_generator(
        "ulgm", numbers=range(5), ids=range(5), labels=truth, widths={"M": 1, "T": 1}, label_range=(-3, 3)
    )
    generator.observe(1, [one(*range(5))], [says([3.0, 3.1, 3.2, 0.0, 0.1], [2.0, 3.0, 3.1, 0.7, 3e-12])])
    generator.end_epoch()
    for sample in (3, 4):
        generator.observe(2, [one(sample)], [says([0.0], [3.0])])
    state = generator.state_dict()
    assert state["count.T"].tolist() == [5.0, 0.0] and state["sum.T"][1].item() != 0
    before = state["label.T"][:3].tolist()
    generator.observe(2, [one(0, 1, 2)], [says([3.0, 3.1, 3.2], [2.0, 1.0, 0.0])])
    assert generator.state_dict()["label.T"][:3].tolist() == before


def test_zero_is_in_neither_class_unless_it_counts_as_positive() -> None:
    for zero_is_positive, count in ((False, [0.0, 1.0]), (True, [1.0, 1.0])):
        generator = make_generator(
            "ulgm",
            numbers=[0, 1],
            ids=[1, 2],
            labels=[0.0, -1.0],
            widths={"M": 1, "T": 1},
            label_range=(-3, 3),
            zero_is_positive=zero_is_positive,
        )
        generator.observe(1, [one(0, 1)], [says([1.0, 2.0], [3.0, 4.0])])
        assert generator.state_dict()["count.M"].tolist() == generator.state_dict()["count.T"].tolist() == count


def test_a_sample_seen_twice_in_a_batch_counts_once() -> None:
    once, filler, twice = two_samples(), two_samples(), two_samples()
    once.observe(2, [one(0, 1)], [says([0.5, -2.0], [1.0, -3.0])])
    filler.observe(2, [one(0, 1, 0, 0, weight=[1, 1, 0, 0])], [says([0.5, -2.0, 0.5, 9.0], [1.0, -3.0, 1.0, math.nan])])
    twice.observe(2, [one(0, 1), one(0, 1)], [says([0.5, -2.0], [1.0, -3.0])] * 2)
    assert same(once.state_dict(), filler.state_dict())
    assert same(once.state_dict(), twice.state_dict())


def test_filler_takes_no_part_though_its_sample_is_not_in_the_batch() -> None:
    generator = two_samples()
    before = generator.state_dict()
    generator.observe(2, [one(0, weight=[0])], [says([0.5], [1.0])])
    assert same(before, generator.state_dict())


def test_an_absent_modality_takes_no_part() -> None:
    generator = two_samples()
    before = generator.state_dict()
    generator.observe(2, [one(0, 1, text=[False, True])], [says([0.5, -2.0], [math.nan, -3.0])])
    state = generator.state_dict()
    assert state["label.T"][0] == before["label.T"][0] and state["label.T"][1] != before["label.T"][1]
    assert centres(state, "T").tolist() == [[2.0], [-3.0]]  # its old feature stays
    assert centres(state, "M").tolist() == [[0.5], [-2.0]]


def test_features_are_detached_and_kept_in_float32() -> None:
    generator = two_samples()
    features = {k: torch.tensor([[1.5]], requires_grad=True).bfloat16() for k in "MT"}
    generator.observe(2, [one(0)], [Prediction(tasks={}, features=features)])
    state = generator.state_dict()
    assert not any(tensor.requires_grad for tensor in state.values())
    assert state["feature.T"].dtype == torch.float32 and state["feature.T"][0] == 1.5


# --- targets


def test_targets_are_the_labels_as_they_stand() -> None:
    generator = two_samples()
    generator.observe(2, [one(0)], [says([0.5], [0.0])])
    targets = generator.targets(one(1, 0, 1))
    assert targets["T"].tolist() == pytest.approx([-2.0, 2 / 3, -2.0])
    assert targets["M"].tolist() == [0.25] * 3  # the batch's own: the true label


def test_a_sample_outside_the_train_split_has_its_own_label() -> None:
    targets = two_samples().targets(one(7, 0, -1, 2))
    assert targets["T"].tolist() == [0.25, 2.0, 0.25, 0.25]


def test_numbers_may_have_gaps_and_any_order() -> None:
    generator = make_generator(
        "ulgm",
        numbers=torch.tensor([9, 2, 5]),
        ids=torch.tensor([1, 2, 3]),
        labels=torch.tensor([0.9, 0.2, 0.5]),
        widths={"M": 1, "T": 1},
        label_range=(-3, 3),
    )
    targets = generator.targets(one(2, 5, 9, 3, 1, 10))["T"]
    assert targets.tolist() == pytest.approx([0.2, 0.5, 0.9, 0.25, 0.25, 0.25])
    generator.observe(1, [one(9, 3)], [says([1.0, 100.0], [1.0, 100.0])])  # 3 is nobody
    assert generator.state_dict()["count.M"].tolist() == [1.0, 0.0]
    assert centres(generator.state_dict(), "M")[0] == 1.0


# --- restarts


def epoch_steps(run: Run, epoch: int, generator: LabelGenerator, begin: int = 0, end: int | None = None) -> None:
    for step, seen in enumerate(run.steps(epoch)):
        if begin <= step < (end or 10**9):
            generator.observe(epoch, *seen)


def test_a_restart_in_mid_epoch_is_invisible(tmp_path: Path) -> None:
    run = Run(samples=23, seed=5, global_batch=4, absent=0.2)
    generator = ulgm(run)
    for epoch in (1, 2):
        epoch_steps(run, epoch, generator)
        generator.end_epoch()
    epoch_steps(run, 3, generator, 0, 3)
    save_file(generator.state_dict(), tmp_path / "labels.safetensors")
    resumed = ulgm(run)
    resumed.load_state_dict(load_file(tmp_path / "labels.safetensors"))
    for other in (generator, resumed):
        epoch_steps(run, 3, other, 3)
        other.end_epoch()
        epoch_steps(run, 4, other)
    assert same(generator.state_dict(), resumed.state_dict())


def test_the_state_follows_the_samples_ids_not_their_places() -> None:
    """The data packed anew, in another order and at other numbers, goes on from the same checkpoint."""
    run = Run(samples=23, seed=5, global_batch=4)
    generator = ulgm(run)
    epoch_steps(run, 1, generator)
    epoch_steps(run, 2, generator)
    state = generator.state_dict()
    order = np.random.default_rng(0).permutation(run.samples)
    packed = make_generator(
        "ulgm",
        numbers=np.arange(100, 100 + run.samples),
        ids=run.ids[order],
        labels=run.truth[order],
        widths=run.widths,
        label_range=run.label_range,
    )
    packed.load_state_dict(state)
    loaded = packed.state_dict()
    for name in state:
        by_sample = name.split(".")[0] in ("ids", "label", "feature", "class")
        assert torch.equal(loaded[name], state[name][order] if by_sample else state[name]), name
    assert packed.targets(one(100))["T"][0] == state["label.T"][order[0]]


def test_the_order_of_handing_samples_over_does_not_matter() -> None:
    run = Run(samples=23, seed=5, global_batch=4)
    generators = [ulgm(run), ulgm(run, np.random.default_rng(1).permutation(run.samples))]
    for generator in generators:
        epoch_steps(run, 1, generator)
        epoch_steps(run, 2, generator)
    assert same(generators[0].state_dict(), generators[1].state_dict())


def test_a_state_of_other_data_or_another_system_is_refused() -> None:
    run, other = Run(samples=5, seed=1, global_batch=2), Run(samples=6, seed=1, global_batch=2)
    with pytest.raises(ConfigError, match=r"knows 6 train samples, \d of them among this data set's 5: start anew"):
        ulgm(run).load_state_dict(ulgm(other).state_dict())
    moved = {**ulgm(run).state_dict(), "ids": torch.from_numpy(run.ids + 1)}
    with pytest.raises(ConfigError, match="knows 5 train samples, 0 of them"):
        ulgm(run).load_state_dict(moved)
    with pytest.raises(ConfigError, match="knows 0 train samples"):
        ulgm(run).load_state_dict({})
    narrow = Run(samples=5, seed=1, global_batch=2, widths={"M": 5, "T": 3})
    wide = Run(samples=5, seed=1, global_batch=2, widths={"M": 5, "T": 4})
    with pytest.raises(ConfigError, match=r"'sum.T' of shape \(2, 4\), this system's is \(2, 3\)"):
        ulgm(narrow).load_state_dict(ulgm(wide).state_dict())
    with pytest.raises(ConfigError, match=r"has no 'label.A'"):
        ulgm(run).load_state_dict(ulgm(wide).state_dict())


def test_the_state_is_a_copy_on_the_cpu_that_no_later_step_changes() -> None:
    generator = two_samples()
    before = generator.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    generator.observe(2, [one(0)], [says([0.5], [0.0])])
    assert same(before, kept) and not same(before, generator.state_dict())


def test_re_summing_by_chunks_changes_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(samples=29, seed=9, global_batch=6)
    generator = ulgm(run)
    for epoch in (1, 2):
        epoch_steps(run, epoch, generator)
    running = generator.state_dict()
    monkeypatch.setattr("mmsa_dist.label_generators.kept.CHUNK", 4)
    generator.end_epoch()
    for name, tensor in generator.state_dict().items():
        torch.testing.assert_close(tensor, running[name], atol=1e-12, rtol=0)


def test_an_epochs_end_sums_anew() -> None:
    run = Run(samples=29, seed=9, global_batch=6)
    generator: Any = ulgm(run)
    epoch_steps(run, 1, generator)
    right = generator.state_dict()
    for centres in generator._centres.values():
        centres.sums += 1.0  # as if rounding had added up
    generator.end_epoch()
    for name, tensor in generator.state_dict().items():
        torch.testing.assert_close(tensor, right[name], atol=1e-12, rtol=0)


# --- ranks


def on_ranks(run: Run, accumulation: int, epochs: range, state: State | None = None) -> State:
    generator = ulgm(run)
    if state is not None:
        generator.load_state_dict(state)
    for epoch in epochs:
        for seen in run.steps(epoch, dist.get_rank(), dist.get_world_size(), accumulation):
            generator.observe(epoch, *seen)
        generator.end_epoch()
    return generator.state_dict()


def joined(run: Run, accumulation: int) -> list[tuple[list[int], list[bool], Tensor]]:
    world, rank = dist.get_world_size(), dist.get_rank()
    steps = [join_step(*seen, run.widths, torch.device("cpu")) for seen in run.steps(1, rank, world, accumulation)]
    return [(step.numbers.tolist(), step.real.tolist(), step.features["T"]) for step in steps]


def test_ranks_join_their_rows_in_the_order_of_the_global_batch(ranks: Ranks) -> None:
    run = Run(samples=11, seed=4, global_batch=6)
    for steps in ranks(joined, 2, run, 2):
        assert len(steps) == 2
        for step, (numbers, real, features) in enumerate(steps):
            batch = run.plan(1).step(step).tolist()
            filler = 8 - len(batch)  # up to 2 ranks x 2 micro-batches x 2 samples
            assert numbers == batch + batch[:1] * filler
            assert real == [True] * len(batch) + [False] * filler
            assert np.array_equal(features.numpy(), run.features(1, "T")[numbers])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 3), (2, 1), (2, 2), (4, 1)])
def test_any_number_of_ranks_gives_the_labels_of_one(ranks: Ranks, world: int, accumulation: int) -> None:
    run = Run(samples=29, seed=7, global_batch=6, absent=0.2)  # 29 = 4 * 6 + 5: filler on 2 and on 4 ranks
    alone = ulgm(run)
    for epoch in range(1, 5):
        epoch_steps(run, epoch, alone)
        alone.end_epoch()
    states = ranks(on_ranks, world, run, accumulation, range(1, 5))
    assert all(same(states[0], state) for state in states[1:]), "ranks differ"
    assert same(states[0], alone.state_dict())


def test_a_state_loads_at_another_number_of_ranks(ranks: Ranks) -> None:
    run = Run(samples=29, seed=8, global_batch=6)
    whole = ranks(on_ranks, 2, run, 1, range(1, 5))[0]
    half = ranks(on_ranks, 2, run, 1, range(1, 3))[1]
    assert same(whole, ranks(on_ranks, 4, run, 1, range(3, 5), half)[3])
