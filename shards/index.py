"""``index.json``: what a packed data set is. Written last and atomically: no index, no data set.

Samples are numbered 0..N-1 over the shards in their order; each shard holds one split and the splits follow one
another (train, valid, test), so that a split is a contiguous range of numbers. What is known of each *sample* stands in
one small Arrow file a shard (JSON would not carry 10^8 samples), which is memory-mapped.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shards.errors import DataError
from shards.files import write_atomic
from shards.numbering import Numbered
from shards.remote.file import RemoteFile
from shards.remote.store import read
from shards.remote.url import child_url, folder_url, is_url
from shards.tables import table_schema
from shards.trust import Expected, cache_folder
from shards.utterance import EMOTIONS, MODALITIES, SPLITS, TASKS

SCHEMA = 2
"""Version of the format. A reader refuses a higher one; an index says the lowest that can express it."""

FILE = "index.json"

_LARGEST = 1 << 29
"""Bytes of a remote index at most: that of 10^8 samples has a quarter of it."""

_NOT_DATA = {"fingerprint", "source", "tool_version", "seed"}
"""Fields that say where the data came from, not what it is."""

_SINCE_2 = ("classes", "layout")
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
        if not value.isprintable() and any(unicodedata.category(letter) == "Cc" for letter in value):
            raise ValueError(f"{value!r} has control characters")
        return value


class Modality(_Part):
    """width: D of every sample; max_length: steps T of the longest."""

    width: int = Field(ge=1)
    max_length: int = Field(ge=1)


class Index(_Part, Numbered):
    """A packed data set."""

    name: str
    synthetic: bool
    """True where the data is generated: every result from it says so."""
    dtype: str = Field(pattern="^float(16|32|64)$")
    """Of the stored features; of shards that somebody else wrote the widest, and each sample's stands in the table."""
    modalities: dict[str, Modality]
    """Modalities with stored features, in the order text, audio, vision. Raw text alone is not among them."""
    tasks: tuple[str, ...]
    """Labels that the data set has, ``M`` first; or the emotions of a classification."""
    classes: dict[str, int] = Field(default_factory=dict)
    """task -> number of classes, where labels are classes 0, 1, … of it; empty where they are intensities."""
    label_range: tuple[float, float]
    layout: dict[str, str] = Field(default_factory=dict)
    """Of shards that somebody else wrote: what -> its member, and the field or tensor in it (``features.npz:audio``).
    Empty for those that this tool wrote."""
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
    """Where the files are; of a remote data set, where copies of them are kept."""
    origin: str | None = Field(default=None, exclude=True)
    """The address of a remote data set's folder."""

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
        if self.layout and self.has_raw_text != ("raw_text" in self.layout):
            raise ValueError(f"layout is of {sorted(self.layout)}, but has_raw_text is {self.has_raw_text}")
        if self.dtype == "float64" and not self.layout:
            raise ValueError("dtype is float64, which this tool does not write")
        if set(self.statistics) != set(self.modalities):
            raise ValueError(f"statistics are for {sorted(self.statistics)}, modalities are {sorted(self.modalities)}")
        for modality, part in self.modalities.items():
            widths = {name: len(values) for name, values in self.statistics[modality].items()}
            if widths != {"mean": part.width, "std": part.width}:
                raise ValueError(f"statistics of {modality} have {widths} values, its width is {part.width}")
        names = Counter(name for shard in self.shards for name in (shard.url, shard.table))
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"shards list {twice[0]!r} more than once")
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

    def without(self, shard_nos: Collection[int]) -> "Index":
        """The data set without some of its shards: fewer samples, numbered anew, and a fingerprint of its own.

        The statistics stay those of the whole.
        """
        left = tuple(shard for n, shard in enumerate(self.shards) if n not in shard_nos)
        counts = {split: sum(shard.samples for shard in left if shard.split == split) for split in self.splits}
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Index(**{**fields, "shards": left, "splits": counts, "fingerprint": ""})

    # --- files

    @property
    def remote(self) -> bool:
        """Whether files are fetched when they are used."""
        return self.origin is not None

    @property
    def foreign(self) -> bool:
        """Whether somebody else wrote the shards, in a layout of their own."""
        return bool(self.layout)

    @property
    def where(self) -> str:
        """The folder or address of the data set, as messages name it."""
        return self.origin or str(self.folder)

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Reads the index of the data set at `path`: its folder, the index file itself, or the address of either.

        Raises:
            DataError: there is none, it is damaged, edited, or from a newer version.
            ConfigError, TransientError: the address is wrong, may not be read, or does not answer.
        """
        origin = folder_url(str(path)) if is_url(path) else None
        file, text = _remote_text(origin) if origin else _local_text(Path(path))
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
            folder = cache_folder() if origin else Path(file).parent
            return cls.model_validate({**content, "folder": folder, "origin": origin})
        except ValidationError as error:
            raise DataError(f"{file}: {_first(error)}; pack the data again") from error

    def save(self) -> None:
        """Writes ``index.json`` into `folder`, atomically. Call it last."""
        write_atomic(self.folder / FILE, (json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n").encode())

    def tar_path(self, shard_no: int) -> Path:
        """The tar of a shard."""
        return self.expected_tar(shard_no).path

    def table_path(self, shard_no: int) -> Path:
        """The Arrow file of a shard."""
        return self.expected_table(shard_no).path

    def expected_tar(self, shard_no: int) -> Expected:
        """The tar of a shard, and what it must be."""
        shard = self.shards[shard_no]
        return self._expected(shard.url, shard.bytes, shard.sha256)

    def expected_table(self, shard_no: int) -> Expected:
        """The Arrow file of a shard, and what it must be."""
        shard = self.shards[shard_no]
        return self._expected(shard.table, shard.table_bytes, shard.table_sha256)

    def files(self, shard_no: int) -> tuple[Expected, Expected]:
        """Both files of a shard: its table and its tar."""
        return self.expected_table(shard_no), self.expected_tar(shard_no)

    def _expected(self, name: str, size: int, sha256: str) -> Expected:
        if self.origin:
            return RemoteFile.of(child_url(self.origin, name), size, sha256)
        return Expected(self.folder / name, size, sha256)

    def table(self, shard_no: int, verify: bool = True) -> pa.Table:
        """What is known of a shard's samples, one row each in tar order: columns `table_schema`. Memory-mapped.

        Args:
            verify: check the file's sha256 before its first use, once per node (its size always is).

        Raises:
            DataError: the file is missing, damaged, or does not belong to this index.
        """
        file = self.expected_table(shard_no)
        path = file.path
        try:
            table = file.use(lambda path: pa.ipc.open_file(pa.memory_map(str(path))).read_all(), verify)
            table.validate(full=True)  # a forged or damaged file must not send us outside its buffers
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{path}: not a readable Arrow file ({error}); see mmsa-dist verify, then pack again"
            ) from error
        schema = table_schema(self.tasks, self.foreign)
        if table.schema != schema or table.num_rows != self.shards[shard_no].samples:
            raise DataError(
                f"{path}: has {table.num_rows} rows with columns {table.column_names}, expected "
                f"{self.shards[shard_no].samples} with {schema.names}; pack again"
            )
        return table


def _local_text(path: Path) -> tuple[str, str]:
    """The index file in a folder, or itself: what messages call it, and its content."""
    file = path if path.name == FILE else path / FILE
    try:
        if not path.exists():
            raise DataError(f"{path}: no such folder; give one that mmsa-dist pack or index has written")
        if path.is_file() and path != file:
            raise DataError(
                f"{path}: is no folder with an {FILE}; give the folder, or index it first (mmsa-dist index)"
            )
        return str(file), file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"no {FILE} in {file.parent}: pack first (mmsa-dist pack), or the packing did not finish"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _remote_text(origin: str) -> tuple[str, str]:
    """As `_local_text`, of a remote folder. Asked for anew each time: it is the one file whose content may change."""
    file = child_url(origin, FILE)
    try:
        return file, read(file, _LARGEST).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not text ({error.reason}): it is no index") from error


def _first(error: ValidationError) -> str:
    """The first complaint, as `field: what`."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
