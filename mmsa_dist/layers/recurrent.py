"""Recurrent layers over ragged sequences.

Packing is what PyTorch offers for ragged sequences, and on a CPU it is slow: it leaves the fused kernels and takes each
step apart. All layers here avoid it there (`python -m benchmarks.parts` has both ways beside each other).

Shapes: B batch, T time, D width, H hidden units.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmsa_dist.layers.pooling import last_valid


def reverse(values: Tensor, lengths: Tensor) -> Tensor:
    """Turns each sequence round within its own length: values (B, T, D), lengths (B,) -> (B, T, D).

    Padding stays behind; its content is arbitrary.
    """
    steps = torch.arange(values.shape[1], device=values.device)
    source = (lengths.to(values.device, non_blocking=True)[:, None] - 1 - steps).clamp(min=0)
    rows = torch.arange(values.shape[0], device=values.device)
    return values[rows[:, None], source]  # copies whole steps, which gather does number by number


class BiGRU(nn.GRU):
    """One bidirectional GRU layer over ragged sequences; parameters are those of `nn.GRU`.

    On a GPU it runs packed (one fused kernel). On a CPU both directions run as *one* GRU with twice the hidden units
    and block-diagonal weights, over the sequence beside its reversal: half the time steps, and no packing, since
    padding stands behind the real steps in both and so reaches none of them.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor
    weight_ih_l0_reverse: Tensor
    weight_hh_l0_reverse: Tensor
    bias_ih_l0_reverse: Tensor
    bias_hh_l0_reverse: Tensor

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden, batch_first=True, bidirectional=True)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """values (B, T, D), lengths (B,) int64 on the CPU -> (B, T, 2H). Padded steps hold anything finite."""
        return self.packed(values, lengths) if values.is_cuda else self.unpacked(values, lengths)

    def packed(self, values: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, the way of a GPU."""
        packed = pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(super().forward(packed)[0], batch_first=True, total_length=values.shape[1])[0]

    def unpacked(self, values: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, the way of a CPU."""
        # Each direction's gates from its own input; the joint GRU reads them through an identity, which costs less
        # than block-diagonal input weights as soon as D is some times H.
        ahead = F.linear(values, self.weight_ih_l0, self.bias_ih_l0)
        back = F.linear(reverse(values, lengths), self.weight_ih_l0_reverse, self.bias_ih_l0_reverse)
        gates = _by_gate(ahead, back, torch.cat, dim=-1)
        hidden_weight = _by_gate(self.weight_hh_l0, self.weight_hh_l0_reverse, _block_diagonal, dim=0)
        hidden_bias = _by_gate(self.bias_hh_l0, self.bias_hh_l0_reverse, torch.cat, dim=0)
        read = torch.eye(gates.shape[-1], dtype=gates.dtype, device=gates.device)
        weights = [read, hidden_weight, torch.zeros_like(hidden_bias), hidden_bias]
        start = gates.new_zeros(1, gates.shape[0], 2 * self.hidden_size)
        states = torch.gru(gates, start, weights, True, 1, 0.0, self.training, False, True)[0]
        ahead, back = states.chunk(2, dim=-1)
        return torch.cat([ahead, reverse(back, lengths)], dim=-1)


def _by_gate(ahead: Tensor, back: Tensor, join: Callable[..., Tensor], dim: int) -> Tensor:
    """Joins what the two directions hold for each of the three gates, so that the joint GRU's gates are in order."""
    gates = zip(ahead.chunk(3, dim), back.chunk(3, dim), strict=True)
    return torch.cat([join(pair, dim) for pair in gates], dim)


def _block_diagonal(blocks: tuple[Tensor, Tensor], _: int) -> Tensor:
    return torch.block_diag(*blocks)


class BiLSTM(nn.LSTM):
    """One bidirectional LSTM layer over ragged sequences; parameters are those of `nn.LSTM`.

    On a GPU it runs packed. On a CPU each direction runs unpacked, in the fused kernel, the second one over the
    reversal: padding stands behind the real steps in both. For bfloat16 on a CPU see `LastStateLSTM`.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden, batch_first=True, bidirectional=True)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """values (B, T, D), lengths (B,) int64 on the CPU -> (B, T, 2H). Padded steps hold anything finite."""
        return self.packed(values, lengths) if values.is_cuda or _unfused(values) else self.unpacked(values, lengths)

    def packed(self, values: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, by packing."""
        packed = pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(super().forward(packed)[0], batch_first=True, total_length=values.shape[1])[0]

    def unpacked(self, values: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, by direction."""
        start = values.new_zeros(1, values.shape[0], self.hidden_size)
        ahead, back = (
            torch.lstm(steps, [start, start], tuple(own), True, 1, 0.0, self.training, False, True)[0]
            for steps, own in zip((values, reverse(values, lengths)), self.all_weights, strict=True)
        )
        return torch.cat([ahead, reverse(back, lengths)], dim=-1)


def last_states(states: Tensor, lengths: Tensor) -> Tensor:
    """What a bidirectional layer ends with, the first direction at the last real step and the second at the first one.

    states (B, T, 2H), lengths (B,) -> (B, 2H).
    """
    ahead, back = states.chunk(2, dim=-1)
    return torch.cat([last_valid(ahead, lengths), back[:, 0]], dim=-1)


def _unfused(values: Tensor) -> bool:
    """Whether the fused kernel of a CPU may be missing: that for bfloat16 exists on the newest ones only."""
    return values.device.type == "cpu" and (values.dtype != torch.float32 or torch.is_autocast_enabled("cpu"))


class LastStateLSTM(nn.LSTM):
    """An LSTM that gives the top layer's state at the last real step.

    It runs over the padding too, unpacked: later steps cannot change earlier ones, and the unpacked kernel is fused on
    CPU and GPU alike. Only bfloat16 on a CPU is packed: the fused kernel exists for it on the newest CPUs only.
    """

    def __init__(self, width: int, hidden: int, layers: int = 1, dropout: float = 0.0) -> None:
        # nn.LSTM warns of a dropout between layers where there is only one
        super().__init__(width, hidden, num_layers=layers, dropout=dropout if layers > 1 else 0.0, batch_first=True)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """values (B, T, D), lengths (B,) int64 on the CPU -> (B, H)."""
        if _unfused(values):
            return self.packed(values, lengths)
        return last_valid(super().forward(values)[0], lengths)

    def packed(self, values: Tensor, lengths: Tensor) -> Tensor:
        """As `forward`, by packing."""
        packed = pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False)
        return super().forward(packed)[1][0][-1]
