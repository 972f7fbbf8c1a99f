"""Attention over ragged sequences; the scores are never materialised (fused kernels).

Shapes: B batch, L query steps, S key steps, D width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, scale: float | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over real keys.

    Args:
        query: (B, h, L, d).
        key, value: (B, h, S, d).
        key_mask: (B, S) bool, True on real keys. Every sample has at least one, as `Batch.mask` sees to.
        scale: in place of 1 / sqrt(d).

    Returns:
        (B, h, L, d).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask[:, None, None, :], scale=scale)


class SelfAttention(nn.Module):
    """Single-head scaled dot product attention of a sequence over itself.

    The key has no bias: it would add the same to all scores of a query, which the softmax takes out again.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, out_width)
        self.key = nn.Linear(width, out_width, bias=False)
        self.value = nn.Linear(width, out_width)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """values (B, L, width), mask (B, L) bool -> (B, L, out_width)."""
        query, key, value = (layer(values)[:, None] for layer in (self.query, self.key, self.value))
        return attend(query, key, value, mask)[:, 0]


class MultiHeadAttention(nn.Module):
    """Multi-head attention of one sequence over another, `heads` of width D / heads (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # see SelfAttention
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, key_mask: Tensor) -> Tensor:
        """query (B, L, D), key (B, S, D), also the values, key_mask (B, S) bool -> (B, L, D)."""
        seen = attend(
            self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(key)), key_mask
        )
        return self.out(seen.transpose(1, 2).flatten(2))

    def _split(self, values: Tensor) -> Tensor:
        """(B, T, D) -> (B, h, T, D / h)."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)
