"""``run.log``: what a run's command says, line by line with the time, to be read when its terminal is gone."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

FILE = "run.log"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours, and how a progress bar moves on a terminal."""


class RunLog:
    """Keeps lines from when it began, and writes them once it is told where."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._path: Path | None = None

    def into(self, folder: Path) -> None:
        """From now on lines go to the run in `folder`, behind those of earlier commands."""
        self._path = folder / FILE
        self._write()

    def line(self, text: str) -> None:
        said = _CONTROL.sub("", text).rpartition("\r")[2].rstrip()  # of a bar what was seen last
        if said:
            self._lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {said}\n")
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._lines)
        except OSError:  # a full disk; what matters is on the terminal, and in the events
            pass
        self._lines.clear()


class _Both:
    """A stream of which whole lines go to the log too. In all else it is that stream."""

    def __init__(self, stream: TextIO, log: RunLog) -> None:
        self._stream, self._log, self._begun = stream, log, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._log.line(line)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def logged() -> Iterator[RunLog]:
    """All that this process prints meanwhile, and the error it ends with."""
    log, streams = RunLog(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (_Both(stream, log) for stream in streams)
    try:
        yield log
    except BaseException as error:
        log.line(f"error: {error}" if str(error) else f"ended by {type(error).__name__}")
        raise
    finally:
        sys.stdout, sys.stderr = streams
