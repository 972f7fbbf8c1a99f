"""Members of a tar grouped into samples, by WebDataset's own rule."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import DataError
from shards.foreign.tar import TarReader

LARGEST_TENSORS = 1 << 30
LARGEST_JSON = 1 << 24
"""Bytes of a member at most that is read: of arrays, of text."""

_MOST_MEMBERS = 1000
"""Of one sample."""


@dataclass
class Sample:
    """One sample.

    Attributes:
        key: its name: the members' path up to the first dot of the file's name.
        begin: where the header of its first member begins in the tar.
        end: where its last member ends.
        payloads: suffix -> content, of those that were asked for.
        offsets: suffix -> where that content begins in the tar.
        others: suffixes of its other members.
    """

    key: str
    begin: int
    end: int = 0
    payloads: dict[str, bytes] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)


def samples(
    path: Path, limit: Callable[[str], int | None], ended: Callable[[TarReader], None] = lambda tar: None
) -> Iterator[Sample]:
    """The samples of a tar: consecutive members of one key. One is in memory at a time.

    Args:
        limit: of a member's suffix: how many bytes it may have, to be read; 0 or None passes it over.
        ended: is given the reader at the end, when it has read the whole file.

    Raises:
        DataError: the tar is damaged, or a member is too large; names both.
    """
    sample: Sample | None = None
    with TarReader(path) as tar:
        for member in tar.members():
            key, suffix = split_name(member.name)
            if not key:
                continue
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(key, member.begin)
            if suffix in sample.offsets or suffix in sample.others:
                raise DataError(f"{path}: member {member.name!r} is there twice; write the tar anew")
            if len(sample.offsets) + len(sample.others) >= _MOST_MEMBERS:
                raise DataError(f"{path}: sample {key!r} has more than {_MOST_MEMBERS:,} members; write the tar anew")
            sample.end = member.offset + member.size
            if not (most := limit(suffix)):
                sample.others.add(suffix)
                continue
            if member.size > most:
                raise DataError(f"{path}: member {member.name!r} has {member.size:,} bytes, at most {most:,} are read")
            sample.payloads[suffix], sample.offsets[suffix] = tar.payload(), member.offset
        if sample is not None:
            yield sample
        ended(tar)


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix): WebDataset cuts at the first dot of the file's name. ('', '') for a file that is in no sample.

    Files without a dot, hidden ones, and WebDataset's own (``__name__``) are in none.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    own = name.partition("/")[0].startswith("__") and "__" in name.partition("/")[0][2:]
    if not stem or not dot or own:
        return "", ""
    return f"{folder}{slash}{stem}", suffix.lower()
