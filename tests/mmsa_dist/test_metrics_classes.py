"""Metrics of classes: by hand, and against scikit-learn and torch on the two logits that a log-odds comes from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from mmsa_dist import metrics
from mmsa_dist.errors import DataError, TrainingError
from shards.utterance import EMOTIONS

KIND = metrics.CLASSES
TWO = ("happy", "sad")


def test_by_hand() -> None:
    """happy: 1 1 0 answered 1 0 0. sad: 0 0 0 answered 0 0 1."""
    y, p = [[1, 0], [1, 0], [0, 0]], [[2.0, -1.0], [-1.0, -3.0], [-0.5, 0.5]]
    values = metrics.evaluate(KIND, y, p, TWO)
    assert list(values) == ["loss", "acc", "f1", "acc_happy", "f1_happy", "acc_sad", "f1_sad"]
    assert values["acc_happy"] == values["acc_sad"] == values["acc"] == 2 / 3
    assert values["f1_happy"] == pytest.approx(2 / 3 * 2 / 3 + 1 / 3 * 2 / 3)  # both classes have F1 2/3
    assert values["f1_sad"] == pytest.approx(4 / 5)  # 0: F1 4/5, and none is 1
    assert values["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    terms = [-2.0, -1.0, 1.0, -3.0, -0.5, 0.5]  # log-odds of what is wrong
    assert values["loss"] == pytest.approx(sum(math.log1p(math.exp(term)) for term in terms) / 6)


def test_a_tie_is_not_there() -> None:
    """Argmax over two equal logits is the first."""
    assert metrics.evaluate(KIND, [[0]], [[0.0]], ("sad",))["acc_sad"] == 1.0
    assert metrics.evaluate(KIND, [[0]], [[-0.0]], ("sad",))["acc_sad"] == 1.0
    assert metrics.evaluate(KIND, [[0]], [[1e-30]], ("sad",))["acc_sad"] == 0.0


def test_huge_log_odds_have_a_loss() -> None:
    assert metrics.evaluate(KIND, [[1], [0]], [[1e30], [-1e30]], ("sad",))["loss"] == 0.0
    assert metrics.evaluate(KIND, [[0]], [[1e30]], ("sad",))["loss"] == pytest.approx(1e30)


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 2, *[st.integers(-12, 12)] * 4), min_size=1, max_size=30))
def test_they_are_those_of_the_two_logits(rows: list[tuple[int, ...]]) -> None:
    table = np.array(rows)
    y, logits = table[:, :2], torch.tensor(table[:, 2:].reshape(-1, 2, 2) / 4.0)
    values = metrics.evaluate(KIND, y, (logits[..., 1] - logits[..., 0]).numpy(), TWO)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 2), torch.tensor(y).reshape(-1))
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-6)
    chosen = logits.numpy().argmax(-1)
    for n, task in enumerate(TWO):
        assert values[f"acc_{task}"] == pytest.approx(accuracy_score(y[:, n], chosen[:, n]))
        expected = f1_score(y[:, n], chosen[:, n], average="weighted", zero_division=0)
        assert values[f"f1_{task}"] == pytest.approx(expected)
    for kind in ("acc", "f1"):
        assert values[kind] == pytest.approx(np.mean([values[f"{kind}_{task}"] for task in TWO]))


def test_the_kind_its_names_and_which_way_is_better() -> None:
    assert metrics.kind_for((0.0, 1.0), dict.fromkeys(EMOTIONS, 2)) == KIND
    assert metrics.kind_for((0.0, 1.0), {}) == metrics.kind_for((0.0, 1.0)) == "other"
    each = [f"{kind}_{emotion}" for emotion in EMOTIONS for kind in ("acc", "f1")]
    assert metrics.names(KIND) == ("loss", "acc", "f1", *each)
    assert metrics.is_better("loss", 0.4, 0.5) and not metrics.is_better("loss", 0.5, 0.4)
    assert all(metrics.higher_is_better(name) for name in metrics.names(KIND) if name != "loss")
    assert metrics.default_monitor(KIND) == "loss"
    assert {metrics.default_monitor(kind) for kind in metrics.KINDS} == {"mae"}


def test_without_samples_nothing_is_defined() -> None:
    assert set(metrics.evaluate(KIND, [], []).values()) == {None}


def test_bad_values_get_a_sentence() -> None:
    with pytest.raises(DataError, match="label sad is 2 at position 1, expected 0 or 1; pack the data again"):
        metrics.evaluate(KIND, [[0, 1], [1, 2]], [[0.0, 0.0], [0.0, 0.0]], TWO)
    with pytest.raises(TrainingError, match="1 of 4 predictions are not finite"):
        metrics.evaluate(KIND, [[0, 1], [1, 0]], [[0.0, 0.0], [math.nan, 0.0]], TWO)


def test_the_confusion_of_one_task() -> None:
    counts, labels = metrics.confusion([1, 1, 0, 0], [3.0, -1.0, 0.0, 0.5], 2, KIND)
    assert labels == ("not", "there") and counts.tolist() == [[1, 1], [1, 1]]
    assert metrics.class_counts(KIND) == (2,)
