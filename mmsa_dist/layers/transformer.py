"""The transformer of MulT over packed sequences: pre-norm layers whose keys may be another sequence.

Shapes: B batch, N packed steps of the target, M of the source, D width (`layers.packed`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmsa_dist.layers.packed import Steps
from mmsa_dist.layers.positions import sinusoids
from mmsa_dist.layers.sight import Sight
from mmsa_dist.layers.tiles import attend_packed


@dataclass(frozen=True)
class Dropouts:
    """Shares that are dropped: of attention weights, of a feed-forward's hidden units, of what a residual block adds,
    and of a stack's input."""

    attention: float = 0.0
    relu: float = 0.0
    residual: float = 0.0
    embedding: float = 0.0


class PackedAttention(nn.Module):
    """Multi-head attention, the heads side by side in the width.

    Keys have no bias (the softmax takes it out again), and values none (their weights sum to one, so that the output's
    bias says the same).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % heads == 0
        self.heads, self.dropout = heads, dropout
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * width, bias=False)
        self.out = linear(width, width)

    def forward(self, query: Tensor, key: Tensor, sight: Sight) -> Tensor:
        """query (N, D), key (M, D), also the values -> (N, D); zero where the query's sample has nothing to see."""
        keys, values = self.key_value(key).chunk(2, -1)
        dropout = self.dropout if self.training else 0.0
        seen = self.out(attend_packed(self.query(query), keys, values, sight, self.heads, dropout))
        return seen if sight.blind is None else seen.masked_fill(sight.blind[:, None], 0.0)


class FeedForward(nn.Module):
    """x + FFN(norm(x)), the hidden layer `4 D` wide."""

    def __init__(self, width: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = linear(width, 4 * width)
        self.second = linear(4 * width, width)
        self.hidden_dropout = nn.Dropout(dropouts.relu)
        self.dropout = nn.Dropout(dropouts.residual)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.hidden_dropout(self.first(self.norm(values)).relu())
        return values + self.dropout(self.second(hidden))


class TransformerLayer(nn.Module):
    """x + attention(norm(x), norm(source)), then the feed-forward network. Target and source share the norm."""

    def __init__(self, width: int, heads: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = PackedAttention(width, heads, dropouts.attention)
        self.dropout = nn.Dropout(dropouts.residual)
        self.feedforward = FeedForward(width, dropouts)

    def forward(self, values: Tensor, source: Tensor | None, sight: Sight, rows: Tensor | None = None) -> Tensor:
        """values (N, D), source (M, D) or None for `values`, rows (B,) of values to answer for -> (N, D) or (B, D).

        `sight` is of the steps that are answered for.
        """
        query = self.norm(values)
        key = query if source is None else self.norm(source)
        if rows is not None:
            values, query = values.index_select(0, rows), query.index_select(0, rows)
        return self.feedforward(values + self.dropout(self.attention(query, key, sight)))


class Stack(nn.Module):
    """sqrt(D) x plus positions -> dropout -> layers -> norm (Tsai et al. 2019, section 3.2).

    Args:
        positions: without them no step knows its place.
        future: whether steps of the future are hidden (`Sight`).
    """

    def __init__(
        self, width: int, heads: int, layers: int, dropouts: Dropouts, *, positions: bool = True, future: bool = False
    ) -> None:
        super().__init__()
        self.positions, self.future = positions, future
        self.dropout = nn.Dropout(dropouts.embedding)
        self.layers = nn.ModuleList(TransformerLayer(width, heads, dropouts) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, values: Tensor, steps: Steps, source: Tensor, source_steps: Steps) -> Tensor:
        """values (N, D) enriched by source (M, D) -> (N, D)."""
        sight = Sight(steps, source_steps, self.future)
        values, source = self.embed(values, steps), self.embed(source, source_steps)
        for layer in self.layers:
            values = layer(values, source, sight)
        return self.norm(values)

    def last(self, values: Tensor, steps: Steps) -> Tensor:
        """Self-attention; values (N, D) -> (B, D), each sample's last step.

        The last layer's other steps reach nothing, and are not computed.
        """
        values, sight = self.embed(values, steps), Sight(steps, steps, self.future)
        for layer in self.layers[:-1]:
            values = layer(values, None, sight)
        one = Steps.of(torch.ones_like(steps.lengths), steps.there)  # which sees all
        return self.norm(self.layers[-1](values, None, Sight(one, steps), steps.last))

    def embed(self, values: Tensor, steps: Steps) -> Tensor:
        """The layers' input."""
        width = values.shape[-1]
        values = values * math.sqrt(width)
        if self.positions:
            values = values + sinusoids(steps.longest, width, values.device).to(values.dtype)[steps.position]
        return self.dropout(values)


class StepProjection(nn.Module):
    """Conv1d over time to a common width, as many steps as before: zeros beyond both ends, and in padding."""

    def __init__(self, width: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, out, kernel, padding=kernel // 2, bias=False)

    def forward(self, values: Tensor, mask: Tensor, present: Tensor) -> Tensor:
        """values (B, T, D), mask (B, T), present (B,) -> (B, T, out)."""
        real = mask & present[:, None]
        values = values.to(self.conv.weight.dtype).masked_fill(~real[..., None], 0.0)
        return self.conv(values.transpose(1, 2)).transpose(1, 2)


def linear(width: int, out: int, bias: bool = True) -> nn.Linear:
    """A linear layer as transformers are begun with: Xavier's weights (Glorot & Bengio 2010), no bias."""
    layer = nn.Linear(width, out, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def check_shape(width: int, heads: int, kernels: dict[str, int]) -> None:
    """Raises ValueError where a width does not divide into heads, or a convolution has no centre."""
    if width % heads:
        raise ValueError(f"width {width} must be divisible by heads {heads}")
    for name, kernel in kernels.items():
        if kernel % 2 == 0:
            raise ValueError(f"{name} {kernel} must be odd, so that its centre is a step")
