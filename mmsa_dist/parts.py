"""A checkpoint's numbers, first as each rank holds them, then whole on rank 0.

To copy its own part is all that a rank stands still for. The parts travel in threads, beside training, in a process
group that nothing else uses.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmsa_dist.portable import MOMENTS, State, Stretch

MESSAGE = 1 << 25
"""Numbers sent at a time."""


class Place(NamedTuple):
    """Where a stretch of numbers belongs: in a weight or a moment (`kind`), from its flattened number `start` on."""

    kind: str
    name: str
    start: int
    size: int


@dataclass
class Part:
    """What one rank holds of a state.

    Attributes:
        step, scale: as in `State`.
        places, numbers: its stretches, one after another in fp32.
        shapes: of all weights that are parameters, whole.
        buffers: the system's, on rank 0.
    """

    step: int
    scale: dict[str, float]
    places: list[Place]
    numbers: Tensor
    shapes: dict[str, torch.Size]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def stretches(self) -> Iterator[tuple[Place, Tensor]]:
        yield from zip(self.places, self.numbers.split([place.size for place in self.places]), strict=True)


class Room:
    """Memory that parts are copied into, one at a time: pinned for a GPU, and there already for the next."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._numbers = torch.empty(0)

    def copy(self, stretches: Iterable[Stretch]) -> tuple[list[Place], Tensor]:
        """Copies of all stretches, good until the next call."""
        held = list(stretches)
        places = [Place(kind, name, start, numbers.numel()) for kind, name, start, numbers in held]
        size = sum(place.size for place in places)
        if self._numbers.numel() < size:
            self._numbers = torch.empty(size, pin_memory=self._on_gpu)
        numbers = self._numbers[:size]
        for to, (_, _, _, own) in zip(numbers.split([place.size for place in places]), held, strict=True):
            to.copy_(own, non_blocking=True)
        if self._on_gpu:
            torch.cuda.synchronize()
        return places, numbers


def assemble(part: Part, group: dist.ProcessGroup | None) -> State | None:
    """The whole state on rank 0, None elsewhere. Every rank must call it, each in one thread at a time.

    Args:
        group: of all ranks, on the host, which only this function uses; None where there is one rank.
    """
    if group is None:
        return _filled(part, [])
    rank, world = dist.get_rank(), dist.get_world_size()
    layouts: list[list[Place]] | None = [[]] * world if rank == 0 else None
    dist.gather_object(part.places, layouts, 0, group)
    if layouts is not None:
        return _filled(part, layouts, group)
    for _, numbers in part.stretches():
        for message in numbers.split(MESSAGE):
            dist.send(message, 0, group)
    return None


def _filled(part: Part, layouts: list[list[Place]], group: dist.ProcessGroup | None = None) -> State:
    """Rank 0's own stretches and those of the other ranks, each received where it belongs."""
    state = State(part.step, {}, {kind: {} for kind in MOMENTS}, part.scale)
    whole = {"weights": state.weights, **state.moments}
    flat: dict[tuple[str, str], Tensor] = {}
    for layout in [part.places, *layouts[1:]]:
        for kind, name, _, _ in layout:
            if name not in whole[kind]:
                whole[kind][name] = torch.empty(part.shapes[name])
                flat[kind, name] = whole[kind][name].view(-1)
    for (kind, name, start, size), numbers in part.stretches():
        flat[kind, name][start : start + size] = numbers
    for rank, layout in enumerate(layouts[1:], 1):
        for kind, name, start, size in layout:
            for message in flat[kind, name][start : start + size].split(MESSAGE):
                dist.recv(message, rank, group)
    state.weights |= part.buffers
    return state
