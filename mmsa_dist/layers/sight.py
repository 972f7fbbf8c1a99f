"""Which steps of one packed sequence see which of another, and how that is cut into tiles.

Shapes: B batch, L query steps of the longest sample, S key steps; N packed steps (`layers.packed`). A tile is `items`
blocks of at most `rows` queries, each with the first `keys` keys of its own sample.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmsa_dist.layers.packed import Steps

BLOCK = 1 << 15
"""Scores of an item, of one head, at most; and at least `ROWS` queries, whatever the keys."""
ROWS = 64
"""Fewer queries skip more of what a future mask hides, and are slower to multiply."""
TILE = 1 << 18
"""Scores of a tile, over all heads: about as many as stay in a cache while they are worked on."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Tile:
    """Blocks of queries of about equally many keys.

    Attributes:
        items, rows, keys: its shape.
        query, key: the packed steps: a slice of them where there is one item, else (items * rows,) and (items * keys,)
            numbers. A row beyond its item's last query has the number N, one past the end.
        hidden: (items, rows, k) float32, 0 where the last k keys are seen and -inf where not; None where all are.
    """

    items: int
    rows: int
    keys: int
    query: slice | Tensor
    key: slice | Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class Sight:
    """Every query sees the keys of its own sample.

    Attributes:
        query, key: the steps of both.
        future: whether a query sees no key of its future: query i, from 1, sees the first i + |S - L| keys of a sample
            with L queries and S keys. (Tsai et al.'s public code; with L = S the usual mask. The last query sees all.)
    """

    query: Steps
    key: Steps
    future: bool = False

    def __post_init__(self) -> None:
        assert not (self.future and self.key.mixed), "a query might be left without a key"

    @cached_property
    def blind(self) -> Tensor | None:
        """(N,) bool: queries whose sample has no real key; None where it is known that there are none."""
        there = self.key.there
        if there.device.type == "cpu" and bool(there.all()):
            return None
        return ~there[self.query.sample]

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, L, S) bool for a padded batch; no row is without a key."""
        device = self.key.sample.device
        length, size = (steps.lengths.to(device, non_blocking=True)[:, None] for steps in (self.query, self.key))
        row = torch.arange(self.query.longest, device=device)
        limit = torch.minimum(row + 1 + (size - length).abs(), size) if self.future else size.expand(-1, len(row))
        mask = torch.arange(self.key.longest, device=device) < limit[..., None]
        if self.key.visible is not None:
            mask = mask & self.key.unpack(self.key.visible)[:, None]
        return mask[:, None]

    def tiles(self, heads: int) -> list[Tile]:
        """All tiles, for as many heads. On the CPU only."""
        if heads not in self._tiles:
            self._tiles[heads] = self._cut(heads)
        return self._tiles[heads]

    @cached_property
    def _tiles(self) -> dict[int, list[Tile]]:
        return {}

    def _cut(self, heads: int) -> list[Tile]:
        blocks = Blocks.of(self.query.lengths.numpy(), self.key.lengths.numpy(), self.future)
        tiles, begin = [], 0
        for end in range(1, len(blocks.sample) + 1):  # blocks in ascending order of keys
            more = (end + 1 - begin) * blocks.most_rows(begin, end + 1) * blocks.keys[min(end, len(blocks.keys) - 1)]
            if end == len(blocks.sample) or more * heads > TILE:
                tiles.append(blocks.tile(begin, end, self.key.visible))
                begin = end
        return tiles


@dataclass(frozen=True)
class Blocks:
    """All blocks of queries in ascending order of keys; each attribute is (blocks,) but `length`, `size` (B,).

    Attributes:
        length, size: queries and keys of each sample.
        sample: of each block. begin, end: its queries, within the sample. keys: that its last query sees.
    """

    length: Numbers
    size: Numbers
    future: bool
    sample: Numbers
    begin: Numbers
    end: Numbers
    keys: Numbers

    @classmethod
    def of(cls, length: Numbers, size: Numbers, future: bool) -> "Blocks":
        """A sample's queries in as few blocks as `BLOCK` allows, of about equal size."""
        number = -(-length // np.maximum(BLOCK // size, ROWS))
        sample = np.arange(len(length)).repeat(number)
        nth = np.arange(len(sample)) - (number.cumsum() - number)[sample]
        begin, end = ((nth + more) * length[sample] // number[sample] for more in (0, 1))
        blocks = cls(length, size, future, sample, begin, end, end)
        keys = blocks._limit(sample, end - 1)
        order = keys.argsort(kind="stable")
        return cls(length, size, future, sample[order], begin[order], end[order], keys[order])

    def most_rows(self, begin: int, end: int) -> int:
        """Queries of the largest of some blocks."""
        return int((self.end[begin:end] - self.begin[begin:end]).max())

    def tile(self, begin: int, end: int, visible: Tensor | None) -> Tile:
        """Blocks `begin` to `end` as a tile."""
        sample, first, stop = self.sample[begin:end, None], self.begin[begin:end, None], self.end[begin:end, None]
        rows, keys = self.most_rows(begin, end), int(self.keys[begin:end].max())
        row = first + np.arange(rows)
        limit = self._limit(sample, np.minimum(row, stop - 1))  # (items, rows)
        least = keys if visible is None else 0
        seen = int(min(limit.min(), least))
        hidden = np.arange(seen, keys) >= limit[..., None]
        query_from, key_from = (np.append(0, steps.cumsum())[sample] for steps in (self.length, self.size))
        column = key_from + np.minimum(np.arange(keys), self.size[sample] - 1)
        if visible is not None:
            hidden |= ~visible.numpy()[column][:, None, seen:]
        if len(sample) == 1:
            query: slice | Tensor = slice((query_from + first).item(), (query_from + stop).item())
            key: slice | Tensor = slice(key_from.item(), key_from.item() + keys)
        else:
            query = torch.from_numpy(np.where(row < stop, query_from + row, self.length.sum()).reshape(-1))
            key = torch.from_numpy(column.reshape(-1))
        bias = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), -torch.inf) if hidden.any() else None
        return Tile(len(sample), rows, keys, query, key, bias)

    def _limit(self, sample: Numbers, row: Numbers) -> Numbers:
        """How many keys query `row` (from 0) of `sample` sees."""
        size = self.size[sample]
        if not self.future:
            return size + 0 * row
        return np.minimum(row + 1 + np.abs(size - self.length[sample]), size)
