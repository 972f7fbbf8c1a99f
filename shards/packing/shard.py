"""One shard made: its tar, its table, and a small record that says it is finished.

The record is ``<stem>.done.json`` and is written last. It has the shard's entry for the index and all that was counted
on the way, so that nothing of a finished shard must be read again: a packing that was stopped goes on with the next.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from shards.files import sha256_of
from shards.index import Shard
from shards.packing.job import Piece
from shards.packing.tally import Tally
from shards.sources import Source, check_unchanged
from shards.tar import ShardWriter
from shards.workspace import DONE

Report = Callable[[int, int], None]
"""Is told of progress: how many samples more are packed, and how many bytes more are written."""


class Record(BaseModel):
    """A finished shard, and what was counted while it was made (see `Tally`, whose names these are)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard
    moments: dict[str, tuple[int, list[float], list[float]]]
    longest: dict[str, int]
    non_finite: dict[str, int]
    present: dict[str, int]
    absent: dict[str, int]
    remarks: dict[str, int]

    @classmethod
    def of(cls, shard: Shard, tally: Tally) -> Self:
        """The record of a shard just closed."""
        return cls(
            shard=shard,
            moments={modality: moments.parts() for modality, moments in tally.moments.items()},
            longest=tally.longest,
            non_finite=tally.cleaner.non_finite,
            present=tally.cleaner.present,
            absent=tally.cleaner.absent,
            remarks=tally.remarks,
        )

    @classmethod
    def found(cls, folder: Path, stem: str) -> Self | None:
        """The record in the folder, where there is one and its files are what it says, byte for byte."""
        try:
            record = cls.model_validate(json.loads((folder / f"{stem}{DONE}").read_bytes()))
        except (OSError, ValueError, ValidationError):
            return None
        shard = record.shard
        if (shard.url, shard.table) != (f"{stem}.tar", f"{stem}.arrow"):
            return None
        expected = ((shard.url, shard.bytes, shard.sha256), (shard.table, shard.table_bytes, shard.table_sha256))
        try:
            whole = all(
                (folder / name).stat().st_size == size and sha256_of(folder / name) == sha256
                for name, size, sha256 in expected
            )
        except OSError:
            return None
        return record if whole else None

    def save(self, folder: Path) -> None:
        """Writes it beside its files, atomically. Whether it outlives a power cut does not matter: see `found`."""
        stem = self.shard.url.removesuffix(".tar")
        part = folder / f".{stem}{DONE}.part"
        part.write_bytes(json.dumps(self.model_dump(mode="json")).encode())
        part.replace(folder / f"{stem}{DONE}")


def make(source: Source, dtype: str, folder: Path, piece: Piece, report: Report) -> Record:
    """Makes the shard in `folder`, or takes the one that an earlier packing has finished there.

    Raises:
        DataError: a sample is not as it should be, or the input was changed while it was read.
        OSError: it cannot be written.
    """
    record = Record.found(folder, piece.stem)
    if record and record.shard.samples == len(piece.samples):
        report(record.shard.samples, 0)
        return record
    tally = Tally(source)
    writer = ShardWriter(folder, piece.stem, piece.split, source.tasks)
    try:
        for number in piece.samples:
            before = writer.bytes
            writer.add(tally.prepare(source.read(piece.split, int(number)), dtype))
            report(1, writer.bytes - before)
        check_unchanged(source)
        record = Record.of(writer.close(), tally)
    except BaseException:
        writer.abandon()
        raise
    record.save(folder)
    return record
