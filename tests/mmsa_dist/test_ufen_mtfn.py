"""UFEN-MTFN against its equations, and its ablation switches."""

import re
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import from_dict
from mmsa_dist.systems import Prediction, UfenMtfn
from mmsa_dist.systems.ufen_mtfn import CrossModal, EncoderDecoder, Ufen, UfenLayer, UfenMtfnConfig, upsample
from shards.batch import Batch
from tests.mmsa_dist.batches import build, padded, ragged, spec_for, targets_of
from tests.mmsa_dist.test_layers import affine, softmax


def layer_norm(values: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    values = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + norm.eps)
    return values * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def attention(layer: Any, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    q, k, v = affine(layer.query, query), affine(layer.key, key), affine(layer.value, key)
    d = q.shape[-1] // layer.heads
    heads = [slice(h * d, (h + 1) * d) for h in range(layer.heads)]
    return affine(layer.out, np.concatenate([softmax(q[:, h] @ k[:, h].T / np.sqrt(d)) @ v[:, h] for h in heads], -1))


@pytest.mark.parametrize(("stride", "kernel", "length"), [(2, 3, 7), (2, 3, 6), (2, 3, 1), (1, 3, 5), (3, 5, 8)])
def test_a_layer_is_the_equation(stride: int, kernel: int, length: int) -> None:
    """Convolution with zeros beyond both ends, self-attention over its output, linear: on a padded batch."""
    torch.manual_seed(0)
    config = UfenMtfnConfig(width=6, heads=1, filters=5, kernel=kernel, conv_stride=stride)
    layer = UfenLayer(6, config)
    assert layer.conv is not None
    assert layer.attention is not None
    values = torch.randn(1, length + 4, 6)
    mask = torch.arange(length + 4)[None] < length
    output, out_mask, part = layer(values, mask)

    x = np.pad(values[0, :length].numpy(), ((kernel // 2, kernel // 2), (0, 0)))
    weight, bias = layer.conv.weight.detach().numpy(), layer.conv.bias.detach().numpy()  # (F, D, K)
    steps = range(0, length, stride)
    conv = np.stack([np.einsum("fdk,kd->f", weight, x[t : t + kernel]) + bias for t in steps])
    assert out_mask[0].tolist() == [True] * len(conv) + [False] * (out_mask.shape[1] - len(conv))
    np.testing.assert_allclose(output[0, : len(conv)].detach().numpy(), conv, atol=1e-5)
    q, k, v = (
        affine(layer.attention.query, conv),
        affine(layer.attention.key, conv),
        affine(layer.attention.value, conv),
    )
    seen = softmax(q @ k.T / np.sqrt(5)) @ v
    np.testing.assert_allclose(part[0, : len(conv)].detach().numpy(), affine(layer.up, seen), atol=1e-5)


def test_upsampling_repeats_each_step() -> None:
    values = torch.arange(3.0).view(1, 3, 1)
    assert upsample(values, 2, 5)[0, :, 0].tolist() == [0, 0, 1, 1, 2]
    assert upsample(values, 4, 9)[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert upsample(values, 1, 3) is values


@pytest.mark.parametrize(
    "values",
    [
        *({"layers": layers} for layers in (1, 2, 3, 4)),
        {"use_gru": False},
        {"use_conv": False},
        {"use_attention": False},
        {"use_conv": False, "use_attention": False},
        {"use_gru": False, "use_conv": False, "use_attention": False},
    ],
    ids=str,
)
def test_unimodal_features_are_the_sum_of_all_layers(values: dict[str, Any]) -> None:
    """X^fusion = X^GRU + each layer's part, up-sampled; with whatever ablation of table 9, and as deep as in table 7.

    Without the GRU the features are only projected; without convolution each layer attends over X^GRU and keeps its
    steps; without attention the convolution itself is up-sampled; without both nothing is added.
    """
    torch.manual_seed(0)
    config = UfenMtfnConfig(width=6, heads=1, filters=5, **values)
    branch = Ufen(4, config)
    steps, lengths = torch.randn(2, 7, 4), torch.tensor([7, 4])
    mask = torch.arange(7)[None] < lengths[:, None]
    if config.use_gru:
        assert branch.gru is not None
        below = branch.project(branch.gru.packed(steps, lengths))
    else:
        below = branch.project(steps)
    given, wanted = below, below.clone()
    for depth in range(config.layers if config.use_conv or config.use_attention else 0):
        layer: Any = branch.layers[depth]
        if config.use_conv:
            real = below.masked_fill(~mask[..., None], 0.0)
            below, mask = layer.conv(real.transpose(1, 2)).transpose(1, 2), mask[:, ::2]
        seen = layer.attention(below, mask) if config.use_attention else below
        stride = 2 ** (depth + 1) if config.use_conv else 1
        wanted = wanted + torch.stack([layer.up(seen)[:, t // stride] for t in range(7)], 1)
    if not config.use_conv:
        assert below is given
    found = branch(steps, lengths, torch.arange(7)[None] < lengths[:, None])
    for row, length in enumerate((7, 4)):
        torch.testing.assert_close(found[row, :length], wanted[row, :length], atol=1e-5, rtol=1e-5)


def test_cross_modal_attention_is_the_equation() -> None:
    torch.manual_seed(0)
    pair = CrossModal(8, 2)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    query_mask, key_mask = (
        torch.tensor([[True] * 3, [True, True, False]]),
        torch.tensor([[True] * 4, [True] + [False] * 3]),
    )
    out = pair(query, query_mask, key, key_mask, torch.tensor([True, True])).detach().numpy()
    for row, (n, m) in enumerate([(3, 4), (2, 1)]):
        found = layer_norm(attention(pair.attention, query[row, :n].numpy(), key[row, :m].numpy()), pair.norm)
        np.testing.assert_allclose(out[row], found.mean(0), atol=1e-5)
    alone = pair(query, query_mask, key, key_mask, torch.tensor([False, False])).detach().numpy()
    np.testing.assert_allclose(alone[0], layer_norm(query[0].numpy(), pair.norm).mean(0), atol=1e-5)


def decoded_from(codec: EncoderDecoder, x: np.ndarray) -> np.ndarray:
    """The encoder-decoder on one sample's tokens (P, d)."""
    norms: list[Any] = list(codec.norms)

    def forward(layers: nn.Sequential, values: np.ndarray) -> np.ndarray:
        return affine(layers[3], np.maximum(affine(layers[0], values), 0))

    encoded = layer_norm(x + attention(codec.encoder_attention, x, x), norms[0])
    encoded = layer_norm(encoded + forward(codec.encoder_feedforward, encoded), norms[1])
    decoded = layer_norm(x + attention(codec.decoder_attention, x, x), norms[2])
    decoded = layer_norm(decoded + attention(codec.memory_attention, decoded, encoded), norms[3])
    return layer_norm(decoded + forward(codec.decoder_feedforward, decoded), norms[4])


def test_encoder_decoder_is_the_equation() -> None:
    torch.manual_seed(0)
    codec = EncoderDecoder(UfenMtfnConfig(width=8, heads=2)).eval()
    tokens = torch.randn(1, 6, 8)
    found = codec(tokens, torch.ones(1, 6, dtype=torch.bool))[0].detach().numpy()
    np.testing.assert_allclose(found, decoded_from(codec, tokens[0].numpy()), atol=1e-5)


def fused_features(system: Any, batch: Batch) -> tuple[Prediction, list[dict[str, np.ndarray]]]:
    """What a system says, and X^fusion of each sample: modality -> (T, d), its real steps."""
    seen: dict[str, torch.Tensor] = {}
    for name, branch in {"text": system.text_branch, "audio": system.audio, "vision": system.vision}.items():
        branch.register_forward_hook(lambda module, given, out, name=name: seen.update({name: out.detach()}))
    prediction = system(batch)
    steps = {name: batch.lengths[name].tolist() for name in seen}
    return prediction, [{n: x[row, : steps[n][row]].numpy() for n, x in seen.items()} for row in range(batch.size)]


def test_a_unimodal_answer_is_linear_in_the_mean_over_real_steps() -> None:
    """Y_i = linear(mean of X^fusion), of a batch with anything in its padding."""
    system: Any = build(UfenMtfn, spec_for()).eval()
    prediction, fused = fused_features(system, padded(ragged(size=5), {"text": 2, "audio": 4, "vision": 3}, None))
    for row, features in enumerate(fused):
        for task, (name, x) in zip("TAV", features.items(), strict=True):
            wanted = affine(system.heads[name], x.sum(0) / len(x)).item()
            assert prediction.tasks[task][row].item() == pytest.approx(wanted, abs=1e-5), (task, row)


@pytest.mark.parametrize("values", [{}, {"cross_attention": False}, {"encoder_decoder": False}], ids=str)
def test_what_is_fused_is_every_ordered_pairs_cross_modal_attention(values: dict[str, Any]) -> None:
    """i asks j: mean of LN(attention(X_i, X_j)). Side by side they give Y_m, through the encoder-decoder Y_m'.

    Table 9: without cross-modal attention the means of X_i are fused; without the encoder-decoder Y_m is the answer.
    """
    system: Any = build(UfenMtfn, spec_for(), **values).eval()
    prediction, fused = fused_features(system, ragged(size=5))
    for row, x in enumerate(fused):
        if "cross_attention" in values:
            found = [features.mean(0) for features in x.values()]
        else:
            asked = {(i, j): system.pairs[f"{i}_{j}"] for i, j in permutations(x, 2)}
            found = [layer_norm(attention(p.attention, x[i], x[j]), p.norm).mean(0) for (i, j), p in asked.items()]
        tokens = np.stack(found)
        said = affine(system.fusion_head, tokens.ravel())
        if "encoder_decoder" in values:
            assert "F" not in prediction.tasks
            wanted = {"M": said}
        else:
            decoded = decoded_from(system.encoder_decoder, tokens)
            wanted = {"F": said, "M": affine(system.answer_head, decoded.ravel())}
        for task, value in wanted.items():
            assert prediction.tasks[task][row].item() == pytest.approx(value.item(), abs=1e-5), (task, row)


def test_the_answer_is_read_from_the_decoder_and_the_fusion_task_from_its_input() -> None:
    system = build(UfenMtfn, spec_for()).eval()
    assert system.encoder_decoder is not None
    seen: dict[str, torch.Tensor] = {}
    system.encoder_decoder.register_forward_hook(lambda module, given, out: seen.update(input=given[0], decoded=out))
    prediction = system(ragged())
    assert seen["input"].shape[1:] == (6, 32)  # six ordered pairs: (B, 6 d_m)
    torch.testing.assert_close(prediction.tasks["F"], system.fusion_head(seen["input"].flatten(1))[:, 0])
    torch.testing.assert_close(prediction.tasks["M"], system.answer_head(seen["decoded"].flatten(1))[:, 0])


def test_the_loss_is_the_sum_of_five_squared_errors_against_the_multimodal_label() -> None:
    batch = ragged(size=7, absent={"vision": [2]})
    system = build(UfenMtfn, spec_for())
    prediction, targets = system(batch), targets_of(batch)
    losses = system.loss(prediction, batch, targets)
    assert set(losses.parts) == {"M", "F", "T", "A", "V"}
    for task, part in losses.parts.items():
        squares = (prediction.tasks[task].detach() - targets["M"]).numpy() ** 2
        squares *= batch.present["vision"].numpy() if task == "V" else 1
        assert part.item() == pytest.approx(squares.sum() / 7, rel=1e-5)


def test_own_targets_train_the_unimodal_tasks_on_their_labels() -> None:
    batch = ragged(size=6, absent={"audio": [1]})
    batch.labels["T"][0] = torch.nan
    system = build(UfenMtfn, spec_for(), unimodal_targets="own")
    prediction, targets = system(batch), targets_of(batch)
    losses = system.loss(prediction, batch, targets)
    for task, left_out in {"T": 0, "A": 1}.items():
        squares = (prediction.tasks[task].detach() - targets[task]).numpy() ** 2
        squares[left_out] = 0
        assert losses.parts[task].item() == pytest.approx(squares.sum() / 6, rel=1e-5)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())


def test_own_targets_need_a_task_and_labels() -> None:
    batch = ragged(size=6)
    system = build(UfenMtfn, spec_for(tasks=("M",)), unimodal_targets="own")
    with pytest.raises(ConfigError, match="no labels for task T, and the data has none; choose a label generator"):
        system.loss(system(batch), batch, {"M": batch.labels["M"]})
    with pytest.raises(ConfigError, match="own needs a unimodal task"):
        build(UfenMtfn, spec_for(), unimodal_targets="own", multi_task=False)


def test_a_label_generator_reads_the_features_of_tasks_with_own_targets() -> None:
    batch = ragged(size=6, absent={"audio": [1]})
    system = build(UfenMtfn, spec_for(tasks=("M",)), unimodal_targets="own", subtasks=("text", "audio"))
    features = system(batch).features
    assert {task: feature.shape[1] for task, feature in features.items()} == {"M": 6 * 32, "T": 32, "A": 32}
    assert not features["A"][1].any()
    assert build(UfenMtfn, spec_for())(batch).features == {}


# Ablation switches -------------------------------------------------------------------------------------------------

BRANCH = r"(text_branch|audio|vision)\."
ABLATIONS: list[tuple[dict[str, Any], str, str]] = [
    # what is set, the terms of the loss, parameters that must be gone, and no other
    ({}, "MFTAV", ""),
    ({"subtasks": ("text", "vision")}, "MFTV", r"heads\.audio"),
    ({"subtasks": ()}, "MF", r"heads\."),
    ({"multi_task": False}, "M", r"heads\.|fusion_head"),
    ({"use_gru": False}, "MFTAV", BRANCH + "gru"),
    ({"use_conv": False}, "MFTAV", BRANCH + r"layers\.\d\.conv"),
    ({"use_attention": False}, "MFTAV", BRANCH + r"layers\.\d\.attention"),
    ({"use_conv": False, "use_attention": False}, "MFTAV", BRANCH + "layers"),
    ({"cross_attention": False}, "MFTAV", r"pairs\."),
    ({"encoder_decoder": False}, "MTAV", "encoder_decoder|answer_head"),
    ({"encoder_decoder": False, "multi_task": False}, "M", r"encoder_decoder|answer_head|heads\."),
    ({"layers": 1}, "MFTAV", BRANCH + r"layers\.[123]"),
    ({"layers": 2}, "MFTAV", BRANCH + r"layers\.[23]"),
    ({"layers": 3}, "MFTAV", BRANCH + r"layers\.3"),
    ({"layers": 4}, "MFTAV", ""),
]


@pytest.mark.parametrize(("values", "terms", "gone"), ABLATIONS, ids=[str(row[0]) for row in ABLATIONS])
def test_a_switch_does_what_it_says(values: dict[str, Any], terms: str, gone: str) -> None:
    """The part is gone, with its loss and its parameters; what is left learns, and padding is still nothing."""
    batch = ragged(size=12, longest=20)
    system = build(UfenMtfn, spec_for(), **values)
    deepest = 4 if "layers" in values else 2
    full = {name for name, _ in build(UfenMtfn, spec_for(), layers=deepest).named_parameters()}
    wanted = {name for name in full if gone and re.match(gone, name)}
    assert full - {name for name, _ in system.named_parameters()} == wanted
    assert bool(wanted) == bool(gone)
    losses = system.loss(system(batch), batch, targets_of(batch))
    assert set(losses.parts) == set(terms)
    losses.total.backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    more = padded(batch, {"text": 3, "audio": 5, "vision": 2}, None)
    torch.testing.assert_close(system(more).tasks["M"], system(batch).tasks["M"], atol=1e-6, rtol=0)


def test_one_modality_leaves_nothing_to_fuse() -> None:
    system = build(UfenMtfn, spec_for(["text"]))
    prediction = system(ragged(modalities=["text"]))
    assert set(prediction.tasks) == {"M", "T"}
    assert set(build(UfenMtfn, spec_for(["text", "audio"])).pairs) == {"text_audio", "audio_text"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 30, "heads": 4}, "width 30 must be divisible by heads 4"),
        ({"width": 7, "heads": 7}, "and by 2"),
        ({"kernel": 4}, "kernel 4 must be odd"),
        ({"layers": 5}, "less than or equal to 4"),
        ({"multi_task": False, "subtasks": ("text",)}, "multi_task is off"),
        ({"subtasks": ("txt",)}, "'text', 'audio' or 'vision'"),
    ],
)
def test_what_does_not_fit_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UfenMtfnConfig(**values)
    with pytest.raises(ConfigError) as caught:
        from_dict({"system": "ufen_mtfn", "model": values})
    assert "\n" not in str(caught.value)
