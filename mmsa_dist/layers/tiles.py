"""Attention over packed sequences; the fast way on a CPU, with dropout of the attention weights.

PyTorch's fused kernel for CPUs has no dropout: asked for one, `scaled_dot_product_attention` keeps the scores of the
whole batch several times over, and draws its random numbers one by one. It computes padding too, and what a future mask
hides.

`Tiled` is the same attention, forward and backward, over tiles of queries and keys (`layers.sight`) that stay in the
cache: no score outlives its tile, and none is computed for padding or for more of the future than a block's edge.
The backward pass computes the weights again from the scores and their logarithmic sums, as the fused kernels do
(Dao et al. 2022, section 3), and the dropout again from its seed.

Elsewhere (GPU, half precision) the sequences are padded and PyTorch's kernels do it.

Shapes: N packed query steps, M packed key steps, D width, h heads of d = D / h.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmsa_dist.layers.sight import Sight, Tile


def attend_packed(query: Tensor, key: Tensor, value: Tensor, sight: Sight, heads: int, dropout: float = 0.0) -> Tensor:
    """dropout(softmax(Q K^T / sqrt(d))) V of each head, over the keys that `sight` shows.

    Args:
        query: (N, D). key, value: (M, D).
        dropout: the share of weights that become zero; those that stay grow by 1 / (1 - share).

    Returns:
        (N, D).
    """
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return attend_padded(query, key, value, sight, heads, dropout)
    seen: Tensor = Tiled.apply(query, key, value, sight, heads, dropout)
    return seen


def attend_padded(query: Tensor, key: Tensor, value: Tensor, sight: Sight, heads: int, dropout: float) -> Tensor:
    """`attend_packed` by PyTorch, of a padded batch."""
    padded = (steps.unpack(x) for steps, x in ((sight.query, query), (sight.key, key), (sight.key, value)))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in padded)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, dropout_p=dropout)
    return sight.query.pack(seen.transpose(1, 2).flatten(2))


class Tiled(torch.autograd.Function):
    """`attend_packed` in tiles.

    Products are laid out so that their result is d high and as long as a tile, never as long and d wide: with few
    numbers a head the latter cost several times as much.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight, heads: int, dropout: float
    ) -> Tensor:
        tiles = sight.tiles(heads)
        query = _one_more(query * (query.shape[1] // heads) ** -0.5)
        out = torch.empty_like(query)
        seed = int(torch.randint(2**62, ())) if dropout else 0
        coins, space = Coins(seed, dropout), Space(tiles, heads)
        q, k, v, o = (_by_head(x, heads) for x in (query, key, value, out))
        for tile in tiles:
            weights = _weights(_take(q, tile.query, tile), _take(k, tile.key, tile), tile, space)
            if dropout:
                weights.mul_(coins.kept(space.of("coins", tile)))
            _put(o, tile.query, torch.bmm(_take(v, tile.key, tile), weights.mT), tile)
        seen = out[:-1].div_(1 - coins.lost) if dropout else out[:-1]
        ctx.save_for_backward(query, key, value, seen)
        ctx.rest = tiles, heads, seed, dropout
        return seen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, seen = ctx.saved_tensors
        tiles, heads, seed, dropout = ctx.rest
        coins, space = Coins(seed, dropout), Space(tiles, heads)
        # sum_j p_j dp_j of a row of weights p is dO · O, with dropout and without
        centre = _one_more((gradient * seen).unflatten(1, (heads, -1)).sum(-1))
        wanted = _one_more(gradient / (1 - coins.lost))
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        q, k, v, g, c = (_by_head(x, heads) for x in (query, key, value, wanted, centre))
        dq, dk, dv = (_by_head(x, heads) for x in (d_query, d_key, d_value))
        for tile in tiles:
            q_tile, k_tile, g_tile = _take(q, tile.query, tile), _take(k, tile.key, tile), _take(g, tile.query, tile)
            weights = kept = _weights(q_tile, k_tile, tile, space)
            slopes = torch.bmm(g_tile.mT, _take(v, tile.key, tile), out=space.of("slopes", tile))
            if dropout:
                coin = coins.kept(space.of("coins", tile))
                slopes.mul_(coin)
                kept = coin.mul_(weights)
            _add(dv, tile.key, torch.bmm(g_tile, kept), tile)
            slopes.sub_(_take(c, tile.query, tile).mT).mul_(weights)
            _put(dq, tile.query, torch.bmm(k_tile, slopes.mT), tile)
            _add(dk, tile.key, torch.bmm(q_tile, slopes), tile)
        return d_query[:-1].mul_((query.shape[1] // heads) ** -0.5), d_key, d_value, None, None, None


def _weights(query: Tensor, key: Tensor, tile: Tile, space: "Space") -> Tensor:
    """(h * items, rows, keys): softmax of Q' K where it is not hidden."""
    scores = torch.bmm(query.mT, key, out=space.of("weights", tile))
    if tile.hidden is not None:
        edge = tile.keys - tile.hidden.shape[-1]
        scores.view(-1, tile.items, tile.rows, tile.keys)[..., edge:].add_(tile.hidden)
    return torch.softmax(scores, -1, out=scores)


class Coins:
    """One coin a weight, from 16 random bits: PyTorch's own generator takes several times as long.

    Args:
        seed: the same seed gives the same coins.
        share: of the coins that are zero, rounded to 1 / 65,536.
    """

    def __init__(self, seed: int, share: float) -> None:
        self._limit = round(share * 65536)
        self.lost = self._limit / 65536
        """The share that they are zero with, exactly."""
        self._random = np.random.Generator(np.random.SFC64(seed)) if share else None

    def kept(self, out: Tensor) -> Tensor:
        """Fills `out`, float32 of any shape, with the next coins: 1 or 0."""
        assert self._random is not None
        bits = self._random.integers(0, 2**64 - 1, -(-out.numel() // 4), dtype=np.uint64, endpoint=True)
        coins = torch.from_numpy(bits.view(np.int16))[: out.numel()]
        return torch.ge(coins.view(out.shape), self._limit - 32768, out=out)


class Space:
    """Memory for one tile after another, whatever their shapes."""

    def __init__(self, tiles: list[Tile], heads: int) -> None:
        self._heads = heads
        self._largest = heads * max(tile.items * tile.rows * tile.keys for tile in tiles)
        self._parts: dict[str, Tensor] = {}

    def of(self, name: str, tile: Tile) -> Tensor:
        """(h * items, rows, keys), what was there before under this name."""
        if name not in self._parts:
            self._parts[name] = torch.empty(self._largest)
        shape = self._heads * tile.items, tile.rows, tile.keys
        return self._parts[name][: shape[0] * shape[1] * shape[2]].view(shape)


def _one_more(values: Tensor) -> Tensor:
    """(N, D) -> (N + 1, D): a row of zeros past the end, for the rows of a tile that are no query (`Tile`)."""
    return F.pad(values, (0, 0, 0, 1))


def _by_head(values: Tensor, heads: int) -> Tensor:
    """(N, D) -> (h, d, N), a view."""
    return values.view(values.shape[0], heads, -1).permute(1, 2, 0)


def _take(values: Tensor, steps: slice | Tensor, tile: Tile) -> Tensor:
    """(h, d, N) -> (h * items, d, steps of an item); a view where there is one item."""
    if isinstance(steps, slice):
        return values[..., steps]
    rows = _flat(values).index_select(0, steps).view(tile.items, -1, *values.shape[:2])
    return rows.permute(2, 0, 3, 1).flatten(0, 1)


def _put(values: Tensor, steps: slice | Tensor, columns: Tensor, tile: Tile) -> None:
    """The opposite of `_take`."""
    if isinstance(steps, slice):
        values[..., steps].copy_(columns)
    else:
        _flat(values).index_copy_(0, steps, _rows(columns, tile))


def _add(values: Tensor, steps: slice | Tensor, columns: Tensor, tile: Tile) -> None:
    """As `_put`, adding up."""
    if isinstance(steps, slice):
        values[..., steps].add_(columns)
    else:
        _flat(values).index_add_(0, steps, _rows(columns, tile))


def _flat(values: Tensor) -> Tensor:
    """(h, d, N), a view of (N, D) -> that."""
    return values.permute(2, 0, 1).flatten(1)


def _rows(columns: Tensor, tile: Tile) -> Tensor:
    """(h * items, d, steps) -> (items * steps, D)."""
    return columns.unflatten(0, (-1, tile.items)).permute(1, 3, 0, 2).flatten(0, 1).flatten(1)
