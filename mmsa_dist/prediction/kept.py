"""The parts of a prediction that are finished: files in a hidden folder beside the target, until the last is there.

A part is there whole or not at all: what a killed command has finished, the same command finds. Only the driver writes
here, so that no folder needs to be shared with other nodes.
"""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.prediction.job import Job, Part, differing
from mmsa_dist.prediction.rows import Rows
from mmsa_dist.predictions import LASTING, failed
from shards.closing import Closing
from shards.files import write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

JOB = "job.json"
"""Says in the folder what is predicted."""

UNREAD = "unread"
"""In the metadata of a part's table: how many samples hold nothing that the model reads."""

ANSWER = "answer:"
"""Begins the columns of the judged tasks' predictions as metrics take them."""


class Kept(Closing):
    """The folder of a job, held by this process.

    Args:
        out: the file that the predictions are to become.

    Attributes:
        done: numbers of the parts that are finished.

    Raises:
        ConfigError: another prediction has parts there, or another process works on it; or no folder can be made there.
        TransientError: it cannot be written just now.
    """

    def __init__(self, out: Path, job: Job, parts: tuple[Part, ...]) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        self._out, self._job, self._parts = out, job, parts
        self._lock = -1
        try:
            self._claim()
            self._check_job()
            self.done = {part.number for part in parts if self._whole(part)}
        except OSError as error:
            self.close()
            raise failed(out, error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the folder; where no part is finished nothing stays behind."""
        if self._lock >= 0:
            if not any(self.folder.glob("part-*.parquet")):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def save(self, part: Part, content: bytes) -> None:
        """Keeps a part's rows, `encoded`. Twice the same part is there once.

        Raises:
            ConfigError, TransientError: it cannot be written.
        """
        try:
            write_atomic(self._file(part), content)
        except OSError as error:
            raise failed(self._out, error) from error
        self.done.add(part.number)

    def rows(self) -> Iterator[tuple[Part, Rows]]:
        """Every part with its rows, in order.

        Raises:
            DataError: one is gone or damaged since it was written.
        """
        for part in self._parts:
            try:
                rows = decoded(self._file(part).read_bytes(), self._job)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self._file(part)}: cannot be read ({error}); give the same command again, which predicts that "
                    "part anew"
                ) from error
            assert len(rows.keys) == part.count, part
            yield part, rows

    def remove(self) -> None:
        """Lets go of the folder for good: the predictions are in their file now."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def _claim(self) -> None:
        """Makes the folder where it is missing, and holds it."""
        while self._lock < 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), self.folder.stat()):
                    self._lock, descriptor = descriptor, -1
            except BlockingIOError as error:
                raise ConfigError(
                    f"--out {self._out}: another mmsa-dist predict is at work on it; wait for it, or choose another"
                ) from error
            except FileNotFoundError:
                pass  # whoever held it has finished in this moment
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def _check_job(self) -> None:
        """The parts that are there are this job's; else a new job is written down."""
        file, mine = self.folder / JOB, self._job.identity()
        try:
            its: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            its = {}
        except ValueError:
            its = {"job": None}
        there = len(list(self.folder.glob("part-*.parquet")))
        if there and its != mine:
            what = ", ".join(differing(mine, its))
            raise ConfigError(
                f"--out {self._out}: {there:,} parts of another prediction wait beside it ({what} differ): give the "
                f"command that began it, which goes on, or another --out; or remove {self.folder} to start anew"
            )
        if its != mine:
            write_atomic(file, json.dumps(mine, indent=1).encode())

    def _whole(self, part: Part) -> bool:
        """Whether the part is there; what is damaged is removed, to be done again."""
        file = self._file(part)
        try:
            if len(decoded(file.read_bytes(), self._job).keys) == part.count:
                return True
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in LASTING:
                raise
        except ValueError:
            pass
        with suppress(FileNotFoundError):
            file.unlink()
        return False

    def _file(self, part: Part) -> Path:
        return self.folder / f"part-{part.number:06d}.parquet"


def encoded(parts: "list[Rows]", job: Job) -> bytes:
    """Rows as a Parquet file with checksums, of which `decoded` makes the same rows again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"key": pa.array([key for rows in parts for key in rows.keys], pa.string())}
    for name in job.columns:
        columns[name] = pa.array(np.concatenate([rows.columns[name] for rows in parts]), pa.float32())
    answers = np.concatenate([rows.answers for rows in parts])
    for number, task in enumerate(job.judged):
        columns[f"{ANSWER}{task}"] = pa.array(answers[:, number], pa.float32())
    table = pa.table(columns).replace_schema_metadata({UNREAD: str(sum(rows.unread for rows in parts))})
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def decoded(content: bytes, job: Job) -> Rows:
    """The rows of a part.

    Raises:
        ValueError: it is damaged, or of another job.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: pa.Table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        unread = int((table.schema.metadata or {})[UNREAD.encode()])
        columns = {name: _floats(table, name) for name in job.columns}
        answers = np.stack([_floats(table, f"{ANSWER}{task}") for task in job.judged], axis=1)
    except (pa.ArrowException, OSError, LookupError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    truth = np.stack([columns[name] for name in job.columns[: len(job.judged)]], axis=1)
    return Rows(table.column("key").to_pylist(), columns, truth, answers, unread)


def _floats(table: "pa.Table", name: str) -> Any:
    return table.column(name).to_numpy().astype(np.float32, copy=False)
