"""Words that many messages need: the nearest valid name, a number with its noun, a size."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A clause to append to "unknown … 'wrong'": the nearest valid name where one is close, and all valid ones."""
    names = sorted(valid, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    close = [] if wrong.isdecimal() else get_close_matches(wrong, names, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (valid: {', '.join(names)})"


def counted(number: int, noun: str) -> str:
    """1 epoch, 1,200 epochs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def told_bytes(size: float) -> str:
    """3.4 kB, 1,200.0 MB; a megabyte is 2^20 bytes, as everywhere here."""
    return f"{size / 2**10:,.1f} kB" if size < 2**20 else f"{size / 2**20:,.1f} MB"


def was(number: int) -> str:
    """1 value was, 2 values were."""
    return "was" if number == 1 else "were"


def has(number: int) -> str:
    """1 sample has, 2 samples have."""
    return "has" if number == 1 else "have"
