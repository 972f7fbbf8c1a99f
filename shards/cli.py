"""`mmsa-dist pack`, `inspect` and `verify`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shards.errors import ConfigError, DataError
from shards.formats import FORMATS
from shards.index import Index
from shards.progress import console, remarks, track
from shards.suggest import nearest
from shards.write import MEGABYTE

PACK_HELP = """usage: mmsa-dist pack FORMAT ... --out FOLDER

Writes a data set as WebDataset shards with an index.

formats:
  mmsa FILE.pkl               the feature pickle of the MMSA toolkit, aligned or unaligned
  table FILE.csv [FILE.npz]   a csv with one row an utterance, and features for the same ids
  generated                   synthetic data at the size of a published set

examples:
  mmsa-dist pack mmsa MOSI/Processed/unaligned_50.pkl --out data/mosi
  mmsa-dist pack table utterances.csv features.npz --split split_official --audio audio_opensmile --out data/mosi
  mmsa-dist pack generated --like mosi --out data/synthetic

`mmsa-dist pack FORMAT --help` lists the options of a format."""

_TYRO = (tyro.conf.FlagCreatePairsOff,)
"""A flag has no --no- twin."""


def pack(argv: list[str]) -> int:
    """Entry of `mmsa-dist pack`."""
    from shards.write import pack as write

    if not argv or argv[0] in ("-h", "--help"):
        print(PACK_HELP)
        return 0 if argv else 2
    if argv[0] not in FORMATS:
        raise ConfigError(f"pack: unknown format {argv[0]!r}{nearest(argv[0], FORMATS)}")
    options = tyro.cli(FORMATS[argv[0]], args=argv[1:], prog=f"mmsa-dist pack {argv[0]}", config=_TYRO)
    options.check()
    index, notes = write(
        options.source(),
        options.out,
        name=options.name,
        dtype=options.dtype,
        seed=options.seed,
        shard_bytes=int(options.shard_size * MEGABYTE),
        overwrite=options.overwrite,
        show=track,
    )
    for note in notes:
        remarks.print(f"note: {note}", soft_wrap=True, markup=False)
    stored = sum(shard.bytes + shard.table_bytes for shard in index.shards) / MEGABYTE
    counts = ", ".join(f"{split} {count:,}" for split, count in index.splits.items())
    modalities = ", ".join(f"{m} {part.width}" for m, part in index.modalities.items())
    what = modalities or "transcripts only"
    print(f"{index.name}: {counts} samples; {what}; {len(index.shards)} shards, {stored:,.1f} MB")
    print(f"see what is inside with: mmsa-dist inspect {options.out}")
    return 0


@dataclass(frozen=True)
class Inspect:
    """Shows what a packed data set holds."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder that `mmsa-dist pack` wrote."""
    json: bool = False
    """Print it as JSON."""


def inspect(argv: list[str]) -> int:
    """Entry of `mmsa-dist inspect`."""
    from shards.inspect import render, summary

    options = tyro.cli(Inspect, args=argv, prog="mmsa-dist inspect", config=_TYRO)
    told = summary(Index.load(options.folder))
    if options.json:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        console.print(render(told))
    return 0


@dataclass(frozen=True)
class Verify:
    """Checks every checksum of a packed data set, and that each shard holds what the index says."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder that `mmsa-dist pack` wrote."""


def verify(argv: list[str]) -> int:
    """Entry of `mmsa-dist verify`."""
    from shards.verify import check_shard

    options = tyro.cli(Verify, args=argv, prog="mmsa-dist verify")
    index = Index.load(options.folder)
    numbers = range(len(index.shards))
    wrong = [sentence for n in track(numbers, len(numbers), "verifying") for sentence in check_shard(index, n)]
    if wrong:
        raise DataError(
            f"{options.folder}: {len(wrong)} of {2 * len(numbers)} files are not what was packed; copy them again, or "
            "pack again:\n  " + "\n  ".join(wrong)
        )
    print(f"{index.name}: {len(numbers)} shards, {index.num_samples:,} samples, every checksum as packed")
    return 0
