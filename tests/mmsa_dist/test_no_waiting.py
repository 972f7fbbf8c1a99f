"""The host queues a whole forward and backward pass without once asking the device for a number."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmsa_dist.systems import get_system, system_names
from tests.mmsa_dist.batches import SMALL, make_batch, ragged, spec_for

LENGTHS = {"text": [3, 5, 2], "audio": [4, 1, 6], "vision": [2, 7, 3]}


@pytest.mark.parametrize("name", system_names())
def test_no_system_waits_for_the_device(name: str) -> None:
    """On the meta device there are no numbers: whoever reads one, or lets a shape depend on it, raises."""
    kind = get_system(name)
    system = kind(kind.Config(**SMALL.get(name, {})), spec_for()).to("meta").train()
    batch = make_batch(LENGTHS, absent={"audio": [1]}).to("meta")
    losses = system.loss(system(batch), batch, batch.labels)
    losses.total.backward()
    assert losses.total.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in system.parameters())


def test_a_number_cannot_be_read_there() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device="meta").item()


class Operations(TorchDispatchMode):
    """Counts what is dispatched, backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operations(name: str, size: int, longest: int) -> int:
    """Operations of one forward and backward pass over `size` samples of 1 to `longest` steps."""
    kind = get_system(name)
    system = kind(kind.Config(**SMALL.get(name, {})), spec_for()).train()
    batch = ragged(size, longest, absent={"audio": [1]})
    with Operations() as counted:
        system.loss(system(batch), batch, batch.labels).total.backward()
    return counted.number


@pytest.mark.parametrize("name", system_names())
def test_no_system_loops_over_samples_or_steps(name: str) -> None:
    """Sixteen times the samples and five times the steps are the same number of operations, each on more."""
    few = operations(name, 4, 8)
    assert few > 10
    assert operations(name, 64, 8) == few
    assert operations(name, 4, 40) == few
