"""What is to be packed, and which samples go into which shard."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from shards.sources import Source
from shards.utterance import SPLITS

_MEASURED = 64
"""Samples of a split whose size stands for that of all."""

_OVERHEAD = 2560
"""Bytes of a sample beside its arrays, roughly: two headers, JSON, the names of the arrays, padding."""


@dataclass(frozen=True)
class Piece:
    """One shard to be made.

    Attributes:
        number: its place among all shards.
        stem: name of its files without suffix, e.g. ``train-00000``.
        split: the split it is of.
        samples: (N,) numbers of its samples in the source, in the order in which they are stored.
    """

    number: int
    stem: str
    split: str
    samples: np.ndarray


@dataclass(frozen=True)
class Job:
    """Everything that the bytes of the shards depend on.

    Attributes:
        source: of the samples.
        dtype: of the stored features.
        seed: of the order in which a split's samples are stored.
        shard_bytes: about how large a shard is.
    """

    source: Source
    dtype: str
    seed: int
    shard_bytes: int

    def identity(self) -> dict[str, Any]:
        """The same in plain values, by which a packing that was stopped knows its own shards again."""
        source = self.source
        return {
            "source": source.provenance,
            "counts": source.counts,
            "widths": source.widths,
            "tasks": list(source.tasks),
            "classes": source.classes,
            "label_range": list(source.label_range),
            "dtype": self.dtype,
            "seed": self.seed,
            "shard_bytes": self.shard_bytes,
            "versions": {name: installed(name) for name in ("mmsa-dist", "numpy", "pyarrow")},
        }

    def divide(self) -> "Division":
        """Which samples go into which shard: all shards of a split have the same number of samples, or one less.

        Raises:
            DataError: one of the samples by which their size is judged cannot be read.
        """
        pieces: list[Piece] = []
        total = 0
        for split in SPLITS:
            count = self.source.counts[split]
            if not count:
                continue
            order = stored_order(self.seed, split, count)
            stored = self._size(split, order[:_MEASURED]) * count // min(count, _MEASURED)
            shards = min(count, max(1, -(-stored // max(1, self.shard_bytes))))
            ends = [count * (n + 1) // shards for n in range(shards)]
            for n, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                pieces.append(Piece(len(pieces), f"{split}-{n:05d}", split, order[begin:end]))
            total += stored
        return Division(tuple(pieces), total)

    def _size(self, split: str, numbers: np.ndarray) -> int:
        """About how many bytes these samples take in a tar."""
        read = (self.source.read(split, int(number)) for number in numbers)
        return sum(
            _OVERHEAD
            + sum(array.size for array in utterance.modalities.values()) * np.dtype(self.dtype).itemsize
            + (0 if utterance.tokens is None else utterance.tokens.nbytes)
            for utterance in read
        )


@dataclass(frozen=True)
class Division:
    """All shards to be made, in order, and about how many bytes they will have."""

    pieces: tuple[Piece, ...]
    bytes: int


def stored_order(seed: int, split: str, count: int) -> np.ndarray:
    """(count,) numbers that a split's samples have in the source, in the order in which they are stored."""
    return np.random.default_rng([seed, SPLITS.index(split)]).permutation(count)


def installed(package: str) -> str:
    """The package's version; of a checkout that is not installed, just that."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "checkout"
