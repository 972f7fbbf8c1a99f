"""Metrics on hand-computed cases at every bin edge, and against a reference written sample by sample."""

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mmsa_dist import metrics
from mmsa_dist.errors import ConfigError, DataError, TrainingError

BELOW, ABOVE = -math.inf, math.inf


def next_to(value: float, towards: float) -> float:
    """The float32 beside `value`."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


# --- bin edges


@pytest.mark.parametrize(
    ("value", "seven", "five", "three"),
    [
        (-9.0, "-3", "-2", "-1"),
        (-3.0, "-3", "-2", "-1"),
        (-2.5, "-2", "-2", "-1"),  # half to even
        (next_to(-2.5, BELOW), "-3", "-2", "-1"),
        (-2.0, "-2", "-2", "-1"),
        (-1.5, "-2", "-2", "-1"),
        (next_to(-1.5, ABOVE), "-1", "-1", "-1"),
        (-1.0, "-1", "-1", "-1"),
        (-0.5, "0", "0", "0"),
        (next_to(-0.5, BELOW), "-1", "-1", "-1"),
        (-0.0, "0", "0", "0"),
        (0.0, "0", "0", "0"),
        (0.5, "0", "0", "0"),
        (next_to(0.5, ABOVE), "1", "1", "1"),
        (1.0, "1", "1", "1"),
        (1.5, "2", "2", "1"),
        (next_to(1.5, BELOW), "1", "1", "1"),
        (2.0, "2", "2", "1"),
        (2.5, "2", "2", "1"),
        (next_to(2.5, ABOVE), "3", "2", "1"),
        (3.0, "3", "2", "1"),
        (9.0, "3", "2", "1"),
    ],
)
def test_mosi_classes_at_every_edge(value: float, seven: str, five: str, three: str) -> None:
    for classes, wanted in ((7, seven), (5, five), (3, three)):
        counts, labels = metrics.confusion([0.0], [value], classes)
        assert labels == tuple(str(n) for n in range(-(classes // 2), classes // 2 + 1))
        assert counts.sum() == 1 and counts[labels.index("0"), labels.index(wanted)] == 1
        assert metrics.evaluate("mosi", [float(wanted)], [value])[f"acc{classes}"] == 1.0


@pytest.mark.parametrize(
    ("value", "two", "three", "five"),
    [
        (-2.0, 0, 0, 0),
        (-1.0, 0, 0, 0),
        (-0.7, 0, 0, 0),
        (next_to(-0.7, ABOVE), 0, 0, 1),
        (-0.1, 0, 0, 1),
        (next_to(-0.1, ABOVE), 0, 1, 2),
        (-0.0, 0, 1, 2),
        (0.0, 0, 1, 2),  # zero counts as negative
        (next_to(0.0, ABOVE), 1, 1, 2),
        (0.1, 1, 1, 2),  # the edge itself, in float32
        (next_to(0.1, ABOVE), 1, 2, 3),
        (0.7, 1, 2, 3),
        (next_to(0.7, ABOVE), 1, 2, 4),
        (1.0, 1, 2, 4),
        (2.0, 1, 2, 4),
    ],
)
def test_sims_classes_at_every_edge(value: float, two: int, three: int, five: int) -> None:
    for classes, wanted in ((2, two), (3, three), (5, five)):
        counts, labels = metrics.confusion([value], [value], classes, "sims")
        assert len(labels) == classes and counts[wanted, wanted] == 1 == counts.sum()


def test_an_edge_given_in_double_precision_is_compared_in_float32() -> None:
    assert np.float64(np.float32(0.1)) > 0.1  # so a comparison in float64 would put it above
    assert metrics.evaluate("sims", [0.0], np.array([0.1], np.float32))["acc3"] == 1.0
    assert metrics.evaluate("sims", [0.0], np.array([0.1], np.float64))["acc3"] == 1.0


def test_confusion_has_truth_down_and_prediction_across() -> None:
    counts, labels = metrics.confusion([-1.0, -1.0, 0.0, 2.0], [1.0, -0.1, -0.0, 3.0], 2)
    assert labels == ("y < 0", "y ≥ 0")
    assert counts.tolist() == [[1, 1], [0, 2]]
    assert metrics.confusion([0.5], [0.0], 2, "sims").labels == ("y ≤ 0", "y > 0")
    assert metrics.confusion([0.5], [0.0], 5, "sims").labels == (
        "y ≤ -0.7",
        "-0.7 < y ≤ -0.1",
        "-0.1 < y ≤ 0.1",
        "0.1 < y ≤ 0.7",
        "y > 0.7",
    )


# --- hand-computed


def test_mosi_by_hand() -> None:
    y = [-2.0, -0.4, 0.0, 0.0, 1.0, 3.0]
    p = [-1.4, 0.2, -0.2, 0.5, 1.6, 3.4]
    values = metrics.evaluate("mosi", y, p)
    assert values["mae"] == pytest.approx((0.6 + 0.6 + 0.2 + 0.5 + 0.6 + 0.4) / 6)
    assert values["corr"] == pytest.approx(statistics.correlation(y, p))
    assert values["acc7"] == pytest.approx(4 / 6)  # classes -2 0 0 0 1 3 against -1 0 0 0 2 3
    assert values["acc5"] == pytest.approx(4 / 6)  # 3 and 3.4 both clip to 2
    assert values["acc3"] == 1.0  # -1 0 0 0 1 1 on both sides
    assert values["acc2_has0"] == pytest.approx(4 / 6)  # wrong: -0.4 against 0.2, and 0 against -0.2
    # has0: negative TP 1 FN 1 FP 1, F1 1/2, support 2; not negative TP 3 FN 1 FP 1, F1 3/4, support 4
    assert values["f1_has0"] == pytest.approx((2 * 0.5 + 4 * 0.75) / 6)
    assert values["acc2_non0"] == pytest.approx(3 / 4)
    # non0: negative TP 1 FN 1, F1 2/3, support 2; positive TP 2 FP 1, F1 4/5, support 2
    assert values["f1_non0"] == pytest.approx((2 * 2 / 3 + 2 * 4 / 5) / 4)


def test_sims_by_hand_clips_before_everything() -> None:
    y, p = [-1.0, 0.0, 0.4, 1.0], [-1.5, 0.3, 0.5, 1.8]
    values = metrics.evaluate("sims", y, p)
    assert values["mae"] == pytest.approx((0.0 + 0.3 + 0.1 + 0.0) / 4)
    assert values["corr"] == pytest.approx(statistics.correlation(y, [-1.0, 0.3, 0.5, 1.0]))
    assert values["acc2"] == pytest.approx(3 / 4)  # zero is negative, 0.3 is not
    assert values["f1"] == pytest.approx((2 * 2 / 3 + 2 * 4 / 5) / 4)
    assert values["acc3"] == values["acc5"] == pytest.approx(3 / 4)


def test_zeros() -> None:
    """A zero label is in has0 and not in non0; a zero prediction is not negative, and not positive either."""
    values = metrics.evaluate("mosi", [0.0, 0.0, 2.0, -2.0], [0.0, -0.0, 0.0, -1.0])
    assert values["acc2_has0"] == 1.0
    assert values["acc2_non0"] == 1 / 2


def test_without_a_nonzero_label_non0_is_undefined() -> None:
    values = metrics.evaluate("mosi", [0.0, 0.0], [1.0, -1.0])
    assert values["acc2_non0"] is None and values["f1_non0"] is None
    assert values["acc2_has0"] == 1 / 2


@pytest.mark.parametrize("kind", metrics.KINDS)
def test_a_constant_prediction_has_no_correlation(kind: str) -> None:
    for constant in (0.0, 0.1, 0.3):  # 0.1 and 0.3 have a mean that rounds
        values = metrics.evaluate(kind, [-1.0, 0.2, 1.0], [constant] * 3)
        assert values["corr"] is None
        assert values["mae"] == pytest.approx(np.mean([abs(v - constant) for v in (-1.0, 0.2, 1.0)]))
    assert metrics.evaluate(kind, [0.4] * 3, [-1.0, 0.2, 1.0])["corr"] is None


def test_sims_prediction_that_is_constant_once_clipped_has_no_correlation() -> None:
    assert metrics.evaluate("sims", [-1.0, 1.0], [1.5, 2.5])["corr"] is None
    assert metrics.evaluate("mosi", [-1.0, 1.0], [1.5, 2.5])["corr"] == pytest.approx(1.0)


def test_one_sample() -> None:
    assert metrics.evaluate("mosi", [1.0], [-1.0]) == {
        "mae": 2.0,
        "corr": None,
        **dict.fromkeys(("acc7", "acc5", "acc3", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0"), 0.0),
    }
    assert metrics.evaluate("sims", [1.0], [1.0]) == {
        "mae": 0.0,
        "corr": None,
        **dict.fromkeys(("acc2", "f1", "acc3", "acc5"), 1.0),
    }


@pytest.mark.parametrize("kind", metrics.KINDS)
def test_no_sample_leaves_everything_undefined(kind: str) -> None:
    assert set(metrics.evaluate(kind, [], []).values()) == {None}


# --- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_prediction_that_is_not_finite_gets_a_sentence(bad: float) -> None:
    with pytest.raises(
        TrainingError, match=r"1 of 3 predictions are not finite, the first at position 1 \((nan|-?inf)\)"
    ):
        metrics.evaluate("mosi", [0.0, 1.0, 2.0], [0.0, bad, 2.0])
    with pytest.raises(TrainingError, match="lower the learning rate"):
        metrics.confusion([0.0], [bad], 7)


def test_a_label_that_is_not_finite_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError, match=r"2 of 3 labels are not finite, the first at position 0"):
        metrics.evaluate("sims", [math.nan, 1.0, math.inf], [0.0, 0.0, 0.0])


def test_unknown_names_are_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mosi'"):
        metrics.evaluate("mosii", [0.0], [0.0])
    with pytest.raises(ConfigError, match=r"7 classes for labels of kind 'sims' \(valid: 2, 3, 5\)"):
        metrics.confusion([0.0], [0.0], 7, "sims")
    with pytest.raises(ConfigError, match="did you mean 'acc2_has0'"):
        metrics.higher_is_better("acc2_has")


def test_different_lengths_are_our_bug() -> None:
    with pytest.raises(ValueError, match="1 labels for 2 predictions"):
        metrics.evaluate("mosi", [0.0], [0.0, 1.0])


# --- kinds and directions


def test_kinds_and_their_metrics() -> None:
    assert metrics.kind_for((-3, 3)) == metrics.kind_for((-3.0, 3.0)) == "mosi"
    assert metrics.kind_for((-1.0, 1.0)) == "sims"
    assert metrics.kind_for((0.0, 10.0)) == "other"
    assert metrics.names("mosi") == (
        *("mae", "corr", "acc7", "acc5", "acc3"),
        *("acc2_has0", "f1_has0", "acc2_non0", "f1_non0"),
    )
    assert metrics.names("sims") == ("mae", "corr", "acc2", "f1", "acc3", "acc5")
    assert metrics.names("other") == ("mae", "corr")
    assert [metrics.class_counts(kind) for kind in metrics.KINDS] == [(2, 3, 5, 7), (2, 3, 5), ()]


@pytest.mark.parametrize("name", ["mae", "loss"])
def test_less_is_better(name: str) -> None:
    assert not metrics.higher_is_better(name)
    assert metrics.is_better(name, 0.7, 0.8) and not metrics.is_better(name, 0.8, 0.7)


@pytest.mark.parametrize("name", sorted({*metrics.names("mosi"), *metrics.names("sims")} - {"mae"}))
def test_more_is_better(name: str) -> None:
    assert metrics.higher_is_better(name)
    assert metrics.is_better(name, 0.8, 0.7) and not metrics.is_better(name, 0.7, 0.8)


@pytest.mark.parametrize("name", ["mae", "corr"])
def test_equal_is_not_better_and_undefined_never_is(name: str) -> None:
    assert not metrics.is_better(name, 0.5, 0.5)
    for undefined in (None, math.nan):
        assert not metrics.is_better(name, undefined, 0.5)
        assert metrics.is_better(name, 0.5, undefined)
        assert not metrics.is_better(name, undefined, None)


# --- against a reference


def reference_class(value: float, kind: str, classes: int) -> int:
    """The definition, for one float32 value, in exact arithmetic."""
    exact = Fraction(value)
    if kind == "mosi":
        limit = classes // 2
        return round(min(max(exact, Fraction(-limit)), Fraction(limit)))  # Python rounds half to even
    edges = {2: (-1.01, 0.0, 1.01), 3: (-1.01, -0.1, 0.1, 1.01), 5: (-1.01, -0.7, -0.1, 0.1, 0.7, 1.01)}[classes]
    bounds = [Fraction(float(np.float32(edge))) for edge in edges]
    (found,) = [i for i in range(classes) if bounds[i] < exact <= bounds[i + 1]]
    return found


def reference(kind: str, y: list[float], p: list[float]) -> dict[str, float | None]:
    if kind == "sims":
        y, p = ([min(max(v, -1.0), 1.0) for v in values] for values in (y, p))

    def share(pairs: Sequence[tuple[object, object]]) -> float | None:
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else None

    def f1(pairs: list[tuple[bool, bool]]) -> float | None:
        if not pairs:
            return None
        truth, predicted = zip(*pairs, strict=True)
        return float(f1_score(truth, predicted, average="weighted", zero_division=0.0))

    pairs = list(zip(y, p, strict=True))
    values: dict[str, float | None] = {"mae": sum(abs(a - b) for a, b in pairs) / len(pairs)}
    constant = len(set(y)) < 2 or len(set(p)) < 2
    values["corr"] = None if constant else statistics.correlation(y, p)
    for classes in (7, 5, 3) if kind == "mosi" else (3, 5):
        values[f"acc{classes}"] = share(
            [(reference_class(a, kind, classes), reference_class(b, kind, classes)) for a, b in pairs]
        )
    if kind == "mosi":
        has0 = [(a >= 0, b >= 0) for a, b in pairs]
        non0 = [(a > 0, b > 0) for a, b in pairs if a != 0]
        values |= {"acc2_has0": share(has0), "f1_has0": f1(has0), "acc2_non0": share(non0), "f1_non0": f1(non0)}
    else:
        two = [(a > 0, b > 0) for a, b in pairs]
        values |= {"acc2": share(two), "f1": f1(two)}
    return values


edges = [0.0, -0.0, 0.1, -0.1, 0.5, -0.5, 0.7, -0.7, 1.0, -1.0, 1.5, -1.5, 2.5, -2.5, 3.0, -3.0]
number = st.one_of(
    st.sampled_from([float(np.float32(e)) for e in edges]),
    st.floats(-4, 4, width=32).map(lambda v: round(v * 1024) / 1024),
)


@given(st.sampled_from(["mosi", "sims"]), st.lists(st.tuples(number, number), min_size=1, max_size=12))
def test_equals_the_reference(kind: str, pairs: list[tuple[float, float]]) -> None:
    y, p = ([pair[i] for pair in pairs] for i in (0, 1))
    wanted = reference(kind, y, p)
    values = metrics.evaluate(kind, y, p)
    assert values.keys() == wanted.keys()
    for name, value in values.items():
        assert value == (None if wanted[name] is None else pytest.approx(wanted[name], abs=1e-9)), name


@given(st.lists(st.tuples(number, number), min_size=1, max_size=12))
def test_f1_has_truth_first_and_confusion_agrees_with_accuracy(pairs: list[tuple[float, float]]) -> None:
    y, p = ([pair[i] for pair in pairs] for i in (0, 1))
    for kind, classes, name in (
        ("mosi", 7, "acc7"),
        ("mosi", 5, "acc5"),
        ("mosi", 2, "acc2_has0"),
        ("sims", 5, "acc5"),
    ):
        counts = metrics.confusion(y, p, classes, kind).counts
        assert counts.shape == (classes, classes) and counts.sum() == len(pairs)
        assert metrics.evaluate(kind, y, p)[name] == pytest.approx(counts.trace() / counts.sum())


def test_weighted_f1_is_not_symmetric_in_its_arguments() -> None:
    y, p = [1.0, 1.0, 1.0], [1.0, -1.0, -1.0]  # positive TP 1 FN 2, F1 1/2
    assert metrics.evaluate("mosi", y, p)["f1_has0"] == pytest.approx(1 / 2)
    assert metrics.evaluate("mosi", p, y)["f1_has0"] == pytest.approx(1 / 6)


def test_tensors_columns_and_lower_precision_are_flattened() -> None:
    y, p = torch.tensor([[0.5], [1.5]]), torch.tensor([[0.5], [1.5]], dtype=torch.float16)
    assert metrics.evaluate("mosi", y, p)["mae"] == 0.0


def test_correlation_of_tiny_and_huge_values() -> None:
    y = np.array([1.0, 2.0, 4.0], np.float32)
    for scale in (1e-40, 1e-20, 1e20, 8e37):
        assert metrics.evaluate("other", y, y * np.float32(scale))["corr"] == pytest.approx(1.0, abs=1e-4)


# --- a piece at a time


@pytest.mark.parametrize("kind", [*metrics.KINDS, metrics.CLASSES])
@given(
    cuts=st.lists(st.integers(0, 60), max_size=5),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1.0, 3.0]),
    offset=st.sampled_from([0.0, 1.5, 1e4]),
)
def test_pieces_give_what_all_at_once_gives(kind: str, cuts: list[int], seed: int, scale: float, offset: float) -> None:
    """Counts exactly, sums to their last bits: also where the mean is large beside the deviations."""
    rng = np.random.default_rng(seed)
    tasks = ("happy", "sad")
    shape = (60, 2) if kind == metrics.CLASSES else (60,)
    y = (rng.random(shape) < 0.5).astype(np.float32) if kind == metrics.CLASSES else rng.normal(size=shape).round(1)
    p = (offset + scale * rng.normal(size=shape)).astype(np.float32)
    found = metrics.running(kind, tasks)
    bounds = [0, *sorted(cuts), 60]
    for begin, end in pairwise(bounds):
        found.add(y[begin:end], p[begin:end])
    assert found.samples == 60
    expected = metrics.evaluate(kind, y, p, tasks)
    assert list(found.values()) == list(expected)
    for name, value in found.values().items():
        if name in ("mae", "corr", "loss"):
            assert value == (None if expected[name] is None else pytest.approx(expected[name], rel=1e-9, abs=1e-7))
        else:
            assert value == expected[name]


def test_pieces_that_are_constant_each_are_not_constant_together() -> None:
    found = metrics.running("other")
    for value in (1.0, 2.0):
        found.add([value, value], [value, value])
    assert found.values()["corr"] == pytest.approx(1.0)
    assert metrics.running("mosi").values() == metrics.evaluate("mosi", [], [])
