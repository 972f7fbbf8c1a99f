"""Brings shards near before the samples in them are due, a few at a time, while training goes on.

Remote ones are fetched; those of a file system are verified, where this node has not done so. What was verified is read
no further: of a large shard a rank may need little, and the node's memory may not hold all.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.closing import Closing
from shards.errors import MmsaError
from shards.remote.cache import Cache
from shards.remote.file import RemoteFile
from shards.trust import Expected

THREADS = 4
"""That fetch."""
OWN_THREADS = 2
"""That verify: a core each, while they do."""
_CHUNK = 512
"""Samples looked at in one go."""


class Files(Protocol):
    """What is known of a data set's files: an `Index`, or a mix of several."""

    @property
    def shards(self) -> Sequence[object]: ...
    @property
    def remote(self) -> bool: ...
    def first(self, shard_no: int) -> int: ...
    def files(self, shard_no: int) -> tuple[Expected, Expected]: ...


class Order(Protocol):
    """In which order samples are read; `shards.order` has some."""

    @property
    def num_samples(self) -> int: ...
    def between(self, begin: int, end: int) -> NDArray[np.int64]: ...


class Ahead(Closing):
    """Brings the shards of an epoch near in the order in which they are needed, so many before they are.

    What goes wrong is left to the reader that needs the shard, which tries again and says what it is.

    Args:
        index: of the data set.
        order: of its samples; read through a copy, so that looking ahead does not disturb what it remembers.
        begin: the position in it at which reading begins.
        depth: shards that are brought before the first of their samples is due; fewer where they would fill half of
            the cache.
    """

    def __init__(self, index: Files, order: Order, begin: int, depth: int) -> None:
        self._index = index
        self._coming = self._first_samples(copy(order), begin)
        self._depth = depth
        self._threads = THREADS if index.remote else OWN_THREADS
        self._half = Cache().limit // 2 if index.remote else math.inf
        self._firsts = np.array([index.first(n) for n in range(len(index.shards))])
        self._waiting: deque[tuple[int, int]] = deque()  # (position of its first sample, bytes) of shards not yet due
        self._queue: SimpleQueue[tuple[Expected, ...] | None] = SimpleQueue()
        for _ in range(self._threads):
            Thread(target=self._work, name="mmsa-ahead", daemon=True).start()  # a half-done download may be cut off
        self.reach(begin)

    def reach(self, position: int) -> None:
        """Says that the samples before `position` are read, or being read."""
        while self._waiting and self._waiting[0][0] < position:
            self._waiting.popleft()
        while len(self._waiting) < self._depth and sum(size for _, size in self._waiting) <= self._half:
            first, shard_no = next(self._coming, (None, 0))
            if first is None:
                return
            files = self._index.files(shard_no)
            self._queue.put(files)
            if first >= position:
                self._waiting.append((first, sum(file.bytes for file in files)))

    def close(self) -> None:
        """Brings no more; what is on its way comes to its end."""
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        for _ in range(self._threads):
            self._queue.put(None)

    def _first_samples(self, order: Order, begin: int) -> Iterator[tuple[int, int]]:
        """(position of its first sample from `begin` on, shard), of each shard in the order of these positions."""
        seen: set[int] = set()
        for at in range(begin, order.num_samples, _CHUNK):
            numbers = order.between(at, min(at + _CHUNK, order.num_samples))
            shards, places = np.unique(np.searchsorted(self._firsts, numbers, side="right") - 1, return_index=True)
            for place, shard_no in sorted(zip(places.tolist(), shards.tolist(), strict=True)):
                if shard_no not in seen:
                    seen.add(shard_no)
                    yield at + place, shard_no

    def _work(self) -> None:
        while (files := self._queue.get()) is not None:
            for file in files:
                with suppress(MmsaError, OSError):  # what goes wrong is left to the reader that needs it
                    if isinstance(file, RemoteFile):
                        file.fetch(wait=False)  # and what another process fetches just now, to it
                    else:
                        file.check()


@dataclass(frozen=True)
class InOrder:
    """The order of an evaluation: `count` samples from number `first` on."""

    first: int
    count: int

    @property
    def num_samples(self) -> int:
        return self.count

    def between(self, begin: int, end: int) -> NDArray[np.int64]:
        return np.arange(self.first + begin, self.first + end)


@contextmanager
def looking_ahead(
    index: Files, order: Order, begin: int, depth: int, verify: bool = True
) -> Iterator[Callable[[int], None]]:
    """`Ahead.reach` while the block lasts; something that does nothing where files are neither fetched nor verified.

    Args:
        verify: files of a file system.
    """
    if not index.remote and not verify:
        yield lambda position: None
        return
    with Ahead(index, order, begin, depth) as ahead:
        yield ahead.reach


def fetch_tables(index: Files, shard_nos: Iterable[int]) -> None:
    """Fetches the tables of shards, several at a time: small files, whose number is what takes time.

    Raises:
        DataError, ConfigError, TransientError: one cannot be had.
    """
    tables = [index.files(n)[0] for n in shard_nos] if index.remote else []
    if len(tables) < 2:
        return
    with ThreadPoolExecutor(2 * THREADS, thread_name_prefix="mmsa-ahead") as pool:
        for _ in pool.map(lambda table: table.check(), tables):
            pass
