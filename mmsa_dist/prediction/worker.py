"""One of the processes of a cluster that predict: reads the samples of a part where it is, and gives its rows.

What goes wrong with data or model is handed over as a value, not raised: it is the user's to read, not Ray's to wrap.
"""

import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmsa_dist import launch
from mmsa_dist.errors import ConfigError, DataError, MmsaError
from mmsa_dist.prediction.job import Job, Part, batches
from mmsa_dist.prediction.kept import encoded
from mmsa_dist.prediction.rows import predicted
from mmsa_dist.predictor import Predictor
from shards.ahead import InOrder, looking_ahead
from shards.index import Index
from shards.quarantine import without
from shards.read import ShardReader
from shards.remote.url import is_url

PART, CONTENT, ERROR = "part", "content", "error"
"""Columns of what a worker gives, a part a row: its number; its rows, `kept.encoded`; or what went wrong."""


@dataclass(frozen=True)
class Order:
    """What all workers are told.

    Attributes:
        model: a list of the one reference to the model's files: bare, Ray would unpack them for each task.
        device: where the system computes.
        versions: `launch.versions` of the driver.
    """

    job: Job
    model: list[Any]
    device: str
    versions: dict[str, str | None]


class Worker:
    """A model that is loaded once, and the data set, open."""

    def __init__(self, order: Order) -> None:
        self._job = order.job
        self._error: MmsaError | None = None
        try:
            launch.check_versions(order.versions)
            self._index = _index(order.job)
            self._reader = ShardReader(self._index)
            self._predictor = _loaded(order)
        except MmsaError as error:
            self._error = error

    def __call__(self, asked: pa.Table) -> pa.Table:
        """`PART`, `CONTENT` and `ERROR` of each part that is `asked` for, a row each."""
        parts = [Part(**row) for row in asked.to_pylist()]
        told = [self._answer(part) for part in parts]
        return pa.table(
            {
                PART: pa.array([part.number for part in parts], pa.int64()),
                CONTENT: pa.array([content for content, _ in told], pa.large_binary()),
                ERROR: pa.array([error for _, error in told], pa.string()),
            }
        )

    def _answer(self, part: Part) -> tuple[bytes, str]:
        """The part's rows, or `written` down why there are none."""
        try:
            if self._error is not None:
                raise self._error
            return self._rows(part), ""
        except MmsaError as error:
            return b"", written(error)

    def _rows(self, part: Part) -> bytes:
        read = partial(self._reader.samples, with_text="raw_text" in self._predictor.columns)
        done = []
        with looking_ahead(self._index, InOrder(part.first, part.count), 0, depth=2) as reach:
            for numbers in batches(part, self._job.batch_size):
                reach(numbers.stop - part.first)
                done.append(predicted(self._predictor, read(numbers), self._job.labelled))
        return encoded(done, self._job)


def written(error: MmsaError) -> str:
    """An error as `raised` makes it again: its class and sentence."""
    return f"{type(error).__name__}\n{error}"


def read_error(text: str) -> MmsaError:
    """The error that was `written`."""
    from mmsa_dist import errors

    name, _, sentence = text.partition("\n")
    found = getattr(errors, name, MmsaError)
    return found(sentence) if isinstance(found, type) and issubclass(found, MmsaError) else MmsaError(sentence)


def _index(job: Job) -> Index:
    """The data set as the driver has seen it.

    Raises:
        ConfigError: this node does not see it. DataError: it is another one.
    """
    node = f"the Ray node {os.uname().nodename}"
    if not is_url(job.data) and not Path(job.data).exists():
        raise ConfigError(
            f"{node} does not see {job.data}: --ray reads data where all nodes see them, in a shared folder or a "
            "bucket (s3://…); put them there, or leave --ray out"
        )
    index = Index.load(job.data)
    if job.without:
        (index,) = without([index], job.without)
    if index.fingerprint != job.fingerprint:
        raise DataError(
            f"{job.data}: {node} finds another data set there (fingerprint {index.fingerprint[:12]}) than the driver "
            f"({job.fingerprint[:12]}); put the same at the same path on all nodes"
        )
    return index


def _loaded(order: Order) -> Predictor:
    import ray

    files: dict[str, bytes] = ray.get(order.model[0])
    with tempfile.TemporaryDirectory(prefix="mmsa-") as scratch:
        for name, content in files.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return Predictor.load(Path(scratch), order.device)
