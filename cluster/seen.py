"""What `mmsa-dist jobs watch` knows of a run at one moment, as a screen, and as a line where there is none."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BAR = 30
"""Width of the bar, in characters."""

RUNNING, ENDED, FAILED = "running", "ended", "failed"
"""Into which kinds the states fall: green, plain, red."""


@dataclass(frozen=True)
class Rank:
    """One rank, lately.

    Attributes:
        samples: that it trains on a second. stall: share of its training that is waiting for data. Each None where it
            is not known.
        silent: seconds since it has told anything.
    """

    number: int
    samples: float | None = None
    stall: float | None = None
    silent: float | None = None


@dataclass
class Seen:
    """All that can be known; what is not is None, and is left out of the screen.

    Attributes:
        title: what is watched. kind: `RUNNING`, `ENDED` or `FAILED`. state: in words.
        epoch: being trained, from 1. step: of `steps` in it. seconds_left: at most, by the pace so far.
        result: the last epoch's validation result, in words.
        goodput: share of the run's time that counted. checkpoint: step of the newest. age: seconds since it was taken.
        trials: of a sweep, how many are in which state.
        error: the last one, with where it comes from. notes: what cannot be seen from here, and why.
        log: its last lines.
    """

    title: str
    kind: str = RUNNING
    state: str = "starting"
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    result: str | None = None
    seconds_left: float | None = None
    ranks: Sequence[Rank] = ()
    goodput: float | None = None
    checkpoint: int | None = None
    age: float | None = None
    restarts: int | None = None
    trials: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    log: Sequence[str] = ()

    @property
    def samples(self) -> float | None:
        """Of all ranks together, a second."""
        known = [each.samples for each in self.ranks if each.samples is not None]
        return sum(known) if known else None

    @property
    def stall(self) -> float | None:
        """Of the rank that waits most."""
        return max((each.stall for each in self.ranks if each.stall is not None), default=None)

    @property
    def done(self) -> float | None:
        """Share of all steps."""
        if self.epoch is None or not self.epochs:
            return None
        within = (self.step or 0) / self.steps if self.steps else 0.0
        return min(1.0, (self.epoch - 1 + within) / self.epochs)


def line(seen: Seen) -> str:
    """The moment in one line, the parts that stay the same first."""
    parts = [seen.state]
    if seen.epoch is not None:
        parts.append(_progress(seen))
    if seen.loss is not None:
        parts.append(f"loss {seen.loss:.4f}")
    kept = _kept(seen)
    parts += [part for part in (seen.result, _speed(seen), kept and f"checkpoint {kept}", _trials(seen)) if part]
    return "  ".join(parts)


def changes(seen: Seen) -> tuple[object, ...]:
    """What a new line is worth at once: not that time passes, another step, or a rate that is a little another."""
    place = (seen.epoch, seen.result, seen.checkpoint)
    return (seen.kind, *place, seen.restarts, seen.error, tuple(seen.trials.items()), tuple(seen.notes))


def screen(seen: Seen) -> RenderableType:
    """The moment as a person looks at it."""
    style = {RUNNING: "green", FAILED: "red"}.get(seen.kind, "")
    parts: list[RenderableType] = [Text.assemble((seen.title, "bold"), "  ", (seen.state, style))]
    if seen.done is not None:
        left = f", about {duration(seen.seconds_left)} left at most" if seen.seconds_left else ""
        full = round(BAR * seen.done)
        parts.append(Text.assemble(("━" * full, style), ("─" * (BAR - full), "dim"), f" {100 * seen.done:.0f} %{left}"))
    facts = Table.grid(padding=(0, 2, 0, 0))
    for name, value in (
        ("progress", _progress(seen) if seen.epoch is not None else None),
        ("loss", None if seen.loss is None else f"{seen.loss:.4f}"),
        ("validation", seen.result),
        ("throughput", _speed(seen)),
        ("goodput", None if seen.goodput is None else f"{100 * seen.goodput:.1f} % of its time"),
        ("checkpoint", _kept(seen)),
        ("restarts", None if seen.restarts is None else str(seen.restarts)),
        ("trials", _trials(seen)),
    ):
        if value:
            facts.add_row(Text(name, style="dim"), value)
    if seen.error:
        facts.add_row(Text("last error", style="red"), Text(seen.error))
    parts.append(facts)
    if len(seen.ranks) > 1:
        parts.append(_ranks(seen.ranks))
    parts += [Text(f"note: {note}", style="dim") for note in seen.notes]
    if seen.log:
        parts += [
            Text("log", style="dim"),
            *(Text(f"  {each}", no_wrap=True, overflow="ellipsis") for each in seen.log),
        ]
    return Group(*parts)


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 3 min, 2 h 5 min, 3 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days"


def ago(then: float) -> str:
    """How long a moment of Unix time is past."""
    return f"{duration(max(0.0, time.time() - then))} ago"


def _progress(seen: Seen) -> str:
    of = f" of {seen.epochs}" if seen.epochs else ""
    within = f", step {seen.step:,}" + (f" of {seen.steps:,}" if seen.steps else "") if seen.step is not None else ""
    return f"epoch {seen.epoch}{of}{within}"


def _speed(seen: Seen) -> str | None:
    if seen.samples is None:
        return None
    ranks = f" of {len(seen.ranks)} ranks" if len(seen.ranks) > 1 else ""
    stall = "" if seen.stall is None else f", data stall {100 * seen.stall:.1f} %"
    return f"{seen.samples:,.1f} samples/s{ranks}{stall}"


def _kept(seen: Seen) -> str | None:
    if seen.checkpoint is None and seen.age is None:
        return None
    step = "" if seen.checkpoint is None else f"step {seen.checkpoint:,}"
    age = "" if seen.age is None else f"taken {duration(seen.age)} ago"
    return ", ".join(filter(None, [step, age]))


def _trials(seen: Seen) -> str | None:
    return ", ".join(f"{count} {state}" for state, count in seen.trials.items() if count) or None


def _ranks(ranks: Sequence[Rank]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("rank", "samples/s", "data stall", "last heard of"):
        table.add_column(head, justify="right")
    for each in ranks:
        table.add_row(
            str(each.number),
            "-" if each.samples is None else f"{each.samples:,.1f}",
            "-" if each.stall is None else f"{100 * each.stall:.1f} %",
            "-" if each.silent is None else f"{duration(each.silent)} ago",
        )
    return table
