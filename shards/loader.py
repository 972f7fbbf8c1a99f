"""Batches of a plan, prepared ahead by a few threads and handed out in the plan's order.

Threads, not processes: a sample is a view into a mapped file, and the conversion to float32, which is all the work,
runs without the interpreter lock. They live as long as the loader, over all epochs.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from shards.ahead import InOrder, Order, looking_ahead
from shards.batch import Batch, BatchSpec, TextIds, collate
from shards.closing import Closing
from shards.mix import AnyReader
from shards.plan import EvaluationPlan, Piece, Plan, share
from shards.utterance import Utterance

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Loader(Closing):
    """Reads and collates the batches of one rank.

    Args:
        reader: of the samples.
        spec: what goes into a batch.
        readers: threads; 0 works in the calling thread. At most twice as many batches are prepared ahead, by each
            iterator. The batches are the same for any number. Evaluation has as many threads of its own: it does not
            wait for the next epoch's batches, should their shards be slow to come.
    """

    def __init__(self, reader: AnyReader, spec: BatchSpec, readers: int = 1) -> None:
        assert readers >= 0, readers
        self._reader = reader
        self._readers = readers
        self._text_lock = Lock()
        self._with_text = spec.text_ids is not None
        self._spec = replace(spec, text_ids=self._one_at_a_time(spec.text_ids)) if spec.text_ids else spec
        self._training, self._evaluating = (
            ThreadPoolExecutor(readers, thread_name_prefix=f"mmsa-reader-{use}") if readers else None
            for use in ("train", "evaluate")
        )

    def train(
        self, plan: Plan, rank: int, world: int, accumulation: int = 1, start_step: int = 0
    ) -> Generator[list[Batch]]:
        """The rank's micro-batches of each step of an epoch, from `start_step` on.

        Reading begins with this call, not with the first batch that is asked for, so that an epoch's first batches can
        be read while the one before is evaluated. Close what is not used up.

        Raises:
            DataError: when the batch that cannot be read is due.
        """
        steps = self._steps(plan, rank, world, accumulation, start_step)
        next(steps)
        return steps

    def _steps(self, plan: Plan, rank: int, world: int, accumulation: int, start_step: int) -> Generator[list[Batch]]:
        """`train`, after a first item that is none: by then reading has begun."""
        steps = range(start_step, plan.num_steps)
        turns = ((step, turn) for step in steps for turn in range(accumulation))

        def batch(at: tuple[int, int]) -> Batch:  # the step's numbers too are computed ahead, by a reader
            step, turn = at
            return self._batch(share(plan.step(step), rank, world, accumulation)[turn])

        begin = start_step * plan.global_batch
        with (
            self._looking_ahead(plan.order, begin) as reach,
            closing(self._made(self._training, batch, turns)) as batches,
        ):
            yield []
            for step in steps:
                reach((step + 1) * plan.global_batch)
                yield list(islice(batches, accumulation))

    def step(self, plan: Plan, step: int, rank: int, world: int, accumulation: int = 1) -> list[Batch]:
        """The rank's micro-batches of one step, made now and here.

        Raises:
            DataError: they cannot be read.
        """
        return [self._batch(piece) for piece in share(plan.step(step), rank, world, accumulation)]

    def evaluate(self, plan: EvaluationPlan, rank: int, world: int) -> Iterator[Batch]:
        """The rank's batches of an evaluation; see `EvaluationPlan.batches_for`."""
        with (
            self._looking_ahead(InOrder(plan.first, plan.count), 0) as reach,
            closing(self._made(self._evaluating, self._batch, plan.batches_for(rank, world))) as batches,
        ):
            for turn, batch in enumerate(batches, 1):
                reach(turn * world * plan.batch)
                yield batch

    def close(self) -> None:
        """Ends the threads. Iterators that are not used up yet cannot be used afterwards."""
        for pool in filter(None, (self._training, self._evaluating)):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in filter(None, (self._training, self._evaluating)):
            pool.shutdown(wait=True)

    def _looking_ahead(self, order: Order, begin: int) -> AbstractContextManager[Callable[[int], None]]:
        index = self._reader.index
        return looking_ahead(index, order, begin, max(1, self._reader.open_shards // 2), self._reader.verify)

    def _made(
        self, pool: ThreadPoolExecutor | None, make: Callable[[_Item], Batch], items: Iterable[_Item]
    ) -> Generator[Batch]:
        if pool is None:
            return (make(item) for item in items)
        made = _ahead(pool, make, items, 2 * self._readers)
        next(made)
        return made

    def _batch(self, piece: Piece) -> Batch:
        samples = self._reader.samples(piece.numbers, with_text=self._with_text)
        return collate(samples, self._spec, piece.numbers, piece.weight, piece.norm)

    def _one_at_a_time(self, text_ids: TextIds) -> TextIds:
        """`text_ids` for several threads: fast tokenizers raise "Already borrowed" when two enter at once."""

        def locked(samples: list[Utterance]) -> list[np.ndarray]:
            with self._text_lock:
                return text_ids(samples)

        return locked


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], depth: int
) -> Generator[Any]:
    """``map(work, items)`` with at most `depth` results prepared ahead by the pool; an exception comes at its place.

    Before the first result comes None, and by then the pool is at work.
    """
    remaining = iter(items)
    pending: deque[Future[_Result]] = deque(pool.submit(work, item) for item in islice(remaining, depth))
    try:
        yield None
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()
