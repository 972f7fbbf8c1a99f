"""`mmsa-dist jobs watch`: one live screen of a job of a cluster, or of any run whose folder can be read from here."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from cluster.command_line import parsed
from cluster.errors import ConfigError, TransientError
from cluster.seen import FAILED, RUNNING, Seen, changes, line, screen

SECONDS_BETWEEN_LINES = 30.0
"""How often there is a line of what goes on as before."""

PATIENCE = 60.0
"""Seconds in a row for which what is watched may not answer."""


@dataclass(frozen=True)
class Watch:
    """Watch a job of a cluster, or a run's folder: mmsa-dist jobs watch JOB, or mmsa-dist jobs watch --run RUN_DIR

    One screen, drawn anew every two seconds until the job ends: how far it is, how fast each rank is and what it waits
    for, the newest checkpoint, restarts, the last error, the log's end. Where there is no terminal it is printed once;
    with --follow a line for each change and every half a minute. Ctrl-C ends the looking, never the job.

    A job is seen through its head's dashboard, whose address and token are enough for its state, its epochs, its
    errors and its log. What ranks measure is read from their nodes where those can be reached from here, else from a
    Prometheus that reads them. A run's folder has all of it, whatever started the run.
    """

    job: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="JOB")]] = None
    """The job's id, as `mmsa-dist submit` said it."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="RUN_DIR")] = None
    """The folder of a run or of a sweep, in place of a job."""
    address: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    prometheus: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """A Prometheus that reads the cluster's nodes, e.g. http://127.0.0.1:9090."""
    follow: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Without a terminal: a line for each change until it ends, not one screen."""
    every: float = 2.0
    """Seconds between two looks."""
    lines: int = 8
    """Lines of the log to show."""


class Watched(Protocol):
    """What can be looked at again and again."""

    def look(self) -> Seen: ...


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist jobs watch`: 0 once what is watched has ended, or was seen once; 130 after Ctrl-C.

    Raises:
        ConfigError: neither a job nor a run, or both; an unknown job; a refused token. TransientError: nothing answers.
    """
    options = parsed(Watch, argv, "mmsa-dist jobs watch")
    if (options.job is None) == (options.run is None):
        raise ConfigError("what to watch: a job's id, or --run RUN_DIR, and not both; see mmsa-dist jobs watch --help")
    if not 0 < options.every <= 3600 or options.lines < 0:
        raise ConfigError("--every: more than 0 seconds, at most an hour; --lines: 0 or more")
    try:
        with opened(options) as watched:
            return _watch(watched, options)
    except KeyboardInterrupt as stop:
        goes_on = "the job goes on" if options.job else "the run goes on"
        print(f"no longer watching; {goes_on}", file=sys.stderr)
        return 128 + int(stop.args[0]) if stop.args else 130  # the front door says which signal it was


@contextmanager
def opened(options: Watch) -> Iterator[Watched]:
    """What the options name, whose trouble is said in sentences inside."""
    if options.run is not None:
        unused = [name for name in ("address", "prometheus") if getattr(options, name)]
        if unused:
            raise ConfigError(f"--{unused[0]} belongs to a job, and --run reads files only; leave one of them out")
        from cluster.watch_run import RunFolder

        yield RunFolder(options.run, options.lines)
        return
    from cluster.client import connected, find
    from cluster.watch_job import Job

    assert options.job is not None
    with connected(options.address) as (_, client):
        find(client, options.job)
        yield Job(client, options.job, options.prometheus, options.lines)


def _watch(watched: Watched, options: Watch) -> int:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        from rich.live import Live

        with Live(console=console, auto_refresh=False, transient=True) as live:
            for seen in looks(watched, options.every):
                live.update(screen(seen), refresh=True)
        console.print(screen(seen))
        return 0
    if not options.follow:
        console.width = 140
        console.print(screen(watched.look()))
        return 0
    before, said = None, 0.0
    for seen in looks(watched, options.every):
        if (now := changes(seen)) != before or time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            print(f"{time.strftime('%H:%M:%S')}  {line(seen)}", flush=True)
            before, said = now, time.monotonic()
    if seen.kind == FAILED and seen.error:
        print(f"error: {seen.error}", flush=True)
    return 0


def looks(watched: Watched, every: float) -> Iterator[Seen]:
    """One look after the other until what is watched has ended; one that fails is made again for a while.

    Raises:
        TransientError: nothing could be seen for `PATIENCE` seconds.
    """
    last: Seen | None = None
    answered = time.monotonic()
    while last is None or last.kind == RUNNING:
        try:
            last = watched.look()
            answered = time.monotonic()
        except (RuntimeError, OSError) as error:
            if last is None or time.monotonic() - answered > PATIENCE:
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise TransientError(f"nothing was to be seen for {PATIENCE:.0f} s: {why}") from error
            last.notes = [f"no answer for {time.monotonic() - answered:.0f} s; asking again"]
        yield last
        if last.kind == RUNNING:
            time.sleep(every)
