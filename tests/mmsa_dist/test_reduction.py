"""Gradients at ZeRO stage 0: the mean over ranks, in place, while backward goes on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmsa_dist.errors import TrainingError
from mmsa_dist.reduction import LARGE, TOGETHER, Reduction, parcels

WIDTH = 160  # WIDTH x WIDTH is large, a bias is small


class Net(nn.Module):
    """Layers of which a rank may leave one out, one that nobody uses and one that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.unused, self.frozen = nn.Linear(4, 4), nn.Linear(WIDTH, WIDTH)
        self.first, self.extra, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, extra: bool) -> Tensor:
        x = self.frozen(self.first(x).relu())
        return self.last(self.extra(x).relu() if extra else x)


def inputs(rank: int, piece: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(10 * rank + piece))


def loss_of(net: Net, rank: int, piece: int) -> Tensor:
    return net(inputs(rank, piece), extra=rank % 2 == 0).square().mean()


def reduced(pieces: int) -> dict[str, Any]:
    """What a rank's gradients are after a step of `pieces` micro-batches, and how they came to be."""
    rank, net = dist.get_rank(), Net()
    reduction = Reduction(net)
    came, sent, places, messages = [], [], {}, []
    send = reduction._send

    def noted(parcel: Any) -> None:
        sent.append(len(came))
        for parameter in parcel.parameters:
            places[parameter] = parameter.grad.data_ptr()
        send(parcel)
        messages.append(parcel.sent.numel())

    reduction._send = noted  # type: ignore[method-assign]
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(came.append)
    answer: dict[str, Any] = {"steps": []}
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        for piece in range(pieces):
            reduction.backward(Tensor.backward, loss_of(net, rank, piece) / pieces, last=piece == pieces - 1)
        answer["steps"].append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    answer["stayed"] = all(parameter.grad.data_ptr() == at for parameter, at in places.items())
    answer["came"], answer["sent"], answer["messages"] = len(came), sent, messages
    reduction.close()
    answer["hooks"] = [len(p._post_accumulate_grad_hooks or ()) for p in net.parameters() if p.requires_grad]
    return answer


def expected(world: int, pieces: int) -> dict[str, Tensor]:
    """The same in one process without any of it."""
    net = Net()
    whole = [loss_of(net, rank, piece) for rank in range(world) for piece in range(pieces)]
    torch.stack(whole).mean().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_rank_has_the_mean(ranks: Callable[..., Any], world: int, pieces: int) -> None:
    """Also of what some or all ranks have not used, which is zeros to them; and none of what does not learn."""
    wanted = expected(world, pieces)
    for answer in ranks(reduced, world, pieces):
        for step in answer["steps"]:
            assert step.keys() == wanted.keys()
            for name, gradient in step.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


def test_nothing_large_is_copied_and_the_first_is_on_its_way_before_the_last_is_there(
    ranks: Callable[..., Any],
) -> None:
    first, _ = ranks(reduced, 2, 1)
    assert first["stayed"]
    assert first["messages"].count(WIDTH * WIDTH) == 6  # three weights, two steps
    assert first["sent"][0] < first["came"] / 2


def test_one_rank_sends_nothing_and_hooks_leave(ranks: Callable[..., Any]) -> None:
    (alone,) = ranks(reduced, 1, 2)
    assert not alone["messages"]
    for answer in [alone, *ranks(reduced, 2, 1)]:
        assert set(answer["hooks"]) == {1}  # the test's own


class Views(nn.Module):
    """Large parameters that are seen through views: autograd takes for their gradients the memory of the one that they
    are added to, which layers before them read later."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.slow = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(8)])
        self.added = nn.ParameterList([nn.Parameter(torch.randn(WIDTH * WIDTH)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.slow(x)
        for each in self.added:
            x = x + each.view(WIDTH, WIDTH)
        return x


def viewed(rank: int) -> Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(rank))


def reduced_views() -> list[dict[str, Tensor]]:
    net, found = Views(), []
    reduction = Reduction(net)
    for _ in range(5):
        net.zero_grad(set_to_none=True)
        x = viewed(dist.get_rank())
        reduction.backward(Tensor.backward, (net(x) * x).mean(), last=True)
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    reduction.close()
    return found


def test_a_gradient_that_flows_on_is_not_changed_meanwhile(ranks: Callable[..., Any]) -> None:
    net = Views()
    loss = torch.stack([(net(viewed(rank)) * viewed(rank)).mean() for rank in range(2)]).mean()
    wanted = dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))
    for steps in ranks(reduced_views, 2):
        for step in steps:
            for name, gradient in step.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7, msg=name)


def in_parts() -> str:
    """A layer within two checkpoints of the old kind, each of which is a backward pass of its own."""
    net = nn.Linear(WIDTH, WIDTH)
    reduction = Reduction(net)
    x = inputs(dist.get_rank(), 0).requires_grad_()
    for _ in range(2):
        x = checkpoint(net, x, use_reentrant=True)
    try:
        reduction.backward(Tensor.backward, x.square().mean(), last=True)
    except TrainingError as error:
        return str(error)
    finally:
        reduction.close()
    return ""


def test_a_gradient_that_comes_in_parts_is_refused(ranks: Callable[..., Any]) -> None:
    for said in ranks(in_parts, 2):
        assert "got its gradient in parts" in said and "use_reentrant=False" in said
    assert ranks(in_parts, 1) == [""], "one rank sends nothing"


@given(st.lists(st.integers(1, 3 * LARGE), max_size=200))
def test_parcels_hold_each_parameter_once_in_order_and_large_ones_alone(sizes: list[int]) -> None:
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    packed = parcels(parameters)
    assert [id(p) for parcel in packed for p in parcel.parameters] == [id(p) for p in parameters]
    for parcel in packed:
        together = [p.numel() for p in parcel.parameters]
        assert len(together) == 1 or (max(together) < LARGE and sum(together) <= TOGETHER)
    small = [all(p.numel() < LARGE for p in parcel.parameters) for parcel in packed]
    whole = [sum(p.numel() for p in parcel.parameters) for parcel in packed]
    for at in range(len(packed) - 1):  # no message more than is needed
        if small[at] and small[at + 1]:
            assert whole[at] + packed[at + 1].parameters[0].numel() > TOGETHER
