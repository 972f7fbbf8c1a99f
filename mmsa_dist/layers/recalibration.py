"""SUGRM's recalibration (Hwang & Kim 2023): each modality's columns weighted by what all modalities say.

Shapes: B batch, T time, D width of a modality, Z squeezed width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmsa_dist.layers.pooling import masked_mean, zero_absent

REDUCTION = 4
"""How many times narrower the squeezed vector is than the modalities side by side."""


class Recalibration(nn.Module):
    """Squeeze and excitation over modalities: with the means s_m over each modality's real steps,

        z = ReLU(W [s_t; s_a; s_v] + b),   x_m <- 2 σ(W_m z + b_m) · x_m   at every step.

    A gate of one, where σ is a half, leaves a column as it is. An absent modality brings zeros into the squeeze.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        """
        Args:
            widths: modality -> D.
        """
        super().__init__()
        total = sum(widths.values())
        squeezed = max(1, total // REDUCTION)
        self.squeeze = nn.Linear(total, squeezed)
        self.gates = nn.ModuleDict({name: nn.Linear(squeezed, width) for name, width in widths.items()})

    def forward(
        self, values: Mapping[str, Tensor], masks: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """values: modality -> (B, T, D), masks (B, T) bool, present (B,) bool -> modality -> (B, T, D).

        Padding holds what it held, times a gate.
        """
        means = [zero_absent(masked_mean(values[name], masks[name]), present[name]) for name in self.gates]
        squeezed = self.squeeze(torch.cat([mean.to(self.squeeze.weight.dtype) for mean in means], dim=-1)).relu()
        return {
            name: values[name] * (2 * gate(squeezed).sigmoid()).to(values[name].dtype)[:, None]
            for name, gate in self.gates.items()
        }
