"""Which parameters learn at which rate, and how the rates move over a run's steps."""

from collections.abc import Callable
from typing import Any

import torch

from mmsa_dist.config import GroupValues, OptimConfig
from mmsa_dist.errors import ConfigError
from mmsa_dist.systems.base import GROUPS, System

NO_DECAY = "_no_decay"
"""Ends the name of the group of a text encoder's biases and norms."""


def parameter_groups(system: System, optim: OptimConfig) -> list[dict[str, Any]]:
    """Optimizer groups of the papers: text (decay / no decay), audio, vision, rest; each parameter in exactly one.

    Biases and normalisation weights of the text encoder get no weight decay. Frozen parameters are in no group.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in system.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = system.parameter_group(name)
        if kind not in GROUPS:
            raise ConfigError(
                f"system {system.name!r} puts parameter {name!r} into group {kind!r}, expected one of {GROUPS}"
            )
        bare = kind == "text" and (parameter.ndim < 2)  # biases, layer norms
        label = f"{kind}{NO_DECAY}" if bare else kind
        group = groups.setdefault(
            label,
            {
                "name": label,
                "params": [],
                "lr": getattr(optim.lr, kind),
                "base_lr": getattr(optim.lr, kind),
                "weight_decay": 0.0 if bare else getattr(optim.weight_decay, kind),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def rate_of(group: dict[str, Any], rates: GroupValues) -> float:
    """Which of `rates` a group of `parameter_groups` has."""
    return float(getattr(rates, group["name"].removesuffix(NO_DECAY)))


def schedule(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """step (from 0) -> factor of every learning rate. A function of the step alone, so there is no state to lose."""
    warm = round(optim.warmup * total_steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        progress = min(1.0, (step - warm) / max(1, total_steps - warm))
        if optim.schedule == "linear":
            return 1.0 - progress
        if optim.schedule == "cosine":
            return 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))
        return 1.0

    return factor
