"""A csv with one row an utterance, and an npz of features for the same ids (see `arrays` for their kinds)."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ConfigError, DataError
from shards.files import sha256_of
from shards.sources.arrays import Arrays
from shards.sources.columns import Columns
from shards.sources.rows import Rows
from shards.utterance import SPLITS, Utterance


class TableSource:
    """Reads a csv and an npz. Both are held in memory.

    Args:
        table: the csv.
        features: the npz; None where the transcripts are all there is.
        columns: what is what.
        label_range: None takes -1..1 where there are unimodal labels (SIMS), else -3..3.
        hold_out_valid: where the table has no valid rows: this many videos of train become valid, chosen by `seed`.

    Raises:
        DataError: a file is not as told; names line or column, and the nearest existing one.
        ConfigError: options contradict each other or the files.
    """

    synthetic = False
    has_tokens = False

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
        if hold_out_valid < 0:
            raise ConfigError(f"--hold-out-valid {hold_out_valid}: expected a number of videos, 0 or more")
        self.where = str(table)
        rows = Rows(table)
        self._ids = rows.ids(columns.id)
        self._splits = rows.splits(columns.split)
        self._texts = rows.texts(columns.text)
        self._labels = rows.labels(columns)
        self._arrays = Arrays(features, columns) if features else None
        named = [option for option in ("text_features", "audio", "vision") if getattr(columns, option)]
        if named and not features:
            raise ConfigError(
                f"--{named[0].replace('_', '-')} names an array, but no .npz file is given; add it after {table}"
            )
        if self._arrays:
            self._arrays.check_all_there(self._ids, table)
        self.name = table.stem
        self.classes: dict[str, int] = {}
        self.tasks = tuple(self._labels)
        self.label_range = label_range or ((-1.0, 1.0) if len(self.tasks) > 1 else (-3.0, 3.0))
        self.has_raw_text = self._texts is not None
        self.widths = self._arrays.widths if self._arrays else {}
        if not self.widths and not self.has_raw_text:
            raise ConfigError(f"{table}: neither a transcript nor features are named; add --text, --audio or --vision")
        self.provenance: dict[str, Any] = {"format": "table", "file": table.name, "sha256": sha256_of(table)}
        if features:
            self.provenance |= {"features_file": features.name, "features_sha256": sha256_of(features)}
        self.provenance["columns"] = columns.model_dump(exclude_defaults=True)
        if hold_out_valid:
            self._hold_out(rows.videos(columns), hold_out_valid, seed)
        self._rows_of = {s: [n for n, split in enumerate(self._splits) if split == s] for s in SPLITS}
        self.counts = {split: len(numbers) for split, numbers in self._rows_of.items()}
        if not self.counts["valid"]:
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
            modalities=self._arrays.read(self._ids[row]) if self._arrays else {},
            labels={task: values[row] for task, values in self._labels.items()},
            raw_text=self._texts[row] if self._texts else None,
        )

    def notes(self) -> list[str]:
        held = self.provenance.get("held_out_videos")
        unused = self._arrays.unused(len(self._ids)) if self._arrays else []
        return (
            [f"valid is {self.counts['valid']} utterances of the held-out videos {', '.join(held)}"] if held else []
        ) + unused

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
