"""Readers of published formats: each turns its format into utterances; `shards.write` packs any of them.

Samples are read one at a time and by number, so that packing in shuffled order needs no more memory than the source
does.
"""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from shards.utterance import Utterance


class Source(Protocol):
    """What packing must know of an input, and its samples.

    Packing in parallel reads from copies: one in each forked process (a file that is open there shares its position
    with all others: open it anew where `os.getpid` has changed), or a pickled one in each Ray worker. So `read` changes
    nothing that counts: what it finds odd goes into the sample's `remarks`.

    Attributes:
        name: default name of the data set.
        where: the input as messages name it.
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
    synthetic: bool
    label_range: tuple[float, float]
    tasks: tuple[str, ...]
    classes: dict[str, int]
    widths: dict[str, int]
    has_raw_text: bool
    has_tokens: bool
    counts: dict[str, int]

    @property
    def provenance(self) -> dict[str, Any]:
        """What the index keeps of the origin: at least "format", "file" and "sha256"."""
        ...

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
        """What is odd about the whole but not wrong, in sentences for the report after packing."""
        ...


@runtime_checkable
class Watched(Protocol):
    """A source whose file is read while it is packed, and that can tell whether it is the same still."""

    def unchanged(self) -> None:
        """Raises:
        DataError: the file is not the one that was opened.
        """
        ...


def check_unchanged(source: Source) -> None:
    """That what was read of a `Watched` source is what its checksum is of.

    Raises:
        DataError: its file was changed in the meantime.
    """
    if isinstance(source, Watched):
        source.unchanged()
