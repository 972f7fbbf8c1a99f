"""What a step of ULGM costs: operators are watched, nothing is timed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmsa_dist.label_generators import ULGM
from shards.plan import Piece
from tests.mmsa_dist.ulgm_reference import Run, ulgm


class Watch(TorchDispatchMode):
    """Counts the elements that operators read and write, and notes those that make the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique")
    BY_ROW = ("index", "index_put_", "index_fill_", "scatter_reduce_")
    """These touch the rows that an index names, not all rows of their first argument."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.elements = 0
        self.waits: list[str] = []
        self.whole: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITS):
            self.waits.append(name)
        for tensor in tensors((args, kwargs or {}, out)):
            if not len(tensor.shape) or tensor.shape[0] < self.samples:
                self.elements += tensor.numel()
            elif name not in self.BY_ROW:
                self.whole.append(name)
        return out


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from tensors(part)


def watched(samples: int) -> Watch:
    run = Run(samples=samples, seed=0, global_batch=8)
    generator = ulgm(run)
    (batch, prediction) = run.step(2, Piece(np.arange(8, dtype=np.int64), np.ones(8, np.float32), 8.0))
    generator.observe(1, [batch], [prediction])
    with Watch(samples) as watch:
        generator.targets(batch)
        generator.observe(2, [batch], [prediction])
    return watch


def test_a_step_costs_the_same_whatever_the_number_of_samples_and_never_waits_for_the_device() -> None:
    small, large = watched(100), watched(10_000)
    assert small.whole == large.whole == [], "touches a row of every sample"
    assert small.elements == large.elements > 0
    assert small.waits == large.waits == []


def test_the_watch_sees_what_it_should() -> None:
    state, mask = torch.zeros(100), torch.zeros(100, dtype=torch.bool)
    with Watch(100) as watch:
        state.mean().item()
        state[mask]
    assert "mean" in watch.whole and {"_local_scalar_dense"} <= set(watch.waits)


def test_the_size_of_the_state_is_what_is_said() -> None:
    run = Run(samples=1000, seed=0, global_batch=8)
    generator = ulgm(run)
    held = [v for v in vars(generator).values() if isinstance(v, Tensor)]
    held += [t for v in vars(generator).values() if isinstance(v, dict) for t in tensors(v)]
    size = sum(t.numel() * t.element_size() for t in held if len(t) >= 1000) + 8 * 1000  # ids
    assert ULGM.state_bytes(1000, run.widths) == pytest.approx(size, rel=2e-3)  # but for the one row that is not read
    assert 10e6 < ULGM.state_bytes(16_326, {"M": 128, "T": 32, "A": 16, "V": 32}) < 16e6  # MOSEI
