"""Ragged sequences without their padding: the real steps of a whole batch, sample behind sample.

What a transformer does to each step by itself (projections, feed-forward, norms) then costs real steps only, and so
does its attention (`layers.tiles`).

Shapes: B batch, T time (the longest), N real steps of the batch, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmsa_dist.layers.pooling import masked_mean
from shards.batch import Batch


@dataclass(frozen=True)
class Steps:
    """Where the steps of a packed batch belong.

    Attributes:
        lengths: (B,) int64 on the CPU, each at least 1: nothing here waits for the device.
        sample: (N,) int64 on the device, the sample of each step.
        position: (N,) int64 on the device, its place in the sample, from 0.
        real: (N,) bool on the device; False on a step that stands in for an absent modality.
        there: (B,) bool on the device: whether the sample has any real step.
        mixed: whether stand-ins may stand beside real steps, as in joined sequences.
    """

    lengths: Tensor
    sample: Tensor
    position: Tensor
    real: Tensor
    there: Tensor
    mixed: bool = False

    @classmethod
    def of(cls, lengths: Tensor, there: Tensor) -> "Steps":
        """Steps of sequences of `lengths` (B,); a sample that is not `there` (B,) has stand-ins only."""
        sample, position = _places(lengths, there.device)
        return cls(lengths, sample, position, there[sample], there)

    @classmethod
    def of_modality(cls, batch: Batch, name: str) -> "Steps":
        """One modality's steps; of a sample that lacks it one step, a stand-in."""
        lengths, present = batch.lengths[name], batch.present[name]
        if present.device.type == "cpu":  # elsewhere to ask would be to wait, and `Batch` gives it one step anyway
            lengths = lengths.where(present, 1)
        return cls.of(lengths, present)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def last(self) -> Tensor:
        """(B,) int64: the row of each sample's last step."""
        return (self.lengths.cumsum(0) - 1).to(self.sample.device, non_blocking=True)

    @cached_property
    def visible(self) -> Tensor | None:
        """(N,) bool: the steps that attention may look at; None for all.

        Stand-ins are hidden beside real steps. A sample that has nothing else shows them, since attention must find
        something: what it finds there is to be thrown away (`there`).
        """
        if not self.mixed or (self.real.device.type == "cpu" and bool(self.real.all())):
            return None
        return self.real | ~self.there[self.sample]

    def pack(self, values: Tensor) -> Tensor:
        """(B, T', D) -> (N, D), for any T' from `longest` on."""
        return values.flatten(0, 1).index_select(0, self.sample * values.shape[1] + self.position)

    def unpack(self, values: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), zeros in padding."""
        size, longest = len(self.lengths), self.longest
        padded = values.new_zeros(size * longest, *values.shape[1:])
        return padded.index_copy(0, self.sample * longest + self.position, values).unflatten(0, (size, longest))

    def mean(self, values: Tensor) -> Tensor:
        """(N, D) -> (B, D): over each sample's real steps; zero where it has none."""
        return masked_mean(self.unpack(values), self.unpack(self.real))


def join(parts: Sequence[Steps]) -> tuple[Steps, Tensor]:
    """Sequences of the same B samples, one behind the other within each sample.

    Returns:
        the joint steps, and the order (N,): ``torch.cat([values of each part])[order]`` are its values.
    """
    lengths = torch.stack([part.lengths for part in parts]).sum(0)
    device = parts[0].sample.device
    numbers = torch.arange(len(lengths))
    order = torch.cat([numbers.repeat_interleave(part.lengths) for part in parts]).argsort(stable=True)
    order = order.to(device, non_blocking=True)
    real = torch.cat([part.real for part in parts])[order]
    there = torch.stack([part.there for part in parts]).any(0)
    sample, position = _places(lengths, device)
    return Steps(lengths, sample, position, real, there, mixed=True), order


def _places(lengths: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,) each: sample and place in it of every step, on `device`."""
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    return sample.to(device, non_blocking=True), position.to(device, non_blocking=True)
