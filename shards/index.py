"""``index.json``: what a packed data set is. Written last and atomically: no index, no data set.

Samples are numbered 0..N-1 over the shards in their order; each shard holds one split and the splits follow one
another (train, valid, test), so that a split is a contiguous range of numbers. What is known of each *sample* stands in
one small Arrow file a shard (JSON would not carry 10^8 samples), which is memory-mapped.
"""

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shards.errors import DataError
from shards.files import write_atomic
from shards.suggest import nearest
from shards.trust import Expected
from shards.utterance import EMOTIONS, MODALITIES, SPLITS, TASKS

SCHEMA = 2
"""Version of the format. A reader refuses a higher one; an index says the lowest that can express it."""

FILE = "index.json"

_NOT_DATA = {"fingerprint", "source", "tool_version", "seed"}
"""Fields that say where the data came from, not what it is."""

_SINCE_2 = ("classes",)
"""Fields that schema 2 added. Where all have their default the index is one of schema 1, fingerprint included."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Part):
    """One tar and its Arrow table."""

    url: str
    """The tar, relative to the index's folder."""
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    samples: int = Field(ge=1)
    split: str
    """The split that all its samples belong to."""
    table: str
    """The Arrow file, relative to the index's folder; its columns are `table_schema`."""
    table_bytes: int = Field(ge=0)
    table_sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("url", "table")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or "\\" in value or not path.parts:
            raise ValueError("must be a path inside the index's folder")
        return value


class Modality(_Part):
    """width: D of every sample; max_length: steps T of the longest."""

    width: int = Field(ge=1)
    max_length: int = Field(ge=1)


class Index(_Part):
    """A packed data set."""

    name: str
    synthetic: bool
    """True where the data is generated: every result from it says so."""
    dtype: str = Field(pattern="^float(16|32)$")
    modalities: dict[str, Modality]
    """Modalities with stored features, in the order text, audio, vision. Raw text alone is not among them."""
    tasks: tuple[str, ...]
    """Labels that the data set has, ``M`` first; or the emotions of a classification."""
    classes: dict[str, int] = Field(default_factory=dict)
    """task -> number of classes, where labels are classes 0, 1, … of it; empty where they are intensities."""
    label_range: tuple[float, float]
    has_raw_text: bool
    has_tokens: bool
    splits: dict[str, int]
    """Samples per split."""
    shards: tuple[Shard, ...]
    statistics: dict[str, dict[str, list[float]]]
    """modality -> {"mean": [D], "std": [D]} over the real steps of the train split; a constant dimension has std 0."""
    non_finite: dict[str, int]
    """modality -> values that were NaN or infinite in the source, stored as zero."""
    source: dict[str, Any]
    """Provenance: "format", "file", "sha256" and whatever else the reader of that format has to say."""
    tool_version: str
    seed: int
    """The order within each split was shuffled once with it."""
    fingerprint: str = ""
    """sha256 of all of the above that says what the data is, checksums included; filled in here where it is new."""
    folder: Path = Field(exclude=True)
    """Where the files are."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for given, known, field in (
            (tuple(self.modalities), MODALITIES, "modalities"),
            (self.tasks, TASKS + EMOTIONS, "tasks"),
            (tuple(self.splits), SPLITS, "splits"),
        ):
            if given != tuple(name for name in known if name in given):
                raise ValueError(f"{field} are {list(given)}, expected some of {list(known)} in this order")
        order = [SPLITS.index(shard.split) if shard.split in SPLITS else -1 for shard in self.shards]
        if -1 in order or order != sorted(order):
            raise ValueError(
                f"shards are of splits {list(dict.fromkeys(s.split for s in self.shards))}, wanted {SPLITS}"
            )
        if self._counted() != {split: count for split, count in self.splits.items() if count}:
            raise ValueError(f"splits say {self.splits} samples, the shards hold {self._counted()}")
        if self.classes and set(self.classes) != set(self.tasks):
            raise ValueError(f"classes are given for {sorted(self.classes)}, tasks are {list(self.tasks)}")
        if set(self.statistics) != set(self.modalities):
            raise ValueError(f"statistics are for {sorted(self.statistics)}, modalities are {sorted(self.modalities)}")
        computed = self._compute_fingerprint()
        if self.fingerprint not in ("", computed):
            raise ValueError(
                f"fingerprint is {self.fingerprint[:12]}…, its fields give {computed[:12]}…: it was edited"
            )
        object.__setattr__(self, "fingerprint", computed)
        return self

    def _counted(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.samples
        return counts

    def _content(self) -> dict[str, Any]:
        """What ``index.json`` holds: the lowest schema that can express it, and the fields that this schema has."""
        content = self.model_dump(mode="json")
        defaults = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in _SINCE_2}
        if all(getattr(self, name) == default for name, default in defaults.items()):
            return {"schema": 1, **{name: value for name, value in content.items() if name not in _SINCE_2}}
        return {"schema": SCHEMA, **content}

    def _compute_fingerprint(self) -> str:
        content = {name: value for name, value in self._content().items() if name not in _NOT_DATA}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    # --- files

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Reads the index of the data set at `path` (its folder, or the index file itself).

        Raises:
            DataError: there is none, it is damaged, edited, or from a newer version.
        """
        file = Path(path)
        if file.name != FILE:
            file = file / FILE
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise DataError(
                f"no {FILE} in {file.parent}: pack first (mmsa-dist pack), or the packing did not finish"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # brackets nested without end recur
            raise DataError(f"{file}: not valid JSON ({error}); it is damaged, pack again") from error
        if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
            raise DataError(f"{file}: has no schema number, so it is not an index of this tool; pack the data again")
        schema = content.pop("schema")
        if schema > SCHEMA:
            raise DataError(
                f"{file}: schema {schema}, from version {content.get('tool_version', '?')}, is newer than schema "
                f"{SCHEMA}, which this version reads; upgrade mmsa-dist or pack again"
            )
        if not content.get("fingerprint"):  # without it, an edit of what no checksum covers would pass
            raise DataError(f"{file}: has no fingerprint: it was edited; pack the data again")
        try:
            return cls.model_validate({**content, "folder": file.parent})
        except ValidationError as error:
            raise DataError(f"{file}: {_first(error)}; pack the data again") from error

    def save(self) -> None:
        """Writes ``index.json`` into `folder`, atomically. Call it last."""
        write_atomic(self.folder / FILE, (json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n").encode())

    def tar_path(self, shard_no: int) -> Path:
        """The tar of a shard."""
        return self.folder / self.shards[shard_no].url

    def table_path(self, shard_no: int) -> Path:
        """The Arrow file of a shard."""
        return self.folder / self.shards[shard_no].table

    def expected_tar(self, shard_no: int) -> Expected:
        """The tar of a shard, and what it must be."""
        shard = self.shards[shard_no]
        return Expected(self.tar_path(shard_no), shard.bytes, shard.sha256)

    def expected_table(self, shard_no: int) -> Expected:
        """The Arrow file of a shard, and what it must be."""
        shard = self.shards[shard_no]
        return Expected(self.table_path(shard_no), shard.table_bytes, shard.table_sha256)

    def table(self, shard_no: int, verify: bool = True) -> pa.Table:
        """What is known of a shard's samples, one row each in tar order: columns `table_schema`. Memory-mapped.

        Args:
            verify: check the file's sha256 before its first use, once per node (its size always is).

        Raises:
            DataError: the file is missing, damaged, or does not belong to this index.
        """
        file = self.expected_table(shard_no)
        if verify:
            file.check()
        else:
            file.check_size()
        path = file.path
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            table.validate(full=True)  # a forged or damaged file must not send us outside its buffers
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{path}: not a readable Arrow file ({error}); see mmsa-dist verify, then pack again"
            ) from error
        if table.schema != table_schema(self.tasks) or table.num_rows != self.shards[shard_no].samples:
            raise DataError(
                f"{path}: has {table.num_rows} rows with columns {table.column_names}, expected "
                f"{self.shards[shard_no].samples} with {table_schema(self.tasks).names}; pack again"
            )
        return table

    # --- numbers

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
        """Numbers of the split's samples; empty where the data set lacks the split.

        Raises:
            DataError: no data set has such a split.
        """
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}{nearest(split, SPLITS)}")
        shards = self.shards_of(split)
        return range(self.first(shards.start), self.first(shards.stop)) if shards else range(0)


def table_schema(tasks: tuple[str, ...]) -> pa.Schema:
    """Columns of a shard's table.

    ``key``; ``offset`` and ``size`` of the safetensors payload in the tar, ``json_offset`` and ``json_size`` of the
    JSON payload, in bytes; ``split``; ``length_<modality>``, 0 where absent; ``n_tokens``; ``label_<task>``, NaN where
    absent.
    """
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            *(pa.field(name, pa.int64(), nullable=False) for name in ("offset", "size", "json_offset", "json_size")),
            pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            *(pa.field(f"length_{name}", pa.int32(), nullable=False) for name in MODALITIES),
            pa.field("n_tokens", pa.int32(), nullable=False),
            *(pa.field(f"label_{task}", pa.float32(), nullable=False) for task in tasks),
        ]
    )


def _first(error: ValidationError) -> str:
    """The first complaint, as `field: what`."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
