"""Unimodal tasks beside the multimodal one: which there are, their loss, and how a missing label is kept out of it.

Shapes: B batch.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.label_generators.base import WEIGHING
from mmsa_dist.layers.heads import Head
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, weighted_mean
from shards.batch import Batch
from shards.utterance import UNIMODAL_TASK

Modality = Literal["text", "audio", "vision"]


def chosen_subtasks(chosen: Sequence[Modality] | None, spec: DataSpec) -> tuple[str, ...]:
    """Modalities that have a task of their own, in the order t, a, v; all that the data has where `chosen` is None.

    Raises:
        ConfigError: one that the data does not have, or one named twice.
    """
    if chosen is None:
        return tuple(spec.widths)
    for name in chosen:
        if name not in spec.widths:
            raise ConfigError(
                f"model.subtasks: {name!r} is not a modality in use ({', '.join(spec.widths)}); remove it or use {name}"
            )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"model.subtasks: {', '.join(chosen)} names a modality twice; name each once")
    return tuple(name for name in spec.widths if name in chosen)


def target_of(modality: str, targets: dict[str, Tensor]) -> Tensor:
    """(B,) labels of the modality's task. Raises ConfigError where neither data nor label generator gives them."""
    task = UNIMODAL_TASK[modality]
    if task not in targets:
        raise ConfigError(
            f"labels.generator: it gives no labels for task {task}, and the data has none; choose a label generator "
            f"(ulgm, sugrm, ulag), or leave {modality} out of model.subtasks"
        )
    return targets[task]


def where_labelled(target: Tensor, prediction: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves out samples without the modality or without its label (NaN).

    Args:
        target, prediction: (B,). present: (B,) bool.

    Returns:
        target (B,) without NaN (a NaN would reach the gradient through any mask), and who takes part (B,) bool.
    """
    labelled = present & target.isfinite()
    return torch.where(labelled, target, prediction.detach()), labelled


def distance_weighted(
    subtasks: Sequence[str], prediction: Prediction, batch: Batch, targets: dict[str, Tensor]
) -> dict[str, Tensor]:
    """task -> mean( tanh|y_s - y_m| · |ŷ_s - y_s| ) of each modality's task (Self-MM, section 3.4).

    Labels that a generator makes start as y_m, so in the first epoch these are exactly zero. A sample that lacks the
    modality or its label has no part.
    """
    losses = {}
    for name in subtasks:
        task = UNIMODAL_TASK[name]
        answer = prediction.tasks[task]
        label, takes_part = where_labelled(target_of(name, targets), answer, batch.present[name])
        distance = (targets.get(WEIGHING + task, label) - targets["M"]).abs()
        losses[task] = weighted_mean(distance.tanh() * (answer - label).abs(), batch, takes_part)
    return losses


def regressors(config: Strict, fused: int, widths: Mapping[str, int], subtasks: Sequence[str]) -> dict[str, Head]:
    """Self-MM's heads, keyed by task: M of the fused vector, each modality's task of its own vector.

    Args:
        config: has ``post_<fusion or modality>_dim`` and ``post_<fusion or modality>_dropout``.
        fused: width of the fused vector. widths: modality -> that of its vector.
    """

    def head(width: int, name: str) -> Head:
        return Head(width, getattr(config, f"post_{name}_dim"), getattr(config, f"post_{name}_dropout"))

    return {"M": head(fused, "fusion")} | {UNIMODAL_TASK[name]: head(widths[name], name) for name in subtasks}


def predicted(
    heads: nn.ModuleDict, subtasks: Sequence[str], fused: Tensor, vectors: Mapping[str, Tensor]
) -> Prediction:
    """What Self-MM's heads (`layers.heads.Head`, keyed by task) say: M of the fused vector, each modality's task of its
    own vector; F* of each is its feature.

    Args:
        fused: (B, D). vectors: modality -> (B, D).
    """
    said = {"M": heads["M"](fused)}
    said |= {UNIMODAL_TASK[name]: heads[UNIMODAL_TASK[name]](vectors[name]) for name in subtasks}
    return Prediction(
        tasks={task: answer for task, (answer, _) in said.items()},
        features={task: feature for task, (_, feature) in said.items()},
    )


def multi_task_loss(
    subtasks: Sequence[str], prediction: Prediction, batch: Batch, targets: dict[str, Tensor]
) -> Losses:
    """mean |ŷ_m - y_m| + Σ_s mean( tanh|y_s - y_m| · |ŷ_s - y_s| ), the loss of Self-MM and its descendants."""
    parts = {"M": weighted_mean((prediction.tasks["M"] - targets["M"]).abs(), batch)}
    parts |= distance_weighted(subtasks, prediction, batch, targets)
    total = torch.stack(list(parts.values())).sum()
    return Losses(total, {name: part.detach() for name, part in parts.items()})
