"""Law 1 behind a fine-tuned text encoder, under ZeRO-3: all ranks gather its weights together, whatever their texts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mmsa_dist.config import EngineConfig, GroupValues, OptimConfig
from mmsa_dist.systems import get_system
from shards.utterance import Utterance
from shards.write import pack
from tests.data import TinySource
from tests.mmsa_dist.batches import WIDTHS, build, ragged, rows, targets_of
from tests.mmsa_dist.encoders import WORDS, spec_of
from tests.mmsa_dist.test_laws import recipe_for, train

Encoders = Callable[..., Path]

SIZE = 12
OPTIM = OptimConfig(lr=GroupValues(text=1e-4, audio=1e-4, vision=1e-4, rest=1e-4))
SOME, RANK_1 = (1, 4, 8), range(SIZE // 2, SIZE)
"""Samples of every batch that have no text: some of each rank's, or all of rank 1's."""


def steps(encoder: Path, system: str, stage: int, silent: Sequence[int]) -> tuple[list[float], float]:
    """Losses of three steps on this rank, and how far the furthest weight of the encoder went (0 but on rank 0)."""
    from mmsa_dist.engine import Engine

    rank, world = dist.get_rank(), dist.get_world_size()
    own, share = slice(rank * SIZE // world, (rank + 1) * SIZE // world), SIZE / world
    built = build(get_system(system), spec_of(encoder, tuple(WIDTHS)))
    engine = Engine(built, OPTIM, EngineConfig(zero=stage), micro_batch=SIZE // world, total_steps=100)
    losses = []
    for step in range(3):
        whole = ragged(size=SIZE, seed=step, vocabulary=len(WORDS), absent={"text": silent})
        losses.append(engine.step([rows(whole, own, share)], lambda p, b: built.loss(p, b, targets_of(b))).loss)
    state = engine.state()
    engine.close()
    if state is None:
        return losses, 0.0
    began = load_file(encoder / "model.safetensors")
    ways = [
        (value.cpu() - began[name.removeprefix("text.model.")]).abs().max()
        for name, value in state.weights.items()
        if name.startswith("text.model.")
    ]
    return losses, float(torch.stack(ways).max())


def equal_at_two_ranks(ranks: Callable[..., Any], encoder: Path, system: str, silent: Sequence[int]) -> None:
    ((one, learned),) = ranks(steps, 1, encoder, system, 0, silent)
    assert learned > OPTIM.lr.text, "the encoder must learn"
    for losses, _ in ranks(steps, 2, encoder, system, 3, silent):
        assert losses == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("system", ["self_mm", "iam", "pmr"])
def test_two_ranks_equal_one_where_one_has_no_text_at_all(
    ranks: Callable[..., Any], encoders: Encoders, system: str
) -> None:
    """In parts, which are as many on both ranks."""
    equal_at_two_ranks(ranks, encoders("distilbert", dropout=0.0), system, RANK_1)


@pytest.mark.parametrize("silent", [SOME, RANK_1], ids=["some", "all of one rank"])
def test_two_ranks_equal_one_where_no_padding_is_computed(
    ranks: Callable[..., Any], encoders: Encoders, silent: Sequence[int]
) -> None:
    equal_at_two_ranks(ranks, encoders("bert", dropout=0.0), "self_mm", silent)


class Quiet(TinySource):
    """A third of the utterances has no transcript."""

    def read(self, split: str, number: int) -> Utterance:
        made = super().read(split, number)
        return replace(made, raw_text=None) if number % 3 == 0 else made


def test_a_whole_run_at_two_ranks_equals_one(ranks: Callable[..., Any], encoders: Encoders, tmp_path: Path) -> None:
    """Transcripts from shards, labels that are made in epoch 2 and learned in epoch 3, the best weights at the end."""
    source: Any = Quiet(108, 0.1)
    pack(source, tmp_path / "data", dtype="float32", shard_bytes=8_000)
    text = {"encoder": str(encoders("distilbert", dropout=0.0)), "max_tokens": 24}
    few = {"data": {"batch_size": 24}, "train": {"epochs": 3}}
    changes: dict[str, Any] = {**few, "text": text, "optim": {"lr": OPTIM.lr.model_dump()}}
    one = ranks(train, 1, tmp_path / "one", recipe_for("self_mm", tmp_path / "data", **changes).dump())[0]
    assert len(one["losses"]) == 9
    assert one["epochs"][2]["loss_T"] > 1e-3, "no step has learned from a generated label"
    staged = recipe_for("self_mm", tmp_path / "data", engine={"zero": 3}, **changes)
    for found in ranks(train, 2, tmp_path / "two", staged.dump()):
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-5)
        for name, value in one["labels"].items():
            assert torch.allclose(found["labels"][name].float(), value.float(), atol=1e-3), name
        for split in ("valid", "test"):
            assert found["result"][split]["mae"] == pytest.approx(one["result"][split]["mae"], abs=1e-5)
