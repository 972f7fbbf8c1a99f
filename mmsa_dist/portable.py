"""Weights and optimizer state by parameter name: the form that loads at any number of ranks and any ZeRO stage.

DeepSpeed's own checkpoints load at the same number of ranks only, and its universal ones train wrongly at stage 3.
This file is the only one that touches DeepSpeed's private names; a test over pairs of stages and ranks watches them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmsa_dist.errors import DataError
from mmsa_dist.systems.base import System

MOMENTS = ("exp_avg", "exp_avg_sq")
INITIAL_MICRO_STEP_ID = -1
"""Where ZeRO 1 and 2 count micro-batches from."""
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's scaler of fp16 losses changes from step to step."""


@dataclass
class State:
    """What training needs to go on.

    Attributes:
        step: optimizer steps taken.
        weights: name -> fp32 tensor, whole; buffers included.
        moments: ``exp_avg`` and ``exp_avg_sq`` -> name -> fp32 tensor, whole; frozen parameters have none.
        scale: fp16's loss scale, and by what it is changed next (`SCALE`); empty at other precisions.
    """

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)


Stretch = tuple[str, str, int, Tensor]
"""``weights`` or one of `MOMENTS`, a parameter's name, and some of its flattened numbers, from which one on."""


def held(engine: Any, system: System, stage: int, step: int) -> Iterator[Stretch]:
    """What this rank has to give to a state: all ranks together give each number once. No collective call."""
    first = dist.get_rank() == 0
    if stage in (1, 2) and step > 0:
        _link_moments(engine.optimizer)
    for name, parameter in system.named_parameters():
        kinds = ("weights", *MOMENTS) if step and parameter.requires_grad else ("weights",)
        for kind in kinds:
            if stage == 3:
                numbers = _divided(parameter, kind)
                start = dist.get_rank() * numbers.numel()
                own = numbers[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]
            elif stage and parameter.requires_grad:
                fragment = parameter._hp_mapping  # type: ignore[attr-defined]
                if fragment is None:
                    continue
                start = fragment.lp_fragment_address.start
                own = fragment.get_hp_fragment(None if kind == "weights" else kind)
            elif first:  # who holds it whole, as all do
                start = 0
                own = parameter.data if kind == "weights" else engine.optimizer.state[parameter][kind]
            else:
                continue
            if own.numel():
                yield kind, name, start, own.detach().reshape(-1)


def _divided(parameter: Any, kind: str) -> Tensor:
    """This rank's stretch of a parameter, or of a moment of it, under ZeRO-3; what is beyond its end too."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    if not parameter.requires_grad:
        return parameter.ds_tensor
    if kind == "weights":
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, kind)


def shapes(system: System) -> dict[str, torch.Size]:
    """Of all parameters, whole also where ZeRO-3 has divided them."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in system.named_parameters()}


def buffers(system: System) -> dict[str, Tensor]:
    """Copies of the buffers that a checkpoint keeps."""
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in _persistent_buffers(system).items()}


def loss_scale(engine: Any) -> dict[str, float]:
    """`State.scale`."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in SCALE} if getattr(scaler, "dynamic", False) else {}


def load_module(system: System, weights: dict[str, Tensor]) -> None:
    """Weights into a module that DeepSpeed has not seen yet.

    Raises:
        DataError: names or shapes differ.
    """
    own = {**dict(system.named_parameters()), **_persistent_buffers(system)}
    if own.keys() != weights.keys():
        missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise DataError(f"the checkpoint is of another system: it lacks {missing[:3]} and has {foreign[:3]} besides")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise DataError(
                    f"the checkpoint is of another system: {name} has shape {tuple(weights[name].shape)}, "
                    f"expected {tuple(tensor.shape)}"
                )
            if not tensor.is_meta:  # an outline gets the first rank's
                tensor.copy_(weights[name])


def load_optimizer(engine: Any, system: System, stage: int, state: State) -> None:
    """Moments, fp32 master weights where the working copy is narrower, and fp16's loss scale, into a freshly
    initialised engine."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for name, value in state.scale.items():
        setattr(engine.optimizer.loss_scaler, name, value)
    if stage in (1, 2) and any(p.dtype != torch.float32 for p in system.parameters()):
        for name, parameter in system.named_parameters():
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, state.weights[name].to(parameter.device))
    if stage == 3 and any(p.dtype != torch.float32 for p in system.parameters()):
        from deepspeed.utils import safe_set_local_fp32_param

        for name, parameter in system.named_parameters():
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, _own_part(state.weights[name], parameter))
    if state.step == 0:
        return
    trained = {name: p for name, p in system.named_parameters() if p.requires_grad}
    if stage == 0:
        for name, parameter in trained.items():
            engine.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step), device=parameter.device),
                **{key: state.moments[key][name].to(parameter.device, copy=True) for key in MOMENTS},
            }
        return
    zero = engine.optimizer
    partitions = zero.single_partition_of_fp32_groups if stage in (1, 2) else zero.fp32_partitioned_groups_flat
    for flat in partitions:
        # one `step` tensor each: a shared one would count every group's step
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(state.step), device=flat.device),
            **{key: torch.zeros_like(flat) for key in MOMENTS},
        }
    if stage in (1, 2):
        _link_moments(zero)
        for name, parameter in trained.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state.moments[key][name].to(parameter.device), key)
        return
    from deepspeed.utils import safe_set_local_optimizer_state

    for name, parameter in trained.items():
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, _own_part(state.moments[key][name], parameter), key)


def replace_weights(system: System, stage: int, weights: dict[str, Tensor]) -> None:
    """Weights into an initialised module, for evaluation only: the optimizer's own copies are left as they were."""
    import deepspeed

    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if stage == 3:
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                    parameter.data.copy_(weights[name])
            else:
                parameter.data.copy_(weights[name])
        for name, buffer in _persistent_buffers(system).items():
            buffer.copy_(weights[name])


def forget_gradients(engine: Any, stage: int) -> None:
    """As if the last backward pass had not been: its gradients are gone, and the next one is the first of a step.

    DeepSpeed does the same in a step that it skips, where it counts that step and changes the loss scale too.
    """
    engine._is_gradient_accumulation_boundary = None  # its own counter of micro-batches tells again
    engine.zero_grad()
    if stage == 0:
        return
    zero = engine.optimizer
    zero.zero_grad(set_to_none=True)
    if stage == 3:
        zero._pre_step()
        zero.reset_cpu_buffers()
        return
    zero.micro_step_id = INITIAL_MICRO_STEP_ID
    zero._release_preflattened_grad_buffers()
    for group in zero.averaged_gradients:
        zero.averaged_gradients[group] = None
        zero.all_grad_tensors[group] = None
    if zero.cpu_offload:
        zero.reset_cpu_buffers()
        zero._offload_accumulated_param_ids = set()


def _own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's stretch of a flattened parameter under ZeRO-3, zero beyond its end."""
    n, rank = parameter.partition_numel(), dist.get_rank()  # type: ignore[attr-defined]
    part = torch.zeros(n, dtype=torch.float32)
    own = whole.reshape(-1)[rank * n : (rank + 1) * n]
    part[: own.numel()] = own
    return part.to(parameter.device)


def _link_moments(zero: Any) -> None:
    """DeepSpeed links moments after the first group's first step, so later groups' never were: link them again."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _persistent_buffers(system: System) -> dict[str, Tensor]:
    parameters = {name for name, _ in system.named_parameters()}
    buffers = dict(system.named_buffers())
    return {name: buffers[name] for name in system.state_dict() if name not in parameters and name in buffers}
