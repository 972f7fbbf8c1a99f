"""A system that wants more memory than there is, once a batch has a sample that is long enough."""

from typing import ClassVar

import torch
from torch import Tensor

from mmsa_dist.config import Strict
from mmsa_dist.systems.base import Losses, Prediction
from mmsa_dist.systems.self_mm import SelfMM, SelfMMConfig
from shards.batch import Batch


class HungryConfig(SelfMMConfig):
    """Self-MM's, and from when on it is hungry."""

    enough: int = 10**6
    """Steps of all modalities together of a sample that is too long."""
    evaluating: bool = False
    """Whether it is hungry in evaluation too."""


class Hungry(SelfMM):
    """Where it is hungry it asks for a petabyte, which is refused at once."""

    Config: ClassVar[type[Strict]] = HungryConfig

    def forward(self, batch: Batch) -> Prediction:
        if not self.training and self.config.evaluating:  # type: ignore[attr-defined]
            torch.empty(10**15, dtype=torch.uint8)
        return super().forward(batch)

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        assert isinstance(self.config, HungryConfig)
        if self.training and int(sum(batch.lengths.values()).max()) >= self.config.enough:  # type: ignore[union-attr]
            torch.empty(10**15, dtype=torch.uint8)
        return super().loss(prediction, batch, targets)
