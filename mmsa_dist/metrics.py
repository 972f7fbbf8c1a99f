"""Metrics exactly as the field reports them. y is the truth, p the prediction; both are flattened to float32.

Shapes: N samples, C classes. Shares (accuracy, F1) are fractions of 1. A value that is not defined (the correlation of
a constant, a share of no samples) is None: never NaN, and never a number that only looks like a result.

Source: the evaluation that MMSA, Self-MM, MulT and the papers after them share, its conventions kept:
rounding is half to even, F1 is weighted with the truth first, SIMS is clipped before everything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmsa_dist.errors import ConfigError, DataError, TrainingError
from mmsa_dist.suggest import nearest

KINDS = ("mosi", "sims", "other")
"""mosi: MOSI and MOSEI, labels -3..3. sims: SIMS and SIMSv2, -1..1. other: any range; MAE and correlation only."""

Floats = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]
Values = dict[str, float | None]


class Confusion(NamedTuple):
    """counts: (C, C) int64, the truth's class down, the prediction's across. labels: the classes' names, ascending."""

    counts: Classes
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Scale:
    """A way to make C classes of a value.

    Attributes:
        labels: the classes' names, ascending.
        classes: (N,) float32 -> (N,) class numbers 0..C-1.
    """

    labels: tuple[str, ...]
    classes: Callable[[Floats], Classes]


def evaluate(kind: str, y: npt.ArrayLike, p: npt.ArrayLike) -> Values:
    """All metrics of a data set's kind.

    Args:
        kind: one of `KINDS`; `kind_for` finds it.
        y: (N,) true labels.
        p: (N,) predictions, in label units.

    Returns:
        The metrics of `names(kind)`, in that order; None where a value is not defined.

    Raises:
        ConfigError: no such kind.
        TrainingError: a prediction is not finite.
        DataError: a label is not finite.
    """
    _scales(kind)
    truth, prediction = _checked(y, p)
    if kind == "sims":
        truth, prediction = truth.clip(-1, 1), prediction.clip(-1, 1)
    values: Values = {"mae": _mae(truth, prediction), "corr": _corr(truth, prediction)}
    if kind == "mosi":
        for classes in (7, 5, 3):
            values[f"acc{classes}"] = _accuracy(_counts("mosi", classes, truth, prediction))
        values |= _binary("_has0", truth >= 0, prediction >= 0)
        non0 = truth != 0
        values |= _binary("_non0", truth[non0] > 0, prediction[non0] > 0)
    elif kind == "sims":
        counts = _counts("sims", 2, truth, prediction)
        values |= {"acc2": _accuracy(counts), "f1": _weighted_f1(counts)}
        for classes in (3, 5):
            values[f"acc{classes}"] = _accuracy(_counts("sims", classes, truth, prediction))
    return values


def names(kind: str) -> tuple[str, ...]:
    """The metrics that `evaluate` gives for this kind."""
    return tuple(evaluate(kind, [], []))


def kind_for(label_range: tuple[float, float]) -> str:
    """The kind of a data set with labels in this range."""
    kinds: Mapping[tuple[float, float], str] = {(-3.0, 3.0): "mosi", (-1.0, 1.0): "sims"}
    return kinds.get((float(label_range[0]), float(label_range[1])), "other")


def confusion(y: npt.ArrayLike, p: npt.ArrayLike, classes: int, kind: str = "mosi") -> Confusion:
    """How often each true class was predicted as each class.

    Args:
        y: (N,) true labels.
        p: (N,) predictions.
        classes: 2 (has0: negative or not), 3, 5 or 7 for mosi; 2, 3 or 5 for sims. `class_counts(kind)` lists them.
        kind: whose classes.

    Raises:
        ConfigError: the kind has no such classes.
        TrainingError, DataError: as `evaluate`.
    """
    scales = _scales(kind)
    if classes not in scales:
        valid = ", ".join(map(str, class_counts(kind))) or "none"
        raise ConfigError(f"no confusion matrix of {classes} classes for labels of kind {kind!r} (valid: {valid})")
    truth, prediction = _checked(y, p)
    return Confusion(_counts(kind, classes, truth, prediction), scales[classes].labels)


def class_counts(kind: str) -> tuple[int, ...]:
    """Numbers of classes that `confusion` knows for this kind, ascending."""
    return tuple(sorted(_scales(kind)))


def higher_is_better(name: str) -> bool:
    """Whether more of the metric called `name` is better; ``loss`` counts as a metric.

    Raises:
        ConfigError: no such metric; names the nearest.
    """
    known = {"loss", *(metric for kind in KINDS for metric in names(kind))}
    if name not in known:
        raise ConfigError(f"unknown metric {name!r}{nearest(name, known)}")
    return name not in ("mae", "loss")


def is_better(name: str, new: float | None, old: float | None) -> bool:
    """Whether `new` improves on `old`; an undefined value improves on nothing, and anything improves on it."""
    if new is None or np.isnan(new):
        return False
    if old is None or np.isnan(old):
        return True
    return new > old if higher_is_better(name) else new < old


def _checked(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[Floats, Floats]:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which has its sentence below
        truth = np.asarray(y, dtype=np.float32).reshape(-1)
        prediction = np.asarray(p, dtype=np.float32).reshape(-1)
    if len(truth) != len(prediction):
        raise ValueError(f"{len(truth)} labels for {len(prediction)} predictions")
    for values, what, error in ((prediction, "predictions", TrainingError), (truth, "labels", DataError)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            remedy = "lower the learning rate or clip the gradient" if error is TrainingError else "leave them out"
            raise error(
                f"{len(wrong)} of {len(values)} {what} are not finite, the first at position {wrong[0]} "
                f"({values[wrong[0]]}): no metric is defined; {remedy}"
            )
    return truth, prediction


def _mae(y: Floats, p: Floats) -> float | None:
    return float(np.abs(p.astype(np.float64) - y).mean()) if len(y) else None


def _corr(y: Floats, p: Floats) -> float | None:
    """Pearson's r in float64, whose squares of float32 values neither overflow nor vanish."""
    if len(y) < 2 or (y == y[0]).all() or (p == p[0]).all():
        return None
    dy, dp = (v - v.mean() for v in (y.astype(np.float64), p.astype(np.float64)))
    r = (dy @ dp) / (np.sqrt(dy @ dy) * np.sqrt(dp @ dp))
    return float(np.clip(r, -1, 1))  # rounding only


def _binary(suffix: str, y: npt.NDArray[np.bool_], p: npt.NDArray[np.bool_]) -> Values:
    counts = _cross(y.astype(np.int64), p.astype(np.int64), 2)
    return {f"acc2{suffix}": _accuracy(counts), f"f1{suffix}": _weighted_f1(counts)}


def _accuracy(counts: Classes) -> float | None:
    total = counts.sum()
    return float(counts.trace() / total) if total else None


def _weighted_f1(counts: Classes) -> float | None:
    """Mean of the classes' F1 weighted by how often each is true (scikit-learn's ``average="weighted"``).

    F1 = 2 TP / (2 TP + FP + FN) is 0 / 0 only for a class that is neither true nor predicted; its weight is 0.
    """
    total = counts.sum()
    if not total:
        return None
    true, predicted = counts.sum(1), counts.sum(0)
    f1 = 2 * counts.diagonal() / np.maximum(true + predicted, 1)
    return float(f1 @ true / total)


def _scales(kind: str) -> Mapping[int, _Scale]:
    if kind not in _SCALES:
        raise ConfigError(f"unknown kind of labels {kind!r}{nearest(kind, KINDS)}")
    return _SCALES[kind]


def _counts(kind: str, classes: int, y: Floats, p: Floats) -> Classes:
    scale = _SCALES[kind][classes]
    return _cross(scale.classes(y), scale.classes(p), classes)


def _cross(y: Classes, p: Classes, classes: int) -> Classes:
    return np.bincount(y * classes + p, minlength=classes * classes).reshape(classes, classes)


def _rounded(limit: int) -> _Scale:
    """Clip to -limit..limit, round half to even."""
    labels = tuple(str(n) for n in range(-limit, limit + 1))
    return _Scale(labels, lambda v: np.round(v.clip(-limit, limit)).astype(np.int64) + limit)


def _bins(*inner: float) -> _Scale:
    """Clip to -1..1, half-open bins (lo, hi] between the inner edges.

    The edges are float32 like the values: a prediction of 0.1 is then the edge itself and falls in the bin below it.
    """
    edges = np.array(inner, dtype=np.float32)
    bounds = [-1.0, *inner, 1.0]
    labels = [f"{lo:g} < y ≤ {hi:g}" for lo, hi in pairwise(bounds)]
    labels[0] = f"y ≤ {inner[0]:g}"
    labels[-1] = f"y > {inner[-1]:g}"
    return _Scale(tuple(labels), lambda v: np.searchsorted(edges, v.clip(-1, 1), side="left").astype(np.int64))


_SCALES: Mapping[str, Mapping[int, _Scale]] = {
    "mosi": {
        2: _Scale(("y < 0", "y ≥ 0"), lambda v: (v >= 0).astype(np.int64)),
        3: _rounded(1),
        5: _rounded(2),
        7: _rounded(3),
    },
    "sims": {2: _bins(0.0), 3: _bins(-0.1, 0.1), 5: _bins(-0.7, -0.1, 0.1, 0.7)},
    "other": {},
}
