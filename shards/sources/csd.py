"""Computational sequences of the CMU-MultimodalSDK (``.csd``), cut to the segments of a label sequence.

The label sequence has an entry a video, and in it a step a segment: its interval and its labels. The segment at step 3
of ``video`` is called ``video[3]``, as the SDK calls it: counted from 0, in the order of the file. Other sequences have
the whole video, or pieces of it, with times in seconds from the video's start; each gives a segment those of its steps
that lie in it, wholly or in part (see `alignment`). Where labels *and* sequence are cut to segments already, the entry
of the same name is taken whole, whatever its times.

Shapes: S steps of a sequence in one video, n steps of a segment, W its words, D width.
"""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.errors import ConfigError, DataError
from shards.files import sha256_of
from shards.sources.alignment import within, word_means
from shards.sources.folds import read_folds
from shards.sources.sequence import ComputationalSequence
from shards.sources.stamp import Stamp
from shards.suggest import counted
from shards.utterance import MODALITIES, SPLITS, Utterance

PAUSES = frozenset({"sp", ""})
"""What stands between words in a sequence of words: a short pause."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """One step of the label sequence: seconds from `start` to `end`."""

    key: str
    video: str
    start: float
    end: float
    label: float


class CsdSource:
    """Reads computational sequences, a segment at a time; none is held in memory.

    Args:
        labels: the label sequence.
        features: modality -> sequence of its features.
        words: a sequence of words, for transcripts.
        align: "segments": each modality keeps its own steps. "words": one step a word, the mean of the modality's steps
            during that word; words are those of `words` without pauses or, without that, the steps of the text.
        folds: one file or three, see `read_folds`.
        label_column: column of the labels that is the label; 0 is the sentiment of MOSI and of MOSEI.
        label_range: None takes -3..3.

    Raises:
        DataError: a file is not what it should be; names file and entry.
        ConfigError: options contradict each other.
    """

    synthetic = False
    has_tokens = False
    tasks: tuple[str, ...] = ("M",)

    def __init__(
        self,
        labels: Path,
        features: Mapping[str, Path],
        folds: tuple[Path, ...],
        *,
        words: Path | None = None,
        align: Literal["segments", "words"] = "segments",
        label_column: int = 0,
        label_range: tuple[float, float] | None = None,
    ) -> None:
        if not features and not words:
            raise ConfigError("neither features nor words are named; add --text, --audio, --vision or --words")
        if align == "words" and not words and "text" not in features:
            raise ConfigError("--align words: which sequence has the words? name it with --words, or --text")
        self.where = str(labels)
        self.name = labels.stem.lower()
        self.classes: dict[str, int] = {}
        self.label_range = label_range or (-3.0, 3.0)
        self._align = align
        self._labels_path, self._folds_paths, self._label_column = labels, folds, label_column
        self._stamps = [
            Stamp.of(labels, "a computational sequence (.csd)"),
            *(Stamp.of(path, "lists of video ids") for path in folds),
        ]
        self._words = ComputationalSequence(words, "words") if words else None
        self._features = {m: ComputationalSequence(features[m]) for m in MODALITIES if m in features}
        self.widths = {modality: sequence.width for modality, sequence in self._features.items()}
        self.has_raw_text = words is not None
        self._notes: list[str] = []
        segments = self._labelled(labels, label_column)
        names = {segment.key for its in segments.values() for segment in its}
        self._cut = [sequence for sequence in self._every() if names.issuperset(chain(*sequence.videos.values()))]
        self._segments = self._in_folds(self._with_steps(segments), read_folds(folds))
        self.counts = {split: len(segments) for split, segments in self._segments.items()}
        for sequence in self._every():
            sequence.close()

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Every file with its checksum. Takes a while for large ones, so only once."""
        files = {"words": self._words, **self._features}
        told = {"format": "csd", "file": self._labels_path.name, "sha256": sha256_of(self._labels_path)}
        for what, sequence in files.items():
            if sequence:
                told |= {f"{what}_file": sequence.path.name, f"{what}_sha256": sha256_of(sequence.path)}
        folds = {path.name: sha256_of(path) for path in self._folds_paths}
        return told | {"folds": folds, "align": self._align, "label_column": self._label_column}

    def unchanged(self) -> None:
        for stamp in (*self._stamps, *(sequence.stamp for sequence in self._every())):
            stamp.check()

    def keys(self, split: str) -> Iterable[str]:
        return (segment.key for segment in self._segments[split])

    def read(self, split: str, number: int) -> Utterance:
        segment = self._segments[split][number]
        said, words = self._spoken(self._words, segment) if self._words else (None, None)
        modalities: dict[str, np.ndarray] = {}
        remarks: tuple[str, ...] = ()
        if self._align == "words":
            modalities, remarks = self._by_word(segment, self._text_steps(segment) if words is None else words)
        else:
            for modality, sequence in self._features.items():
                entries, _, steps = self._steps(sequence, segment)
                modalities[modality] = sequence.features(entries, steps)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is then counted as such
            modalities = {modality: values.astype(np.float32) for modality, values in modalities.items()}
        return Utterance(
            key=segment.key,
            split=split,
            modalities=modalities,
            labels={"M": segment.label},
            raw_text=None if said is None else " ".join(said),
            remarks=remarks,
        )

    def notes(self) -> list[str]:
        return list(self._notes)

    # --- one segment

    def _steps(self, sequence: ComputationalSequence, segment: _Segment) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Entries with steps of the segment, the intervals (S, 2) of all their steps, and which (n,) are in it."""
        entries = self._entries(sequence, segment)
        intervals = sequence.intervals(entries)
        if sequence in self._cut:
            return entries, intervals, np.argsort(intervals[:, 0], kind="stable")
        return entries, intervals, within(intervals, segment.start, segment.end)

    def _entries(self, sequence: ComputationalSequence, segment: _Segment) -> list[str]:
        entries = sequence.videos.get(segment.video, [])
        return [name for name in entries if name == segment.key] if sequence in self._cut else entries

    def _spoken(self, words: ComputationalSequence, segment: _Segment) -> tuple[list[str], np.ndarray]:
        """The segment's words without pauses, and their intervals (W, 2)."""
        entries, intervals, steps = self._steps(words, segment)
        said = words.words(entries, steps)
        kept = [n for n, word in enumerate(said) if word.strip() not in PAUSES]
        return [said[n].strip() for n in kept], intervals[steps[kept]]

    def _text_steps(self, segment: _Segment) -> np.ndarray:
        """Intervals (W, 2) of the segment's text features, which have a step a word."""
        _, intervals, steps = self._steps(self._features["text"], segment)
        return intervals[steps]

    def _by_word(self, segment: _Segment, words: np.ndarray) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """modality -> (W, D), and what is odd. `words` (W, 2) count whole, even where the segment ends within one."""
        modalities, remarks = {}, []
        for modality, sequence in self._features.items():
            entries = self._entries(sequence, segment)
            intervals = sequence.intervals(entries)
            steps = within(intervals, words[:, 0].min(initial=np.inf), words[:, 1].max(initial=-np.inf))
            means, count = word_means(sequence.features(entries, steps), intervals[steps], words)
            if count.any():
                modalities[modality] = means
                if not count.all():
                    remarks.append(f"{modality}: {{:,}} samples have words during which it has no step; zeros there")
        return modalities, tuple(remarks)

    # --- which segments there are

    def _every(self) -> list[ComputationalSequence]:
        """All sequences but the labels; the smallest first, as a rule."""
        return [*([self._words] if self._words else []), *self._features.values()]

    def _labelled(self, path: Path, column: int) -> dict[str, list[_Segment]]:
        """video -> its segments. An entry ``video[3]`` with one step is that segment already."""
        found: dict[str, list[_Segment]] = {}
        with closing(ComputationalSequence(path)) as labels:
            if not 0 <= column < labels.width:
                raise ConfigError(f"--label-column {column}: {path} has {labels.width} columns, the first is 0")
            for video, entry in ((video, entry) for video, entries in labels.videos.items() for entry in entries):
                intervals = labels.intervals([entry])
                values = labels.features([entry], np.arange(len(intervals)))[:, column]
                alone = "[" in entry and len(intervals) == 1
                for number, ((start, end), value) in enumerate(zip(intervals.tolist(), values.tolist(), strict=True)):
                    key = entry if alone else f"{entry}[{number}]"
                    found.setdefault(video, []).append(_Segment(key, video, start, end, value))
        return found

    def _with_steps(self, segments: dict[str, list[_Segment]]) -> dict[str, list[_Segment]]:
        """Those segments of which some sequence has a step, or a word; the SDK leaves out the others, too."""
        needed = self._every()[:1] if self._align == "words" else self._every()
        kept: dict[str, list[_Segment]] = {}
        left_out: list[_Segment] = []
        for video, its in segments.items():
            found = [segment for segment in its if any(self._has_step(sequence, segment) for sequence in needed)]
            left_out += [segment for segment in its if segment not in found]
            kept[video] = found
        if left_out:
            first, what = left_out[0], "word" if self._align == "words" else "step"
            self._notes.append(
                f"{counted(len(left_out), 'segment')} without a {what} left out, e.g. {first.key!r} "
                f"({first.start:g} to {first.end:g} s)"
            )
        return kept

    def _has_step(self, sequence: ComputationalSequence, segment: _Segment) -> bool:
        if sequence is self._words:
            return bool(self._spoken(sequence, segment)[0])
        return bool(len(self._steps(sequence, segment)[2]))

    def _in_folds(self, segments: dict[str, list[_Segment]], folds: dict[str, str]) -> dict[str, list[_Segment]]:
        """split -> its segments, in the order of the videos' names."""
        found: dict[str, list[_Segment]] = {split: [] for split in SPLITS}
        strange = [video for video in segments if video not in folds]
        if len(strange) == len(segments):
            raise DataError(
                f"{self.where}: not one of its {counted(len(segments), 'video')}, e.g. {strange[0]!r}, is in the "
                f"folds, e.g. {next(iter(folds))!r}; are they of this data set?"
            )
        for video, its in segments.items():
            if video in folds:
                found[folds[video]] += its
        if strange:
            number = sum(len(segments[video]) for video in strange)
            self._notes.append(
                f"{counted(number, 'segment')} of {counted(len(strange), 'video')} in no fold, e.g. {strange[0]!r}; "
                "left out"
            )
        if missing := [video for video in folds if video not in segments]:
            self._notes.append(f"{counted(len(missing), 'video')} of the folds without labels, e.g. {missing[0]!r}")
        return found
