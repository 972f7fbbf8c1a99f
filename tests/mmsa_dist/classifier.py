"""A small system that learns classes, for tests of what is around one."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsa_dist.config import Strict
from mmsa_dist.layers.pooling import masked_mean, zero_absent
from mmsa_dist.systems import DataSpec, Losses, Prediction, System
from mmsa_dist.systems.base import weighted_mean
from shards.batch import Batch

CLASSIFIER = f"{__name__}:Classifier"


class ClassifierConfig(Strict):
    """No switches."""


class Classifier(System):
    """Means over time, side by side, into one number a task: the log-odds of a class, or an intensity."""

    Config = ClassifierConfig
    classifies = True
    paper = "Nobody, Nowhere"

    def __init__(self, config: Strict, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.out = nn.Linear(sum(spec.widths.values()), len(spec.judged))

    def forward(self, batch: Batch) -> Prediction:
        means = [
            zero_absent(masked_mean(batch.values[name], batch.mask(name)), batch.present[name])
            for name in self.spec.widths
        ]
        odds = self.out(torch.cat(means, dim=1))
        return Prediction(dict(zip(self.spec.judged, odds.unbind(1), strict=True)))

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        parts = {}
        for task, odds in prediction.tasks.items():
            entropy = functional.binary_cross_entropy_with_logits(odds, targets[task], reduction="none")
            parts[task] = weighted_mean(entropy, batch) / len(prediction.tasks)
        total = torch.stack(list(parts.values())).sum()
        return Losses(total, {task: part.detach() for task, part in parts.items()})
