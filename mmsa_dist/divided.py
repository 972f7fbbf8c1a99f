"""A system that is too big for each rank to hold: under ZeRO-3 the first rank builds it, the others its outline.

The weights then go from the first rank to all, a module at a time, and each rank keeps its part. So no GPU ever holds a
whole system, and of the hosts the first rank's alone. What is built is the same to the last bit as where every rank
builds it: `deepspeed.zero.Init` around a constructor would keep that rank's host free too, but breaks modules that copy
others or set their weights, `transformers`' among them.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmsa_dist.config import TextConfig
from mmsa_dist.systems.base import DataSpec, System, make_system


def build(name: str, model: Any, spec: DataSpec, device: torch.device, *, in_parts: bool) -> System:
    """The system; where ranks are to hold parts of it, on all but the first its outline, and a collective call.

    Every rank's random numbers go on as the first one's do.

    Args:
        device: where ranks speak with one another; the system is built on the CPU.
        in_parts: `divide` follows.
    """
    if not in_parts or dist.get_world_size() == 1:
        return make_system(name, model, spec)
    first = dist.get_rank() == 0
    system = make_system(name, model, spec) if first else outline(name, model, spec)
    numbers = torch.get_rng_state().to(device)
    _broadcast(numbers)
    torch.set_rng_state(numbers.cpu())
    return system


def outline(name: str, model: Any, spec: DataSpec) -> System:
    """The system without its weights: all shapes and nothing behind them, on PyTorch's device ``meta``."""
    text: TextConfig | None = spec.text
    if text is not None:  # its shape is enough
        spec = replace(spec, text=text.model_copy(update={"pretrained": False}))
    with torch.device("meta"):
        return make_system(name, model, spec)


def divide(system: System, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Leaves each rank with its part of every parameter, of the first rank's values. A collective call.

    Buffers are the first rank's on all ranks, whole.

    Args:
        config: DeepSpeed's, at stage 3.
        dtype: of the parameters' working copies.
    """
    import deepspeed

    made: dict[Tensor, nn.Parameter] = {}
    for module in system.modules():
        own = [_real(module, name, made, device) for name, _ in module.named_parameters(recurse=False)]
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        if own:
            deepspeed.zero.Init(module=nn.ParameterList(own), config_dict_or_path=config, dtype=dtype)
        for name, buffer in module.named_buffers(recurse=False):
            whole = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            if not buffer.is_meta:
                whole.copy_(buffer)
            _broadcast(whole)
            module.register_buffer(name, whole, persistent=name not in module._non_persistent_buffers_set)


def _real(module: nn.Module, name: str, made: dict[Tensor, nn.Parameter], device: torch.device) -> nn.Parameter:
    """A module's parameter, in place of an outline's one with room for its values; one that modules share stays one."""
    parameter: nn.Parameter = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    if parameter not in made:
        room = torch.empty_like(parameter, device=device)
        made[parameter] = nn.Parameter(room, requires_grad=parameter.requires_grad)
    setattr(module, name, made[parameter])
    return made[parameter]


def _broadcast(tensor: Tensor) -> None:
    """The first rank's values, to all."""
    if tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), 0)
