"""A terminal that closes: SIGHUP, and nobody there any more to read what is said."""

import os
import select
import signal
import stat
from contextlib import suppress


def heard() -> bool:
    """Whether SIGHUP concerns this process: not under nohup, which has it ignored."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def leave_terminal() -> None:
    """After SIGHUP: what goes to a terminal that is gone, or into a pipe whose reader has got it too, goes nowhere.

    Each sentence would end in an error otherwise, and the run at the first of them.
    """
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISFIFO(os.fstat(stream).st_mode) or _gone(stream):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _gone(stream: int) -> bool:
    look = select.poll()
    look.register(stream, select.POLLOUT)
    return any(what & (select.POLLERR | select.POLLHUP) for _, what in look.poll(0))
