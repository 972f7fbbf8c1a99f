"""Ends a rank that stands still, and keeps where it stood.

A collective that a peer never enters, or a file system that does not answer, raises nothing: whoever waits, waits. So a
thread beside training looks for signs of life (`Ledger` gives one whenever it books). It is patient until the first
step, which may compile, download and wait for others, and less so afterwards.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mmsa_dist.errors import TransientError

GRACE = 2.0
"""Seconds between a rank's last words and its end, in which its peers, who stand still as well, say theirs."""

PATIENCE = 10.0
"""Seconds that a rank's last words may take to be written."""


class Watch:
    """Watches this process, as a context.

    Args:
        folder: of the run; where all threads stood goes into its ``stacks/``.
        first: seconds without a sign of life that are borne before the first step.
        later: seconds that are borne after it.
        failed: writes down how the rank ended.
    """

    def __init__(
        self, folder: Path, rank: int, first: float, later: float, failed: Callable[[BaseException], None]
    ) -> None:
        self._folder, self._rank, self._patience, self._later = folder, rank, first, later
        self._failed = failed
        self._seen = time.monotonic()
        self._doing = "start"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch-progress", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def alive(self, did: str) -> None:
        """A sign of life: a stretch of this name ended."""
        self._seen, self._doing = time.monotonic(), did
        if did == "step":
            self._patience = self._later

    def _look(self) -> None:
        every = max(0.05, min(1.0, self._patience / 4, self._later / 4))
        looked = time.monotonic()
        while not self._over.wait(every):
            now = time.monotonic()
            if now - looked > every + self._later / 2:  # this process was stopped itself, and goes on
                self._seen = now
            looked = now
            if now - self._seen > self._patience:
                self._end(now - self._seen)

    def _end(self, seconds: float) -> None:
        # in a thread: the run's own disk may be what does not answer, or be full, and the rank must end all the same
        telling = threading.Thread(target=self._tell, args=(seconds,), name="tell-standstill", daemon=True)
        telling.start()
        telling.join(PATIENCE)
        time.sleep(GRACE)
        os._exit(TransientError.exit_code)  # whatever it waits for would hold an exception up as well

    def _tell(self, seconds: float) -> None:
        try:
            where = f"is in {write_stacks(self._folder, self._rank)}"
        except OSError as error:
            where = f"could not be written ({error.strerror})"
        self._failed(
            TransientError(
                f"rank {self._rank} stood still for {seconds:.0f} s after a stretch of {self._doing!r}: it waits for "
                f"another rank, or for a file system, that does not answer; where each of its threads stood {where}. "
                "--launch.step-timeout bears more"
            )
        )


def write_stacks(folder: Path, rank: int) -> Path:
    """Where all threads of this process stand, in ``stacks/rank-<r>.txt`` of the run."""
    path = folder / "stacks" / f"rank-{rank}.txt"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    return path
