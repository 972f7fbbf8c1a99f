"""The trials of a sweep as a table: on the terminal for people, as ``trials.csv`` for programs."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmsa_dist.metrics import higher_is_better
from mmsa_dist.report import LABELS, value_text
from tune.outcome import Outcome
from tune.space import Space

WIDE = 6
"""More searched values than this share one column."""

SHOWN = 20
"""Rows on the terminal; ``trials.csv`` has all."""


def trials_table(outcomes: Sequence[Outcome], space: Space, monitor: str, best: Outcome | None) -> Table:
    """A trial a row, the best first, failed ones last; the best is marked."""
    knobs = [(knob.keys[0], _short(knob.name)) for knob in space.knobs]
    wide = len(knobs) > WIDE
    table = Table("trial", title="trials", title_justify="left")
    for _, name in [("", "values")] if wide else knobs:
        table.add_column(name, overflow="fold", min_width=34 if wide else None)
    for name in (f"valid {LABELS.get(monitor, monitor)}", "best at", "epochs"):
        table.add_column(name, justify="right")
    table.add_column("status", overflow="fold")
    ranked = sorted(outcomes, key=lambda each: _rank(each, monitor))
    for each in ranked[:SHOWN]:
        shown = [_text(each.values.get(key)) for key, _ in knobs]
        named = " · ".join(f"{name} {value}" for (_, name), value in zip(knobs, shown, strict=True))
        table.add_row(
            f"{each.number}{' *' if each == best else ''}",
            *([named] if wide else shown),
            value_text(monitor, each.best),
            str(each.best_epoch or "-"),
            str(each.epochs),
            each.status if each.error is None else f"{each.status}: {each.error}",
            style="bold" if each == best else "",
        )
    if len(ranked) > SHOWN:
        table.caption = f"and {len(ranked) - SHOWN} more in trials.csv"
    return table


def write_csv(outcomes: Sequence[Outcome], space: Space, monitor: str, path: Path) -> None:
    """Every trial with the full names and values, in the order they were drawn."""
    keys = space.keys
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["trial", *keys, f"valid_{monitor}", "best_epoch", "epochs", "status", "error", "folder"])
        for each in outcomes:
            values = [each.values.get(key) for key in keys]
            best = "" if each.best is None else each.best
            out.writerow(
                [
                    each.number,
                    *values,
                    best,
                    each.best_epoch,
                    each.epochs,
                    each.status,
                    each.error or "",
                    each.folder.name,
                ]
            )


def _rank(outcome: Outcome, monitor: str) -> tuple[int, float, int]:
    if outcome.best is None:
        return (1, 0.0, outcome.number)
    return (0, -outcome.best if higher_is_better(monitor) else outcome.best, outcome.number)


def _short(name: str) -> str:
    """``optim.lr.audio, optim.lr.rest`` -> ``lr.audio+rest``: what tells the columns apart."""
    first, *others = (key.split(".", 1)[1] for key in name.split(", "))
    return "+".join([first, *(key.rsplit(".", 1)[-1] for key in others)])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
