"""The host queues a whole forward and backward pass without once asking the device for a number."""

import pytest
import torch

from mmsa_dist.systems import get_system, system_names
from tests.mmsa_dist.batches import SMALL, make_batch, spec_for

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
