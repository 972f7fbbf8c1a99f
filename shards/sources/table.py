"""A csv with one row an utterance; its features stand in an npz (see `arrays` for its kinds), or elsewhere."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shards.errors import ConfigError, DataError
from shards.files import sha256_of
from shards.sources.arrays import Arrays
from shards.sources.columns import Columns, CsvColumns
from shards.sources.rows import Rows
from shards.sources.stamp import Stamp
from shards.utterance import SPLITS, Utterance

NAMELESS = ("label", "labels", "utterances")
"""Names of a csv that say nothing: its folder's is then the data set's, as of mosi/utterances.csv."""


class Features(Protocol):
    """The features of a csv's utterances, found by id.

    Attributes:
        widths: modality -> D.
        stamps: their files, as they were before anything of them was read.
        provenance: what the index keeps of their origin.
    """

    widths: dict[str, int]
    stamps: list[Stamp]
    provenance: dict[str, Any]

    def read(self, key: str) -> dict[str, np.ndarray]:
        """modality -> (T, D) float32 of the utterance, without padding."""
        ...

    def notes(self) -> list[str]: ...


class CsvSource:
    """Utterances that are the rows of a csv, with features from wherever. The csv is held in memory.

    Args:
        table: the csv.
        rows: what it holds.
        columns: what is what.
        features: makes them for these ids; None where the transcripts are all there is.
        label_range: None takes -1..1 where there are unimodal labels (SIMS), else -3..3.
        hold_out_valid: where the table has no valid rows: this many videos of train become valid, chosen by `seed`.

    Raises:
        DataError: a file is not as told; names line or column, and the nearest existing one.
        ConfigError: options contradict each other or the files.
    """

    kind: str
    synthetic = False
    has_tokens = False

    def __init__(
        self,
        table: Path,
        rows: Rows,
        columns: CsvColumns,
        features: Callable[[list[str]], Features] | None,
        *,
        label_range: tuple[float, float] | None,
        hold_out_valid: int,
        seed: int,
    ) -> None:
        if hold_out_valid < 0:
            raise ConfigError(f"--hold-out-valid {hold_out_valid}: expected a number of videos, 0 or more")
        self.where = str(table)
        self._ids = rows.ids(columns.id)
        self._splits = rows.splits(columns)
        self._texts = rows.texts(columns.text)
        self._labels = rows.labels(columns)
        self._features = features(self._ids) if features else None
        self._stamps = [rows.stamp, *(self._features.stamps if self._features else ())]
        self.name = (table.resolve().parent.name.lower() if table.stem in NAMELESS else "") or table.stem
        self.classes: dict[str, int] = {}
        self.tasks = tuple(self._labels)
        self.label_range = label_range or ((-1.0, 1.0) if len(self.tasks) > 1 else (-3.0, 3.0))
        self.has_raw_text = self._texts is not None
        self.widths = self._features.widths if self._features else {}
        if not self.widths and not self.has_raw_text:
            raise ConfigError(f"{table}: neither a transcript nor features are named; add --text, --audio or --vision")
        self.provenance: dict[str, Any] = {"format": self.kind, "file": table.name, "sha256": sha256_of(table)}
        if self._features:
            self.provenance |= self._features.provenance
        self.provenance["columns"] = columns.model_dump(exclude_defaults=True)
        if hold_out_valid:
            self._hold_out(rows.videos(columns), hold_out_valid, seed)
        self._rows_of = {s: [n for n, split in enumerate(self._splits) if split == s] for s in SPLITS}
        self.counts = {split: len(numbers) for split, numbers in self._rows_of.items()}
        if self.tasks and not self.counts["valid"]:  # without labels it is there to be predicted
            raise DataError(
                f"{table}: no row is of the valid split; hold training videos out with --hold-out-valid 10, "
                "or name another --split column"
            )

    def keys(self, split: str) -> Iterable[str]:
        return (self._ids[row] for row in self._rows_of[split])

    def read(self, split: str, number: int) -> Utterance:
        row = self._rows_of[split][number]
        return Utterance(
            key=self._ids[row],
            split=split,
            modalities=self._features.read(self._ids[row]) if self._features else {},
            labels={task: values[row] for task, values in self._labels.items()},
            raw_text=self._texts[row] if self._texts else None,
        )

    def notes(self) -> list[str]:
        held = self.provenance.get("held_out_videos")
        told = [f"valid is {self.counts['valid']} utterances of the held-out videos {', '.join(held)}"] if held else []
        return told + (self._features.notes() if self._features else [])

    def unchanged(self) -> None:
        for stamp in self._stamps:
            stamp.check()

    def _hold_out(self, videos: list[str], wanted: int, seed: int) -> None:
        present = Counter(self._splits)
        if present["valid"]:
            raise ConfigError(
                f"--hold-out-valid: {self.where} has {present['valid']} valid rows already; leave the option out"
            )
        choices = sorted({video for video, split in zip(videos, self._splits, strict=True) if split == "train"})
        if wanted >= len(choices):
            raise ConfigError(
                f"--hold-out-valid {wanted}: {self.where} has {len(choices)} training videos; hold out fewer"
            )
        chosen = {choices[n] for n in np.random.default_rng(seed).permutation(len(choices))[:wanted]}
        self._splits = [
            "valid" if s == "train" and v in chosen else s for v, s in zip(videos, self._splits, strict=True)
        ]
        self.provenance["held_out_videos"] = sorted(chosen)


class TableSource(CsvSource):
    """A csv, and an npz that is held in memory, too.

    Args:
        table: the csv.
        features: the npz; None where the transcripts are all there is.
        columns: what is what.
        label_range: as `CsvSource`, and the others too.
    """

    kind = "table"

    def __init__(
        self,
        table: Path,
        features: Path | None = None,
        columns: Columns | None = None,
        *,
        label_range: tuple[float, float] | None = None,
        hold_out_valid: int = 0,
        seed: int = 0,
    ) -> None:
        columns = columns or Columns()
        named = [option for option in ("text_features", "audio", "vision") if getattr(columns, option)]
        if named and not features:
            raise ConfigError(
                f"--{named[0].replace('_', '-')} names an array, but no .npz file is given; add it after {table}"
            )

        def arrays(ids: list[str]) -> Features:
            assert features
            found = Arrays(features, columns)
            found.check_all_there(ids, table)
            return found

        super().__init__(
            table,
            Rows(table),
            columns,
            arrays if features else None,
            label_range=label_range,
            hold_out_valid=hold_out_valid,
            seed=seed,
        )
