"""SUGRM against its definition: numpy, a sample at a time, and a few cases by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmsa_dist.label_generators import LabelGenerator, make_generator
from mmsa_dist.systems.base import Prediction
from shards.batch import Batch
from tests.mmsa_dist.label_references import SugrmReference, expected, generator_of
from tests.mmsa_dist.ulgm_reference import WIDTHS, Run


def reference_of(run: Run) -> SugrmReference:
    truth = {int(n): float(y) for n, y in zip(run.numbers, run.truth, strict=True)}
    return SugrmReference(truth, run.label_range, run.widths)


def check(state: dict[str, Tensor], reference: SugrmReference, numbers: np.ndarray) -> None:
    for s, labels in reference.labels.items():
        np.testing.assert_allclose(state[f"label.{s}"].numpy(), expected(labels, numbers), atol=1e-6, rtol=0)
    y = reference.truth
    low, high = min(y.values()), max(y.values())
    for name, classes in {
        "M": ([n for n in y if y[n] > 0], [n for n in y if y[n] < 0]),
        "extremes": ([n for n in y if y[n] == high], [n for n in y if y[n] == low != high]),
    }.items():
        for i, members in enumerate(classes):
            mean = reference.mean(iter(members))
            assert state[f"count.{name}"][i] == sum(n in reference.fused for n in members)
            if mean is not None:
                kept = (state[f"sum.{name}"][i] / state[f"count.{name}"][i]).numpy()
                np.testing.assert_allclose(kept, mean[: len(kept)], atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    global_batch=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
    zeros=st.sampled_from([0.0, 0.4]),
    label_range=st.sampled_from([(-3.0, 3.0), (-1.0, 1.0)]),
    widths=st.sampled_from([WIDTHS, {"M": 2, "T": 4}, {"M": 3, "A": 3, "V": 3}]),
)
def test_equals_the_definition(
    samples: int,
    seed: int,
    global_batch: int,
    accumulation: int,
    absent: float,
    zeros: float,
    label_range: tuple[float, float],
    widths: dict[str, int],
) -> None:
    """Few samples, classes without any, filler, absent modalities, features wider and narrower than the fused one."""
    run = Run(samples, seed, global_batch, label_range, 5, absent, zeros, widths)
    generator, reference = generator_of("sugrm", run), reference_of(run)
    for epoch in range(1, 4):
        for step, seen in enumerate(run.steps(epoch, accumulation=accumulation)):
            generator.observe(epoch, *seen)
            reference.step(epoch, run.seen(epoch, step))
            check(generator.state_dict(), reference, run.numbers)
        generator.end_epoch()
        check(generator.state_dict(), reference, run.numbers)


def test_equals_the_definition_over_hundreds_of_steps_with_changes_of_sign() -> None:
    run = Run(samples=37, seed=3, global_batch=4, absent=0.2)
    generator, reference = generator_of("sugrm", run), reference_of(run)
    turned = steps = 0
    for epoch in range(1, 22):  # 10 steps each
        for step, seen in enumerate(run.steps(epoch)):
            before = generator.state_dict()
            generator.observe(epoch, *seen)
            reference.step(epoch, run.seen(epoch, step))
            state = generator.state_dict()
            check(state, reference, run.numbers)
            turned += sum(int((state[f"label.{s}"].sign() != before[f"label.{s}"].sign()).sum()) for s in "TAV")
            steps += 1
        if epoch > 16:  # hundreds of steps without: rounding must not add up before an epoch's end either
            generator.end_epoch()
    assert steps == 210 and turned > 20, (steps, turned)


def one(*numbers: int, text: list[bool] | None = None) -> Batch:
    """A batch of samples of which only the numbers matter."""
    size = len(numbers)
    return Batch(
        values={},
        lengths={},
        present={"text": torch.tensor([True] * size if text is None else text)},
        labels={"M": torch.full((size,), 0.25)},
        numbers=torch.tensor(numbers, dtype=torch.int64),
        weight=torch.ones(size),
        norm=float(size),
        keys=[str(n) for n in numbers],
    )


def says(m: list[list[float]], t: list[list[float]]) -> Prediction:
    return Prediction(tasks={}, features={"M": torch.tensor(m), "T": torch.tensor(t)})


def made(labels: list[float], widths: dict[str, int], **options: Any) -> LabelGenerator:
    numbers = list(range(len(labels)))
    return make_generator(
        "sugrm", numbers=numbers, ids=numbers, labels=labels, widths=widths, label_range=(-3, 3), **options
    )


def text_labels(generator: LabelGenerator) -> list[float]:
    return generator.state_dict()["label.T"].tolist()


def test_by_hand() -> None:
    """Fused features on a line: +3 and -3 at 4 and -4, the centres at 3 and -3."""
    generator = made([3.0, 1.0, -3.0, -1.0], {"M": 1, "T": 1})
    generator.observe(1, [one(0, 1, 2, 3)], [says([[4.0], [2.0], [-4.0], [-2.0]], [[0.0]] * 4)])
    assert text_labels(generator) == [3.0, 1.0, -3.0, -1.0]  # epoch 1 makes no labels
    generator.observe(2, [one(1)], [says([[2.0]], [[0.0]])])
    # D = 8, magnitude = 6 * 2 / 8 = 1.5; r_s = 3 / 3 > r_m = 1 / 5: new = 1 - 1.5;  y = 1/3 * 1 + 2/3 * -0.5
    assert text_labels(generator) == pytest.approx([3.0, 0.0, -3.0, -1.0])
    generator.observe(3, [one(3)], [says([[-2.0]], [[2.0]])])
    # magnitude = 6 * 4 / 8 = 3; r_s = 1 / 5 < r_m = 5 / 1: new = -1 + 3 = 2;  y = 1/2 * -1 + 1/2 * 2
    assert text_labels(generator) == pytest.approx([3.0, 0.0, -3.0, 0.5])
    generator.observe(3, [one(3)], [says([[-2.0]], [[-2.0]])])  # the same ratio: new = y_m
    assert text_labels(generator) == pytest.approx([3.0, 0.0, -3.0, 1 / 2 * 0.5 - 1 / 2 * 1])
    generator.observe(3, [one(0)], [says([[4.0]], [[-90.0]])])  # further than D: 3 - 6, which is the lowest label
    assert text_labels(generator)[0] == pytest.approx(1 / 2 * 3 - 1 / 2 * 3)


def test_a_narrower_feature_is_filled_up_with_zeros() -> None:
    """Either way round: |(3, 4) - (3, 0)| = 4 and |(3, 0) - (3, 4)| = 4."""
    for m, t in (({"M": 2, "T": 1}, ([[3.0, 4.0]], [[3.0]])), ({"M": 1, "T": 2}, ([[3.0]], [[3.0, 4.0]]))):
        generator = made([3.0, -3.0], m)
        wide = m["M"]
        generator.observe(1, [one(0, 1)], [says([[4.0, 0.0][:wide], [-4.0, 0.0][:wide]], [[0.0] * m["T"]] * 2)])
        generator.observe(2, [one(0)], [says(*t)])
        # magnitude = 6 * 4 / 8 = 3. r of (3, 0) is 1 / 7; r of (3, 4) is sqrt(17) / sqrt(65): larger
        new = 3.0 if m["M"] == 2 else 0.0  # 3 + 3 clamped, 3 - 3
        assert text_labels(generator)[0] == pytest.approx(1 / 3 * 3 + 2 / 3 * new)


@pytest.mark.parametrize(
    ("labels", "fused"),
    [([1.0, 2.0], [1.0, 2.0]), ([-1.0, -2.0], [1.0, 2.0]), ([2.0, 2.0], [1.0, 2.0]), ([2.0, -2.0], [1.5, 1.5])],
    ids=["no negative", "no positive", "no other extreme", "D is zero"],
)
def test_without_a_class_or_a_distance_labels_stay(labels: list[float], fused: list[float]) -> None:
    generator = made(labels, {"M": 1, "T": 1})
    for epoch in (1, 2, 3):
        generator.observe(epoch, [one(0, 1)], [says([[f] for f in fused], [[5.0], [0.5]])])
        generator.end_epoch()
    assert text_labels(generator) == labels


def test_a_feature_on_a_centre_has_a_ratio() -> None:
    """r = inf at C-, greater than any other; and where both lie there neither is greater: y_m."""
    for text, new in ((0.0, -3.0), (-4.0, -3.0 + 6 * 0)):
        generator = made([3.0, -3.0], {"M": 1, "T": 1})
        generator.observe(1, [one(0, 1)], [says([[4.0], [-4.0]], [[0.0], [0.0]])])
        generator.observe(2, [one(1)], [says([[-4.0]], [[text]])])
        assert np.isfinite(text_labels(generator)).all()
        moved = -3.0 + 6 * 4 / 8 if text == 0.0 else new  # r_s = 1 < inf: y_m + magnitude
        assert text_labels(generator)[1] == pytest.approx(1 / 3 * -3 + 2 / 3 * moved)


def test_only_fused_features_are_kept() -> None:
    state = generator_of("sugrm", Run(5, 1, 2)).state_dict()
    assert {name for name in state if name.startswith("feature")} == {"feature.M"}
    assert {name for name in state if name.startswith("class")} == {"class.M", "class.extremes"}
