"""Every unimodal task learns the multimodal label: what training is without a label generator.

It is the row "w/o ULAG" of TAM-ULAG's table 6. A distance-weighted loss would give these labels the weight
tanh|y_m - y_m| = 0 and leave the multimodal task alone; the paper's results without ULAG are not those of the
multimodal task alone (table 7, M), so every sample weighs one.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmsa_dist.config import Strict
from mmsa_dist.label_generators.base import WEIGHING, LabelGenerator, TrainSplit, label_generator
from shards.batch import Batch

if TYPE_CHECKING:
    from mmsa_dist.systems.base import Prediction


@label_generator("multimodal")
class MultimodalLabels(LabelGenerator):
    """y_s = y_m, each sample with the full weight of a label infinitely far away: tanh(inf) = 1."""

    paper = "Sun & Wang, J. Electronics & Information Technology 2024, table 6"

    def __init__(self, config: Strict, split: TrainSplit) -> None:
        super().__init__(config, split)
        self._tasks = [task for task in split.widths if task != "M"]

    def targets(self, batch: Batch, prediction: "Prediction | None" = None) -> dict[str, Tensor]:
        truth = batch.labels["M"]
        far = torch.full_like(truth, torch.inf)
        return {"M": truth, **dict.fromkeys(self._tasks, truth), **{WEIGHING + task: far for task in self._tasks}}
