"""How long work shows itself: a bar on a terminal, plain lines elsewhere (logs, pipes, CI).

Results go to standard output (`console`), progress and remarks to standard error (`remarks`): output can be piped.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

# plain: names of files and data sets may hold [brackets] and :colons:
console = Console(highlight=False, markup=False, emoji=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 140  # in a log a table is better wide than cropped at 80 columns
remarks = Console(stderr=True, highlight=False, markup=False, emoji=False)

SECONDS_BETWEEN_LINES = 10.0
"""How often a plain line appears where there is no terminal."""

_COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)

_Item = TypeVar("_Item")


def track(iterable: Iterable[_Item], total: int | None, description: str) -> Iterator[_Item]:
    """Yields what `iterable` yields and shows how far it is.

    Args:
        total: number of items, None where it is not known.
        description: what is being done, e.g. ``packing train``.
    """
    if remarks.is_terminal:
        yield from _bar(iterable, total, description)
    else:
        yield from _lines(iterable, total, description)


@contextmanager
def meter(total: int, description: str, remark: str = "") -> Iterator[Callable[[int, int], None]]:
    """Gives what is to be told of progress: how many more are done, and how many bytes more are written.

    Args:
        total: number of items.
        description: what is being done, e.g. ``packing``.
        remark: to be said before.
    """
    if remark:
        remarks.print(f"{description}: {remark}", soft_wrap=True)
    began, done, written = time.monotonic(), 0, 0

    def rate() -> str:
        return f"{written / 1e6 / max(1e-9, time.monotonic() - began):,.0f} MB/s" if written else ""

    if remarks.is_terminal:
        columns = (*_COLUMNS, TextColumn("{task.fields[rate]}"))
        with Progress(*columns, console=remarks, transient=True) as progress:
            task = progress.add_task(description, total=total, rate="")

            def advance(items: int, bytes_: int) -> None:
                nonlocal written
                written += bytes_
                progress.update(task, advance=items, rate=rate())

            yield advance
        return
    last = began

    def say(items: int, bytes_: int) -> None:
        nonlocal done, written, last
        done, written = done + items, written + bytes_
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            share = f"{done:,}/{total:,} ({100 * done // max(1, total)} %)"
            remarks.print(", ".join(filter(None, [f"{description}: {share}", rate()])), soft_wrap=True)

    yield say
    if last > began:  # whoever read of a part shall not think that it ended there
        remarks.print(f"{description}: done", soft_wrap=True)


def _bar(iterable: Iterable[_Item], total: int | None, description: str) -> Iterator[_Item]:
    with Progress(*_COLUMNS, console=remarks, transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in iterable:
            yield item
            progress.advance(task)


def _lines(iterable: Iterable[_Item], total: int | None, description: str) -> Iterator[_Item]:
    last, said = time.monotonic(), False
    for done, item in enumerate(iterable):
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last, said = now, True
            share = f"/{total:,} ({100 * done // total} %)" if total else ""
            remarks.print(f"{description}: {done:,}{share}", soft_wrap=True)
        yield item
    if said:  # whoever read of a part shall not think that it ended there
        remarks.print(f"{description}: done", soft_wrap=True)
