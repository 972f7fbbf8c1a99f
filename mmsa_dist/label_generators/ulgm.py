"""ULGM: unimodal labels from how much nearer a sample's feature lies to the positive than to the negative samples.

Source: W. Yu et al., "Learning Modality-Specific Representations with Self-Supervised Multi-Task Learning for
Multimodal Sentiment Analysis" (Self-MM), AAAI 2021, section 3.3. For k in m, t, a, v: F_k is the newest feature of a
sample, C+_k and C-_k the mean F_k of the samples whose current label y_k is positive or negative (y_m for F_m):

    alpha_k = (|F_k - C-_k| - |F_k - C+_k|) / (|F_k - C+_k| + 1e-8)
    y_new   = 1/2 alpha_s / (alpha_m + 1e-8) y_m + 1/2 (y_m + alpha_s - alpha_m), clamped to the label range
    y_s    <- (n - 1) / (n + 1) y_s + 2 / (n + 1) y_new   in epoch n > 1; labels start as y_m

Two things differ from the public code. Centres are kept as running sums, so a step costs O(B d) and not O(N d). And
samples that were not visited yet take no part in them (there: zero vectors).

Shapes: N training samples, B rows of the global batch, d width of a feature; 2 classes, positive then negative.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.label_generators.base import MODALITY_OF, LabelGenerator, TrainSplit, join_step, label_generator
from shards.batch import Batch

if TYPE_CHECKING:
    from mmsa_dist.systems.base import Prediction

EPS = 1e-8
CHUNK = 8192
"""Rows that re-summing converts to float64 at a time."""


@label_generator("ulgm")
class ULGM(LabelGenerator):
    """Self-MM's unimodal label generation module.

    Row i of the state is the train sample with the i-th smallest number. One row more is written to by everything
    that takes no part (filler, absent modality) and read by nothing: so a step has fixed shapes and never waits for
    the device. Sums are float64: float32 features add up in it almost without rounding.
    """

    paper = "Yu et al., AAAI 2021"

    class Config(Strict):
        """Options of ULGM."""

        zero_is_positive: bool = False
        """A label of exactly zero counts as positive; otherwise in neither class."""

    def __init__(self, config: Strict, split: TrainSplit) -> None:
        super().__init__(config, split)
        assert isinstance(config, ULGM.Config)
        self._zero_is_positive = config.zero_is_positive
        self._range = split.label_range
        self._widths = _checked_widths(split.widths)
        self._tasks = [task for task in self._widths if task != "M"]
        self._device = split.device
        order = np.argsort(split.numbers, kind="stable")
        self._ids = _checked_ids(split.ids)[order]
        self._numbers = torch.from_numpy(split.numbers[order]).to(self._device)
        self._size = len(order)
        first, last = int(split.numbers.min()), int(split.numbers.max())
        self._first = first if last - first + 1 == self._size else None  # a whole split's numbers are a range
        truth = torch.from_numpy(_checked_labels(split.labels)[order]).to(self._device)
        self._truth = torch.cat([truth, truth.new_zeros(1)])
        self._labels = {task: self._truth.clone() for task in self._tasks}
        rows = self._size + 1
        self._position = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._classes = {k: torch.zeros(rows, dtype=torch.int8, device=self._device) for k in self._widths}
        self._features = {k: torch.zeros(rows, d, device=self._device) for k, d in self._widths.items()}
        self._sums = {k: self._double(2, d) for k, d in self._widths.items()}
        self._counts = {k: self._double(2) for k in self._widths}

    def targets(self, batch: Batch, prediction: "Prediction | None" = None) -> dict[str, Tensor]:
        rows, known = self._rows(batch.numbers.to(self._device, non_blocking=True))
        truth = batch.labels["M"]
        return {"M": truth, **{task: torch.where(known, self._labels[task][rows], truth) for task in self._tasks}}

    @torch.no_grad()
    def observe(self, epoch: int, batches: Sequence[Batch], predictions: "Sequence[Prediction]") -> None:
        step = join_step(batches, predictions, self._widths, self._device)
        rows, known = self._rows(step.numbers)
        taken = self._first_of_each(rows, known & step.real)
        part = {k: taken & step.present[k] for k in self._widths}
        features = {k: step.features[k].where(part[k][:, None], 0.0) for k in self._widths}
        if epoch > 1:  # before the features enter: the centres are those of the steps before
            alpha = {k: self._alpha(k, features[k]) for k in self._widths}
            for task in self._tasks:
                self._relabel(task, epoch, rows.where(part[task], self._size), part[task], alpha)
        for k in self._widths:
            self._enter(k, rows.where(part[k], self._size), part[k], features[k])

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Sums anew, so that rounding does not add up over a run."""
        for k in self._widths:
            self._sums[k].zero_()
            self._counts[k].zero_()
            for classes, features in zip(self._classes[k].split(CHUNK), self._features[k].split(CHUNK), strict=True):
                members = _members(classes)
                self._sums[k] += members @ features.double()
                self._counts[k] += members.sum(1)

    def state_dict(self) -> dict[str, Tensor]:
        """``ids`` (N,), and per task ``label`` and ``class`` (N,), ``feature`` (N, d), ``sum`` (2, d), ``count`` (2,).

        Sums too, not only what they sum: a resumed run goes on to the last bit.
        """
        state = {"ids": torch.from_numpy(self._ids.copy())}
        for name, tensor, by_sample in self._named():
            state[name] = (tensor[:-1] if by_sample else tensor).detach().to("cpu", copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rows = self._rows_in(state)
        for name, tensor, by_sample in self._named():
            if name not in state:
                raise ConfigError(
                    f"the checkpoint's label generator has no {name!r}: it is of another system; start anew"
                )
            loaded = state[name].cpu()[rows] if by_sample else state[name]
            target = tensor[:-1] if by_sample else tensor
            if loaded.shape != target.shape:
                raise ConfigError(
                    f"the checkpoint's label generator has {name!r} of shape {tuple(loaded.shape)}, this system's is "
                    f"{tuple(target.shape)}: start anew, or use the recipe of the checkpoint"
                )
            target.copy_(loaded)

    @classmethod
    def state_bytes(cls, samples: int, widths: Mapping[str, int]) -> int:
        numbers, ids, truth, position = 8, 8, 4, 8
        labels, classes = 4 * (len(widths) - 1), len(widths)
        return samples * (numbers + ids + truth + position + labels + classes + 4 * sum(widths.values()))

    def _rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) sample numbers -> their rows, and whether they are train samples (else the row is the unread one)."""
        if self._first is not None:
            rows = numbers - self._first
            known = (rows >= 0) & (rows < self._size)
        else:
            rows = torch.searchsorted(self._numbers, numbers).clamp_(max=self._size - 1)
            known = self._numbers[rows] == numbers
        return rows.where(known, self._size), known

    def _first_of_each(self, rows: Tensor, real: Tensor) -> Tensor:
        """(B,) True for the first real row of every sample: a sample that a batch has twice counts once."""
        place = torch.arange(len(rows), device=rows.device)
        slots = rows.where(real, self._size)
        self._position.index_fill_(0, slots, len(rows))
        self._position.scatter_reduce_(0, slots, place, "amin")
        return real & (self._position[rows] == place)

    def _alpha(self, k: str, features: Tensor) -> Tensor:
        """(B, d) -> (B,) float64, NaN where a class has no sample and so no centre."""
        centres = self._sums[k] / self._counts[k][:, None]  # 0 / 0 is NaN
        to_positive, to_negative = (features.double() - centres[:, None]).norm(dim=2)
        return (to_negative - to_positive) / (to_positive + EPS)

    def _relabel(self, task: str, epoch: int, slots: Tensor, part: Tensor, alpha: Mapping[str, Tensor]) -> None:
        truth, old = self._truth[slots].double(), self._labels[task][slots]
        ratio = alpha[task] / (alpha["M"] + EPS)
        new = 0.5 * ratio * truth + 0.5 * (truth + alpha[task] - alpha["M"])
        mixed = (epoch - 1) / (epoch + 1) * old.double() + 2 / (epoch + 1) * new.clamp(*self._range)
        self._labels[task][slots] = torch.where(part & ~mixed.isnan(), mixed.float(), old)

    def _enter(self, k: str, slots: Tensor, part: Tensor, features: Tensor) -> None:
        """Takes the samples' old features out of the class they were counted in and puts the new ones in theirs."""
        labels = (self._truth if k == "M" else self._labels[k])[slots]
        positive = labels >= 0 if self._zero_is_positive else labels > 0
        classes = (positive.to(torch.int8) + 2 * (labels < 0).to(torch.int8)) * part
        left, joined = _members(self._classes[k][slots] * part), _members(classes)
        # Matrix products, not index_add: the same bits on every rank, on a GPU too.
        self._sums[k] += joined @ features.double() - left @ self._features[k][slots].double()
        self._counts[k] += joined.sum(1) - left.sum(1)
        self._classes[k][slots] = classes
        self._features[k][slots] = features

    def _named(self) -> list[tuple[str, Tensor, bool]]:
        """Name, tensor, and whether it has a row for each sample (and the unread one)."""
        named = [(f"label.{task}", self._labels[task], True) for task in self._tasks]
        for k in self._widths:
            named += [(f"feature.{k}", self._features[k], True), (f"class.{k}", self._classes[k], True)]
            named += [(f"sum.{k}", self._sums[k], False), (f"count.{k}", self._counts[k], False)]
        return named

    def _rows_in(self, state: Mapping[str, Tensor]) -> Tensor:
        """(N,) where each of our samples is in a saved state."""
        saved = state["ids"].cpu().numpy() if "ids" in state else np.empty(0, dtype=np.int64)
        order = np.argsort(saved, kind="stable")
        place = np.searchsorted(saved, self._ids, sorter=order)
        known = np.isin(self._ids, saved)
        if len(saved) != self._size or not known.all():
            raise ConfigError(
                f"the checkpoint's label generator knows {len(saved)} train samples, {int(known.sum())} of them among "
                f"this data set's {self._size}: start anew, or give the data that the checkpoint was made on"
            )
        return torch.from_numpy(order[place])

    def _double(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)


def _members(classes: Tensor) -> Tensor:
    """(B,) classes 0 none, 1 positive, 2 negative -> (2, B) float64, 1 where the sample is in the class."""
    return torch.stack([classes == 1, classes == 2]).double()


def _checked_widths(widths: Mapping[str, int]) -> dict[str, int]:
    unknown = [task for task in widths if task != "M" and task not in MODALITY_OF]
    if unknown or "M" not in widths or len(widths) < 2:
        raise ConfigError(
            f"label generator 'ulgm' reads features of M and of at least one of {', '.join(MODALITY_OF)}; the system "
            f"gives {', '.join(widths) or 'none'}: use a system that has them (self_mm), or label generator 'none'"
        )
    return dict(widths)


def _checked_ids(ids: np.ndarray) -> np.ndarray:
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"train: {len(ids)} samples have {len(np.unique(ids))} ids: keys must differ; re-pack the data")
    return ids


def _checked_labels(labels: np.ndarray) -> np.ndarray:
    missing = int((~np.isfinite(labels)).sum())
    if missing:
        raise DataError(
            f"train: {missing} of {len(labels)} samples have no label M, from which label generator 'ulgm' starts: "
            "pack the data without them"
        )
    return labels
