"""Keys with dots: WebDataset cuts a name at its first dot, so that it makes one sample of ``vid.0`` and ``vid.1``."""

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from shards.errors import DataError

_NUMBER = re.compile(r"\d+([_-]\d+)*")
_KINDS = ("npy", "npz", "safetensors", "json", "txt", "cls")


def check_dots(path: Path, key: str, suffixes: Collection[str], words: Collection[str]) -> None:
    """Looks whether the members of a sample seem to be those of several.

    They do where every member has a number in front (``0.audio.npy``, ``0.json``), or where the same two members or
    more stand behind different words (``anna.npy``, ``anna.json``, ``ben.npy``, ``ben.json``).

    Args:
        path, key: of the sample, for the message.
        suffixes: of all its members.
        words: first parts of suffixes that do say what a member is.

    Raises:
        DataError: they do.
    """
    behind: dict[str, set[str]] = defaultdict(set)
    own = False  # the sample has a member as it should be: called by its type alone (``json``), or by a known word
    for suffix in suffixes:
        word, dot, rest = suffix.partition(".")
        if suffix.rpartition(".")[2] not in _KINDS:
            continue
        if dot and word not in words:
            behind[word].add(rest)
        else:
            own = True
    numbers = {word for word in behind if _NUMBER.fullmatch(word)}
    if not behind or any(_NUMBER.fullmatch(word) for word in words):
        return
    contents = list(behind.values())
    alike = {word for word, rests in behind.items() if len(rests) > 1 and contents.count(rests) > 1}
    joined = (alike & numbers if own else alike) or (numbers if len(numbers) == len(behind) and not own else set())
    if joined:
        word = min(joined)
        raise DataError(
            f"{path}: the keys seem to contain dots ({key}.{word}): WebDataset cuts at the first dot, so that all of "
            f"{key}.… is one sample; write {key}_{word} … instead, or, if they are members of one sample, say which "
            f"is what, e.g. --audio {word}.{min(behind[word])}"
        )
