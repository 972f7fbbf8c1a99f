"""When a run is saved, and the writing of it beside training.

Each rank copies its part of a checkpoint and goes on; a thread of each sends it to rank 0's, which writes the whole. At
most one is on its way: the next waits for it, and whatever ends a run waits for the last.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from mmsa_dist import checkpoint
from mmsa_dist.checkpoint import Checkpoint
from mmsa_dist.ledger import Ledger
from mmsa_dist.mirror import Mirror, Sender
from mmsa_dist.parts import Part
from mmsa_dist.run_folder import Events

if TYPE_CHECKING:
    from mmsa_dist.loop import Progress
    from mmsa_dist.session import Session


@dataclass(frozen=True)
class Writing:
    """A checkpoint on its way to the disk.

    Attributes:
        step: of the engine.
        blocked: seconds for which this rank's training stood still.
        kept: where the run's time had gone when it was taken: what a restart keeps of it.
        done: gives the seconds that writing took.
    """

    step: int
    blocked: float
    kept: dict[str, float]
    done: "Future[float]"


class Saver:
    """Saves one rank's session. Every method may raise: rank 0's TransientError where a checkpoint cannot be written, a
    RuntimeError where another rank is gone."""

    def __init__(self, session: "Session", events: Events, ledger: Ledger) -> None:
        self._session, self._events, self._ledger = session, events, ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._sender, self._warnings = _sender(session)
        self._writing: Writing | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with checkpoint.held(self._session.folder / "checkpoints"):
            self._thread.shutdown()  # what is being written is finished, also where something else failed
            if error is not None and self._writing is not None and self._writing.done.exception():
                self._writing = None  # failed in the wake of `error`, which is the one to say
            self.tell()
            if self._sender:
                self._sender.close(self._ledger.beat)
                self.tell()

    def due(self) -> bool:
        """Whether it is time for another one. Rank 0 has the clock; the others learn of it with the next step."""
        every = self._session.recipe.checkpoint.every_seconds
        return bool(every and self._session.rank == 0 and time.monotonic() - self._last >= every)

    def save(self, state: "Progress") -> None:
        """One checkpoint of all ranks."""
        session, began = self._session, time.monotonic()
        self.wait()  # its memory is the next one's
        with self._ledger.under("checkpoint"):
            labels = session.generator.state_dict(keep=session.rank == 0)
            part, progress = session.engine.part(), asdict(state)
            done = self._thread.submit(self._write, part, labels, progress, state.best_step or None)
            self._writing = Writing(part.step, time.monotonic() - began, self._ledger.booked(), done)
        self._last = time.monotonic()

    def tell(self) -> None:
        """Says among the events that the last one is on the disk, once it is."""
        if self._writing is not None and self._writing.done.done():
            told, self._writing = self._writing, None
            seconds = {"blocked": round(told.blocked, 4), "seconds": round(told.done.result(), 4)}
            if self._session.rank == 0:
                self._events.write("saved", step=told.step, **seconds, kept=told.kept)
        while not self._warnings.empty():
            self._events.write("warning", message=self._warnings.get())

    def wait(self) -> None:
        """Until the last one is on the disk."""
        if self._writing is not None:
            with self._ledger.under("checkpoint"):
                self._writing.done.exception()
        self.tell()

    def _write(self, part: Part, labels: dict[str, Tensor], progress: dict[str, Any], best_step: int | None) -> float:
        """In the thread."""
        began, session = time.monotonic(), self._session
        whole = session.engine.assembled(part)
        if whole is not None:
            content = Checkpoint(whole, labels, progress, session.origin)
            path = checkpoint.save(session.folder / "checkpoints", content, session.recipe.checkpoint.keep, best_step)
            if self._sender:
                self._sender.offer(path, best_step)
        return time.monotonic() - began


def _sender(session: "Session") -> "tuple[Sender | None, SimpleQueue[str]]":
    """Who sends checkpoints to the mirror, on rank 0 and where there is one; and what could not be sent."""
    warnings: SimpleQueue[str] = SimpleQueue()
    address = session.recipe.checkpoint.mirror
    if address is None or session.rank:
        return None, warnings
    saved = checkpoint.saved(session.folder / "checkpoints")
    return Sender(Mirror.of(address, session.folder), saved, warnings.put), warnings
