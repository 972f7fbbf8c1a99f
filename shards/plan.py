"""Which samples form which batch: a pure function of the index, the split, the seed, the epoch and the batch size.

Nothing here reads features or knows of processes. So every rank computes the same plan by itself, a restart continues
at any step, and the order cannot depend on the number of ranks, of readers or on a restart.

`shards.order` says in which order the samples of an epoch come; a plan cuts it into global batches, and may first sort
*pools* of a few batches by length, so that samples of a batch are alike and less of it is padding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.costs import CostRule, Costs
from shards.errors import DataError
from shards.index import Index
from shards.mix import Mix
from shards.order import Computed, Numbers, Order, ShardOrder, packed_counts, permutation

POOLS = "lengths-1"
"""Name of the sorting by length, kept with every run: a changed algorithm needs a new name."""

IN_POOL = (1 << 31) + 1
"""Marks the random bits that shuffle the batches of a pool."""


@dataclass(frozen=True)
class Plan(Computed):
    """The steps of one epoch. Compares, hashes and pickles by its fields, `costs` excepted. Made by `training_plan`.

    Attributes:
        order: of the samples.
        global_batch: samples per step, over all ranks and micro-batches.
        pool: global batches that are sorted by length together; 0 sorts nothing.
        rule: what counts as length; None where nothing is sorted.
        costs: looks it up in the index's tables. It does not travel: `Plan.on` gives a copied plan its tables back.
    """

    order: Order
    global_batch: int
    pool: int = 0
    rule: CostRule | None = None
    costs: Callable[[Numbers], NDArray[np.int64]] | None = field(default=None, compare=False, repr=False)

    @property
    def num_samples(self) -> int:
        return self.order.num_samples

    @property
    def num_steps(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def step(self, step: int) -> Numbers:
        """The numbers of the samples of the global batch of `step`: (global_batch,), fewer in the last step.

        Time and memory depend on the batch (or the pool) and on one block, not on `step` nor on the size of the data
        set. A plan that sorts by length reads tables of the shards it needs.

        Raises:
            DataError: such a table is missing or damaged.
        """
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        if self.pool:
            pool, step = divmod(step, self.pool)
            return self._pool(pool)[step * self.global_batch : (step + 1) * self.global_batch]
        begin = step * self.global_batch
        return self.order.between(begin, min(begin + self.global_batch, self.num_samples))

    def describe(self) -> dict[str, Any]:
        """What a reader of a run's ``plan.json`` wants to know: enough to make the plan of any epoch again."""
        about = self.order.describe()
        if self.rule is not None:
            about["order"] += f"+{POOLS}"
            about |= {"length_pool": self.pool, "length": self.rule.describe()}
        return {**about, "global_batch": self.global_batch, "steps_per_epoch": self.num_steps}

    def on(self, index: Index | Mix) -> "Plan":
        """The plan with the tables of `index` to look lengths up in, where it needs some."""
        return self if self.rule is None else replace(self, costs=Costs(index, self.rule))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "costs": None}

    @cached_property
    def _pool(self) -> Callable[[int], Numbers]:
        return lru_cache(maxsize=2)(self._sorted)  # two: readers may stand in different pools

    def _sorted(self, pool: int) -> Numbers:
        """The numbers of the samples of one pool, in the order of the epoch.

        Cut into batches after sorting (ties as they were shuffled), and these shuffled. What does not fill a batch, at
        the end of the epoch, is left out of it: the last batch would always have the longest.
        """
        assert self.costs is not None, "a plan that was copied needs its tables again: plan.on(index)"
        size = self.pool * self.global_batch
        numbers = self.order.between(pool * size, min((pool + 1) * size, self.num_samples))
        whole, rest = np.split(numbers, [len(numbers) // self.global_batch * self.global_batch])
        batches = whole[np.argsort(self.costs(whole), kind="stable")].reshape(-1, self.global_batch)
        batches = batches[permutation(len(batches), self.order.seed, IN_POOL, self.order.epoch, pool)]
        return np.concatenate([batches.ravel(), rest])


def training_plan(
    index: Index | Mix,
    split: str,
    seed: int,
    epoch: int,
    global_batch: int,
    window: int = 8,
    pool: int = 0,
    rule: CostRule | None = None,
) -> Plan:
    """The plan of one epoch over `split`; see `Plan` and `shards.order` for the arguments.

    Raises:
        DataError: the split has no samples.
    """
    numbers = _numbers(index, split)
    assert seed >= 0 and epoch >= 0 and global_batch > 0 and window > 0, (seed, epoch, global_batch, window)
    assert pool >= 0 and (rule is None) == (pool == 0), (pool, rule)
    order: Order
    if isinstance(index, Mix):
        order = index.order(split, seed, epoch, window)
    else:
        counts = packed_counts(shard.samples for shard in index.shards if shard.split == split)
        order = ShardOrder(index.fingerprint, split, numbers.start, counts, seed, epoch, window)
    assert order.num_samples == len(numbers), f"{split}: {order.num_samples} samples in shards, {len(numbers)} numbers"
    return Plan(order, global_batch, pool, rule).on(index)


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


def evaluation_plan(index: Index | Mix, split: str, batch: int) -> EvaluationPlan:
    """The evaluation of `split` in batches of `batch` samples (of the whole split, where that is smaller).

    Raises:
        DataError: the split has no samples.
    """
    assert batch > 0, batch
    numbers = _numbers(index, split)
    return EvaluationPlan(numbers.start, len(numbers), min(batch, len(numbers)))


def _numbers(index: Index | Mix, split: str) -> range:
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
