"""From a sequence to one vector.

Shapes: B batch, T time, D width.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over real steps: values (B, T, D), mask (B, T) bool -> (B, D). A sample without a real step gives zero."""
    kept = values.masked_fill(~mask[..., None], 0.0)
    wide = torch.promote_types(values.dtype, torch.float32)  # a sum of 500 steps leaves half precision's range
    return (kept.sum(1, dtype=wide) / mask.sum(1, keepdim=True).clamp(min=1)).to(values.dtype)


def last_valid(values: Tensor, lengths: Tensor) -> Tensor:
    """The last real step: values (B, T, D), lengths (B,) int64 on any device -> (B, D)."""
    last = (lengths - 1).to(values.device, non_blocking=True)
    return values[torch.arange(values.shape[0], device=values.device), last]


def zero_absent(values: Tensor, present: Tensor) -> Tensor:
    """Zeroes the samples that lack a modality: values (B, ...), present (B,) bool."""
    return values.masked_fill(~present.view(-1, *(1,) * (values.dim() - 1)), 0.0)
