"""TAM-ULAG's temporal attention (Sun & Wang 2024): two scalar gates on every step of a sequence.

Shapes: B batch, T time, D width, H hidden units.
"""

import torch
from torch import Tensor, nn

from mmsa_dist.layers.heads import SequenceVector

ALPHA_START = 1.0
"""Bias of alpha in an open start: tanh(1) = 0.76, still far from flat."""
BETA_START = 2.29285
"""Bias of beta in an open start: tanhshrink(2.29285) = 1 / tanh(1), so that alpha · beta = 1 where w·h = 0."""


class TemporalAttention(nn.Module):
    """Step j becomes h_j · alpha_j · beta_j, with scalars of that step alone:

        alpha_j = tanh(w_a·h_j + b_a),   beta_j = tanhshrink(w_b·h_j + b_b),   tanhshrink(x) = x - tanh(x).

    No step sees another, so only the steps that are read afterwards need be given.
    """

    def __init__(self, width: int, open_start: bool) -> None:
        """
        Args:
            open_start: biases from which alpha · beta = 1; otherwise PyTorch's, near zero, where tanhshrink(x) is
                about x³ / 3 and hardly anything passes.
        """
        super().__init__()
        self.gates = nn.Linear(width, 2)  # w_a and w_b read the same state: one product
        if open_start:
            with torch.no_grad():
                self.gates.bias.copy_(torch.tensor([ALPHA_START, BETA_START]))

    def forward(self, states: Tensor) -> Tensor:
        """states (..., D) -> (..., D), each step times its two gates."""
        alpha, beta = self.gates(states.to(self.gates.weight.dtype)).float().split(1, dim=-1)
        return states * (alpha.tanh() * nn.functional.tanhshrink(beta)).to(states.dtype)


class AttendedVector(SequenceVector):
    """A sequence's vector: the LSTM's state at the last real step -> temporal attention -> dropout -> linear."""

    def __init__(self, width: int, hidden: int, layers: int, dropout: float, out: int, open_start: bool) -> None:
        super().__init__(width, hidden, layers, dropout, out)
        self.attention = TemporalAttention(hidden, open_start)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """values (B, T, D), lengths (B,) -> (B, out)."""
        state = self.attention(self.lstm(values.to(self.linear.weight.dtype), lengths))
        return self.linear(self.dropout(state))
