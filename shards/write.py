"""Packs a source into shards: a folder that is there whole or not at all.

Everything is written into a hidden folder beside the target (`shards.workspace`), onto the disk, the index last; then
the folder gets its name.
"""

import errno
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from shards.errors import ConfigError, DataError, TransientError
from shards.index import Index, Modality, Shard
from shards.moments import Moments
from shards.sources import Source
from shards.sources.clean import Cleaner
from shards.tar import ShardWriter
from shards.utterance import SPLITS, Utterance
from shards.workspace import check_target, publish, workspace

MEGABYTE = 2**20

Show = Callable[[Iterable[int], int, str], Iterable[int]]
"""`shards.progress.track`, or nothing."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def pack(
    source: Source,
    out: Path,
    *,
    name: str | None = None,
    dtype: str = "float16",
    seed: int = 0,
    shard_bytes: int = 64 * MEGABYTE,
    overwrite: bool = False,
    show: Show = lambda numbers, total, what: numbers,
) -> tuple[Index, list[str]]:
    """Writes all samples of `source`; the order within a split is shuffled once, from `seed`.

    Args:
        out: folder to make.
        name: name of the data set, the source's own by default. A generated one always starts with ``synthetic``.
        dtype: of the stored features.
        shard_bytes: a shard is closed once it is this large.
        overwrite: replace a data set that is there already.
        show: wraps the loop over the samples, to show progress.

    Returns:
        The index, and what was odd or mended, in sentences.

    Raises:
        DataError: a sample is not as it should be.
        ConfigError: `out` is taken, or cannot be written.
        TransientError: the disk is full. Nothing half-written stays behind in any case.
    """
    out = out.resolve()
    packing = _Packing(source, dtype, seed, shard_bytes, show)
    try:
        check_target(out, overwrite)
        _check_counts(source)
        _check_keys(source)
        with workspace(out) as folder:
            packing.write(folder, _named(name or source.name, source.synthetic)).save()
            publish(folder, out, overwrite)
    except OSError as error:
        raise _explained(error, out, packing) from error
    return Index.load(out), packing.cleaner.notes() + source.notes()


class _Packing:
    """The work itself, with what it has done so far (an error message tells it)."""

    def __init__(self, source: Source, dtype: str, seed: int, shard_bytes: int, show: Show) -> None:
        self._source, self._dtype, self._seed, self._shard_bytes, self._show = source, dtype, seed, shard_bytes, show
        self.cleaner = Cleaner(source)
        self._moments = {modality: Moments(width) for modality, width in source.widths.items()}
        self._longest = dict.fromkeys(source.widths, 1)
        self.samples = 0
        self.bytes = 0

    def write(self, folder: Path, name: str) -> Index:
        """All shards; the index that belongs to them, not saved yet."""
        source = self._source
        shards = [shard for split in SPLITS for shard in self._write_split(folder, split)]
        return Index(
            folder=folder,
            name=name,
            synthetic=source.synthetic,
            dtype=self._dtype,
            modalities={m: Modality(width=w, max_length=self._longest[m]) for m, w in source.widths.items()},
            tasks=source.tasks,
            classes=source.classes,
            label_range=source.label_range,
            has_raw_text=source.has_raw_text,
            has_tokens=source.has_tokens,
            splits={split: source.counts[split] for split in SPLITS},
            shards=tuple(shards),
            statistics={m: moments.result() for m, moments in self._moments.items()},
            non_finite={m: self.cleaner.non_finite[m] for m in source.widths},
            source=source.provenance,
            tool_version=_tool_version(),
            seed=self._seed,
        )

    def needed(self) -> int:
        """Bytes that the whole data set will take, judged by what was written; 0 where nothing was."""
        return self.bytes * sum(self._source.counts.values()) // self.samples if self.samples else 0

    def _write_split(self, folder: Path, split: str) -> Iterator[Shard]:
        total = self._source.counts[split]
        order = np.random.default_rng([self._seed, SPLITS.index(split)]).permutation(total)
        writer: ShardWriter | None = None
        shard_no = 0
        try:
            for number in self._show(order, total, f"packing {split}"):
                writer = writer or ShardWriter(folder, f"{split}-{shard_no:05d}", split, self._source.tasks)
                before = writer.bytes
                writer.add(self._prepared(self._source.read(split, int(number))))
                self.bytes += writer.bytes - before
                self.samples += 1
                if writer.bytes >= self._shard_bytes:
                    yield writer.close()
                    writer, shard_no = None, shard_no + 1
            if writer:
                yield writer.close()
                writer = None
        finally:
            if writer:
                writer.abandon()
        if split == "train":
            self.cleaner.check_something_finite()

    def _prepared(self, utterance: Utterance) -> Utterance:
        """The sample as it is stored: clean, in the data set's dtype, counted."""
        utterance = self.cleaner.clean(utterance)
        stored: dict[str, np.ndarray] = {}
        for modality, values in utterance.modalities.items():
            self._longest[modality] = max(self._longest[modality], len(values))
            if utterance.split == "train":
                self._moments[modality].add(values)
            largest = max(values.max(), -values.min())
            if largest > np.finfo(self._dtype).max:
                raise DataError(
                    f"{self._source.where}: {utterance.split}, id {utterance.key!r}: {modality} has a value of "
                    f"{largest:g}, more than {self._dtype} holds ({np.finfo(self._dtype).max:g}); "
                    "pack with --dtype float32"
                )
            stored[modality] = values.astype(self._dtype)
        return replace(utterance, modalities=stored)


# --- before anything is written


def _check_counts(source: Source) -> None:
    for split in SPLITS:
        if not source.counts.get(split):
            raise DataError(
                f"{source.where}: the {split} split is empty; a data set needs samples in each of {', '.join(SPLITS)}"
            )


def _check_keys(source: Source) -> None:
    """Every key once in the whole data set, and none empty. Holds 8 bytes a sample, whatever the keys' length.

    Raises:
        DataError: a key is empty, or occurs twice; names the places.
    """
    digests = array("q")
    for split in SPLITS:
        for number, key in enumerate(source.keys(split)):
            if not key:
                raise DataError(
                    f"{source.where}: the id at {split}[{number}] is empty; every sample needs one of its own"
                )
            digests.append(_digest(key))
    ordered = np.sort(np.frombuffer(digests, dtype=np.int64))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not twice:
        return
    places: dict[str, list[str]] = {}
    for split in SPLITS:
        for number, key in enumerate(source.keys(split)):
            if _digest(key) in twice:
                places.setdefault(key, []).append(f"{split}[{number}]")
    repeated = {key: where for key, where in places.items() if len(where) > 1}
    if repeated:  # else two different keys share a digest, which is no fault of theirs
        key, where = next(iter(repeated.items()))
        more = f", and {len(repeated) - 1:,} more ids occur more than once" if len(repeated) > 1 else ""
        raise DataError(f"{source.where}: id {key!r} occurs at {' and '.join(where[:3])}{more}; ids must be unique")


def _digest(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def _named(name: str, synthetic: bool) -> str:
    return f"synthetic-{name}" if synthetic and not name.startswith("synthetic") else name


def _tool_version() -> str:
    try:
        return version("mmsa-dist")
    except PackageNotFoundError:
        return "checkout"


def _explained(error: OSError, out: Path, packing: _Packing) -> Exception:
    """What an OSError means to the user."""
    if error.errno in _FULL:
        with suppress(OSError):
            free = shutil.disk_usage(out.parent).free
            needed = packing.needed() or packing.bytes
            return TransientError(
                f"no space left for {out}: about {needed / MEGABYTE:,.1f} MB are needed, {free / MEGABYTE:,.1f} MB are "
                f"free in {out.parent} ({os.strerror(error.errno)} after {packing.samples:,} samples); what was "
                "written is removed again: make room or choose another --out"
            )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return ConfigError(f"--out {out} cannot be written: {error.strerror}; choose another folder")
    return TransientError(f"packing into {out} failed: {error.strerror or error}; what was written is removed again")
