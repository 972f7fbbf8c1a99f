"""Packs a source into shards: a folder that is there whole or not at all.

Everything is written into a hidden folder beside the target (`shards.workspace`), onto the disk, the index last; then
the folder gets its name. Who writes the shards, and which samples they hold: `shards.packing`.
"""

import errno
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from shards.errors import ConfigError, DataError, TransientError
from shards.files import is_utf8
from shards.half import worth_torch
from shards.index import Index, Modality, Shard
from shards.packing.job import Division, Job, installed
from shards.packing.processes import Crew, Here, LostError, Processes, chosen
from shards.packing.shard import Report, make
from shards.packing.tally import Tally
from shards.sources import Source, check_unchanged
from shards.utterance import SPLITS
from shards.workspace import check_target, finished, publish, resolved, workspace

MEGABYTE = 2**20

Show = Callable[[int, str, str], AbstractContextManager[Report]]
"""`shards.progress.meter`, or nothing: (samples, what is done, a remark) -> what is told of progress."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY}


@contextmanager
def silent(total: int, what: str, remark: str = "") -> Iterator[Report]:
    """Shows nothing."""
    yield lambda samples, written: None


def pack(
    source: Source,
    out: Path,
    *,
    name: str | None = None,
    dtype: str = "float16",
    seed: int = 0,
    shard_bytes: int = 64 * MEGABYTE,
    overwrite: bool = False,
    show: Show = silent,
    workers: int | None = 1,
    ray: str | None = None,
) -> tuple[Index, list[str]]:
    """Writes all samples of `source`; the order within a split is shuffled once, from `seed`.

    The bytes do not depend on who writes them. What a killed packing of the same into `out` has finished is not done
    again.

    Args:
        out: folder to make.
        name: name of the data set, the source's own by default. A generated one always starts with ``synthetic``.
        dtype: of the stored features.
        shard_bytes: about how large a shard is.
        overwrite: replace a data set that is there already.
        show: shows progress.
        workers: processes that write; None starts one a core where the work is worth it, 0 and 1 none.
        ray: address of a Ray cluster whose nodes write instead, or "local" for one of our own on this machine.

    Returns:
        The index, and what was odd or mended, in sentences.

    Raises:
        DataError: a sample is not as it should be, or the input was changed in the meantime.
        ConfigError: `out` is taken, or cannot be written; or a name is no UTF-8.
        TransientError: the disk is full; or a writing process was killed. Nothing half-written stays behind in any
            case; shards that are finished stay, in the hidden folder, where the packing was killed or interrupted.
    """
    out = resolved(out)
    packing = _Packing(Job(source, dtype, seed, shard_bytes), out)
    named = _named(name or source.name, source.synthetic)
    try:
        check_target(out, overwrite)
        _check_names(named, packing.job)
        _check_counts(source)
        _check_keys(source)
        with workspace(out, packing.job.identity(), keeping=(KeyboardInterrupt, TransientError)) as folder:
            packing.folder = folder
            packing.division = packing.job.divide()
            packing.write(folder, packing.crew(folder, workers, ray), show)
            packing.index(folder, named).save()
            check_unchanged(source)
            publish(folder, out, overwrite)
    except OSError as error:
        raise _explained(error, out, packing) from error
    except LostError as error:
        raise LostError(f"{error}; {packing.kept()}") from error
    except KeyboardInterrupt as error:
        error.add_note(packing.kept())
        raise
    return Index.load(out), packing.tally.notes() + source.notes()


class _Packing:
    """The work itself, with what it has done so far (an error message tells it)."""

    def __init__(self, job: Job, out: Path) -> None:
        self.job = job
        self.tally = Tally(job.source)
        self.division = Division((), 0)
        self.samples = 0
        self._out = out
        self.folder: Path | None = None
        self._shards: list[Shard] = []

    def crew(self, folder: Path, workers: int | None, ray: str | None) -> Crew:
        """Those who write."""
        if ray:
            from shards.packing.on_ray import OnRay

            return OnRay(self.job, folder, ray, self.division.bytes)
        write = partial(make, self.job.source, self.job.dtype, folder)
        number = chosen(workers, len(self.division.pieces), self.division.bytes)
        worth_torch(self.division.bytes, number)
        return Processes(write, number) if number > 1 else Here(write)

    def write(self, folder: Path, crew: Crew, show: Show) -> None:
        """All shards."""
        pieces = self.division.pieces
        there = len(finished(folder))
        remark = f"going on: {there:,} of {len(pieces):,} shards are there" if there else ""
        total = sum(self.job.source.counts[split] for split in SPLITS)
        with crew, show(total, "packing", remark) as tell:

            def report(samples: int, written: int) -> None:
                self.samples += samples
                tell(samples, written)

            last = sum(piece.split == "train" for piece in pieces) - 1  # of train, which is the first split
            for piece, record in zip(pieces, crew.work(pieces, report), strict=True):
                self.tally.merge(record)
                self._shards.append(record.shard)
                if piece.number == last:
                    self.tally.cleaner.check_something_finite()

    def index(self, folder: Path, name: str) -> Index:
        """The index that belongs to the shards, not saved yet."""
        source, tally = self.job.source, self.tally
        return Index(
            folder=folder,
            name=name,
            synthetic=source.synthetic,
            dtype=self.job.dtype,
            modalities={m: Modality(width=w, max_length=tally.longest[m]) for m, w in source.widths.items()},
            tasks=source.tasks,
            classes=source.classes,
            label_range=source.label_range,
            has_raw_text=source.has_raw_text,
            has_tokens=source.has_tokens,
            splits={split: source.counts[split] for split in SPLITS},
            shards=tuple(self._shards),
            statistics={m: moments.result() for m, moments in tally.moments.items()},
            non_finite={m: tally.cleaner.non_finite[m] for m in source.widths},
            source=source.provenance,
            tool_version=installed("mmsa-dist"),
            seed=self.job.seed,
        )

    def kept(self) -> str:
        """What is left of a packing that was stopped, and what to do."""
        shards = len(finished(self.folder)) if self.folder else 0
        if not shards:
            return "no shard was finished and nothing is left; start again"
        return (
            f"{shards:,} of {len(self.division.pieces):,} shards are finished and kept beside {self._out}: the same "
            "command goes on with them, another into the same folder removes them"
        )


# --- before anything is written


def _check_counts(source: Source) -> None:
    for split in SPLITS if source.tasks else ():  # without labels it is there to be predicted: any split will do
        if not source.counts.get(split):
            raise DataError(
                f"{source.where}: the {split} split is empty; a data set needs samples in each of {', '.join(SPLITS)}"
            )


def _check_names(name: str, job: Job) -> None:
    """All that the index will say of the source can be written down."""
    if not is_utf8(name):
        raise ConfigError(f"the name {name!r} has bytes that are no UTF-8; give another with --name")
    for field, value in job.source.provenance.items():
        if not is_utf8(json.dumps(value, ensure_ascii=False)):
            raise ConfigError(
                f"{job.source.where!r}: its {field}, {value!r}, has bytes that are no UTF-8, which an index cannot "
                "hold; rename it"
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


def _explained(error: OSError, out: Path, packing: _Packing) -> Exception:
    """What an OSError means to the user."""
    if error.errno in _FULL:
        with suppress(OSError):
            free = shutil.disk_usage(out.parent).free
            needed = packing.division.bytes
            return TransientError(
                f"no space left for {out}: about {needed / MEGABYTE:,.1f} MB are needed, {free / MEGABYTE:,.1f} MB are "
                f"free in {out.parent} ({os.strerror(error.errno)} after {packing.samples:,} samples); what was "
                "written is removed again: make room or choose another --out"
            )
    if error.errno in _REFUSED:
        return ConfigError(f"--out {out} cannot be written: {error.strerror}; choose another folder")
    return TransientError(f"packing into {out} failed: {error.strerror or error}; what was written is removed again")
