"""The options of `mmsa-dist pack`, one class a format; each makes its source.

A format is added here and in `FORMATS`; its reader stands in `shards.sources`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shards.errors import ConfigError
from shards.sources import Source
from shards.sources.columns import Columns


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """What every format needs: where to, and how."""

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

    @abstractmethod
    def source(self) -> Source:
        """The reader of the format.

        Raises:
            DataError: the input is not what the format says.
        """


@dataclass(frozen=True, kw_only=True)
class Labelled(Target, ABC):
    """Of a format that does not tell its labels' range."""

    label_range: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Lowest and highest possible label. Default: -1 1 where there are unimodal labels (SIMS), else -3 3."""

    def check(self) -> None:
        super().check()
        low, high = self.label_range or (-1, 1)
        if not -math.inf < low < high < math.inf:
            raise ConfigError(f"--label-range {low:g} {high:g}: expected two numbers, the lower one first")


@dataclass(frozen=True, kw_only=True)
class PackMmsa(Labelled):
    """Packs the feature pickle of the MMSA toolkit."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.pkl")]
    """The pickle, e.g. MOSI/Processed/unaligned_50.pkl. Anything in it but arrays and plain values is refused."""
    modalities: tuple[Literal["text", "audio", "vision"], ...] = ("text", "audio", "vision")
    """Features to keep."""

    def source(self) -> Source:
        from shards.sources.mmsa import MmsaSource

        return MmsaSource(self.file, label_range=self.label_range, modalities=self.modalities)


@dataclass(frozen=True, kw_only=True)
class PackTable(Labelled):
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
class PackGenerated(Target):
    """Generates synthetic data. Its labels need all modalities together; it says nothing about sentiment."""

    like: Literal["mosi", "mosei", "sims"] = "mosi"
    """Data set whose size, widths, lengths and labels to imitate."""
    samples: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Samples over all splits, in that data set's proportions. Default: its own number."""

    def source(self) -> Source:
        from shards.sources.generated import GeneratedSource

        return GeneratedSource(self.like, self.samples, self.seed)


FORMATS: dict[str, type[Target]] = {
    "mmsa": PackMmsa,
    "table": PackTable,
    "generated": PackGenerated,
}
"""Name on the command line -> its options."""
