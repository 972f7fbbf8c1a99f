"""What makes an answer of a vector, and a vector of a sequence: the parts that Self-MM and its descendants share.

Shapes: B batch, T time, D width.
"""

from torch import Tensor, nn

from mmsa_dist.layers.recurrent import LastStateLSTM


class SequenceVector(nn.Module):
    """A sequence's vector: the LSTM's state at the last real step -> dropout -> linear."""

    def __init__(self, width: int, hidden: int, layers: int, dropout: float, out: int) -> None:
        super().__init__()
        self.lstm = LastStateLSTM(width, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, out)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """values (B, T, D), lengths (B,) -> (B, out)."""
        state = self.lstm(values.to(self.linear.weight.dtype), lengths)
        return self.linear(self.dropout(state))


class Head(nn.Module):
    """A task's regressor: dropout -> linear -> ReLU = F* -> linear -> ReLU -> linear."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, 1)

    def forward(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """vector (B, width) -> prediction (B,) float32, F* (B, hidden)."""
        feature = self.first(self.dropout(vector.to(self.first.weight.dtype))).relu()
        return self.third(self.second(feature).relu()).squeeze(-1).float(), feature
