"""Batches and small systems without files, for tests of systems and layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mmsa_dist.config import Strict
from mmsa_dist.systems import DataSpec, System
from shards.batch import Batch, pad

WIDTHS = {"text": 7, "audio": 5, "vision": 4}
TASKS = ("M", "T", "A", "V")


def spec_for(modalities: Iterable[str] = tuple(WIDTHS), tasks: tuple[str, ...] = TASKS) -> DataSpec:
    return DataSpec({name: WIDTHS[name] for name in modalities}, (-3.0, 3.0), tasks)


def make_batch(
    lengths: Mapping[str, Sequence[int]],
    *,
    seed: int = 0,
    absent: Mapping[str, Sequence[int]] | None = None,
    vocabulary: int | None = None,
) -> Batch:
    """Random features of the given lengths, all weights one.

    Args:
        lengths: modality -> the steps of each sample.
        absent: modality -> samples that lack it.
        vocabulary: text is token ids below it, instead of features.
    """
    size = len(next(iter(lengths.values())))
    random = np.random.default_rng(seed)
    labels = {task: torch.from_numpy(random.uniform(-3, 3, size).astype(np.float32)) for task in TASKS}
    values: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    present: dict[str, Tensor] = {}
    for name, rows in lengths.items():
        lacking = set((absent or {}).get(name, ()))
        ids = name == "text" and vocabulary is not None
        arrays = [
            random.integers(1, vocabulary, n) if ids else random.normal(size=(n, WIDTHS[name])).astype(np.float32)
            for n in rows
        ]
        given = [None if row in lacking else array for row, array in enumerate(arrays)]
        values[name], steps[name], present[name] = pad(given, None if ids else WIDTHS[name])
    return Batch(
        values=values,
        lengths=steps,
        present=present,
        labels=labels,
        numbers=torch.arange(size),
        weight=torch.ones(size),
        norm=float(size),
        keys=[f"sample-{row}" for row in range(size)],
    )


def ragged(
    size: int = 6,
    longest: int = 9,
    *,
    modalities: Iterable[str] = tuple(WIDTHS),
    seed: int = 0,
    absent: Mapping[str, Sequence[int]] | None = None,
    vocabulary: int | None = None,
) -> Batch:
    """`make_batch` with random lengths from 1 to `longest`."""
    random = np.random.default_rng(seed + 1000)
    lengths = {name: random.integers(1, longest + 1, size).tolist() for name in modalities}
    return make_batch(lengths, seed=seed, absent=absent, vocabulary=vocabulary)


def padded(batch: Batch, extra: Mapping[str, int], fill: float | None = 0.0) -> Batch:
    """The same samples with more padding: zeros, or anything where `fill` is None."""
    values = dict(batch.values)
    for name, steps in extra.items():
        old = values[name]
        more = old.new_zeros(old.shape[0], steps, *old.shape[2:])
        values[name] = torch.cat([old, more], dim=1)
        if fill is None and old.is_floating_point():
            values[name] = torch.where(
                replace(batch, values=values).mask(name)[..., None], values[name], torch.randn_like(values[name]) * 10
            )
    return replace(batch, values=values)


def rows(batch: Batch, chosen: slice, norm: float) -> Batch:
    """Some of the samples, with another norm."""
    return Batch(
        values={name: tensor[chosen] for name, tensor in batch.values.items()},
        lengths={name: tensor[chosen] for name, tensor in batch.lengths.items()},
        present={name: tensor[chosen] for name, tensor in batch.present.items()},
        labels={name: tensor[chosen] for name, tensor in batch.labels.items()},
        numbers=batch.numbers[chosen],
        weight=batch.weight[chosen],
        norm=norm,
        keys=batch.keys[chosen],
    )


SMALL: dict[str, dict[str, Any]] = {"mult": {"layers": 1, "width": 20}, "pmr": {"layers": 1, "width": 20}}
"""System -> values in place of its defaults, where those are dozens of layers: what one does, all do."""


def build(cls: type[System], spec: DataSpec, *, seed: int = 0, dropout: bool = False, **values: Any) -> System:
    """A system from a seed, one of `SMALL` where it is there; without dropout unless asked."""
    torch.manual_seed(seed)
    off = {} if dropout else {name: 0.0 for name in cls.Config.model_fields if name.endswith("dropout")}
    return cls(cls.Config(**{**SMALL.get(cls.name, {}), **off, **values}), spec)


def targets_of(batch: Batch) -> dict[str, Tensor]:
    """Labels for every task, as a label generator on data with unimodal labels gives them."""
    return dict(batch.labels)


def alternatives(config: type[Strict], name: str) -> list[Any]:
    """Other values for a field, for tests that change it; the first that is valid is to be taken."""
    now = getattr(config(), name)
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, int):
        return [now * 2, now + 1, now + 2, now // 2]
    if isinstance(now, float):
        return [now + 0.3]
    if isinstance(now, str):
        return [value for value in get_args(config.model_fields[name].annotation) if value != now]
    assert now is None, f"{name}: say here how a {type(now).__name__} is changed"
    return [("text",)]


def loss_of(system: System, batch: Batch) -> Tensor:
    return system.loss(system(batch), batch, targets_of(batch)).total


def loss_of_step(system: System, batches: Sequence[Batch]) -> Tensor:
    """The loss of a step over several micro-batches, as the engine computes it (`Losses.within`)."""
    losses = [system.loss(system(batch), batch, targets_of(batch)) for batch in batches]
    means = [each.means for each in losses if each.means is not None]
    totals = [each.total if each.within is None else each.within(torch.stack(means).mean(0)).total for each in losses]
    return torch.stack(totals).mean()
