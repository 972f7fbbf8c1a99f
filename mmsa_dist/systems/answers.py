"""The output of MulT and its descendants: an intensity, or classes; and its loss.

Shapes: B batch, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_dist.systems.base import DataSpec, Losses, Prediction, weighted_mean
from mmsa_dist.systems.subtasks import where_labelled
from shards.batch import Batch


class Answer(nn.Module):
    """x + linear(dropout(relu(linear(x)))) -> linear: one number, or two logits a task where labels are classes."""

    def __init__(self, width: int, dropout: float, spec: DataSpec) -> None:
        super().__init__()
        self.tasks, self.classes = spec.judged, 2 if spec.classes else 1
        self.first = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)
        self.out = nn.Linear(width, len(self.tasks) * self.classes)

    def forward(self, vector: Tensor) -> dict[str, Tensor]:
        """vector (B, D) -> task -> (B,) float32: label units, or log-odds (`Prediction.tasks`)."""
        said = self.out(vector + self.second(self.dropout(self.first(vector).relu()))).float()
        answers = said.unflatten(-1, (-1, self.classes))
        answers = answers[..., -1] - answers[..., 0] if self.classes == 2 else answers[..., 0]
        return dict(zip(self.tasks, answers.unbind(-1), strict=True))


def answer_loss(spec: DataSpec, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
    """Mean |ŷ - y|; where labels are classes the mean over tasks of the cross-entropy.

    A part of it is a task's share. A sample whose label is missing (NaN) has no part in that task.
    """
    parts = {}
    if not spec.classes:
        parts["M"] = weighted_mean((prediction.tasks["M"] - targets["M"]).abs(), batch)
    for task in spec.classes:
        odds = prediction.tasks[task]
        label, labelled = where_labelled(targets[task], odds, torch.ones_like(odds, dtype=torch.bool))
        # of two logits with softmax, which is this of their difference
        entropy = F.binary_cross_entropy_with_logits(odds, label, reduction="none")
        parts[task] = weighted_mean(entropy, batch, labelled) / len(spec.classes)
    return Losses(torch.stack(list(parts.values())).sum(), {task: part.detach() for task, part in parts.items()})
