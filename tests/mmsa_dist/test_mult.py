"""MulT against its equations."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from mmsa_dist.layers.positions import sinusoids
from mmsa_dist.layers.sight import Sight
from mmsa_dist.layers.transformer import Dropouts, PackedAttention, Stack
from mmsa_dist.systems import DataSpec, MulT
from mmsa_dist.systems.mult import MulTConfig
from shards.utterance import EMOTIONS
from tests.mmsa_dist.batches import WIDTHS, build, make_batch, ragged, spec_for, targets_of
from tests.mmsa_dist.test_layers import affine, softmax
from tests.mmsa_dist.test_packed import steps

SMALL: dict[str, Any] = {"width": 8, "heads": 2, "layers": 1}


def layer_norm(values: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    values = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + norm.eps)
    return values * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def attention(layer: PackedAttention, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Multi-head attention without a mask, from the layer's weights."""
    q, (k, v) = affine(layer.query, query), np.split(affine(layer.key_value, key), 2, -1)
    d = q.shape[-1] // layer.heads
    heads = [slice(h * d, (h + 1) * d) for h in range(layer.heads)]
    return affine(layer.out, np.concatenate([softmax(q[:, h] @ k[:, h].T / np.sqrt(d)) @ v[:, h] for h in heads], -1))


def feedforward(layer: Any, values: np.ndarray) -> np.ndarray:
    return values + affine(layer.second, np.maximum(affine(layer.first, layer_norm(values, layer.norm)), 0))


def test_a_crossmodal_transformer_is_the_equations() -> None:
    """sqrt(d) x + positions; Z + CM(LN(Z), LN(source)), one head; Z + FFN(LN(Z)); the source as it was in both."""
    torch.manual_seed(0)
    stack = Stack(6, 1, 2, Dropouts())
    target, source = torch.randn(5, 6), torch.randn(4, 6)
    z, y = (x.numpy() * np.sqrt(6) + sinusoids(len(x), 6).numpy() for x in (target, source))
    for layer in stack.layers:
        z = z + attention(layer.attention, layer_norm(z, layer.norm), layer_norm(y, layer.norm))
        z = feedforward(layer.feedforward, z)
    found = stack(target, steps([5]), source, steps([4])).detach().numpy()
    np.testing.assert_allclose(found, layer_norm(z, stack.norm), atol=1e-5)


def test_an_absent_source_adds_nothing() -> None:
    torch.manual_seed(0)
    layer = PackedAttention(6, 2)
    nn.init.ones_(layer.out.bias)
    target, source = steps([2, 3]), steps([1, 4], absent=(0,))
    found = layer(torch.randn(5, 6), torch.randn(5, 6), Sight(target, source))
    assert not found[:2].any()
    assert found[2:].all()


def test_the_answer_is_made_of_every_modalitys_last_real_step() -> None:
    batch = make_batch({"text": [3, 5], "audio": [9, 2], "vision": [1, 6]})
    system = build(MulT, spec_for(), **SMALL).eval()
    seen: dict[str, torch.Tensor] = {}
    for name in WIDTHS:
        hook = lambda module, given, out, name=name: seen.update({name: out})  # noqa: E731
        system.memory[name].norm.register_forward_hook(hook)
    system.answer.register_forward_pre_hook(lambda module, given: seen.update(joint=given[0]))
    answer = system(batch).tasks["M"]
    torch.testing.assert_close(seen["joint"], torch.cat([seen[name] for name in WIDTHS], -1))
    assert seen["joint"].shape == (2, 3 * 2 * 8)
    out = system.answer
    vector = seen["joint"].detach().numpy()
    hidden = affine(out.second, np.maximum(affine(out.first, vector), 0))
    np.testing.assert_allclose(answer.detach().numpy(), affine(out.out, vector + hidden)[:, 0], atol=1e-5)


def test_an_absent_modality_leaves_zeros_in_the_last_vector() -> None:
    system = build(MulT, spec_for(), **SMALL).eval()
    seen: list[torch.Tensor] = []
    system.answer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    system(ragged(size=3, absent={"audio": [1]}))
    parts = seen[0].unflatten(-1, (3, -1))
    assert not parts[1, 1].any()
    assert parts[0].any(-1).all()
    assert parts[1, 0].any()


@pytest.mark.parametrize(
    ("modalities", "stacks", "width"),
    [
        (("text", "audio", "vision"), 6, 16),
        (("text", "vision"), 2, 8),
        (("audio",), 0, 8),
    ],
)
def test_as_many_transformers_as_ordered_pairs(modalities: tuple[str, ...], stacks: int, width: int) -> None:
    system = build(MulT, spec_for(modalities), **SMALL)
    assert len(system.crossmodal) == stacks
    assert set(system.memory) == set(modalities)
    assert system.memory[modalities[0]].norm.normalized_shape == (width,)


def test_depth_and_dropouts_go_where_they_are_said_to() -> None:
    system = MulT(MulTConfig(width=8, heads=2, layers=2), spec_for())
    assert [len(stack.layers) for stack in system.crossmodal.values()] == [2] * 6
    assert [len(stack.layers) for stack in system.memory.values()] == [3] * 3
    shares = {name: stack.layers[0].attention.dropout for name, stack in system.crossmodal.items()}
    assert {name: share for name, share in shares.items() if name.endswith("_text")} == {
        "audio_text": 0.3,
        "vision_text": 0.3,
    }
    assert shares["vision_audio"] == shares["text_audio"] == 0.2
    assert shares["text_vision"] == shares["audio_vision"] == 0.0
    assert {stack.layers[0].attention.dropout for stack in system.memory.values()} == {0.3}


def test_a_mask_hides_the_future_of_a_step() -> None:
    """With as many keys as queries, step 2 is not changed by key 3; without the mask it is."""
    torch.manual_seed(0)
    where, values, source = steps([4]), torch.randn(4, 8), torch.randn(4, 8)
    other = source.index_copy(0, torch.tensor([2]), torch.randn(1, 8))
    for future in (True, False):
        stack = Stack(8, 2, 2, Dropouts(), future=future)
        one, two = (stack(values, where, given, where) for given in (source, other))
        assert torch.equal(one[:2], two[:2]) is future
        assert not torch.allclose(one[2:], two[2:])


def emotions() -> DataSpec:
    return DataSpec(WIDTHS, (0.0, 1.0), EMOTIONS, classes=dict.fromkeys(EMOTIONS, 2))


def test_emotions_are_two_logits_each_and_their_cross_entropy() -> None:
    batch = ragged(size=7)
    system = build(MulT, emotions(), **SMALL)
    logits: list[torch.Tensor] = []
    system.answer.out.register_forward_hook(lambda module, given, out: logits.append(out.detach()))
    prediction = system(batch)
    assert tuple(prediction.tasks) == EMOTIONS
    targets = {name: torch.randint(2, (7,)).float() for name in EMOTIONS}
    targets["sad"][2] = torch.nan
    losses = system.loss(prediction, batch, targets)
    for number, name in enumerate(EMOTIONS):
        pair = logits[0].view(7, 4, 2)[:, number]
        torch.testing.assert_close(prediction.tasks[name], pair[:, 1] - pair[:, 0])
        entropy = F.cross_entropy(pair, targets[name].nan_to_num().long(), reduction="none")
        entropy[targets[name].isnan()] = 0
        assert losses.parts[name].item() == pytest.approx(entropy.sum().item() / 7 / 4, rel=1e-5)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in system.parameters())


def test_an_intensity_is_learned_by_its_distance() -> None:
    batch = ragged(size=5)
    system = build(MulT, spec_for(), **SMALL)
    prediction, targets = system(batch), targets_of(batch)
    losses = system.loss(prediction, batch, targets)
    assert set(losses.parts) == {"M"}
    wanted = (prediction.tasks["M"] - targets["M"]).abs().mean().item()
    assert losses.total.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 30, "heads": 4}, "width 30 must be divisible by heads 4"),
        ({"audio_kernel": 4}, "audio_kernel 4 must be odd"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"attention_dropout": 1.0}, "less than 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MulTConfig(**values)
