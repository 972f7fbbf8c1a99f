"""In which order the samples of a split come: a pure function of their number in each shard, a seed and the epoch.

An order answers one question, which numbers stand at positions begin .. end - 1 of an epoch, at a cost that depends on
what is asked and not on the size of the data set. What is kept per shard is a few bytes in an array; per sample,
nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from math import gcd
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

BLOCKS = "blocks-1"
MIX = "mix-1"
"""Names of the algorithms, kept with every run: a changed algorithm needs a new name."""

IN_MIX = 1 << 31
"""Marks the random bits of a set in a mix, so that no two sets have the same."""

MOST_SHARES = 1 << 31
"""Greatest sum of a mix's shares: products of two stay below 2^62."""


class Order(Protocol):
    """The samples of a split in the order of one epoch."""

    @property
    def seed(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def num_samples(self) -> int: ...

    def between(self, begin: int, end: int) -> Numbers:
        """The numbers at positions begin .. end - 1 of the epoch."""

    def describe(self) -> dict[str, Any]:
        """What a reader of a run's ``plan.json`` wants to know."""


class Computed:
    """Base of frozen dataclasses with cached properties: what is computed from the fields does not travel."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class ShardOrder(Computed):
    """The split's shards shuffled and cut into *blocks* of at most `window`; the samples of a block shuffled together.

    So a rank needs the files of one block at a time (two, where a step straddles them), however large the data set is.
    Compares, hashes and pickles by its fields.

    Attributes:
        fingerprint: of the index.
        split: its name.
        first: number of the split's first sample.
        counts: samples in each shard of the split, in the index's order: `packed_counts`.
        seed: of the whole run, >= 0.
        epoch: >= 0; each epoch has an order of its own.
        window: shards that are shuffled together, at most.
        stream: set apart the random bits of orders that are otherwise alike.
    """

    fingerprint: str
    split: str
    first: int
    counts: bytes
    seed: int
    epoch: int
    window: int
    stream: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        return int(self._block_ends[-1])

    @property
    def num_shards(self) -> int:
        return len(self._counts)

    @property
    def num_blocks(self) -> int:
        return len(self._block_ends)

    def between(self, begin: int, end: int) -> Numbers:
        assert 0 <= begin < end <= self.num_samples, (begin, end, self.num_samples)
        block = int(np.searchsorted(self._block_ends, begin, side="right"))
        parts = []
        while begin < end:
            block_begin = int(self._block_ends[block - 1]) if block else 0
            block_end = min(end, int(self._block_ends[block]))
            parts.append(self._block(block)[begin - block_begin : block_end - block_begin])
            begin, block = block_end, block + 1
        return np.concatenate(parts)

    def describe(self) -> dict[str, Any]:
        return {
            "order": BLOCKS,
            "fingerprint": self.fingerprint,
            "split": self.split,
            "seed": self.seed,
            "window": self.window,
            "samples": self.num_samples,
            "shards": self.num_shards,
            "blocks": self.num_blocks,
        }

    @cached_property
    def _counts(self) -> NDArray[np.int32]:
        return np.frombuffer(self.counts, dtype="<i4")

    @cached_property
    def _begins(self) -> Numbers:
        """Number of the first sample of each shard, (shards,)."""
        ends = np.cumsum(self._counts, dtype=np.int64)
        ends += self.first
        ends -= self._counts
        return ends

    @cached_property
    def _shard_order(self) -> NDArray[np.int32]:
        return permutation(self.num_shards, self.seed, *self.stream, self.epoch).astype(np.int32)

    def _bound(self, block: int) -> int:
        """Block b holds the shards ``_shard_order[_bound(b):_bound(b + 1)]``: as many in each, within one."""
        return block * self.num_shards // -(-self.num_shards // self.window)

    @cached_property
    def _block_ends(self) -> Numbers:
        """Position in the epoch at which each block ends, (blocks,)."""
        blocks = -(-self.num_shards // self.window)
        bounds = np.arange(1, blocks + 1, dtype=np.int64) * self.num_shards // blocks
        return np.cumsum(self._counts[self._shard_order], dtype=np.int64)[bounds - 1]

    @cached_property
    def _block(self) -> Callable[[int], Numbers]:
        return lru_cache(maxsize=2)(self._shuffled)  # two: a step may straddle blocks

    def _shuffled(self, block: int) -> Numbers:
        """The numbers of the samples of one block, in the order of the epoch."""
        shards = self._shard_order[self._bound(block) : self._bound(block + 1)]
        begins, counts = self._begins[shards], self._counts[shards]
        numbers = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, counts, strict=True)])
        return numbers[permutation(len(numbers), self.seed, *self.stream, self.epoch, block)]


@dataclass(frozen=True)
class MixedOrder(Computed):
    """Several sets as one stream that never ends, cut into epochs of as many samples as the sets have together.

    Of the stream's first T samples set i has ``T * shares[i] / sum(shares)``, rounded: which set comes next is not
    drawn but dealt, as evenly as can be, so that any stretch of the stream has its share of every set (see `taken`).
    Its samples are those of its own orders, one epoch of it after the other: within each pass over a set every sample
    comes exactly once, and a pass may end in the middle of an epoch of the mix. Where the shares are the sets' sizes,
    passes and epochs end together, and every sample comes exactly once an epoch.

    Attributes:
        fingerprint: of the mix.
        parts: the order of each set, of any epoch, with the numbers that its samples have in the mix.
        shares: positive integers.
        seed: of the whole run.
        epoch: >= 1.
    """

    fingerprint: str
    parts: tuple[ShardOrder, ...]
    shares: tuple[int, ...]
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        assert self.epoch >= 1 and len(self.parts) == len(self.shares) and min(self.shares) > 0
        assert sum(self.shares) <= MOST_SHARES, self.shares

    @cached_property
    def num_samples(self) -> int:
        return sum(part.num_samples for part in self.parts)

    def between(self, begin: int, end: int) -> Numbers:
        assert 0 <= begin < end <= self.num_samples, (begin, end, self.num_samples)
        past = (self.epoch - 1) * self.num_samples
        taken = dealt(np.arange(past + begin, past + end + 1), self.shares)
        numbers = np.empty(end - begin, dtype=np.int64)
        for i, of_set in enumerate(taken):
            numbers[of_set[1:] > of_set[:-1]] = self._stream(i, int(of_set[0]), int(of_set[-1]))
        return numbers

    def describe(self) -> dict[str, Any]:
        return {
            "order": MIX,
            "fingerprint": self.fingerprint,
            "split": self.parts[0].split,
            "seed": self.seed,
            "window": self.parts[0].window,
            "samples": self.num_samples,
            "shards": sum(part.num_shards for part in self.parts),
            "shares": list(self.shares),
            "sets": [{**part.describe(), "passes_per_epoch": self._passes(i)} for i, part in enumerate(self.parts)],
        }

    def _passes(self, i: int) -> float:
        return round(self.num_samples * self.shares[i] / sum(self.shares) / self.parts[i].num_samples, 6)

    def _stream(self, i: int, begin: int, end: int) -> Numbers:
        """Samples begin .. end - 1 of all that set i gives over the whole training."""
        found = [np.empty(0, dtype=np.int64)]
        size = self.parts[i].num_samples
        while begin < end:
            turn, at = divmod(begin, size)
            until = min(size, at + end - begin)
            found.append(self._turn(i, turn).between(at, until))
            begin += until - at
        return np.concatenate(found)

    @cached_property
    def _turn(self) -> Callable[[int, int], ShardOrder]:
        """Pass `turn` over set i, from 0. Two are kept of each: a step may see the end of one and begin another."""
        return lru_cache(maxsize=2 * len(self.parts))(self._new_turn)

    def _new_turn(self, i: int, turn: int) -> ShardOrder:
        part = self.parts[i]
        return ShardOrder(
            part.fingerprint, part.split, part.first, part.counts, self.seed, turn + 1, part.window, (IN_MIX, i)
        )


def dealt(lengths: Numbers, shares: tuple[int, ...]) -> list[Numbers]:
    """How many of the first T samples of a stream each set has, for each T of `lengths`: (T,) per set.

    The first set takes ``T * share / sum``, rounded; the others deal out the rest among themselves in the same way. Of
    each further sample exactly one set has one more, and no set is ever ahead or behind by more than one sample (by
    more than half the number of sets, where these are more than three).
    """
    taken, rest = [], lengths
    for i in range(len(shares) - 1):
        mine, of = shares[i], sum(shares[i:])
        whole, part = np.divmod(rest, of)  # without this the product would not fit in 64 bits
        taken.append(whole * mine + (part * mine + of // 2) // of)
        rest = rest - taken[-1]
    return [*taken, rest]


def reduced(shares: Iterable[int]) -> tuple[int, ...]:
    """The same shares in the smallest integers."""
    shares = tuple(shares)
    common = gcd(*shares)
    return tuple(share // common for share in shares)


def packed_counts(counts: Iterable[int]) -> bytes:
    """Samples of each shard as 32-bit integers, little-endian: 4 bytes a shard, hashed and compared at once."""
    return np.fromiter(counts, dtype="<i4").tobytes()


def permutation(size: int, seed: int, *where: int) -> Numbers:
    """A permutation of 0 .. size - 1 that depends on the arguments only.

    Sorted raw bits instead of `Generator.permutation`: NumPy keeps the stream of a bit generator for ever, but may
    change what a Generator makes of it (NEP 19), and a run may be resumed under another version.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=where)).random_raw(size)
    return np.argsort(bits, kind="stable")
