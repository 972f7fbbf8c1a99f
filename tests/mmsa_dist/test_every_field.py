"""Law 5 for a recipe's optimizer, text and labels: whatever is set there changes what is learned.

`test_systems` says it of every system's own hyper-parameters.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from mmsa_dist.config import RatesFrom, Strict
from mmsa_dist.recipe import Recipe, from_dict
from shards.utterance import Utterance
from shards.write import pack
from tests.data import TinySource

CHANGES: dict[str, list[Any]] = {
    "optim.name": ["adam"],
    "optim.lr.text": [2e-3],
    "optim.lr.audio": [2e-3],
    "optim.lr.vision": [2e-3],
    "optim.lr.rest": [2e-3],
    "optim.lr_from": [(RatesFrom(epoch=2, text=2e-3, audio=2e-3, vision=2e-3, rest=2e-3),)],
    "optim.weight_decay.text": [0.9],
    "optim.weight_decay.audio": [0.9],
    "optim.weight_decay.vision": [0.9],
    "optim.weight_decay.rest": [0.9],
    "optim.betas": [(0.5, 0.999), (0.9, 0.5)],
    "optim.eps": [1e-3],
    "optim.schedule": ["linear", "cosine"],
    "optim.warmup": [0.5],
    "optim.clip": [0.01],
    "text.encoder": [None],
    "text.input": ["tokens"],
    "text.finetune": [False],
    "text.pretrained": [False],
    "text.max_tokens": [4],
    "labels.generator": ["sugrm", "multimodal"],
    "labels.zero_is_positive": [True],
    "labels.options": [],  # of third parties' label generators: `test_label_options`
}
"""Field -> other values, each of which must make a difference. A new field of the schema belongs here."""

CHANGES_NOTHING: dict[str, tuple[Any, str]] = {
    "optim.accumulation": (2, "law 1: the global batch and so the step stay the same"),
    "text.gradient_checkpointing": (True, "what a backward pass needs is computed once more, to the same numbers"),
    "labels.divide_above": (0.0, "where the label state lies; the labels are the same"),
}
"""Field -> another value and why, by design, it makes no difference."""


class Worded(TinySource):
    """Whole numbers for labels, zero among them, and token ids that are not those of the transcript."""

    has_tokens = True

    def read(self, split: str, number: int) -> Utterance:
        made = super().read(split, number)
        tokens = np.random.default_rng(number).integers(5, 10, 6).astype(np.int32)
        return replace(made, labels={"M": float(round(made.labels["M"]))}, tokens=tokens)


def fields(config: type[Strict], prefix: str) -> Iterator[str]:
    """Dotted names of all fields of a part of the recipe, as deep as it goes."""
    for name, field in config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Strict):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def part(name: str) -> type[Strict]:
    kind = Recipe.model_fields[name].annotation
    assert isinstance(kind, type) and issubclass(kind, Strict)
    return kind


def test_every_field_has_its_case() -> None:
    schema = {field for name in ("optim", "text", "labels") for field in fields(part(name), f"{name}.")}
    assert schema == CHANGES.keys() | CHANGES_NOTHING.keys()
    assert not CHANGES.keys() & CHANGES_NOTHING.keys()


def losses(folder: Path, recipe: dict[str, Any]) -> list[float]:
    """Of all steps of a run: what is learned, without evaluation and checkpoints."""
    from mmsa_dist.loop import read_epoch, seed_step
    from mmsa_dist.session import open_session

    session = open_session(from_dict(recipe), folder, dist.get_rank(), dist.get_world_size())
    found = []
    for epoch in range(1, session.recipe.train.epochs + 1):
        session.engine.begin_epoch(epoch)
        for batches in read_epoch(session, epoch)[1]:
            seed_step(session.recipe.seed, session.engine.steps, session.rank)
            step = session.engine.step(batches, lambda p, b: session.system.loss(p, b, session.generator.targets(b, p)))
            session.generator.observe(epoch, batches, step.predictions)
            found.append(step.loss)
        session.generator.end_epoch()
    session.close()
    return found


@pytest.fixture(scope="module")
def run(
    ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, encoders: Callable[..., Path]
) -> Callable[..., list[float]]:
    """The losses of a run with one field of its recipe changed, or with none."""
    folder = tmp_path_factory.mktemp("fields")
    pack(Worded(80, absent=0.1), folder / "data", dtype="float32")

    @cache
    def run(field: str | None = None, value: Any = None) -> list[float]:
        groups = ("text", "audio", "vision", "rest")
        recipe: dict[str, Any] = {
            "system": "self_mm",
            "seed": 3,
            "data": {"path": str(folder / "data"), "batch_size": 24, "readers": 0},
            "text": {"encoder": str(encoders("bert", 0.0)), "max_tokens": 24},
            "optim": {"lr": dict.fromkeys(groups, 1e-3), "weight_decay": dict.fromkeys(groups, 0.01)},
            "train": {"epochs": 3},  # generated labels are learned from in the third
            "tracking": {"enabled": False},
            "model": {f"post_{name}_dropout": 0.0 for name in ("text", "audio")},
        }
        if field is not None:
            *path, last = field.split(".")
            inner = recipe
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = value
        found: list[float] = ranks(losses, 1, folder, recipe)[0]
        return found

    return run


def apart(some: list[float], others: list[float]) -> float:
    assert len(some) == len(others) and all(map(math.isfinite, some))
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in CHANGES.items() for value in values])
def test_every_field_changes_what_is_learned(run: Callable[..., list[float]], field: str, value: Any) -> None:
    """By more than the rounding that law 1 allows."""
    assert apart(run(field, value), run()) > 1e-5


@pytest.mark.parametrize("field", CHANGES_NOTHING)
def test_what_by_design_changes_nothing_does_not(run: Callable[..., list[float]], field: str) -> None:
    value, why = CHANGES_NOTHING[field]
    assert apart(run(field, value), run()) <= 1e-5, why


def test_a_run_is_repeatable(run: Callable[..., list[float]]) -> None:
    """So no difference above comes of itself."""
    assert run("seed", 3) == run()
