"""`mmsa-dist pack`, `inspect` and `verify`."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shards.errors import ConfigError, DataError
from shards.index import Index
from shards.progress import console, remarks, track
from shards.sources import Source
from shards.sources.columns import Columns
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


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where to, and how."""

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder to make."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the data set. Default: from the file's."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the stored features; computing is in float32 either way."""
    seed: int = 0
    """Seed of the order in which samples are stored (and of generated or held-out ones)."""
    shard_size: Annotated[float, tyro.conf.arg(metavar="MB")] = 64
    """Megabytes after which a shard is closed."""
    overwrite: bool = False
    """Replace the data set that FOLDER holds."""

    def check(self) -> None:
        """Raises ConfigError for a number that no packing can use."""
        if not 0 < self.shard_size < math.inf:
            raise ConfigError(
                f"--shard-size {self.shard_size:g}: expected a number of megabytes above 0; 64 is the default"
            )
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: a seed is 0 or more")


@dataclass(frozen=True, kw_only=True)
class _Labelled(_Target):
    """Of a format that does not tell its labels' range."""

    label_range: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Lowest and highest possible label. Default: -1 1 where there are unimodal labels (SIMS), else -3 3."""

    def check(self) -> None:
        super().check()
        low, high = self.label_range or (-1, 1)
        if not -math.inf < low < high < math.inf:
            raise ConfigError(f"--label-range {low:g} {high:g}: expected two numbers, the lower one first")


@dataclass(frozen=True, kw_only=True)
class PackMmsa(_Labelled):
    """Packs the feature pickle of the MMSA toolkit."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.pkl")]
    """The pickle, e.g. MOSI/Processed/unaligned_50.pkl. Anything in it but arrays and plain values is refused."""
    modalities: tuple[Literal["text", "audio", "vision"], ...] = ("text", "audio", "vision")
    """Features to keep."""

    def source(self) -> Source:
        from shards.sources.mmsa import MmsaSource

        return MmsaSource(self.file, label_range=self.label_range, modalities=self.modalities)


@dataclass(frozen=True, kw_only=True)
class PackTable(_Labelled):
    """Packs a csv with one row an utterance, and an npz of features for the same ids.

    An array of the npz is (N, D), one vector an utterance; (N, T, D), padded with zeros; or, named as NAME:LENGTHS with
    a second array of lengths, sequences of their own lengths, padded or one after another.
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.csv")]
    """The csv."""
    features: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="FILE.npz")] = None
    """The npz. Without it, transcripts are all there is."""
    columns: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None
    """YAML file with any of the options below (label_text: my_column); options given here win."""
    told: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    hold_out_valid: Annotated[int, tyro.conf.arg(metavar="VIDEOS")] = 0
    """Where the split column has no valid rows: take so many training videos, chosen by the seed, as valid."""

    def source(self) -> Source:
        from shards.sources.table import TableSource

        columns = self.told
        if self.columns:
            columns = Columns.from_yaml(self.columns, overrides=self.told.model_dump(exclude_defaults=True))
        return TableSource(
            self.file,
            self.features,
            columns,
            label_range=self.label_range,
            hold_out_valid=self.hold_out_valid,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PackGenerated(_Target):
    """Generates synthetic data. Its labels need all modalities together; it says nothing about sentiment."""

    like: Literal["mosi", "mosei", "sims"] = "mosi"
    """Data set whose size, widths, lengths and labels to imitate."""
    samples: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Samples over all splits, in that data set's proportions. Default: its own number."""

    def source(self) -> Source:
        from shards.sources.generated import GeneratedSource

        return GeneratedSource(self.like, self.samples, self.seed)


FORMATS: dict[str, type[PackMmsa | PackTable | PackGenerated]] = {
    "mmsa": PackMmsa,
    "table": PackTable,
    "generated": PackGenerated,
}


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
