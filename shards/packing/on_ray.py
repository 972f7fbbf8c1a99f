"""Shards made by Ray tasks, one a shard, on every node that sees the folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self, cast

from shards import ray_cluster
from shards.errors import ConfigError
from shards.half import worth_torch
from shards.packing.job import Job, Piece
from shards.packing.processes import InOrder, LostError, attempt
from shards.packing.shard import Record, Report, make
from shards.sources import Source
from shards.workspace import JOB

_RETRIES = 2
"""How often Ray does a task again whose node or process is lost; doing it twice gives the same bytes."""

_SECONDS = 60
"""How long to wait for tasks that were told to stop; they do so at once, unless their node is lost."""


class OnRay:
    """A Ray cluster.

    Args:
        job: what is packed; its source is sent to each node once.
        folder: where the shards go, on a file system that all nodes share.
        address: of the cluster, or `LOCAL`.
        stored_bytes: about how much is to be written.
    """

    def __init__(self, job: Job, folder: Path, address: str, stored_bytes: int) -> None:
        self._job, self._folder, self._stored_bytes = job, folder, stored_bytes
        self._cluster = ray_cluster.joined(address)
        self._busy: dict[Any, int] = {}  # task -> number of its piece

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        busy = list(self._busy)
        for task in busy:
            ray.cancel(task)
        if busy:  # whoever still writes would put files into a folder that is being removed
            ray.wait(busy, num_returns=len(busy), timeout=_SECONDS)
        self._cluster.__exit__(None, None, None)

    def work(self, pieces: tuple[Piece, ...], report: Report) -> Iterator[Record]:
        import ray
        from ray.exceptions import RayError

        try:
            source = ray.put(self._job.source)
        except Exception as error:
            raise ConfigError(
                f"{self._job.source.where} cannot be sent to other machines ({_line(error)}); leave --ray out"
            ) from error
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        each = self._stored_bytes // min(cores, max(1, len(pieces)))
        order = _Order([source], self._job.source.where, self._job.dtype, self._folder, each)
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_task)
        most = 2 * cores
        waiting = iter(pieces)
        busy = self._busy
        results = InOrder()
        try:
            while True:
                while len(busy) < most and not results.failed and (piece := next(waiting, None)):
                    busy[task.remote(order, piece)] = piece.number
                if not busy:
                    return
                for done in ray.wait(list(busy))[0]:
                    result = ray.get(done)
                    results.add(busy.pop(done), result)
                    if isinstance(result, Record):
                        report(result.shard.samples, result.shard.bytes)
                yield from results.ready()
        except RayError as error:
            raise LostError(f"a Ray task was lost, {1 + _RETRIES} times ({_line(error)})") from error


@dataclass(frozen=True)
class _Order:
    """What all tasks of a packing are told.

    Attributes:
        source: a list of the one reference to it: bare, Ray would unpack the source for each task anew.
        where: the input, as messages name it.
        dtype, folder: as of `OnRay`.
        stored_bytes: about how much each of Ray's processes is to write.
    """

    source: list[Any]
    where: str
    dtype: str
    folder: Path
    stored_bytes: int


def _task(order: _Order, piece: Piece) -> Record | Exception:
    """One shard, on whatever node this is."""
    node = f"the Ray node {os.uname().nodename}"
    if not (order.folder / JOB).is_file():
        return ConfigError(
            f"{node} does not see {order.folder}: --ray packs into a folder that all nodes share (NFS, for example); "
            "choose such an --out, or leave --ray out"
        )
    worth_torch(order.stored_bytes)
    try:
        source = _unpacked(order.source[0])
    except Exception as error:
        return ConfigError(
            f"{node} cannot read {order.where}: {_line(error)}; the input must be at the same path on all nodes"
        )
    write = partial(make, source, order.dtype, order.folder)
    return attempt(write, piece, lambda samples, written: None)


@lru_cache(maxsize=1)
def _unpacked(reference: Any) -> Source:
    """The source, unpacked once in each of Ray's processes: it may have to read a large file for it."""
    import ray

    return cast(Source, ray.get(reference))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
