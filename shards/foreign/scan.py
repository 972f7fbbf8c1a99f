"""One tar, read once: where each sample's numbers stand, what they are like, and its table.

Shapes: T steps, D width.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.foreign.dots import check_dots
from shards.foreign.mapping import LABELS
from shards.foreign.reading import Reading, Rules
from shards.foreign.samples import Sample, samples
from shards.foreign.tar import TarReader
from shards.index import Shard
from shards.leaks import digest
from shards.moments import Moments
from shards.tables import table_bytes, table_schema
from shards.utterance import MODALITIES

TABLES = "index.tables"
"""Folder of the tables, beside the index."""

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "devel", "development"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}

FEW = 3
"""Different labels at most that are taken for classes, where all are whole numbers."""

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Job:
    """A tar to read, and how.

    Attributes:
        number: its place among all.
        path, url: the file, and what it is called in the index.
        split: of all its samples; None where its samples say it.
        rules: of all tars.
    """

    number: int
    path: Path
    url: str
    split: str | None
    rules: Rules

    @property
    def stem(self) -> str:
        """What messages call it."""
        return self.url


@dataclass
class Scanned:
    """What was found in a tar.

    Attributes:
        shard: its entry in the index.
        table: its Arrow table, as a file.
        digests: (samples,) of the keys.
        widths: modality -> D.
        longest: modality -> steps of the longest sample.
        dtypes: of the features.
        moments: modality -> those of all its steps, as `Moments.parts`; of a train shard only.
        non_finite, absent, padding: modality -> values that are not finite; samples without it; steps cut off.
        unread: suffix -> members that nothing asks for.
        labels: the different labels M, one more than `FEW` at most.
    """

    shard: Shard
    table: bytes
    digests: NDArray[np.uint64]
    widths: dict[str, int]
    longest: Counter[str]
    dtypes: set[str]
    moments: dict[str, tuple[int, list[float], list[float]]]
    non_finite: Counter[str]
    absent: Counter[str]
    padding: Counter[str]
    unread: Counter[str]
    labels: set[float]


def scan(job: Job, report: Callable[[int, int], None]) -> Scanned:
    """Reads the tar of a job.

    Args:
        report: is told of progress: samples, and bytes, more.

    Raises:
        DataError: the tar or a sample is not as it should be; names file, key and member.
    """
    sums: list[tuple[str, int]] = []
    work = _Scan(job)

    def ended(tar: TarReader) -> None:
        sums.append((tar.sha256, tar.size))

    before = 0
    for sample in samples(job.path, job.rules.layout.members.get, ended):
        work.add(sample)
        report(1, sample.end - before)
        before = sample.end
    if not work.digests:
        raise DataError(f"{job.path}: holds no samples (files called KEY.SUFFIX); leave it out")
    return work.result(*sums[0])


@dataclass
class _Scan:
    """The work on one tar."""

    job: Job
    split: str | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    digests: list[int] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    longest: Counter[str] = field(default_factory=Counter)
    dtypes: set[str] = field(default_factory=set)
    moments: dict[str, Moments] = field(default_factory=dict)
    non_finite: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    padding: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    labels: set[float] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.split = self.job.split
        self.words = self.job.rules.layout.words
        self.columns = {name: [] for name in table_schema(self.job.rules.layout.tasks, foreign=True).names}

    def add(self, sample: Sample) -> None:
        """Takes a sample in."""
        if sample.others:
            check_dots(self.job.path, sample.key, {*sample.payloads, *sample.others}, self.words)
        one = Reading(self.job.path, self.job.rules, sample)
        self._take_split(one)
        row: dict[str, Any] = {
            "key": one.key,
            "offset": sample.begin,
            "size": sample.end - sample.begin,
            "json_offset": 0,
            "json_size": 0,
            "split": self.split,
            "n_tokens": 0,
            **{f"label_{task}": one.label(option) for option, task in LABELS.items() if option in one.places},
        }
        for modality in (*MODALITIES, "tokens"):
            row |= {f"offset_{modality}": 0, f"dtype_{modality}": "", f"non_finite_{modality}": 0}
        for modality in MODALITIES:
            row |= {f"length_{modality}": 0} | (self._feature(one, modality) if modality in one.places else {})
        row |= one.tokens() if "tokens" in one.places else {}
        row |= one.text() if "raw_text" in one.places else {}
        if not row["n_tokens"] and not row["json_size"] and not any(row[f"length_{m}"] for m in MODALITIES):
            one.wrong("has no features, no token ids and no transcript; remove the sample")
        if "label" in one.places and len(self.labels) <= FEW:
            self.labels.add(row["label_M"])
        for name, column in self.columns.items():
            column.append(row[name])
        self.digests.append(digest(one.key))
        self.unread.update(sample.others)

    def result(self, sha256: str, size: int) -> Scanned:
        table = table_bytes(self.columns, table_schema(self.job.rules.layout.tasks, foreign=True))
        table_sha256 = hashlib.sha256(table).hexdigest()
        shard = Shard(
            url=self.job.url,
            bytes=size,
            sha256=sha256,
            samples=len(self.digests),
            split=str(self.split),
            table=f"{TABLES}/{self.job.url}.{table_sha256[:12]}.arrow",
            table_bytes=len(table),
            table_sha256=table_sha256,
        )
        return Scanned(
            shard,
            table,
            np.array(self.digests, dtype=np.uint64),
            self.widths,
            self.longest,
            self.dtypes,
            {modality: moments.parts() for modality, moments in self.moments.items()},
            self.non_finite,
            self.absent,
            self.padding,
            self.unread,
            self.labels,
        )

    def _take_split(self, one: Reading) -> None:
        if self.job.split is not None:
            return
        told = one.value("split")
        if told is None:
            one.wrong(f"has no split ({one.places['split']}), expected train, valid or test; correct it")
        split = SPLIT_NAMES.get(told.lower()) if isinstance(told, str) else None
        if split is None:
            one.wrong(f"is of split {told!r} ({one.places['split']}), expected train, valid or test")
        if self.split not in (None, split):
            one.wrong(
                f"is of split {split}, the ones before it are of {self.split}; each shard holds one split: write the "
                'shards anew, a tar for each (docs/your-data.md, "A tar for each split", has the lines that do)'
            )
        self.split = split

    def _feature(self, one: Reading, modality: str) -> dict[str, Any]:
        """The columns of a modality that may be there."""
        array, values = one.feature(modality)
        if array is None or values is None or not values.size:
            self.absent[modality] += 1
            return {}
        width = self.widths.setdefault(modality, values.shape[1])
        if width != values.shape[1]:
            one.wrong(
                f"has {modality} of width {values.shape[1]}, the samples before it of {width}; "
                "they cannot be one data set"
            )
        steps = one.steps(modality, values)
        self.padding[modality] += len(values) - steps
        values = values[:steps]
        finite = np.isfinite(values)
        flaws = int(values.size - np.count_nonzero(finite))
        self.non_finite[modality] += flaws
        if flaws == values.size:  # nothing left, or nothing finite: zeros would pretend to be measured
            self.absent[modality] += 1
            return {}
        if flaws:
            values = np.where(finite, values, np.zeros((), values.dtype))
        if array.dtype == "float64" and np.abs(values).max() > _LARGEST:
            one.wrong(f"has {modality} of {np.abs(values).max():g}, more than float32 holds; correct it")
        if self.split == "train":
            self.moments.setdefault(modality, Moments(width)).add(values)
        self.longest[modality] = max(self.longest[modality], steps)
        self.dtypes.add(array.dtype)
        return {
            f"length_{modality}": steps,
            f"offset_{modality}": one.offset(modality) + array.offset,
            f"dtype_{modality}": array.dtype,
            f"non_finite_{modality}": flaws,
        }
