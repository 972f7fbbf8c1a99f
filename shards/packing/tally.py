"""What is counted while samples are packed: for one shard, or merged for all of them."""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from shards.errors import DataError
from shards.half import to_float16
from shards.moments import Moments
from shards.sources import Source
from shards.sources.clean import Cleaner
from shards.utterance import Utterance

if TYPE_CHECKING:
    from shards.packing.shard import Record


class Tally:
    """Makes samples ready to be stored, and counts what the index and the report need.

    Attributes:
        cleaner: has counted what was mended.
        moments: modality -> those of the train split.
        longest: modality -> steps of the longest sample, 1 where there is none.
        remarks: the samples' `Utterance.remarks` -> in how many.
    """

    def __init__(self, source: Source) -> None:
        self._where = source.where
        self.cleaner = Cleaner(source)
        self.moments = {modality: Moments(width) for modality, width in source.widths.items()}
        self.longest = dict.fromkeys(source.widths, 1)
        self.remarks: Counter[str] = Counter()

    def prepare(self, utterance: Utterance, dtype: str) -> Utterance:
        """The sample as it is stored: clean, in the data set's dtype, counted.

        Raises:
            DataError: it is not as it should be, or has a value beyond the dtype.
        """
        halves: dict[str, np.ndarray] = {}
        if dtype == "float16":  # what can be stored is finite: one look at half the bytes, and mostly the only one
            converted, finite = to_float16(*utterance.modalities.values())
            halves = dict(zip(utterance.modalities, converted, strict=True)) if finite else {}
        utterance = self.cleaner.clean(utterance, finite=bool(halves))
        if utterance.remarks:
            self.remarks.update(utterance.remarks)
        stored: dict[str, np.ndarray] = {}
        for modality, values in utterance.modalities.items():
            self.longest[modality] = max(self.longest[modality], len(values))
            if utterance.split == "train":
                self.moments[modality].add(values)
            stored[modality] = halves[modality] if halves else self._stored(modality, values, dtype, utterance)
        return replace(utterance, modalities=stored)

    def merge(self, record: "Record") -> None:
        """Takes in what was counted for the next shard. The order matters to the last bits of the moments."""
        for mine, its in (
            (self.cleaner.non_finite, record.non_finite),
            (self.cleaner.present, record.present),
            (self.cleaner.absent, record.absent),
            (self.remarks, record.remarks),
        ):
            mine.update(its)
        for modality, parts in record.moments.items():
            self.moments[modality].merge(Moments.from_parts(*parts))
            self.longest[modality] = max(self.longest[modality], record.longest[modality])

    def notes(self) -> list[str]:
        """What was odd or mended, in sentences."""
        return self.cleaner.notes() + [remark.format(count) for remark, count in self.remarks.items()]

    def _stored(self, modality: str, values: np.ndarray, dtype: str, utterance: Utterance) -> np.ndarray:
        if dtype == "float16":
            (stored,), fits = to_float16(values)
        else:
            with np.errstate(over="ignore"):
                stored = values.astype(dtype, copy=False)
            fits = stored is values or bool(np.isfinite(stored).all())
        if not fits:
            raise DataError(
                f"{self._where}: {utterance.split}, id {utterance.key!r}: {modality} has a value of "
                f"{np.abs(values).max():g}, more than {dtype} holds ({np.finfo(dtype).max:g})"
                + ("; pack with --dtype float32" if dtype == "float16" else "; correct it")
            )
        return stored
