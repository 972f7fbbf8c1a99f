"""What a check has found: one line of the table."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "warn", "fail", "skip"]
"""``skip``: not looked at, with the reason."""

MEND, DATA, TRAINING, ASIDE = 2, 3, 4, 75
"""Exit codes of red lines, as those of a run that meets the same: somebody has to mend the node or the command; the
data is wrong; training fails; something outside does not answer, and may later."""


@dataclass(frozen=True)
class Finding:
    """One line: of one check on one node.

    Attributes:
        group: the part of the table, e.g. ``storage``.
        check: the name of the line.
        found: what was found, with numbers and units.
        remedy: what to do; each ``warn`` and each ``fail`` has one.
        code: the exit code that a ``fail`` asks for.
        facts: the same in numbers, for ``--json`` and for comparing nodes.
    """

    group: str
    check: str
    state: State
    found: str
    remedy: str = ""
    code: int = MEND
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.remedy or self.state in ("ok", "skip"), f"{self.group}, {self.check}: says not what to do"

    def dump(self) -> dict[str, Any]:
        """As JSON carries it."""
        return asdict(self)


def told_bytes(count: float) -> str:
    """A number of bytes as people read it: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
