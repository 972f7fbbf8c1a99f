"""What is predicted by many processes, and in which parts.

Which samples a part holds is decided before the first is predicted, from the data, the split and the batch size alone.
So each part is a piece of work of its own: whoever does it, and when, it has the same rows, and those that go through
the system together are those that one process would put together.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist.run_folder import environment

if TYPE_CHECKING:
    from shards.index import Index

AT_LEAST, AT_MOST, LONGEST = 64, 4096, 1024
"""Parts there are: 64 of a small data set, so that all processes have something to do until the end and little is done
twice after a kill; of a larger one as many as make parts of 1,024 samples; of a huge one 4,096, however long."""

COMPUTES = ("mmsa-dist", "torch", "numpy", "transformers")
"""Packages whose versions the last digits of a prediction may depend on."""


@dataclass(frozen=True)
class Part:
    """Some samples of a split that follow one another.

    Attributes:
        number: its place among all parts.
        first: number of its first sample in the index.
        count: of its samples.
    """

    number: int
    split: str
    first: int
    count: int


@dataclass(frozen=True)
class Job:
    """Everything that the rows depend on, and where the data are.

    Attributes:
        data: absolute folder or address of a packed data set, the same on all nodes.
        fingerprint: of its index, less the shards that are left out.
        without: addresses of shards that are left out (`shards.quarantine`).
        splits: in the order in which their rows are written.
        batch_size: samples that go through the system together.
        labelled: the data's labels are those that the model learnt.
        columns: of numbers, `rows.column_names`.
        judged: tasks that metrics are of.
        model: `digest` of its files.
    """

    data: str
    fingerprint: str
    without: tuple[str, ...]
    splits: tuple[str, ...]
    batch_size: int
    labelled: bool
    columns: tuple[str, ...]
    judged: tuple[str, ...]
    model: str

    def identity(self) -> dict[str, Any]:
        """What a part must have been made from to be taken over by this job, in plain values. Where the data lie does
        not matter."""
        values = {name: value for name, value in asdict(self).items() if name not in ("data", "without")}
        packages = environment()["packages"]
        versions = {name: (packages.get(name) or "none").partition("+")[0] for name in COMPUTES}
        return {**{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}, "versions": versions}

    def divide(self, index: "Index") -> tuple[Part, ...]:
        """All parts, in the order of their rows; each is whole batches but for the last of a split."""
        ranges = {split: index.numbers(split) for split in self.splits}
        total = sum(map(len, ranges.values()))
        size = max(min(LONGEST, -(-total // AT_LEAST)), -(-total // AT_MOST))
        size = self.batch_size * max(1, round(size / self.batch_size))
        places = [(split, first) for split, numbers in ranges.items() for first in numbers[::size]]
        return tuple(
            Part(number, split, first, min(size, ranges[split].stop - first))
            for number, (split, first) in enumerate(places)
        )


TOLD = {
    "model": "the model's files",
    "fingerprint": "the data",
    "splits": "--split",
    "batch_size": "--batch-size",
    "versions": "versions of packages",
    "labelled": "whether the labels are the model's",
    "columns": "the columns",
    "judged": "the tasks",
}
"""A job's field, as messages call it."""


def differing(job: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What of two jobs' identities differs, in words."""
    return [TOLD.get(name, name) for name in {**job, **other} if job.get(name) != other.get(name)]


def model_files(folder: Path) -> dict[str, bytes]:
    """The model folder of the model or run in `folder`: name below it -> content.

    Raises:
        DataError: a file is missing or damaged.
    """
    from mmsa_dist.tracking.models import model_folder

    with tempfile.TemporaryDirectory(prefix="mmsa-") as scratch:
        made = model_folder(folder, Path(scratch) / "model")
        return {str(path.relative_to(made)): path.read_bytes() for path in sorted(made.rglob("*")) if path.is_file()}


def digest(files: Mapping[str, bytes]) -> str:
    """Of a model's files, their names included."""
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()


def batches(part: Part, size: int) -> Sequence[range]:
    """The numbers of the samples that go through the system together."""
    end = part.first + part.count
    return [range(first, min(first + size, end)) for first in range(part.first, end, size)]
