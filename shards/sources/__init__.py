"""Readers of published formats: each turns its format into utterances; `shards.write` packs any of them.

Samples are read one at a time and by number, so that packing in shuffled order needs no more memory than the source
does.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from shards.utterance import Utterance


class Source(Protocol):
    """What packing must know of an input, and its samples.

    Attributes:
        name: default name of the data set.
        where: the input as messages name it.
        provenance: what the index keeps of the origin: at least "format", "file" and "sha256".
        synthetic: the data is generated.
        label_range: lowest and highest possible label.
        tasks: labels that the source has, ``M`` first.
        classes: task -> number of classes, where labels are classes; empty where they are intensities.
        widths: modality -> D, in the order text, audio, vision; modalities without features are not in it.
        has_raw_text, has_tokens: every sample has a transcript, has token ids.
        counts: split -> number of samples.
    """

    name: str
    where: str
    provenance: dict[str, Any]
    synthetic: bool
    label_range: tuple[float, float]
    tasks: tuple[str, ...]
    classes: dict[str, int]
    widths: dict[str, int]
    has_raw_text: bool
    has_tokens: bool
    counts: dict[str, int]

    def keys(self, split: str) -> Iterable[str]:
        """The samples' ids, in the source's order."""
        ...

    def read(self, split: str, number: int) -> Utterance:
        """The sample at `number` (0-based, in the source's order), without padding, values as they stand.

        Raises:
            DataError: the sample is not readable; names it.
        """
        ...

    def notes(self) -> list[str]:
        """What was odd but not wrong, for the report after packing; complete once every sample was read."""
        ...
