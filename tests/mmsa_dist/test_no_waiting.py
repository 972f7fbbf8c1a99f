"""The host queues a whole forward and backward pass without once asking the device for a number."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

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


class Calls(TorchFunctionMode):
    """Counts what Python asks of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def calls(name: str, size: int, longest: int) -> int:
    """Calls of one forward and backward pass over `size` samples of 1 to `longest` steps."""
    kind = get_system(name)
    system = kind(kind.Config(**SMALL.get(name, {})), spec_for()).train()
    batch = ragged(size, longest, absent={"audio": [1]})
    with Calls() as counted:
        system.loss(system(batch), batch, batch.labels).total.backward()
    return counted.number


@pytest.mark.parametrize("name", system_names())
def test_no_system_loops_over_samples_or_steps(name: str) -> None:
    """Four times the samples and five times the steps are asked for in as many calls; where attention works in tiles
    that fit a cache, in a few more."""
    few = calls(name, 4, 8)
    assert few > 10
    for many in (calls(name, 16, 8), calls(name, 4, 40)):
        assert few <= many <= (1.1 if name in ("mult", "pmr", "ufen_mtfn") else 1) * few


def test_a_loop_is_counted() -> None:
    with Calls() as counted:
        values = torch.zeros(3, 5)
        for step in values.unbind(1):
            step.add_(1)
    assert counted.number >= 6
