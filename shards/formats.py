"""The options of `mmsa-dist pack`, one class a format; each makes its source.

A format is added here and in `FORMATS`; its reader stands in `shards.sources`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from shards.errors import ConfigError
from shards.options import Flag, option
from shards.remote.url import names_address
from shards.sources import Source
from shards.sources.columns import Columns, CsvColumns, FileColumns

Told = TypeVar("Told", bound=CsvColumns)


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """What every format needs: where to, and how."""

    out: Annotated[Path, option("FOLDER")]
    """Folder to make."""
    name: Annotated[str | None, option("NAME")] = None
    """Name of the data set. Default: from the file's, or its folder's."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the stored features; computing is in float32 either way."""
    seed: int = 0
    """Seed of the order in which samples are stored (and of generated or held-out ones)."""
    shard_size: Annotated[float, option("MB")] = 64
    """About how many megabytes a shard has."""
    overwrite: Flag = False
    """Replace the data set that FOLDER holds."""
    workers: Annotated[int | None, option("N")] = None
    """Processes that pack, 1 for none beside this one. Default: one a core, at most 16, fewer where there is little to
    do. The result does not depend on it."""
    ray: Flag = False
    """Let Ray tasks pack: on the cluster of --address or RAY_ADDRESS, else on a Ray of this machine alone. All nodes
    need FOLDER and the input at the same path."""
    address: Annotated[str | None, option("HOST:PORT")] = None
    """Of the Ray cluster; auto finds the one of this machine."""

    def check(self) -> None:
        """Raises ConfigError for what no packing can use."""
        if names_address(self.out):
            raise ConfigError(f"--out {self.out} is an address; pack into a folder here, then copy it there whole")
        if not 0 < self.shard_size < math.inf:
            raise ConfigError(
                f"--shard-size {self.shard_size:g}: expected a number of megabytes above 0; 64 is the default"
            )
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: a seed is 0 or more")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: expected a number of processes, 0 or more")
        if self.address and not self.ray:
            raise ConfigError(f"--address {self.address} is that of a Ray cluster; add --ray")
        if self.ray and self.workers is not None:
            raise ConfigError(
                "--workers are processes of this machine, --ray packs on a cluster; leave one of them out"
            )

    @abstractmethod
    def source(self) -> Source:
        """The reader of the format.

        Raises:
            DataError: the input is not what the format says.
        """


@dataclass(frozen=True, kw_only=True)
class Labelled(Target, ABC):
    """Of a format that does not tell its labels' range."""

    label_range: Annotated[tuple[float, float] | None, option("LOW HIGH")] = None
    """Lowest and highest possible label. Default: -1 1 where there are unimodal labels (SIMS), else -3 3."""

    def check(self) -> None:
        super().check()
        low, high = self.label_range or (-1, 1)
        if not -math.inf < low < high < math.inf:
            raise ConfigError(f"--label-range {low:g} {high:g}: expected two numbers, the lower one first")


@dataclass(frozen=True, kw_only=True)
class PackMmsa(Labelled):
    """Packs the feature pickle of the MMSA toolkit."""

    file: Annotated[tyro.conf.Positional[Path], option("FILE.pkl")]
    """The pickle, e.g. MOSI/Processed/unaligned_50.pkl. Anything in it but arrays and plain values is refused."""
    modalities: tuple[Literal["text", "audio", "vision"], ...] = ("text", "audio", "vision")
    """Features to keep."""

    def source(self) -> Source:
        from shards.sources.mmsa import MmsaSource

        return MmsaSource(self.file, label_range=self.label_range, modalities=self.modalities)


@dataclass(frozen=True, kw_only=True)
class PackMult(Target):
    """Packs the pickle of MulT: of MOSI and MOSEI with intensities as labels, of IEMOCAP with four emotions."""

    file: Annotated[tyro.conf.Positional[Path], option("FILE.pkl")]
    """The pickle, e.g. mosi_data_noalign.pkl. Anything in it but arrays and plain values is refused."""
    modalities: tuple[Literal["text", "audio", "vision"], ...] = ("text", "audio", "vision")
    """Features to keep."""

    def source(self) -> Source:
        from shards.sources.mult import MultSource

        return MultSource(self.file, modalities=self.modalities)


@dataclass(frozen=True, kw_only=True)
class Tabular(Labelled, ABC):
    """Of a format with a csv of one row an utterance."""

    file: Annotated[tyro.conf.Positional[Path], option("FILE.csv")]
    """The csv."""
    columns: Annotated[Path | None, option("FILE.yaml")] = None
    """YAML file with any of the options below (label_text: my_column); options given here win."""
    hold_out_valid: Annotated[int, option("VIDEOS")] = 0
    """Where the split column has no valid rows: take so many training videos, chosen by the seed, as valid."""

    def chosen(self, told: Told) -> Told:
        """What the YAML file and the options `told` say together."""
        if not self.columns:
            return told
        return type(told).from_yaml(self.columns, overrides=told.model_dump(exclude_defaults=True))


@dataclass(frozen=True, kw_only=True)
class PackTable(Tabular):
    """Packs a csv with one row an utterance, and an npz of features for the same ids.

    An array of the npz is (N, D), one vector an utterance; (N, T, D), padded with zeros; or, named as NAME:LENGTHS with
    a second array of lengths, sequences of their own lengths, padded or one after another.
    """

    features: Annotated[tyro.conf.Positional[Path | None], option("FILE.npz")] = None
    """The npz. Without it, transcripts are all there is."""
    told: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)

    def source(self) -> Source:
        from shards.sources.table import TableSource

        return TableSource(
            self.file,
            self.features,
            self.chosen(self.told),
            label_range=self.label_range,
            hold_out_valid=self.hold_out_valid,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PackFolder(Tabular):
    """Packs a csv with one row an utterance, as the label.csv of MMSA's raw sets, and a folder of features in files.

    An utterance has a .npy for each modality, or one .npz, as --files says; an array is (T, D), of any length.
    """

    features: Annotated[tyro.conf.Positional[Path], option("FOLDER")]
    """The folder of features."""
    strict: Flag = False
    """Stop where a file is missing. Without it, the utterance lacks that modality."""
    told: Annotated[FileColumns, tyro.conf.arg(name="")] = field(default_factory=FileColumns)

    def source(self) -> Source:
        from shards.sources.folder import FolderSource

        return FolderSource(
            self.file,
            self.features,
            self.chosen(self.told),
            strict=self.strict,
            label_range=self.label_range,
            hold_out_valid=self.hold_out_valid,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PackCsd(Labelled):
    """Packs computational sequences (.csd) of the CMU-MultimodalSDK, cut to the segments that have labels.

    For example: mmsa-dist pack csd --labels CMU_MOSI_Opinion_Labels.csd --folds folds.yaml --out data/mosi
    --text CMU_MOSI_TimestampedWordVectors.csd --audio CMU_MOSI_COVAREP.csd --vision CMU_MOSI_Visual_Facet_42.csd
    """

    label_range: Annotated[tuple[float, float] | None, option("LOW HIGH")] = None
    """Lowest and highest possible label. Default: -3 3."""
    labels: Annotated[Path, option("FILE.csd")]
    """Sequence of the labels: its intervals are the segments, which become the samples."""
    folds: Annotated[tuple[Path, ...], option("FILE...")]
    """Which video is in which split: a YAML or JSON file with a list of video ids under each of train, valid and test,
    or three text files in that order, one id a line."""
    text: Annotated[Path | None, option("FILE.csd")] = None
    """Sequence of text features, e.g. word vectors."""
    audio: Annotated[Path | None, option("FILE.csd")] = None
    """Sequence of audio features, e.g. COVAREP."""
    vision: Annotated[Path | None, option("FILE.csd")] = None
    """Sequence of vision features, e.g. Facet or OpenFace."""
    words: Annotated[Path | None, option("FILE.csd")] = None
    """Sequence of the words themselves (TimestampedWords): makes the transcripts. Pauses (sp) are left out."""
    align: Literal["segments", "words"] = "segments"
    """segments: each modality keeps its own steps. words: one step a word, the mean of those during it, or zeros where
    there are none; words are those of --words or, without it, the steps of --text."""
    label_column: Annotated[int, option("N")] = 0
    """Column of the labels to take. MOSEI: 0 sentiment, 1 happy, 2 sad, 3 anger, 4 surprise, 5 disgust, 6 fear."""

    def source(self) -> Source:
        from shards.sources.csd import CsdSource

        given = {"text": self.text, "audio": self.audio, "vision": self.vision}
        return CsdSource(
            self.labels,
            {modality: path for modality, path in given.items() if path},
            self.folds,
            words=self.words,
            align=self.align,
            label_column=self.label_column,
            label_range=self.label_range,
        )


@dataclass(frozen=True, kw_only=True)
class PackGenerated(Target):
    """Generates synthetic data. Its labels need all modalities together; it says nothing about sentiment."""

    like: Literal["mosi", "mosei", "sims", "iemocap"] = "mosi"
    """Data set whose size, widths, lengths and labels to imitate."""
    samples: Annotated[int | None, option("N")] = None
    """Samples over all splits, in that data set's proportions. Default: its own number."""

    def source(self) -> Source:
        from shards.sources.generated import GeneratedSource

        return GeneratedSource(self.like, self.samples, self.seed)


FORMATS: dict[str, type[Target]] = {
    "mmsa": PackMmsa,
    "mult": PackMult,
    "table": PackTable,
    "folder": PackFolder,
    "csd": PackCsd,
    "generated": PackGenerated,
}
"""Name on the command line -> its options."""
