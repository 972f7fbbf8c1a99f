"""The bricks against slow references: numpy from the equations, or PyTorch's own packed way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsa_dist.layers.attention import MultiHeadAttention, SelfAttention, attend
from mmsa_dist.layers.pooling import last_valid, masked_mean, zero_absent
from mmsa_dist.layers.recurrent import BiGRU, BiLSTM, LastStateLSTM, last_states, reverse


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def affine(layer: nn.Linear, values: np.ndarray) -> np.ndarray:
    out = values @ layer.weight.detach().numpy().T
    return out if layer.bias is None else out + layer.bias.detach().numpy()


def ragged(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = torch.randn(len(lengths), max(lengths), width)
    steps = torch.tensor(lengths)
    return values, steps, torch.arange(max(lengths))[None] < steps[:, None]


lengths_of_a_batch = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(lengths_of_a_batch, st.integers(1, 12), st.integers(1, 5))
def test_bigru_unpacked_is_bigru_packed(lengths: list[int], width: int, hidden: int) -> None:
    """The CPU's way against PyTorch's, which is the GPU's: values and all gradients."""
    torch.manual_seed(0)
    values, steps, mask = ragged(lengths, width)
    gru, gradient = BiGRU(width, hidden), torch.randn(*values.shape[:2], 2 * hidden) * mask[..., None]
    results = []
    for way in (gru.packed, gru.unpacked):
        gru.zero_grad()
        out = way(values, steps) * mask[..., None]
        out.backward(gradient)
        results.append([out.detach(), *(p.grad.clone() for p in gru.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + 8
    for packed, unpacked in zip(*results, strict=True):
        torch.testing.assert_close(unpacked, packed, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(lengths_of_a_batch, st.integers(1, 12), st.integers(1, 5))
def test_bilstm_unpacked_is_bilstm_packed(lengths: list[int], width: int, hidden: int) -> None:
    """As for the GRU; and its ends are what PyTorch calls the last states."""
    torch.manual_seed(0)
    values, steps, mask = ragged(lengths, width)
    lstm, gradient = BiLSTM(width, hidden), torch.randn(*values.shape[:2], 2 * hidden) * mask[..., None]
    results = []
    for way in (lstm.packed, lstm.unpacked):
        lstm.zero_grad()
        out = way(values, steps) * mask[..., None]
        out.backward(gradient)
        results.append([out.detach(), *(p.grad.clone() for p in lstm.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + 8
    for packed, unpacked in zip(*results, strict=True):
        torch.testing.assert_close(unpacked, packed, atol=1e-5, rtol=1e-4)
    for row, length in enumerate(lengths):
        last = nn.LSTM.forward(lstm, values[row : row + 1, :length])[1][0]  # (2, 1, H), by direction
        found = last_states(lstm(values, steps), steps)[row]
        torch.testing.assert_close(found, last[:, 0].flatten(), atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(lengths_of_a_batch, st.integers(1, 2))
def test_last_state_is_the_packed_lstms(lengths: list[int], layers: int) -> None:
    torch.manual_seed(0)
    values, steps, _ = ragged(lengths, 4)
    lstm = LastStateLSTM(4, 6, layers)
    torch.testing.assert_close(lstm(values, steps), lstm.packed(values, steps), atol=1e-6, rtol=1e-5)


def test_reverse_turns_each_sequence_within_its_length() -> None:
    values = torch.arange(1.0, 9.0).view(2, 4, 1)
    turned = reverse(values, torch.tensor([4, 2]))[..., 0]
    assert turned[0].tolist() == [4, 3, 2, 1]
    assert turned[1, :2].tolist() == [6, 5]


def test_self_attention_is_the_equation() -> None:
    """softmax(Q K^T / sqrt(d)) V, per sample over its real steps alone."""
    torch.manual_seed(0)
    lengths = [5, 1, 3]
    values, _, mask = ragged(lengths, 4)
    layer = SelfAttention(4, 6)
    out = layer(values, mask).detach().numpy()
    for row, length in enumerate(lengths):
        x = values[row, :length].numpy()
        q, k, v = affine(layer.query, x), affine(layer.key, x), affine(layer.value, x)
        np.testing.assert_allclose(out[row, :length], softmax(q @ k.T / np.sqrt(6)) @ v, atol=1e-6)


def test_multi_head_attention_is_the_equation() -> None:
    """Heads side by side, concatenated, projected."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    layer = MultiHeadAttention(8, 2)
    out = layer(query, key, mask).detach().numpy()
    for row, length in enumerate((5, 2)):
        q = affine(layer.query, query[row].numpy())
        k, v = (affine(part, key[row, :length].numpy()) for part in (layer.key, layer.value))
        heads = [softmax(q[:, h] @ k[:, h].T / np.sqrt(4)) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
        np.testing.assert_allclose(out[row], affine(layer.out, np.concatenate(heads, -1)), atol=1e-6)


def test_attention_never_materialises_its_scores() -> None:
    """Peak memory of 4,000 x 4,000 scores would be 64 MB a head; the fused kernel keeps a row block."""
    from torch.profiler import ProfilerActivity, profile

    query = torch.randn(1, 1, 4000, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attend(query, query, query, torch.ones(1, 4000, dtype=torch.bool))
    largest = max(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert largest < 8e6


def test_pooling() -> None:
    values = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [7.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert masked_mean(values, mask)[:, 0].tolist() == [2, 7]
    assert masked_mean(values, torch.zeros_like(mask)).tolist() == [[0], [0]]
    assert last_valid(values, torch.tensor([2, 3]))[:, 0].tolist() == [3, 9]
    assert zero_absent(values, torch.tensor([False, True]))[:, 0, 0].tolist() == [0, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("layer", [BiGRU, BiLSTM])
def test_both_directions_on_a_gpu_are_the_cpus(layer: type[BiGRU | BiLSTM]) -> None:
    values, steps, mask = ragged([5, 9, 1], 4)
    recurrent = layer(4, 6)
    wanted = recurrent(values, steps) * mask[..., None]
    found = recurrent.cuda()(values.cuda(), steps).cpu() * mask[..., None]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
