"""The nearest valid name, for every message about an unknown one. This floor's own: it imports no other."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A clause to append to "unknown … 'wrong'": the nearest valid name where one is close, and all valid ones."""
    names = sorted(valid)
    close = get_close_matches(wrong, names, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (valid: {', '.join(names)})"
