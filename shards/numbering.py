"""Numbers of samples: 0..N-1 over the shards in their order, so that a split is a contiguous range."""

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from shards.errors import DataError
from shards.suggest import nearest
from shards.utterance import SPLITS

if TYPE_CHECKING:
    from shards.index import Shard


class Numbered:
    """Whatever has `shards`, of which those of a split follow one another."""

    if TYPE_CHECKING:
        shards: tuple[Shard, ...]

    @cached_property
    def _firsts(self) -> list[int]:
        return list(accumulate((shard.samples for shard in self.shards), initial=0))

    @property
    def num_samples(self) -> int:
        return self._firsts[-1]

    def first(self, shard_no: int) -> int:
        """Number of the first sample of a shard; ``first(len(shards))`` is the number of samples."""
        return self._firsts[shard_no]

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, row in its table) of the sample with this number."""
        assert 0 <= number < self.num_samples, number
        shard_no = bisect_right(self._firsts, number) - 1
        return shard_no, number - self._firsts[shard_no]

    def shards_of(self, split: str) -> range:
        """Numbers of the split's shards."""
        mine = [n for n, shard in enumerate(self.shards) if shard.split == split]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def numbers(self, split: str) -> range:
        """Numbers of the split's samples; empty where there are none.

        Raises:
            DataError: no data set has such a split.
        """
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}{nearest(split, SPLITS)}")
        shards = self.shards_of(split)
        return range(self.first(shards.start), self.first(shards.stop)) if shards else range(0)
