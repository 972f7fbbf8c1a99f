"""The trials of a sweep as a table: on the terminal for people, as ``trials.csv`` for programs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from mmsa_dist.metrics import higher_is_better
from mmsa_dist.report import LABELS, value_text
from tune import objectives
from tune.outcome import Outcome
from tune.space import Space

WIDE = 6
"""More searched values than this share one column."""

SHOWN = 10
"""Rows on the terminal; ``trials.csv`` has all."""

BAR = 20
"""Characters of the longest bar."""


def trials_table(outcomes: Sequence[Outcome], space: Space, wanted: Sequence[str], best: Outcome | None) -> Table:
    """The best trials, one a row, failed ones last; the best is marked with a star, and of several objectives the
    Pareto front with a ring.

    Args:
        wanted: the objectives; the first decides which are the best.
    """
    knobs = space.knobs
    wide = len(knobs) > WIDE
    front = objectives.front(outcomes, wanted) if len(wanted) > 1 else []
    table = Table("trial", title="trials", title_justify="left")
    for name in ["values"] if wide else [knob.short for knob in knobs]:
        table.add_column(name, overflow="fold", min_width=34 if wide else None)
    for name in (*(_head(name) for name in wanted), "best at", "epochs"):
        table.add_column(name, justify="right")
    table.add_column("status", overflow="fold")
    ranked = sorted(outcomes, key=lambda each: _rank(each, wanted[0]))
    for each in ranked[:SHOWN]:
        shown = [knob.text(each.values) for knob in knobs]
        named = space.told(each.values)
        table.add_row(
            f"{each.number}{' *' if each == best else ''}{' o' if each in front else ''}",
            *([named] if wide else shown),
            *(_reached(each, name) for name in wanted),
            str(each.best_epoch or "-"),
            str(each.epochs),
            _status(each),
            style="bold" if each == best else "",
        )
    captions = ["o: none betters it in all objectives"] if front else []
    if len(ranked) > SHOWN:
        captions.append(f"and {len(ranked) - SHOWN} more in trials.csv")
    table.caption = "; ".join(captions) or None
    return table


def importance_table(found: Mapping[str, float], monitor: str) -> Table:
    """How much each searched value mattered, the greatest first."""
    table = Table("value", title=f"what mattered for {LABELS.get(monitor, monitor)}", title_justify="left")
    table.add_column("importance", justify="right")
    table.add_column("", min_width=BAR)
    most = max(found.values()) or 1.0
    for name, share in found.items():
        table.add_row(name, f"{100 * share:.0f} %", "█" * round(BAR * share / most))
    return table


def write_csv(outcomes: Sequence[Outcome], space: Space, wanted: Sequence[str], path: Path) -> None:
    """Every trial with the full names and values, in the order they were drawn."""
    reached = [name if name == objectives.PARAMETERS else f"valid_{name}" for name in wanted]
    front = objectives.front(outcomes, wanted)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        ends = ["front", "best_epoch", "epochs", "status", "from_trial", "from_epoch", "error", "folder"]
        out.writerow(["trial", *space.keys, *reached, *ends])
        for each in outcomes:
            values = [each.values.get(key) for key in space.keys]
            found = [_value(each, name) for name in wanted]
            out.writerow(
                [
                    each.number,
                    *values,
                    *("" if value is None else value for value in found),
                    int(each in front),
                    each.best_epoch,
                    each.epochs,
                    each.status,
                    *(each.origin or ("", "")),
                    each.error or "",
                    each.folder.name,
                ]
            )


def _status(outcome: Outcome) -> str:
    origin = f", a copy of trial {outcome.origin[0]} from epoch {outcome.origin[1]} on" if outcome.origin else ""
    return f"{outcome.status}{origin}" + (f": {outcome.error}" if outcome.error else "")


def _head(objective: str) -> str:
    return objective if objective == objectives.PARAMETERS else f"valid {LABELS.get(objective, objective)}"


def _value(outcome: Outcome, objective: str) -> float | None:
    return outcome.parameters if objective == objectives.PARAMETERS else outcome.metrics.get(objective)


def _reached(outcome: Outcome, objective: str) -> str:
    if objective == objectives.PARAMETERS:
        return "-" if outcome.parameters is None else f"{outcome.parameters:,}"
    return value_text(objective, outcome.metrics.get(objective))


def _rank(outcome: Outcome, monitor: str) -> tuple[int, float, int]:
    if outcome.best is None:
        return (1, 0.0, outcome.number)
    return (0, -outcome.best if higher_is_better(monitor) else outcome.best, outcome.number)
