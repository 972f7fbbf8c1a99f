"""What every sample goes through on its way in: finite values, the declared width, labels in range, nothing empty.

Shapes: T steps, D width.
"""

import math
from collections import Counter
from dataclasses import replace

import numpy as np

from shards.errors import DataError
from shards.sources import Source
from shards.suggest import counted, has, was
from shards.utterance import Utterance


class Cleaner:
    """Checks samples of one source and counts what it had to mend.

    Args:
        source: of the samples.
        unlabelled: they are to be predicted: a label that is NaN stands for none. Otherwise only a unimodal one may.

    Attributes:
        non_finite: modality -> values that were NaN or infinite; they become zero.
        present: modality -> samples that have it.
        absent: modality -> samples that lack it: no step, or no finite value at all.
    """

    def __init__(self, source: Source, unlabelled: bool = False) -> None:
        self._source = source
        self._unlabelled = unlabelled
        self.non_finite: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        self.absent: Counter[str] = Counter()

    def clean(self, utterance: Utterance, finite: bool = False) -> Utterance:
        """The sample as it may be stored.

        Args:
            finite: every value is known to be.

        Raises:
            DataError: wrong shape, label out of range, no valid unicode, or nothing in it; names file, split, id and
                value.
        """
        self._check_unicode(utterance)
        modalities: dict[str, np.ndarray] = {}
        for name, width in self._source.widths.items():
            array = self._values(name, utterance.modalities.get(name), width, utterance, finite)
            if array is None:
                self.absent[name] += 1
            else:
                self.present[name] += 1
                modalities[name] = array
        words = utterance.raw_text is not None and utterance.raw_text.strip() != ""
        if not modalities and not words and (utterance.tokens is None or not len(utterance.tokens)):
            raise DataError(
                f"{self._at(utterance)}: every modality has length zero and there is no text; remove the sample"
            )
        labels = utterance.labels
        if self._unlabelled:
            labels = {task: label for task, label in labels.items() if not math.isnan(label)}
        for task, label in labels.items():
            self._check_label(task, label, utterance)
        return replace(utterance, modalities=modalities, labels=labels)

    def check_something_finite(self) -> None:
        """Call after the train split.

        Raises:
            DataError: a modality of the source was absent from every sample so far.
        """
        for name in self._source.widths:
            if not self.present[name]:
                raise DataError(
                    f"{self._source.where}: {name} has not one finite value in {self.absent[name]:,} train samples, so "
                    f"there is nothing to learn from; leave {name} out (see --help) or extract it again"
                )

    def notes(self) -> list[str]:
        """What was mended, in sentences."""
        known = getattr(self._source, "files_missing", {})  # the source says so itself, with an example
        zeroed = [
            f"{name}: {counted(n, 'value')} {was(n)} NaN or infinite; zeroed"
            for name, n in self.non_finite.items()
            if n
        ]
        absent = [
            f"{name}: {counted(n, 'sample')} {has(n)} none; marked absent"
            for name, n in self.absent.items()
            if n and n != known.get(name)
        ]
        return zeroed + absent

    def _at(self, utterance: Utterance) -> str:
        return f"{self._source.where}: {utterance.split}, id {utterance.key!r}"

    def _values(
        self, name: str, array: np.ndarray | None, width: int, utterance: Utterance, known: bool
    ) -> np.ndarray | None:
        if array is None or not array.size:
            return None
        if array.ndim != 2 or array.shape[1] != width:
            raise DataError(f"{self._at(utterance)}: {name} has shape {array.shape}, expected (steps, {width})")
        if known or (finite := np.isfinite(array)).all():
            return array
        self.non_finite[name] += int(array.size - np.count_nonzero(finite))
        # zeros would pretend to be measured: a sample with no finite value lacks the modality
        return np.where(finite, array, np.zeros((), array.dtype)) if finite.any() else None

    def _check_unicode(self, utterance: Utterance) -> None:
        """Half of a surrogate pair is a character in Python and in no file."""
        for what, text in (("id", utterance.key), ("transcript", utterance.raw_text or "")):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{self._at(utterance)}: the {what} is not valid unicode: character {error.start} is "
                    f"{text[error.start]!r}; correct it"
                ) from error

    def _check_label(self, task: str, label: float, utterance: Utterance) -> None:
        low, high = self._source.label_range
        if math.isnan(label) and task != "M":  # a sample may lack a unimodal label
            return
        if not low <= label <= high:  # also true of NaN
            raise DataError(
                f"{self._at(utterance)}: label {task} is {label:g}, expected {low:g}..{high:g}; "
                "correct it, or tell the range with --label-range"
            )
