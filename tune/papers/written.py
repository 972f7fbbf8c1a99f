"""A page on the terminal, in Markdown and in HTML: the same words and numbers."""

import html as escaping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.progress import console
from tune.papers.page import Grid, Page

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDE = 120
"""Columns of a terminal that a table of seven metrics fits into; in a narrower one numbers take two lines."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th.word, td.word { text-align: left } td.word + td.word { white-space: normal }
tr.first td { border-top: 1px solid #999 }
tr.ours td { font-weight: 600 }
figure { display: inline-block; margin: .5em } img { max-width: 100% }
"""


def on_terminal(page: Page) -> "RenderableType":
    """For `rich`'s console."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    wide = console.width >= WIDE
    parts: list[Any] = [Text(page.title, style="bold"), *(Text(line) for line in page.told)]
    for grid in page.grids:
        table = Table(title=grid.title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for n, name in enumerate(grid.header):
            words = n < grid.text
            table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=wide and not words)
        for row in grid.rows:
            table.add_row(*row, style="bold" if _ours(grid, row) else "")
        parts.append(table)
    return Group(*parts, *(Text(f"- {line}") for line in page.notes))


def markdown(page: Page, pictures: Sequence[Path] = (), more: Sequence[Grid] = ()) -> str:
    """As text for a repository or a paper's draft.

    Args:
        pictures: relative to where the text will lie. more: tables that come after the notes.
    """
    parts = [f"# {page.title}", "\n".join(f"{line}  " for line in page.told).rstrip()]
    parts += [part for grid in page.grids for part in _as_text(grid)]
    parts.append("\n".join(f"- {line}" for line in page.notes))
    parts += [part for grid in more for part in _as_text(grid)]
    parts += [f"![{picture.stem}]({picture.as_posix()})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def _as_text(grid: Grid) -> list[str]:
    rule = [":--" if n < grid.text else "--:" for n in range(len(grid.header))]
    rows = [grid.header, tuple(rule), *grid.rows]
    lines = [f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    head = [f"## {grid.title[0].upper()}{grid.title[1:]}"] if grid.title else []
    return [*head, "\n".join(lines)]


def html(page: Page, pictures: Sequence[Path] = (), more: Sequence[Grid] = ()) -> str:
    """As a page of its own, without anything from elsewhere but the pictures beside it.

    Args:
        pictures: relative to where the page will lie. more: tables that come after the notes.
    """
    said = escaping.escape
    parts = [f"<h1>{said(page.title)}</h1>", f"<p>{'<br>'.join(map(said, page.told))}</p>"]
    parts += [part for grid in page.grids for part in _as_table(grid)]
    parts.append(f"<ul>{''.join(f'<li>{said(line)}</li>' for line in page.notes)}</ul>")
    parts += [part for grid in more for part in _as_table(grid)]
    parts += [
        f'<figure><img src="{said(picture.as_posix())}" alt="{said(picture.stem)}"></figure>' for picture in pictures
    ]
    head = f'<meta charset="utf-8"><title>{said(page.title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _as_table(grid: Grid) -> list[str]:
    return [*([f"<h2>{escaping.escape(grid.title)}</h2>"] if grid.title else []), _table(grid)]


def _table(grid: Grid) -> str:
    def cells(row: Sequence[str], kind: str) -> str:
        words = ' class="word"'
        return "".join(
            f"<{kind}{words if n < grid.text else ''}>{escaping.escape(cell)}</{kind}>" for n, cell in enumerate(row)
        )

    lines = [f"<tr>{cells(grid.header, 'th')}</tr>"]
    for row in grid.rows:
        classes = " ".join(["first"] * bool(row[0]) + ["ours"] * _ours(grid, row))
        lines.append(f'<tr class="{classes}">{cells(row, "td")}</tr>')
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _ours(grid: Grid, row: Sequence[str]) -> bool:
    return grid.text > 1 and row[1].startswith("ours, ")
