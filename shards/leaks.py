"""What occurs in more than one split and should not: transcripts, and videos.

A model that has seen a test sentence, or the speaker of a test video, is judged too well. All that is held of a sample
while looking is a digest of 8 bytes, whatever the size of the data set.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.ahead import InOrder, looking_ahead
from shards.index import Index
from shards.read import ShardReader

EXAMPLES = 10
"""Of each kind, at most; the longest transcripts first."""

LONG = 5
"""Words from which on a transcript hardly occurs twice by chance ("yes" and "thank you" do)."""

Digests = NDArray[np.uint64]
Show = Callable[[Iterable[int], int, str], Iterable[int]]

_WORD = re.compile(r"[^\W_\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
"""A word, or one character of a script that puts no spaces between words."""

_VIDEO = (re.compile(r"(.+)\$_\$[^$]+"), re.compile(r"(.+)\[[^\[\]]+\]"), re.compile(r"(.+)_\d+"))
"""Keys that begin with the video's id: ``video$_$clip``, ``video[clip]``, ``video_12``."""

_SPLIT_BITS = np.uint64(2)


@dataclass(frozen=True)
class Shared:
    """Samples whose digest occurs in more than one split.

    Attributes:
        groups: each of one digest: the samples' numbers, ascending.
        samples: split -> number of its samples that share with another split.
    """

    groups: list[NDArray[np.int64]]
    samples: dict[str, int]


def normalised(text: str) -> list[str]:
    """The words of a transcript, without case, punctuation and width of characters: what makes two of them the same."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def video_of(key: str) -> str | None:
    """The video's id in a sample's key; None where the key has none of the usual forms."""
    return next((match[1] for form in _VIDEO if (match := form.fullmatch(key))), None)


def digest(text: str | None) -> int:
    """A digest of 62 bits that is never 0; 0 for None."""
    if not text:
        return 0
    whole = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return (whole >> int(_SPLIT_BITS)) or 1


def shared(index: Index, digests: Digests) -> Shared:
    """Which samples share their digest with a sample of another split.

    Args:
        digests: (samples,) of `digest`, by number; those that are 0 are left out.
    """
    splits = [np.full(count, number, np.uint64) for number, count in enumerate(index.splits.values())]
    marked = (digests << _SPLIT_BITS) | np.concatenate(splits)
    marked = np.sort(marked[digests != 0])
    if not len(marked):
        return Shared([], dict.fromkeys(index.splits, 0))
    values, numbers = marked >> _SPLIT_BITS, marked & np.uint64(3)
    begins = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    # sorted by digest, then split: a digest is in several splits where its first split is not its last
    last = np.r_[begins[1:], len(values)] - 1
    twice = values[begins[numbers[begins] != numbers[last]]]
    found = np.flatnonzero(np.isin(digests, twice))
    found = found[np.argsort(digests[found], kind="stable")]
    cuts = np.flatnonzero(np.diff(digests[found])) + 1
    groups = np.split(found, cuts) if len(found) else []
    samples = {
        split: int(((found >= index.numbers(split).start) & (found < index.numbers(split).stop)).sum())
        for split in index.splits
    }
    return Shared(groups, samples)


def transcripts(index: Index, show: Show = lambda numbers, total, what: numbers) -> dict[str, Any] | None:
    """Transcripts that occur in more than one split; None where the data set has none. Reads every shard's text.

    One without a word is not compared.

    Raises:
        DataError: a shard is missing or does not hold what its table says.
    """
    if not index.has_raw_text:
        return None
    total = index.num_samples
    digests, words = np.zeros(total, np.uint64), np.zeros(total, np.uint16)
    with (
        ShardReader(index, verify=False, open_shards=1) as reader,
        looking_ahead(index, InOrder(0, total), 0, depth=4, verify=False) as reach,
    ):
        for number in show(range(total), total, "comparing transcripts"):
            reach(number + 1)
            text = normalised(reader.sample(number, with_text=True).raw_text or "")
            digests[number], words[number] = digest(" ".join(text)), min(len(text), 0xFFFF)
        found = shared(index, digests)
        groups = sorted(found.groups, key=lambda group: (-int(words[group[0]]), int(group[0])))
        examples = [_example(index, reader, group) for group in groups[:EXAMPLES]]
    return {
        "compared": int(np.count_nonzero(digests)),
        "in_several_splits": len(groups),
        "of_them_long": sum(int(words[group[0]]) >= LONG for group in groups),
        "samples": found.samples,
        "examples": examples,
    }


def videos(index: Index, digests: Digests, keys: Callable[[int], str]) -> dict[str, Any] | None:
    """Videos with utterances in more than one split; None where keys do not tell videos.

    Args:
        digests: (samples,) of `digest` of `video_of`.
        keys: gives the key of a sample's number.
    """
    distinct = len(np.unique(digests[digests != 0]))
    if not (digests != 0).all() or distinct < 2:
        return None
    found = shared(index, digests)
    groups = sorted(found.groups, key=lambda group: int(group[0]))
    examples = [
        {"video": video_of(keys(int(group[0]))), "keys": _first_keys(index, group, keys)} for group in groups[:EXAMPLES]
    ]
    return {
        "videos": distinct,
        "in_several_splits": len(groups),
        "samples": found.samples,
        "examples": examples,
    }


def _example(index: Index, reader: ShardReader, group: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
    text = reader.sample(int(group[0]), with_text=True).raw_text
    return {"text": text, "keys": _first_keys(index, group, lambda number: reader.sample(number).key)}


def _first_keys(index: Index, group: Sequence[int] | NDArray[np.int64], keys: Callable[[int], str]) -> dict[str, str]:
    """split -> key of the group's first sample in it."""
    first: dict[str, str] = {}
    for number in group:
        split = index.shards[index.locate(int(number))[0]].split
        if split not in first:
            first[split] = keys(int(number))
    return first
