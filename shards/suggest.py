"""Words that many messages need: the nearest valid name, and a number with its noun."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A clause to append to "unknown … 'wrong'": the nearest valid name where one is close, and all valid ones."""
    names = sorted(valid)
    close = get_close_matches(wrong, names, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (valid: {', '.join(names)})"


def counted(number: int, noun: str) -> str:
    """1 epoch, 1,200 epochs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
