"""Shards made in this process, or in several of this machine.

The processes are forked: what the source holds in memory is shared, not copied. Each has a pipe to this one, over which
it gets one piece of work after the other and tells how far it is; when this process is gone, the pipe breaks, and the
next thing the other says ends it. So whatever dies, nobody is left behind.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Protocol, Self, cast

from shards.errors import MmsaError, TransientError
from shards.packing.job import Piece
from shards.packing.shard import Record, Report

Make = Callable[[Piece, Report], Record]
"""`shards.packing.shard.make`, but for the first arguments."""

_MOST = 16
"""Processes that are started unasked."""

_WORTH = 32 * 2**20
"""Bytes to be written for which it is worth while to start a process."""

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SECONDS = 0.1
"""Between two reports of a process."""


class LostError(TransientError):
    """A process, or a node, was lost. What is finished may stay: the same command goes on with it."""


class Crew(Protocol):
    """Those who make the shards, ready to work inside its ``with``."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def work(self, pieces: tuple[Piece, ...], report: Report) -> Iterator[Record]:
        """Makes all pieces; their records in their order.

        Raises:
            Exception: what went wrong with the first piece, in their order, with which something did.
            LostError: one of the crew is gone.
        """
        ...


class Here:
    """This process does everything."""

    def __init__(self, make: Make) -> None:
        self._make = make

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def work(self, pieces: tuple[Piece, ...], report: Report) -> Iterator[Record]:
        return (self._make(piece, report) for piece in pieces)


class Processes:
    """So many processes of this machine."""

    def __init__(self, make: Make, workers: int) -> None:
        self._make, self._workers = make, workers
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}

    def __enter__(self) -> Self:
        try:
            for _ in range(self._workers):
                self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        fork = multiprocessing.get_context("fork")
        mine, its = fork.Pipe()
        process = fork.Process(target=_serve, args=(self._make, its, [*self._processes, mine]), daemon=True)
        # an interrupt between the fork and the last line would leave a process that nobody ends, and that writes on
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        try:
            process.start()
            its.close()  # else nobody would see that the process is gone
            self._processes[mine] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(self, *error: object) -> None:
        for process in self._processes.values():
            process.kill()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()

    def work(self, pieces: tuple[Piece, ...], report: Report) -> Iterator[Record]:
        waiting = iter(pieces)
        busy: dict[Connection, int] = {}
        results = InOrder()

        def give(pipe: Connection) -> None:
            """The next piece, unless something went wrong already: then only what is begun is ended."""
            if not results.failed and (piece := next(waiting, None)):
                busy[pipe] = piece.number
                self._talk(pipe, lambda: pipe.send(piece))

        for pipe in self._processes:
            give(pipe)
        while busy:
            for pipe in cast("list[Connection]", wait(list(busy))):
                told = self._talk(pipe, pipe.recv)
                if isinstance(told, tuple):
                    report(*told)
                else:
                    results.add(busy.pop(pipe), told)
                    give(pipe)
            yield from results.ready()

    def _talk(self, pipe: Connection, say: Callable[[], object]) -> object:
        """What `say` gives, as long as somebody is at the other end."""
        try:
            return say()
        except (EOFError, OSError) as error:
            process = self._processes[pipe]
            process.join(timeout=5)
            code = process.exitcode
            how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"and ended with {code}"
            hint = " (out of memory? fewer --workers need less)" if code == -signal.SIGKILL else ""
            raise LostError(f"a packing process was killed {how}{hint}") from error


class InOrder:
    """Results that come in any order and leave in that of their numbers, the first failure as an exception.

    Attributes:
        failed: something went wrong, perhaps not with the first.
    """

    def __init__(self) -> None:
        self.failed = False
        self._next = 0
        self._held: dict[int, object] = {}

    def add(self, number: int, result: object) -> None:
        """`result` is a record, or the exception that there is in its stead."""
        self.failed |= isinstance(result, BaseException)
        self._held[number] = result

    def ready(self) -> Iterator[Record]:
        """Those whose turn it is.

        Raises:
            Exception: its turn has come.
        """
        while self._next in self._held:
            result = self._held.pop(self._next)
            if isinstance(result, BaseException):
                raise result
            self._next += 1
            yield cast(Record, result)


def chosen(workers: int | None, pieces: int, stored_bytes: int) -> int:
    """How many processes to start: no more than there are shards; unasked, one a core where the work is worth it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(cores, _MOST, stored_bytes // _WORTH) if workers is None else workers
    return max(1, min(wanted, pieces))


def attempt(make: Make, piece: Piece, report: Report) -> Record | Exception:
    """The record, or what went wrong: as it can be sent, with the traceback of what is ours to mend."""
    try:
        return make(piece, report)
    except (MmsaError, OSError) as error:
        return error
    except Exception as error:
        return RuntimeError(f"{piece.stem}: {type(error).__name__}: {error}\n{traceback.format_exc()}")


def _serve(make: Make, pipe: Connection, others: list[Connection]) -> None:
    """A process's whole life. Signals are the parent's business: it ends us when it ends."""
    for other in others:
        other.close()
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    report = _Reports(pipe)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            piece = pipe.recv()
            result = attempt(make, piece, report)
            report.flush()
            pipe.send(result)


class _Reports:
    """Sends progress, now and then."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._samples = self._bytes = 0
        self._last = time.monotonic()

    def __call__(self, samples: int, bytes_: int) -> None:
        self._samples += samples
        self._bytes += bytes_
        if time.monotonic() - self._last >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        self._pipe.send((self._samples, self._bytes))
        self._samples = self._bytes = 0
        self._last = time.monotonic()
