"""ULGM as its definition says it, over all samples at every step; and the steps of a made-up run to feed it with.

Shapes: N samples, d width of a feature.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsa_dist.label_generators import LabelGenerator, make_generator
from mmsa_dist.systems.base import Prediction
from shards.batch import Batch
from shards.order import ShardOrder, packed_counts
from shards.plan import Piece, Plan, share

MODALITIES = {"T": "text", "A": "audio", "V": "vision"}
WIDTHS = {"M": 5, "T": 4, "A": 3, "V": 2}


@dataclass
class Reference:
    """No running sums, no arrays of all samples: dictionaries by sample number, centres from scratch every time."""

    truth: Mapping[int, float]
    label_range: tuple[float, float]
    widths: Mapping[str, int] = field(default_factory=lambda: WIDTHS)
    zero_is_positive: bool = False
    labels: dict[str, dict[int, float]] = field(init=False)
    features: dict[str, dict[int, np.ndarray]] = field(init=False)

    def __post_init__(self) -> None:
        self.labels = {k: dict(self.truth) for k in self.widths}
        self.features = {k: {} for k in self.widths}

    def members(self, k: str, positive: bool) -> list[int]:
        def belongs(label: float) -> bool:
            if positive:
                return label > 0 or (self.zero_is_positive and label == 0)
            return label < 0

        return [number for number in self.features[k] if belongs(self.labels[k][number])]

    def centre(self, k: str, positive: bool) -> np.ndarray | None:
        members = self.members(k, positive)
        return np.mean([self.features[k][number] for number in members], axis=0) if members else None

    def step(self, epoch: int, seen: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """seen: task -> sample number -> its feature (d,), of the samples that have the modality."""
        before = {k: (self.centre(k, True), self.centre(k, False)) for k in self.widths}

        def alpha(k: str, number: int) -> float:
            positive, negative = before[k]
            assert positive is not None and negative is not None
            to_positive = float(np.linalg.norm(seen[k][number] - positive))
            return (float(np.linalg.norm(seen[k][number] - negative)) - to_positive) / (to_positive + 1e-8)

        for k in self.widths:
            if k == "M" or epoch == 1 or any(c is None for c in (*before[k], *before["M"])):
                continue
            for number in seen[k]:
                a_s, a_m, y_m = alpha(k, number), alpha("M", number), self.truth[number]
                new = 0.5 * (a_s / (a_m + 1e-8)) * y_m + 0.5 * (y_m + a_s - a_m)
                new = min(max(new, self.label_range[0]), self.label_range[1])
                mixed = (epoch - 1) / (epoch + 1) * self.labels[k][number] + 2 / (epoch + 1) * new
                self.labels[k][number] = float(np.float32(mixed))
        for k in self.widths:
            self.features[k].update({number: vector.astype(np.float64) for number, vector in seen[k].items()})


@dataclass
class Run:
    """Samples with labels, modalities and, for every epoch, features; all from a seed.

    Attributes:
        first: number of the first sample.
        truth: (N,) labels.
        present: task -> (N,) bool.
    """

    samples: int
    seed: int
    global_batch: int
    label_range: tuple[float, float] = (-3.0, 3.0)
    first: int = 0
    absent: float = 0.0
    zeros: float = 0.1
    widths: Mapping[str, int] = field(default_factory=lambda: WIDTHS)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        truth = rng.uniform(*self.label_range, self.samples)
        self.truth = np.where(rng.random(self.samples) < self.zeros, 0.0, truth).astype(np.float32)
        self.present = {k: (rng.random(self.samples) >= self.absent) | (k == "M") for k in self.widths}
        self.ids = rng.permutation(self.samples).astype(np.int64) * 977 - 2**40

    @property
    def numbers(self) -> np.ndarray:
        return np.arange(self.first, self.first + self.samples)

    def features(self, epoch: int, k: str) -> np.ndarray:
        """(N, d) float32, partly following the label: labels then change their sign now and then."""
        rng = np.random.default_rng([self.seed, epoch, ord(k)])
        noise = rng.normal(size=(self.samples, self.widths[k]))
        return np.maximum(noise + 0.3 * self.truth[:, None], 0).astype(np.float32)  # what a ReLU gives

    def plan(self, epoch: int) -> Plan:
        counts = packed_counts([self.samples])
        return Plan(ShardOrder("made-up", "train", self.first, counts, self.seed, epoch, 1), self.global_batch)

    def step(self, epoch: int, piece: Piece) -> tuple[Batch, Prediction]:
        """What a rank sees of a micro-batch. An absent modality's features are garbage that must not matter."""
        rows = piece.numbers - self.first
        present = {k: torch.from_numpy(self.present[k][rows]) for k in self.widths}
        batch = Batch(
            values={},
            lengths={},
            present={MODALITIES[k]: present[k] for k in self.widths if k != "M"},
            labels={"M": torch.from_numpy(self.truth[rows])},
            numbers=torch.from_numpy(piece.numbers),
            weight=torch.from_numpy(piece.weight),
            norm=piece.norm,
            keys=[str(number) for number in piece.numbers],
        )
        features = {k: torch.from_numpy(self.features(epoch, k)[rows]) for k in self.widths}
        features = {k: f.where(present[k][:, None], torch.nan) for k, f in features.items()}
        return batch, Prediction(tasks={}, features=features)

    def steps(
        self, epoch: int, rank: int = 0, world: int = 1, accumulation: int = 1
    ) -> Iterator[tuple[Sequence[Batch], Sequence[Prediction]]]:
        """A rank's micro-batches of every step of an epoch."""
        plan = self.plan(epoch)
        for step in range(plan.num_steps):
            pieces = share(plan.step(step), rank, world, accumulation)
            batches, predictions = zip(*(self.step(epoch, piece) for piece in pieces), strict=True)
            yield batches, predictions

    def seen(self, epoch: int, step: int) -> dict[str, dict[int, np.ndarray]]:
        """The same step as the reference wants it."""
        numbers = self.plan(epoch).step(step).tolist()
        features = {k: self.features(epoch, k) for k in self.widths}
        return {
            k: {n: features[k][n - self.first] for n in numbers if self.present[k][n - self.first]} for k in self.widths
        }

    def reference(self, zero_is_positive: bool = False) -> Reference:
        truth = {int(n): float(y) for n, y in zip(self.numbers, self.truth, strict=True)}
        return Reference(truth, self.label_range, self.widths, zero_is_positive)


def ulgm(run: Run, order: np.ndarray | None = None, **options: Any) -> LabelGenerator:
    """A generator over the run's samples, handed over in `order`."""
    order = np.arange(run.samples) if order is None else order
    return make_generator(
        "ulgm",
        numbers=run.numbers[order],
        ids=run.ids[order],
        labels=run.truth[order],
        widths=run.widths,
        label_range=run.label_range,
        **options,
    )


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
