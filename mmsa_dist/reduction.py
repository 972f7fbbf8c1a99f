"""The mean of all ranks' gradients at ZeRO stage 0, taken where the gradients lie and while backward goes on.

DeepSpeed's own way at this stage waits for the end of backward, copies every gradient into a buffer, scales it, reduces
it and copies it back, with one rank too. Here a large gradient is reduced in place as soon as it and all before it are
there, small ones travel together, and the mean comes of a loss that is divided beforehand: nothing is copied but what
is small. One rank has nothing to do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmsa_dist.errors import TrainingError

LARGE = 16_384
"""Numbers from which a gradient travels alone: fewer are copied sooner than a message is sent."""
TOGETHER = 1_000_000
"""Numbers of small gradients that travel in one message at most."""


@dataclass
class Parcel:
    """Parameters whose gradients travel in one message.

    Attributes:
        missing: those of them that have no gradient of this step yet.
        sent: what travels, the gradient itself or small ones behind each other; None before.
    """

    parameters: list[nn.Parameter]
    missing: set[Tensor] = field(default_factory=set)
    sent: Tensor | None = None
    work: dist.Work | None = None


class Reduction:
    """Makes each trained parameter's gradient the mean over all ranks.

    All ranks send the same parcels in the same order at every step, whatever order their gradients come in: that of the
    system's parameters backwards, as backward goes for the most part. So a run that goes on adds up as one that was not
    interrupted. A parameter that a rank has not used counts as one with a gradient of zeros,
    on one rank too, so that it is stepped on alike at every number of ranks.
    """

    def __init__(self, system: nn.Module) -> None:
        self._world, self._system = dist.get_world_size(), system
        self._parameters = [p for p in system.parameters() if p.requires_grad and p.numel()]
        self._parcels = parcels(reversed(self._parameters)) if self._world > 1 else []
        self._of = {parameter: parcel for parcel in self._parcels for parameter in parcel.parameters}
        self._hooks = [p.register_post_accumulate_grad_hook(self._came) for p in self._of]
        self._next: int | None = None

    def backward(self, backward: Callable[[Tensor], object], loss: Tensor, *, last: bool) -> None:
        """Calls `backward` with the loss of one micro-batch; after the step's `last` one the gradients are the means.

        A collective call then.

        Raises:
            TrainingError: a gradient came in parts, and the first was on its way when the second came.
        """
        self._next = 0 if last else None
        for parcel in self._parcels:
            parcel.missing = set(parcel.parameters)
        try:
            backward(loss / self._world if self._world > 1 else loss)
            if last:
                self._finish()
        finally:
            self._next = None

    def close(self) -> None:
        """Takes its hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _came(self, parameter: Tensor) -> None:
        """Called by autograd when a parameter has its gradient of this micro-batch and those before."""
        if self._next is None:
            return
        parcel = self._of[parameter]  # type: ignore[index]
        if parcel.work is not None:
            name = next(name for name, each in self._system.named_parameters() if each is parameter)
            raise TrainingError(
                f"{name} got its gradient in parts within one backward pass, as in a layer that is within two calls of "
                "torch.utils.checkpoint; give them use_reentrant=False"
            )
        parcel.missing.discard(parameter)
        while self._next < len(self._parcels) and not self._parcels[self._next].missing:
            self._send(self._parcels[self._next])
            self._next += 1

    @torch.no_grad()
    def _finish(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for parcel in self._parcels[self._next :]:
            self._send(parcel)
        for parcel in self._parcels:
            assert parcel.work is not None and parcel.sent is not None
            parcel.work.wait()
            if len(parcel.parameters) > 1:
                sizes = [parameter.numel() for parameter in parcel.parameters]
                means = [m.view_as(p) for m, p in zip(parcel.sent.split(sizes), parcel.parameters, strict=True)]
                torch._foreach_copy_([p.grad for p in parcel.parameters if p.grad is not None], means)
            parcel.work = parcel.sent = None

    @torch.no_grad()
    def _send(self, parcel: Parcel) -> None:
        gradients = [parameter.grad for parameter in parcel.parameters]
        if len(gradients) > 1:
            parcel.sent = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
        else:
            (parameter,) = parcel.parameters
            assert parameter.grad is not None
            if _shared(parameter.grad) or not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.clone(memory_format=torch.contiguous_format)
            parcel.sent = parameter.grad
        parcel.work = dist.all_reduce(parcel.sent, async_op=True)


def _shared(gradient: Tensor) -> bool:
    """Whether another tensor has the same memory: of a parameter that is seen through `unsqueeze` or `view`, autograd
    may take the very gradient that flows on to the layers before."""
    own = 2  # the gradient, and the object that is made here
    return bool(torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) > own)


def parcels(parameters: Iterable[nn.Parameter]) -> list[Parcel]:
    """Large parameters alone, small ones that follow one another together; in order."""
    found: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        large = parameter.numel() >= LARGE
        if large or parameter.numel() > room:
            found.append([])
        found[-1].append(parameter)
        room = 0 if large else (room if len(found[-1]) > 1 else TOGETHER) - parameter.numel()
    return [Parcel(each) for each in found]
