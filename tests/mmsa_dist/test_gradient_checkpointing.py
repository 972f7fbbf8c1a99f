"""Layers of the text encoder that are computed once more in the backward pass: the same numbers, from less memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mmsa_dist.config import EngineConfig, GroupValues, OptimConfig, TextConfig
from mmsa_dist.errors import ConfigError
from mmsa_dist.layers.hub import check_checkpointing
from mmsa_dist.layers.text import TextEncoder
from mmsa_dist.recipe import differences, load_recipe
from mmsa_dist.session import without_effect
from mmsa_dist.systems import SelfMM
from shards.index import Index
from tests.data import packed
from tests.mmsa_dist.batches import WIDTHS, build, ragged, rows, targets_of
from tests.mmsa_dist.encoders import ARCHITECTURES, WORDS, spec_of
from tests.mmsa_dist.zero3 import as_if_large

Encoders = Callable[..., Path]

SIZE = 8


def reader(encoder: Path, checkpointed: bool) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextConfig(encoder=str(encoder), gradient_checkpointing=checkpointed)).train()


def one_pass(read: TextEncoder, way: str) -> tuple[Tensor, dict[str, Tensor], float]:
    """States and gradients of a batch, with dropout, and the first number that is drawn afterwards."""
    batch = ragged(size=SIZE, modalities=["text"], vocabulary=len(WORDS))
    torch.manual_seed(1)
    if way == "padded":  # as on a GPU
        ids, mask = batch.values["text"], batch.mask("text")
        states = read.model(input_ids=ids, attention_mask=mask).last_hidden_state
    else:
        states = read(batch)
    weight = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(2))
    (states @ weight).tanh().sum().backward()
    drawn = torch.rand(()).item()
    return states.detach(), {name: p.grad for name, p in read.named_parameters() if p.grad is not None}, drawn


@pytest.mark.parametrize("way", ["ours", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_the_same_to_the_bit(architecture: str, way: str, encoders: Encoders) -> None:
    """Dropout among them: it is drawn as it was, and nothing after it is drawn otherwise."""
    folder = encoders(architecture, 0.3)
    plain, again = (one_pass(reader(folder, checkpointed), way) for checkpointed in (False, True))
    assert torch.equal(plain[0], again[0])
    assert plain[1].keys() == again[1].keys() and len(plain[1]) > 20
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in plain[1].items())
    assert plain[2] == again[2]


def kept(read: TextEncoder) -> int:
    """Bytes that autograd keeps of a forward pass, each memory once, weights aside."""
    batch = ragged(size=SIZE, longest=40, modalities=["text"], vocabulary=len(WORDS))
    weights = {p.untyped_storage().data_ptr() for p in read.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            found[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        read(batch).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


SHAPES: dict[str, tuple[str, str, dict[str, int]]] = {
    "bert": (
        "BertConfig",
        "num_hidden_layers",
        {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256},
    ),
    "distilbert": ("DistilBertConfig", "n_layers", {"dim": 64, "n_heads": 4, "hidden_dim": 256}),
}


def kept_a_layer(architecture: str, checkpointed: bool, folder: Path) -> float:
    """The difference that four layers more make, over four."""
    kind, depth, shape = SHAPES[architecture]
    held = []
    for layers in (2, 6):
        config = getattr(transformers, kind)(vocab_size=len(WORDS), **shape, **{depth: layers})
        config.save_pretrained(folder / f"{layers}")
        text = TextConfig(encoder=str(folder / f"{layers}"), pretrained=False, gradient_checkpointing=checkpointed)
        held.append(kept(TextEncoder(text).train()))
    return (held[1] - held[0]) / 4


def test_a_layer_keeps_its_input_alone(tmp_path: Path) -> None:
    """64 float32 a token; where it keeps everything, thirty times that."""
    tokens = int(ragged(size=SIZE, longest=40, modalities=["text"], vocabulary=len(WORDS)).lengths["text"].sum())
    assert kept_a_layer("bert", True, tmp_path) == tokens * 64 * 4
    assert kept_a_layer("bert", False, tmp_path) > 30 * tokens * 64 * 4


def test_a_layer_keeps_less_where_a_batch_is_taken_in_parts(tmp_path: Path) -> None:
    assert kept_a_layer("distilbert", True, tmp_path) < kept_a_layer("distilbert", False, tmp_path) / 15


OPTIM = OptimConfig(lr=GroupValues(text=1e-3, audio=1e-3, vision=1e-3, rest=1e-3), accumulation=2)


def losses(encoder: Path, stage: int, checkpointed: bool) -> list[float]:
    """Of five steps of two micro-batches with dropout; at stage 3 nothing stays gathered but what is at work."""
    from mmsa_dist.engine import Engine

    rank, world = dist.get_rank(), dist.get_world_size()
    size = SIZE // world // 2
    built = build(SelfMM, spec_of(encoder, tuple(WIDTHS), gradient_checkpointing=checkpointed))
    assert any(getattr(m, "gradient_checkpointing", False) for m in built.modules()) == checkpointed
    with as_if_large():
        engine = Engine(built, OPTIM, EngineConfig(zero=stage), micro_batch=size, total_steps=100)  # type: ignore[arg-type]
    found = []
    for step in range(5):
        whole = ragged(size=SIZE, seed=step, vocabulary=len(WORDS), absent={"text": [1]})
        parts = [slice(n * size, (n + 1) * size) for n in (2 * rank, 2 * rank + 1)]
        torch.manual_seed(100 * step + rank)
        batches = [rows(whole, part, SIZE / world / 2) for part in parts]
        found.append(engine.step(batches, lambda p, b: built.loss(p, b, targets_of(b))).loss)
    engine.close()
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_learn_the_same_at_every_stage(
    ranks: Callable[..., Any], encoders: Encoders, stage: int, world: int
) -> None:
    """DeepSpeed's hooks see a layer's parts twice."""
    for architecture in ("bert", "distilbert"):
        folder = encoders(architecture, 0.3)
        plain, again = (ranks(losses, world, folder, stage, checkpointed) for checkpointed in (False, True))
        assert plain == again and len(set(plain[0])) == 5, architecture


def test_an_architecture_that_cannot_is_refused(tmp_path: Path) -> None:
    transformers.AlbertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"text.gradient_checkpointing: .* \(albert\) cannot .* --optim.accumulation"):
        check_checkpointing(str(tmp_path))


def test_a_frozen_encoder_keeps_nothing_and_that_is_said(encoders: Encoders, tmp_path: Path) -> None:
    data = str(packed(tmp_path / "data", samples=20))
    words = ["--data", data, "--text.gradient-checkpointing"]
    index, encoder = Index.load(Path(data)), ["--text.encoder", str(encoders("bert"))]
    assert without_effect(load_recipe("self_mm", None, [*words, *encoder]), index) == []
    frozen = load_recipe("self_mm", None, [*words, *encoder, "--text.no-finetune"])
    assert without_effect(frozen, index) == [
        "text.gradient_checkpointing is without effect: the text encoder is frozen"
    ]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in TextEncoder(frozen.text).modules())
    said = "text.gradient_checkpointing is without effect: no text encoder reads the text"
    assert said in without_effect(load_recipe("self_mm", None, words), index)


def test_a_run_may_go_on_with_it() -> None:
    """As after one that did not fit."""
    plain, again = (load_recipe("self_mm", None, words) for words in ([], ["--text.gradient-checkpointing"]))
    assert plain != again and differences(plain, again) == []
