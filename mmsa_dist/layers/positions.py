"""Sinusoidal positions.

Shapes: T time, D width.
"""

import math

import torch
from torch import Tensor


def sinusoids(steps: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(steps, width) float32: what is added to step t, t from 1 (Vaswani et al. 2017, section 3.5).

    The first half of the width holds sin(t w), the second cos(t w), with w from 1 down to 1 / 10,000 in equal ratios,
    as the public code of MulT has it; the paper has sines and cosines take turns, which is the same in another order.
    An odd width ends with a zero.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000) / max(half - 1, 1)))
    angles = torch.arange(1, steps + 1, device=device)[:, None] * rates
    table = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(table, (0, width - 2 * half))
