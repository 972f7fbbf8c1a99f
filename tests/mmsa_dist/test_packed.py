"""Packed sequences and their attention in tiles, against dense attention of one sample at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmsa_dist.layers import sight as sights
from mmsa_dist.layers.packed import Steps, join
from mmsa_dist.layers.positions import sinusoids
from mmsa_dist.layers.sight import Sight
from mmsa_dist.layers.tiles import Coins, attend_packed, attend_padded
from mmsa_dist.layers.transformer import Dropouts, Stack, StepProjection


def steps(lengths: list[int], absent: tuple[int, ...] = ()) -> Steps:
    there = torch.tensor([row not in absent for row in range(len(lengths))])
    return Steps.of(torch.tensor(lengths).where(there, 1), there)


def dense(query: Tensor, key: Tensor, value: Tensor, sight: Sight, heads: int) -> Tensor:
    """Sample by sample, head by head, with all scores written out."""
    out = []
    length, size = sight.query.lengths.tolist(), sight.key.lengths.tolist()
    shown = sight.key.visible if sight.key.visible is not None else torch.ones(sum(size), dtype=torch.bool)
    for q, k, v, seen in zip(query.split(length), key.split(size), value.split(size), shown.split(size), strict=True):
        reach = torch.arange(len(q))[:, None] + (abs(len(k) - len(q)) if sight.future else len(k))
        hidden = (torch.arange(len(k)) > reach) | ~seen
        parts = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        scores = [((a @ b.T / a.shape[1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1), c) for a, b, c in parts]
        out.append(torch.cat([weights @ c for weights, c in scores], -1))
    return torch.cat(out)


def both(way: object, inputs: list[Tensor], sight: Sight, heads: int, gradient: Tensor) -> list[Tensor]:
    out = way(*inputs, sight, heads)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


ragged_pairs = st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(
    ragged_pairs, st.booleans(), st.sampled_from([(1, 4), (2, 4), (3, 6)]), st.sampled_from([(64, 1 << 18), (3, 50)])
)
def test_attention_in_tiles_is_attention(
    lengths: list[tuple[int, int]], future: bool, shape: tuple[int, int], cut: tuple[int, int]
) -> None:
    """Outputs and gradients, in one tile of all and in many of few; padded, for PyTorch's kernels, too."""
    torch.manual_seed(0)
    heads, width = shape
    query, key = steps([a for a, _ in lengths]), steps([b for _, b in lengths])
    inputs = [torch.randn(len(s.sample), width, requires_grad=True) for s in (query, key, key)]
    gradient = torch.randn(len(query.sample), width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sights, "ROWS", cut[0])
        patch.setattr(sights, "BLOCK", 1)
        patch.setattr(sights, "TILE", cut[1])
        found = both(attend_packed, inputs, Sight(query, key, future), heads, gradient)
    wanted = both(dense, inputs, Sight(query, key, future), heads, gradient)
    padded = both(lambda *a: attend_padded(*a, 0.0), inputs, Sight(query, key, future), heads, gradient)
    for one, other, third in zip(found, wanted, padded, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(third, other, atol=2e-6, rtol=1e-5)


def test_the_last_query_sees_every_key_and_the_first_only_what_is_past() -> None:
    mask = Sight(steps([3, 4, 2]), steps([3, 2, 5]), future=True).mask[:, 0]
    assert mask[0, :3, :3].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert mask[1, :, :2].tolist() == [[True, True]] * 4
    assert mask[2, :2].tolist() == [[True] * 4 + [False], [True] * 5]


def test_joined_sequences_hide_what_stands_in_for_an_absent_modality() -> None:
    torch.manual_seed(0)
    text, audio = steps([2, 3, 1], absent=(2,)), steps([4, 1, 1], absent=(1, 2))
    hub, order = join([text, audio])
    values = torch.cat([torch.arange(6.0), 10 + torch.arange(6.0)])[order]
    assert values.tolist() == [0, 1, 10, 11, 12, 13, 2, 3, 4, 14, 5, 15]
    assert hub.lengths.tolist() == [6, 4, 2]
    assert hub.real.tolist() == [True] * 9 + [False] * 3
    assert hub.visible is not None
    assert hub.visible.tolist() == [True] * 9 + [False] + [True] * 2  # the last has nothing else to look at
    inputs = [torch.randn(12, 4, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(12, 4)
    for one, other in zip(
        *(both(way, inputs, Sight(hub, hub), 2, gradient) for way in (attend_packed, dense)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attend_padded(*inputs, Sight(hub, hub), 2, 0.0), dense(*inputs, Sight(hub, hub), 2))


def test_dropout_of_weights_takes_the_same_ones_out_of_the_gradient() -> None:
    """With the unit matrix as values the output is the weights themselves, and shows which were dropped."""
    torch.manual_seed(0)
    size, share = 24, 0.3
    sight = Sight(steps([90]), steps([size]))
    query, key = torch.randn(90, size, requires_grad=True), torch.randn(size, size, requires_grad=True)
    value = torch.eye(size, requires_grad=True)
    gradient = torch.randn(90, size)
    found = attend_packed(query, key, value, sight, 1, share)
    weights = (query @ key.T / size**0.5).softmax(-1)
    kept = found != 0
    assert abs(kept.float().mean().item() - (1 - share)) < 4 * (share * (1 - share) / kept.numel()) ** 0.5
    wanted = (weights * kept / (1 - Coins(0, share).lost)) @ value
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, (query, key, value), gradient),
        torch.autograd.grad(wanted, (query, key, value), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not torch.equal(attend_packed(query, key, value, sight, 1, share) != 0, kept), "the same coins twice"


def test_coins_are_fair_and_repeat_from_their_seed() -> None:
    coins, again = Coins(5, 0.2), Coins(5, 0.2)
    assert coins.lost == pytest.approx(0.2, abs=1e-5)
    first, second = coins.kept(torch.empty(300, 333)), coins.kept(torch.empty(300, 333))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert first.mean().item() == pytest.approx(0.8, abs=4 * 0.4 / first.numel() ** 0.5)
    assert (first * second).mean().item() == pytest.approx(0.64, abs=0.006)
    assert torch.equal(again.kept(torch.empty(300, 333)), first)


def test_no_score_outlives_its_tile() -> None:
    """Forward and backward of 3,000 x 3,000 scores, 36 MB a head, with dropout."""
    from torch.profiler import ProfilerActivity, profile

    one = steps([3000])
    inputs = [torch.randn(3000, 8, requires_grad=True) for _ in range(3)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attend_packed(*inputs, Sight(one, one), 1, 0.2).sum().backward()
    assert max(event.cpu_memory_usage for event in profiler.events()) < 4e6


def test_packing_and_back() -> None:
    where = steps([2, 1, 3])
    padded = torch.arange(18.0).view(3, 6, 1)
    packed = where.pack(padded)
    assert packed[:, 0].tolist() == [0, 1, 6, 12, 13, 14]
    assert where.unpack(packed)[..., 0].tolist() == [[0, 1, 0], [6, 0, 0], [12, 13, 14]]
    assert where.last.tolist() == [1, 2, 5]
    assert where.mean(packed)[:, 0].tolist() == [0.5, 6, 13]
    assert steps([2, 1, 3], absent=(1,)).mean(packed)[:, 0].tolist() == [0.5, 0, 13]


@pytest.mark.parametrize("width", [2, 7, 50])
def test_positions_are_sines_and_cosines_from_one(width: int) -> None:
    table, half = sinusoids(5, width).numpy(), width // 2
    for t in range(1, 6):
        for i in range(half):
            angle = t / 10_000 ** (i / max(half - 1, 1))
            np.testing.assert_allclose(table[t - 1, [i, half + i]], [np.sin(angle), np.cos(angle)], atol=1e-5)
    assert not table[:, 2 * half :].any()


def test_convolution_over_time_reads_zeros_beyond_a_samples_end() -> None:
    torch.manual_seed(0)
    layer = StepProjection(3, 4, 5)
    values, mask = torch.randn(1, 9, 3), torch.arange(9)[None] < 4
    out = layer(values, mask, torch.tensor([True]))
    x = np.pad(values[0, :4].numpy(), ((2, 2), (0, 0)))
    weight = layer.conv.weight.detach().numpy()
    wanted = np.stack([np.einsum("odk,kd->o", weight, x[t : t + 5]) for t in range(4)])
    np.testing.assert_allclose(out[0, :4].detach().numpy(), wanted, atol=1e-5)
    assert not layer(values, mask, torch.tensor([False])).any()


def test_the_last_step_alone_is_the_last_step_of_all() -> None:
    """Self-attention whose last layer is computed for one step a sample."""
    torch.manual_seed(0)
    stack, where = Stack(6, 2, 3, Dropouts(), future=True), steps([4, 1, 7])
    values = torch.randn(12, 6)
    embedded, sight = stack.embed(values, where), Sight(where, where, future=True)
    for layer in stack.layers:
        embedded = layer(embedded, None, sight)
    torch.testing.assert_close(stack.last(values, where), stack.norm(embedded)[where.last], atol=1e-6, rtol=1e-5)


def test_half_precision_goes_the_padded_way() -> None:
    torch.manual_seed(0)
    where = steps([4, 1, 7])
    inputs = [torch.randn(12, 6) for _ in range(3)]
    exact = attend_packed(*inputs, Sight(where, where), 2)
    near = attend_packed(*(x.bfloat16() for x in inputs), Sight(where, where), 2)
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), exact, atol=0.03, rtol=0.05)


def test_a_future_mask_beside_stand_ins_is_refused() -> None:
    with pytest.raises(AssertionError, match="without a key"):
        Sight(steps([2]), replace(steps([2]), mixed=True), future=True)
