"""How a run is ended in good order: whoever is asked to, all ranks agree on a step, save, and end.

The driver puts `REQUEST` into the run's folder, where rank 0 finds it; a rank that gets a signal of its own votes for
it itself. All learn of a vote with the loss of the same step (`Engine.step`), so no rank ends alone.
"""

import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

from mmsa_dist import hangup, run_folder
from mmsa_dist.errors import StoppedError

REQUEST = "stop.json"
"""Asks the ranks of a run to end."""

STOPPED = "stopped.json"
"""Says that they did: what for, and after which step."""

LOOK = 0.2
"""Seconds between two looks for `REQUEST`."""


def request(folder: Path, why: str) -> None:
    """Asks the ranks of the run in `folder` to end."""
    run_folder.write_json(folder / REQUEST, {"why": why})


def requested(folder: Path) -> bool:
    """Whether the ranks of the run in `folder` are asked to end; who waits before there are any ends too."""
    return (folder / REQUEST).is_file()


def pause(folder: Path, seconds: float) -> None:
    """Waits, but no longer than until somebody asks the run to end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not requested(folder):
        time.sleep(min(LOOK, seconds))


def forget(folder: Path) -> None:
    """Before ranks start: what earlier ones were asked and did."""
    for name in (REQUEST, STOPPED):
        (folder / name).unlink(missing_ok=True)


def ended(folder: Path) -> dict[str, Any] | None:
    """``{"why", "step"}`` where the ranks ended because they were asked to."""
    with suppress(FileNotFoundError):
        return dict(run_folder.read_json(folder / STOPPED))
    return None


class Signals:
    """The driver's ear, as a context: the first SIGINT, SIGTERM or SIGHUP asks the ranks to end, the second ends all at
    once. But a SIGHUP is never the second: a terminal that closes sends it twice, the kernel and the shell one each.

    Attributes:
        number: of the signal that came, 0 for none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.number = folder, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # not in a trial of a sweep, which its sweep ends
            asked = (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * hangup.heard())
            self._before = {n: signal.signal(n, self._hear) for n in asked}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else handler)
        if number == signal.SIGHUP:
            hangup.leave_terminal()
        self.number = number
        try:
            request(self._folder, f"{signal.Signals(number).name} to the driver")
        except OSError as error:  # a disk that is full, say
            print(f"the ranks cannot be asked to end ({error.strerror}): ending at once", file=sys.stderr, flush=True)
            if callable(handler := self._before[number]):
                handler(number, frame)
            raise KeyboardInterrupt from None
        print("ending after this step, once it is saved; a second signal ends at once", file=sys.stderr, flush=True)

    def stopped(self) -> StoppedError:
        """What to raise after a signal came and the ranks are gone."""
        done = ended(self._folder)
        kept = f"saved after step {done['step']:,}" if done else "it goes on from its last checkpoint"
        return StoppedError(f"{signal.Signals(self.number).name}; {kept}", self.number)


def paused(folder: Path) -> int | None:
    """The epoch that the run in `folder` was to pause after, where its ranks did so."""
    done = ended(folder)
    return None if done is None else done.get("paused")


class Requests:
    """One rank's ear: whether it is asked to end the run.

    Args:
        until: an epoch after which it is to pause in any case, saved, as it would be when asked to end there.
    """

    def __init__(self, folder: Path, rank: int, until: int | None = None) -> None:
        self._folder, self._rank, self._looked = folder, rank, 0.0
        self._until, self._paused = until, False
        self._why: str | None = None
        self._number = int(signal.SIGTERM)  # also of ranks that another one's vote has told

    def listen(self, *, driven: bool) -> None:
        """Takes SIGTERM as a request, in a process whose main thread trains.

        Args:
            driven: by a driver of ours, which hears a Ctrl-C or a closing terminal for all its ranks; else they are
                requests too.
        """
        signal.signal(signal.SIGTERM, self._hear)
        signal.signal(signal.SIGINT, signal.SIG_IGN if driven else self._hear)
        if hangup.heard():
            signal.signal(signal.SIGHUP, signal.SIG_IGN if driven else self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # of torchrun, which has the same terminal
            hangup.leave_terminal()
        self._why, self._number = f"{signal.Signals(number).name} to rank {self._rank}", number

    def come(self, epoch: int = 0) -> bool:
        """This rank's vote.

        Args:
            epoch: that has just ended, where one has.
        """
        if self._why is None and self._rank == 0 and self._until is not None and epoch >= self._until:
            self._why, self._paused = f"a pause after epoch {self._until}", True
        if self._why is None and self._rank == 0 and time.monotonic() - self._looked >= LOOK:
            self._looked = time.monotonic()
            with suppress(FileNotFoundError):
                self._why = str(run_folder.read_json(self._folder / REQUEST)["why"])
        return self._why is not None

    def stopped(self, step: int) -> StoppedError:
        """Writes down that all ranks have saved after `step` and end; what to raise."""
        if self._why is not None:  # those that were told by others' votes do not know what for
            pause = {"paused": self._until} if self._paused else {}
            run_folder.write_json(self._folder / STOPPED, {"why": self._why, "step": step, **pause})
        why = self._why or "another rank was asked to end"
        return StoppedError(f"{why}; saved after step {step}", self._number)
