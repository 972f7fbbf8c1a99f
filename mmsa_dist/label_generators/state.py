"""What ULGM, SUGRM and ULAG share: labels kept by sample, their momentum, centres, and a checkpoint of all that.

A generator of this kind says which features it keeps and averages (`_keep`, `_average`) and how new labels follow from
a step (`_new_labels`). The order of a step is that of Self-MM: new labels from the centres as they stood before it and
from its features, then the features enter. Labels start as y_m and

    y_s <- (n - 1) / (n + 1) y_s + 2 / (n + 1) y_new,  y_new clamped to the label range,  in epoch n > 1

Shapes: N training samples, B rows of the global batch, d width of a feature.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.label_generators.base import MODALITY_OF, LabelGenerator, TrainSplit, join_step
from mmsa_dist.label_generators.centres import Centres, signs
from mmsa_dist.label_generators.kept import Kept
from mmsa_dist.label_generators.samples import TrainSamples
from shards.batch import Batch
from shards.suggest import counted

if TYPE_CHECKING:
    from mmsa_dist.systems.base import Prediction


DIVIDE_ABOVE = 1.0
"""GiB; MOSEI takes 0.01."""


@dataclass(frozen=True)
class Seen:
    """A step, the same on every rank.

    Attributes:
        truth: (B,) float64 labels y_m.
        part: task -> (B,) bool, the rows that take part: real, with the modality, each sample once.
        slots: task -> (B,) rows of the state; the unread one where a row takes no part.
        features: task -> (B, d) float32, zero where a row takes no part.
        learned: task -> (B,) float32, what the generator's own layers said; empty where it has none.
    """

    truth: Tensor
    part: dict[str, Tensor]
    slots: dict[str, Tensor]
    features: dict[str, Tensor]
    learned: dict[str, Tensor]


class GeneratedLabels(LabelGenerator):
    """Labels by sample, and the newest features of some tasks with the centres of their classes."""

    stay: ClassVar[str] = "unimodal labels stay equal to it"
    """What becomes of them where a class has no sample."""

    class Config(Strict):
        """Options of a generator with positive and negative centres."""

        zero_is_positive: bool = False
        """A label of exactly zero counts as positive; otherwise in neither class."""
        divide_above: float | None = None
        """GiB of state above which features are divided over the ranks: each holds those of its part of the samples,
        and a step exchanges as many rows as its batch has. None is `DIVIDE_ABOVE`."""

    def __init__(self, config: Strict, split: TrainSplit) -> None:
        super().__init__(config, split)
        assert isinstance(config, GeneratedLabels.Config)
        self._zero_is_positive = config.zero_is_positive
        self._range = split.label_range
        self._widths = _checked_widths(split.widths, self.name)
        self._tasks = [task for task in self._widths if task != "M"]
        self._device = split.device
        self._samples = TrainSamples(split, self.name)
        self._labels = {task: self._samples.truth.clone() for task in self._tasks}
        bound = DIVIDE_ABOVE if config.divide_above is None else config.divide_above
        self._divided = self.state_bytes(self._samples.size, self._widths) > bound * 2**30
        self._features: dict[str, Kept] = {}
        self._centres: dict[str, Centres] = {}

    def targets(self, batch: Batch, prediction: "Prediction | None" = None) -> dict[str, Tensor]:
        return {"M": batch.labels["M"], **self._current(batch, self._labels)}

    @torch.no_grad()
    def observe(self, epoch: int, batches: Sequence[Batch], predictions: "Sequence[Prediction]") -> None:
        step = join_step(batches, predictions, self._widths, self._device)
        rows, known = self._samples.rows(step.numbers)
        taken = self._samples.first_of_each(rows, known & step.real)
        part = {k: taken & step.present[k] for k in self._widths}
        seen = Seen(
            truth=self._samples.truth[rows].double(),
            part=part,
            slots={k: rows.where(part[k], self._samples.size) for k in part},
            features={k: step.features[k].where(part[k][:, None], 0.0) for k in part},
            learned=step.learned,
        )
        if epoch > 1:  # before the features enter: the centres are those of the steps before
            self._relabel(epoch, seen)
        for k in self._features:
            self._enter(k, seen)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Sums anew, so that rounding does not add up over a run."""
        for centres in self._centres.values():
            centres.sum_anew(self._features[centres.of])

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """``ids`` (N,); per task ``label`` (N,); ``feature`` (N, d) of what is kept, and ``class`` (N,), ``sum`` (2, d)
        and ``count`` (2,) of its centres.

        Sums too, not only what they sum: a resumed run goes on to the last bit.
        """
        features = {f"feature.{k}": kept.whole(keep) for k, kept in self._features.items()}
        if not keep:
            return {}
        state = {"ids": torch.from_numpy(self._samples.ids.copy())}
        state |= {name: whole for name, whole in features.items() if whole is not None}
        for name, tensor, by_sample in self._named():
            state[name] = (tensor[:-1] if by_sample else tensor).detach().to("cpu", copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rows = self._samples.places_in(state.get("ids"))
        for name, tensor, by_sample in self._named():
            target = tensor[:-1] if by_sample else tensor
            loaded = _saved(state, name, tuple(target.shape))
            target.copy_(loaded.cpu()[rows] if by_sample else loaded)
        for k, kept in self._features.items():
            kept.load(_saved(state, f"feature.{k}", (self._samples.size, self._widths[k]))[rows])

    @classmethod
    def labels_in(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("label."): t for name, t in state.items() if name.startswith("label.")}

    @classmethod
    def idle(cls, config: Strict, labels: npt.NDArray[np.float32]) -> str:
        assert isinstance(config, GeneratedLabels.Config)
        found = set(signs(torch.from_numpy(labels), config.zero_is_positive).tolist())
        lacking = [sign for number, sign in ((1, "positive"), (2, "negative")) if number not in found]
        if not lacking:
            return ""
        zeros = "; --labels.zero-is-positive counts zeros as positive" if {0, 2} == found else ""
        return (
            "it tells samples with a positive label M from those with a negative one, and of "
            f"{counted(len(labels), 'train sample')} none has a {' or a '.join(lacking)} one: {cls.stay}{zeros}"
        )

    @abstractmethod
    def _new_labels(self, seen: Seen) -> dict[str, Tensor]:
        """task -> (B,) float64 y_new of every row, NaN where there is none (a class without a sample): it stays."""

    def _class_of(self, name: str, slots: Tensor) -> Tensor:
        """(B,) int8 classes of samples for the centres called `name`: by the sign of the task's current label."""
        labels = self._samples.truth if name == "M" else self._labels[name]
        return signs(labels[slots], self._zero_is_positive)

    def _keep(self, task: str) -> None:
        """Every sample's newest feature of `task` is kept."""
        self._features[task] = Kept(self._samples.size, self._widths[task], self._device, self._divided)

    def _average(self, name: str, of: str) -> None:
        """Centres called `name` are kept of the features of task `of`."""
        self._centres[name] = Centres(of, self._samples.size + 1, self._widths[of], self._device)

    def _current(self, batch: Batch, by_sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """task -> (B,) of values (N + 1,) kept by sample; the multimodal label of a sample that is none of train."""
        rows, known = self._samples.rows(batch.numbers.to(self._device, non_blocking=True))
        return {task: torch.where(known, by_sample[task][rows], batch.labels["M"]) for task in self._tasks}

    def _relabel(self, epoch: int, seen: Seen) -> None:
        for task, new in self._new_labels(seen).items():
            slots = seen.slots[task]
            old = self._labels[task][slots]
            mixed = (epoch - 1) / (epoch + 1) * old.double() + 2 / (epoch + 1) * new.clamp(*self._range)
            self._labels[task][slots] = torch.where(seen.part[task] & ~mixed.isnan(), mixed.float(), old)

    def _enter(self, k: str, seen: Seen) -> None:
        """The features of a step enter the state, in the classes that the samples have now."""
        slots, features = seen.slots[k], seen.features[k]
        old = self._features[k].of(slots)
        for name, centres in self._centres.items():
            if centres.of == k:
                centres.move(slots, seen.part[k], self._class_of(name, slots), features, old)
        self._features[k].put(slots, features)

    def _named(self) -> list[tuple[str, Tensor, bool]]:
        """Name, tensor, and whether it has a row for each sample (and the unread one); all but the features."""
        named = [(f"label.{task}", self._labels[task], True) for task in self._tasks]
        for name, centres in self._centres.items():
            named.append((f"class.{name}", centres.classes, True))
            named += [(f"sum.{name}", centres.sums, False), (f"count.{name}", centres.counts, False)]
        return named


def _saved(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in state:
        raise ConfigError(f"the checkpoint's label generator has no {name!r}: it is of another system; start anew")
    if tuple(state[name].shape) != shape:
        raise ConfigError(
            f"the checkpoint's label generator has {name!r} of shape {tuple(state[name].shape)}, this system's is "
            f"{shape}: start anew, or use the recipe of the checkpoint"
        )
    return state[name]


def _checked_widths(widths: Mapping[str, int], generator: str) -> dict[str, int]:
    unknown = [task for task in widths if task != "M" and task not in MODALITY_OF]
    if unknown or "M" not in widths or len(widths) < 2:
        raise ConfigError(
            f"label generator {generator!r} reads features of M and of at least one of {', '.join(MODALITY_OF)}; the "
            f"system gives {', '.join(widths) or 'none'}: use a system that has them (tam_ulag, iam, self_mm, sugrm, "
            "or ufen_mtfn with --model.unimodal-targets own), or label generator 'none'"
        )
    return dict(widths)
