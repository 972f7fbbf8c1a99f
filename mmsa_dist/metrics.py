"""Metrics exactly as the field reports them. y is the truth, p the prediction; both are flattened to float32.

Those of intensities are here, those of classes in `metrics_classes`, found by the same kinds and names.

Shapes: N samples, C classes. Shares (accuracy, F1) are fractions of 1. A value that is not defined (the correlation of
a constant, a share of no samples) is None: never NaN, and never a number that only looks like a result.

Source: the evaluation that MMSA, Self-MM, MulT and the papers after them share, its conventions kept:
rounding is half to even, F1 is weighted with the truth first, SIMS is clipped before everything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mmsa_dist import metrics_classes
from mmsa_dist.errors import ConfigError
from mmsa_dist.shares import Classes, Comoments, Confusion, Floats, Values, accuracy, checked, cross, weighted_f1
from mmsa_dist.suggest import nearest
from shards.utterance import EMOTIONS

KINDS = ("mosi", "sims", "other")
"""Of intensities. mosi: MOSI and MOSEI, labels -3..3. sims: SIMS and SIMSv2, -1..1. other: any range; MAE and
correlation only."""

CLASSES = "iemocap"
"""The kind of data sets whose labels are classes: tasks of two each, decided one by one."""


@dataclass(frozen=True)
class _Scale:
    """A way to make C classes of a value.

    Attributes:
        labels: the classes' names, ascending.
        classes: (N,) float32 -> (N,) class numbers 0..C-1.
    """

    labels: tuple[str, ...]
    classes: Callable[[Floats], Classes]


def evaluate(kind: str, y: npt.ArrayLike, p: npt.ArrayLike, tasks: Sequence[str] = EMOTIONS) -> Values:
    """All metrics of a data set's kind.

    Args:
        kind: one of `KINDS`, or `CLASSES`; `kind_for` finds it.
        y: (N,) true labels; of classes (N, E).
        p: (N,) predictions, in label units; of classes (N, E), log-odds.
        tasks: the E tasks of classes.

    Returns:
        The metrics of `names(kind)`, in that order; None where a value is not defined.

    Raises:
        ConfigError: no such kind.
        TrainingError: a prediction is not finite.
        DataError: a label is not finite.
    """
    found = running(kind, tasks)
    found.add(y, p)
    return found.values()


class Running(Protocol):
    """Metrics of what comes a piece at a time; memory does not grow with it.

    Attributes:
        samples: so far.
    """

    samples: int

    def add(self, y: npt.ArrayLike, p: npt.ArrayLike) -> None:
        """Some more samples, as `evaluate` takes them, and with its errors."""
        ...

    def values(self) -> Values:
        """What `evaluate` gives for all of them: equal in all but the last bits of MAE, correlation and loss."""
        ...


def running(kind: str, tasks: Sequence[str] = EMOTIONS) -> Running:
    """`evaluate` for samples that come a piece at a time.

    Raises:
        ConfigError: no such kind.
    """
    if kind == CLASSES:
        return metrics_classes.Running(tasks)
    _scales(kind)
    return _Intensities(kind)


class _Intensities:
    """`Running` of one of `KINDS`."""

    def __init__(self, kind: str) -> None:
        self.samples = 0
        self._kind = kind
        self._apart = 0.0  # sum of |p - y|
        self._moments = Comoments()
        self._counts: dict[str, Classes] = {}
        self.add([], [])  # of no samples too there are counts, all zero

    def add(self, y: npt.ArrayLike, p: npt.ArrayLike) -> None:
        truth, prediction = checked(y, p)
        if self._kind == "sims":
            truth, prediction = truth.clip(-1, 1), prediction.clip(-1, 1)
        self.samples += len(truth)
        self._apart += float(np.abs(prediction.astype(np.float64) - truth).sum())
        self._moments.add(truth, prediction)
        for name, counts in _decisions(self._kind, truth, prediction).items():
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def values(self) -> Values:
        values: Values = {
            "mae": self._apart / self.samples if self.samples else None,
            "corr": self._moments.correlation(),
        }
        for name, counts in self._counts.items():
            values[f"acc{name}"] = accuracy(counts)
            if name.startswith("2"):
                values[f"f1{name.removeprefix('2')}"] = weighted_f1(counts)
        return values


def _decisions(kind: str, y: Floats, p: Floats) -> dict[str, Classes]:
    """How often each true class was given as each class, by what stands behind ``acc`` in the metric's name."""
    if kind == "mosi":
        non0 = y != 0
        return {
            **{str(classes): _counts("mosi", classes, y, p) for classes in (7, 5, 3)},
            "2_has0": _signs(y >= 0, p >= 0),
            "2_non0": _signs(y[non0] > 0, p[non0] > 0),
        }
    return {str(classes): _counts(kind, classes, y, p) for classes in ((2, 3, 5) if kind == "sims" else ())}


def names(kind: str) -> tuple[str, ...]:
    """The metrics that `evaluate` gives for this kind."""
    return tuple(evaluate(kind, [], []))


def default_monitor(kind: str) -> str:
    """The metric that chooses the best epoch where a recipe leaves it open: what MMSA's and MulT's training is stopped
    on, an L1 loss and a cross-entropy."""
    return "loss" if kind == CLASSES else "mae"


def kind_for(label_range: tuple[float, float], classes: Mapping[str, int] | None = None) -> str:
    """The kind of a data set with labels in this range, or with these classes (task -> their number)."""
    if classes:
        return CLASSES
    kinds: Mapping[tuple[float, float], str] = {(-3.0, 3.0): "mosi", (-1.0, 1.0): "sims"}
    return kinds.get((float(label_range[0]), float(label_range[1])), "other")


def confusion(y: npt.ArrayLike, p: npt.ArrayLike, classes: int, kind: str = "mosi") -> Confusion:
    """How often each true class was predicted as each class.

    Args:
        y: (N,) true labels, of one task.
        p: (N,) predictions.
        classes: 2 (has0: negative or not), 3, 5 or 7 for mosi; 2, 3 or 5 for sims; 2 for classes. `class_counts(kind)`
            lists them.
        kind: whose classes.

    Raises:
        ConfigError: the kind has no such classes.
        TrainingError, DataError: as `evaluate`.
    """
    scales = _scales(kind)
    if classes not in scales:
        valid = ", ".join(map(str, class_counts(kind))) or "none"
        raise ConfigError(f"no confusion matrix of {classes} classes for labels of kind {kind!r} (valid: {valid})")
    truth, prediction = checked(y, p)
    return Confusion(_counts(kind, classes, truth, prediction), scales[classes].labels)


def class_counts(kind: str) -> tuple[int, ...]:
    """Numbers of classes that `confusion` knows for this kind, ascending."""
    return tuple(sorted(_scales(kind)))


def higher_is_better(name: str) -> bool:
    """Whether more of the metric called `name` is better; ``loss`` counts as a metric.

    Raises:
        ConfigError: no such metric; names the nearest.
    """
    known = {"loss", *(metric for kind in (*KINDS, CLASSES) for metric in names(kind))}
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


def _signs(y: npt.NDArray[np.bool_], p: npt.NDArray[np.bool_]) -> Classes:
    return cross(y.astype(np.int64), p.astype(np.int64), 2)


def _scales(kind: str) -> Mapping[int, _Scale]:
    if kind not in _SCALES:
        raise ConfigError(f"unknown kind of labels {kind!r}{nearest(kind, (*KINDS, CLASSES))}")
    return _SCALES[kind]


def _counts(kind: str, classes: int, y: Floats, p: Floats) -> Classes:
    scale = _SCALES[kind][classes]
    return cross(scale.classes(y), scale.classes(p), classes)


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
    CLASSES: {2: _Scale(("not", "there"), lambda v: (v > 0).astype(np.int64))},
}
