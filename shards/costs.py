"""How much work a sample is, from the tables: what a plan sorts by that puts samples of like length into a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.order import Numbers

if TYPE_CHECKING:
    from shards.index import Index
    from shards.mix import Mix

KEPT = 64
"""Shards whose costs are remembered, 8 bytes a sample: a pool's, and its neighbour's."""


@dataclass(frozen=True)
class CostRule:
    """A sample's cost is the sum of columns of its shard's table, each times a factor.

    Attributes:
        columns: of `shards.tables.table_schema`, integers, with their factors.
    """

    columns: tuple[tuple[str, int], ...]

    def describe(self) -> dict[str, int]:
        return dict(self.columns)


class Costs:
    """Costs by sample number. Reads the tables of the shards that are asked for, and keeps a few."""

    def __init__(self, index: "Index | Mix", rule: CostRule) -> None:
        self._index, self._rule = index, rule

    def __call__(self, numbers: Numbers) -> NDArray[np.int64]:
        """The cost of each of `numbers`, same shape.

        Raises:
            DataError: a table is missing or damaged.
        """
        shards = np.searchsorted(self._firsts, numbers, side="right") - 1
        costs = np.empty(len(numbers), dtype=np.int64)
        for shard_no in np.unique(shards):
            here = shards == shard_no
            costs[here] = self._of_shard(int(shard_no))[numbers[here] - self._firsts[shard_no]]
        return costs

    @cached_property
    def _firsts(self) -> Numbers:
        return np.fromiter((self._index.first(n) for n in range(len(self._index.shards))), dtype=np.int64)

    @cached_property
    def _of_shard(self) -> Callable[[int], NDArray[np.int64]]:
        return lru_cache(maxsize=KEPT)(self._read)

    def _read(self, shard_no: int) -> NDArray[Any]:
        table = self._index.table(shard_no)
        columns = [factor * table[name].to_numpy().astype(np.int64) for name, factor in self._rule.columns]
        return np.sum(columns, axis=0)
