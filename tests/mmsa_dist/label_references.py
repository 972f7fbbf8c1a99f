"""SUGRM and ULAG as their papers say them, over all samples at every step, and what all label generators are fed with.

Dictionaries by sample number, means from scratch every time, numpy only. ULGM's is `ulgm_reference.Reference`.
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
from shards.plan import Piece
from tests.mmsa_dist.ulgm_reference import WIDTHS, Reference, Run

Vectors = Mapping[int, np.ndarray]
MADE = ("ulgm", "sugrm", "ulag")
"""Label generators that make labels."""


@dataclass
class LearnedRun(Run):
    """A `Run` whose predictions hold, for ULAG, what its layers are to have said: c_s from the seed."""

    def confidences(self, epoch: int, s: str) -> np.ndarray:
        """(N,) float32."""
        return np.random.default_rng([self.seed, epoch, ord(s), 7]).normal(0, 2, self.samples).astype(np.float32)

    def step(self, epoch: int, piece: Piece) -> tuple[Batch, Prediction]:
        batch, prediction = super().step(epoch, piece)
        rows = piece.numbers - self.first
        learned = {s: torch.from_numpy(self.confidences(epoch, s)[rows]) for s in self.widths if s != "M"}
        learned = {s: c.where(torch.from_numpy(self.present[s][rows]), torch.nan) for s, c in learned.items()}
        return batch, Prediction(tasks={}, features=prediction.features, learned=learned)

    def truth_by_number(self) -> dict[int, float]:
        return {int(n): float(y) for n, y in zip(self.numbers, self.truth, strict=True)}


def generator_of(name: str, run: Run, order: np.ndarray | None = None, **options: Any) -> LabelGenerator:
    """A generator over the run's samples, handed over in `order`."""
    order = np.arange(run.samples) if order is None else order
    return make_generator(
        name,
        numbers=run.numbers[order],
        ids=run.ids[order],
        labels=run.truth[order],
        widths=run.widths,
        label_range=run.label_range,
        **options,
    )


def take(
    generator: LabelGenerator, run: Run, epochs: range, rank: int = 0, world: int = 1, accumulation: int = 1
) -> dict[str, Tensor]:
    """The state after whole epochs of a run."""
    for epoch in epochs:
        for seen in run.steps(epoch, rank, world, accumulation):
            generator.observe(epoch, *seen)
        generator.end_epoch()
    return generator.state_dict()


def momentum(epoch: int, old: float, new: float, label_range: tuple[float, float]) -> float:
    clamped = min(max(new, label_range[0]), label_range[1])
    return float(np.float32((epoch - 1) / (epoch + 1) * old + 2 / (epoch + 1) * clamped))


@dataclass
class SugrmReference:
    """The section SUGRM, a sample at a time."""

    truth: Mapping[int, float]
    label_range: tuple[float, float]
    widths: Mapping[str, int] = field(default_factory=lambda: WIDTHS)
    labels: dict[str, dict[int, float]] = field(init=False)
    fused: dict[int, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.labels = {s: dict(self.truth) for s in self.widths if s != "M"}
        self.fused = {}

    def mean(self, members: Iterator[int]) -> np.ndarray | None:
        """The mean fused feature of those samples among `members` that were seen."""
        vectors = [self.fused[number] for number in members if number in self.fused]
        return np.mean(vectors, axis=0) if vectors else None

    def step(self, epoch: int, seen: Mapping[str, Vectors]) -> None:
        y = self.truth
        wide = {k: {n: self.common(vector) for n, vector in vectors.items()} for k, vectors in seen.items()}
        if epoch > 1:
            positive, negative = self.mean(n for n in y if y[n] > 0), self.mean(n for n in y if y[n] < 0)
            top = self.mean(n for n in y if y[n] == max(y.values()))
            bottom = self.mean(n for n in y if y[n] == min(y.values()))
            if not any(mean is None for mean in (positive, negative, top, bottom)):
                assert positive is not None and negative is not None and top is not None and bottom is not None
                self.relabel(epoch, wide, positive, negative, float(np.linalg.norm(top - bottom)))
        self.fused.update(wide["M"])

    def relabel(
        self, epoch: int, seen: Mapping[str, Vectors], positive: np.ndarray, negative: np.ndarray, extent: float
    ) -> None:
        def ratio(vector: np.ndarray) -> float:
            return float(np.linalg.norm(vector - positive) / np.linalg.norm(vector - negative))

        if extent == 0 or max(self.truth.values()) == min(self.truth.values()):
            return
        half = self.label_range[1]
        for s, labels in self.labels.items():
            for n, own in seen[s].items():
                fused = seen["M"][n]
                magnitude = 2 * half * min(float(np.linalg.norm(fused - own)), extent) / extent
                r_s, r_m, new = ratio(own), ratio(fused), self.truth[n]
                new = new - magnitude if r_s > r_m else new + magnitude if r_s < r_m else new
                labels[n] = momentum(epoch, labels[n], new, self.label_range)

    def common(self, vector: np.ndarray) -> np.ndarray:
        wide = np.zeros(max(self.widths.values()))
        wide[: len(vector)] = vector
        return wide


@dataclass
class UlagReference(Reference):
    """ULGM's labels y^c, and y^f of each sample's last visit."""

    similarity: dict[str, dict[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.similarity = {s: dict(self.truth) for s in self.widths if s != "M"}

    def learn(self, epoch: int, said: Mapping[str, Mapping[int, float]]) -> None:
        """said: task -> sample number -> c_s."""
        for s, confidences in said.items() if epoch > 1 else ():
            self.similarity[s].update({n: self.similar(n, c) for n, c in confidences.items()})

    def similar(self, number: int, confidence: float) -> float:
        return self.truth[number] * (2 / (1 + float(np.exp(-np.float64(confidence)))) - 1)


def expected(by_number: Mapping[int, float], numbers: Sequence[int] | np.ndarray) -> list[float]:
    return [by_number[int(number)] for number in numbers]
