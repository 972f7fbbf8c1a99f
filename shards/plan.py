"""Which samples form which batch: a pure function of the index, the split, the seed, the epoch and the batch size.

Nothing here reads data or knows of processes. So every rank computes the same plan by itself, a restart continues at
any step, and the order cannot depend on the number of ranks, of readers or on a restart.

The order of an epoch: the split's shards are shuffled and cut into *blocks* of at most `window` shards; the samples of
a block are shuffled together. A rank therefore needs the files of one block at a time (two, where a step straddles
them), however large the data set is, and a step costs the same at the beginning and at the end of an epoch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError

if TYPE_CHECKING:
    from shards.index import Index

Numbers = NDArray[np.int64]

ORDER = "blocks-1"
"""Name of the shuffling algorithm, kept with every run: a changed algorithm needs a new name."""


@dataclass(frozen=True)
class Plan:
    """The steps of one epoch. Compares, hashes and pickles by its fields. Made by `training_plan`.

    Attributes:
        fingerprint: of the index.
        split: its name.
        first: number of the split's first sample.
        counts: samples in each shard of the split, in the index's order.
        seed: of the whole run, >= 0.
        epoch: >= 0; each epoch has an order of its own.
        global_batch: samples per step, over all ranks and micro-batches.
        window: shards that are shuffled together, at most.
    """

    fingerprint: str
    split: str
    first: int
    counts: tuple[int, ...]
    seed: int
    epoch: int
    global_batch: int
    window: int

    @property
    def num_samples(self) -> int:
        return int(self._block_ends[-1])

    @property
    def num_steps(self) -> int:
        return -(-self.num_samples // self.global_batch)

    @property
    def num_blocks(self) -> int:
        return len(self._block_ends)

    def step(self, step: int) -> Numbers:
        """The numbers of the samples of the global batch of `step`: (global_batch,), fewer in the last step.

        Time and memory depend on the batch and on one block, not on `step` nor on the size of the data set.
        """
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        begin = step * self.global_batch
        end = min(begin + self.global_batch, self.num_samples)
        block = int(np.searchsorted(self._block_ends, begin, side="right"))
        parts = []
        while begin < end:
            block_begin = int(self._block_ends[block - 1]) if block else 0
            block_end = min(end, int(self._block_ends[block]))
            parts.append(self._block(block)[begin - block_begin : block_end - block_begin])
            begin, block = block_end, block + 1
        return np.concatenate(parts)

    def describe(self) -> dict[str, Any]:
        """What a reader of a run's ``plan.json`` wants to know: enough to make the plan of any epoch again."""
        return {
            "order": ORDER,
            "fingerprint": self.fingerprint,
            "split": self.split,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window": self.window,
            "samples": self.num_samples,
            "steps_per_epoch": self.num_steps,
            "shards": len(self.counts),
            "blocks": self.num_blocks,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without what is computed from them

    @cached_property
    def _counts(self) -> Numbers:
        return np.asarray(self.counts, dtype=np.int64)

    @cached_property
    def _begins(self) -> Numbers:
        """Number of the first sample of each shard, (shards,)."""
        return self.first + np.cumsum(self._counts) - self._counts

    @cached_property
    def _shard_order(self) -> Numbers:
        return _permutation(len(self.counts), self.seed, self.epoch)

    @cached_property
    def _bounds(self) -> Numbers:
        """Block b holds the shards ``_shard_order[_bounds[b]:_bounds[b + 1]]``: as many in each, within one."""
        shards = len(self.counts)
        blocks = -(-shards // self.window)
        return np.arange(blocks + 1, dtype=np.int64) * shards // blocks

    @cached_property
    def _block_ends(self) -> Numbers:
        """Position in the epoch at which each block ends, (blocks,)."""
        return np.cumsum(self._counts[self._shard_order])[self._bounds[1:] - 1]

    @cached_property
    def _block(self) -> Callable[[int], Numbers]:
        return lru_cache(maxsize=2)(self._shuffled)  # two: a step may straddle blocks

    def _shuffled(self, block: int) -> Numbers:
        """The numbers of the samples of one block, in the order of the epoch."""
        shards = self._shard_order[self._bounds[block] : self._bounds[block + 1]]
        begins, counts = self._begins[shards], self._counts[shards]
        numbers = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, counts, strict=True)])
        return numbers[_permutation(len(numbers), self.seed, self.epoch, block)]


def training_plan(index: "Index", split: str, seed: int, epoch: int, global_batch: int, window: int = 8) -> Plan:
    """The plan of one epoch over `split`; see `Plan` for the arguments.

    Raises:
        DataError: the split has no samples.
    """
    numbers = _numbers(index, split)
    assert seed >= 0 and epoch >= 0 and global_batch > 0 and window > 0, (seed, epoch, global_batch, window)
    counts = tuple(shard.samples for shard in index.shards if shard.split == split)
    assert sum(counts) == len(numbers), f"{split}: {sum(counts)} samples in shards, {len(numbers)} in the index"
    return Plan(index.fingerprint, split, numbers.start, counts, seed, epoch, global_batch, window)


@dataclass(frozen=True)
class Piece:
    """The samples that one rank puts through the system at once.

    Attributes:
        numbers: (B,) of the samples; filler repeats one of them.
        weight: (B,) float32, 1 for a sample and 0 for filler.
        norm: the weight of the global batch divided by (ranks x accumulation); see `Batch.norm`.
    """

    numbers: Numbers
    weight: NDArray[np.float32]
    norm: float


def share(numbers: Numbers, rank: int, world: int, accumulation: int = 1) -> list[Piece]:
    """One rank's `accumulation` micro-batches of a global batch.

    The global batch is filled up, with its first sample at weight 0, to a multiple of ranks x accumulation; rank r
    has the r-th contiguous slice. So all ranks have as many micro-batches of the same size, and the concatenation over
    ranks and micro-batches in order is the global batch, then filler.

    Args:
        numbers: (G,) of the global batch, G >= 1.
    """
    assert 0 <= rank < world and accumulation > 0 and len(numbers) > 0, (rank, world, accumulation, len(numbers))
    pieces = world * accumulation
    size = -(-len(numbers) // pieces)
    filled, weight = _filled(numbers, size * pieces)
    norm = len(numbers) / pieces
    begins = range(rank * accumulation * size, (rank + 1) * accumulation * size, size)
    return [Piece(filled[b : b + size], weight[b : b + size], norm) for b in begins]


@dataclass(frozen=True)
class EvaluationPlan:
    """Every sample of a split once, in the index's order. Made by `evaluation_plan`.

    Attributes:
        first, count: the split's numbers are first .. first + count - 1.
        batch: samples in a batch.
    """

    first: int
    count: int
    batch: int

    @property
    def num_batches(self) -> int:
        return -(-self.count // self.batch)

    def batches_for(self, rank: int, world: int) -> Iterator[Piece]:
        """The batches of one rank: batch ``i * world + rank`` of the split is its i-th.

        All ranks have as many, all of `batch` samples; filler has weight 0. What is in a batch does not depend on the
        number of ranks, so neither do predictions. Concatenating the i-th batches of all ranks gives the split's order.
        Its norm is the batch's own weight (1 where all is filler): ``loss * norm`` is the sum over its samples.
        """
        assert 0 <= rank < world, (rank, world)
        for turn in range(-(-self.num_batches // world)):
            begin = (turn * world + rank) * self.batch
            real = max(0, min(self.batch, self.count - begin))
            if real:
                numbers = np.arange(self.first + begin, self.first + begin + real)
            else:
                numbers = np.array([self.first])
            filled, weight = _filled(numbers, self.batch)
            weight[real:] = 0
            yield Piece(filled, weight, float(max(1, real)))


def evaluation_plan(index: "Index", split: str, batch: int) -> EvaluationPlan:
    """The evaluation of `split` in batches of `batch` samples (of the whole split, where that is smaller).

    Raises:
        DataError: the split has no samples.
    """
    assert batch > 0, batch
    numbers = _numbers(index, split)
    return EvaluationPlan(numbers.start, len(numbers), min(batch, len(numbers)))


def _numbers(index: "Index", split: str) -> range:
    numbers = index.numbers(split)
    if not numbers:
        held = ", ".join(f"{name} {count}" for name, count in index.splits.items() if count) or "nothing"
        raise DataError(
            f"{index.name}: split {split!r} has no samples (the data set holds: {held}); pack data that has some"
        )
    return numbers


def _filled(numbers: Numbers, size: int) -> tuple[Numbers, NDArray[np.float32]]:
    """`numbers`, then their first again up to `size`; and the weights, 1 and 0."""
    filler = size - len(numbers)
    weight = np.ones(size, dtype=np.float32)
    weight[len(numbers) :] = 0
    return np.concatenate([numbers, np.repeat(numbers[:1], filler)]), weight


def _permutation(size: int, seed: int, *where: int) -> Numbers:
    """A permutation of 0 .. size - 1 that depends on the arguments only.

    Sorted raw bits instead of `Generator.permutation`: NumPy keeps the stream of a bit generator for ever, but may
    change what a Generator makes of it (NEP 19), and a run may be resumed under another version.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=where)).random_raw(size)
    return np.argsort(bits, kind="stable")
