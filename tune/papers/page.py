"""A page of tables, and how a paper's figures stand in it. `written` puts it on a terminal or into a file.

Where a paper does not say which of two conventions its Acc-2 and F1 follow, the figure stands in both columns, marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tune.papers.published import COLUMNS, DATA, UNSTATED, Figures, Paper, Table

UNSURE = "?"
"""Behind a figure whose convention the paper does not state."""

NONE = "-"

SHARES = ("acc", "f1")
"""Begin the names of metrics that papers print in percent, with two digits; others have three."""


@dataclass(frozen=True)
class Grid:
    """Rows of cells under a heading; the first `text` columns are words, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text: int = 2


@dataclass(frozen=True)
class Page:
    """Sentences, tables, and notes under them."""

    title: str
    told: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def as_published(paper: Paper, number: str) -> Page:
    """A table as the paper has it."""
    table = paper.table(number)
    columns = table.columns(table.data[0])
    rows: list[tuple[str, ...]] = []
    for name, row in table.rows.items():
        rows.append((name, row.setting or "", *(figure(row.paper, column) for column in columns)))
        if row.other:
            rows.append(("", str(paper.other), *(figure(row.other, column) for column in columns)))
    told = [f"The paper: {table.setting}."] if table.setting else []
    told += [f"{table.own} less the row."] if table.differences else []
    told += [f"No training reproduces it; {table.instead}."] if table.instead else []
    notes = paper_notes(paper, table, columns) + [f"{n}: {row.note}." for n, row in table.rows.items() if row.note]
    data = " or ".join(DATA[name] for name in table.data)
    return Page(title(paper, number, data), told, [Grid("", header(columns), rows)], notes)


def title(paper: Paper, number: str, data: str) -> str:
    return f"{paper.system}, table {number}: {paper.table(number).title} on {data} ({paper.paper})"


def header(columns: Sequence[str]) -> tuple[str, ...]:
    """The heads of a table of figures."""
    from mmsa_dist.report import label

    return ("row", "", *map(label, columns))


def paper_notes(paper: Paper, table: Table, columns: Sequence[str]) -> list[str]:
    """What must be known to read a paper's figures."""
    said = [] if table.instead else [f"Metrics of the paper: {table.conventions or paper.conventions}."]
    figures = [figures for row in table.rows.values() for figures in (row.paper, row.other)]
    found = [published(each, column) for each in figures for column in columns]
    if any(value is not None and not sure for value, sure in found):
        said.append(f"{UNSURE}: a figure that may be of either convention stands in both columns.")
    if any(row.other for row in table.rows.values()):
        said.append(f"{paper.other}: what a report on a re-implementation measured itself.")
    return said + ([f"{table.note[0].upper()}{table.note[1:]}."] if table.note else [])


def figure(figures: Figures, column: str) -> str:
    """A paper's figure as it stands in a column."""
    value, sure = published(figures, column)
    if value is None:
        return NONE
    known = any(column in columns for columns in COLUMNS.values())
    shown = f"{value:.{digits(column)}f}" if known else f"{value:,.{0 if value >= 1000 else 2}f}"
    return shown if sure else shown + UNSURE


def published(figures: Figures, column: str) -> tuple[float | None, bool]:
    """The figure of a column, and whether it is surely of the column's convention."""
    if column in figures:
        return figures[column], True
    kind = next((kind for kind, columns in UNSTATED.items() if column in columns), None)
    return (figures.get(kind), False) if kind else (None, True)


def digits(column: str) -> int:
    """After the point, as papers print the metric."""
    return 2 if column.startswith(SHARES) else 3


def scale(column: str) -> float:
    """What a metric is multiplied with to be as papers print it."""
    return 100.0 if column.startswith(SHARES) else 1.0
