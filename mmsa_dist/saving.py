"""When a run is saved, and the writing of it beside training.

Ranks gather a checkpoint together, which copies it; rank 0 then writes the copy in a thread while all go on. At most
one is being written: the next waits for it, and whatever ends a run waits for the last.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mmsa_dist import checkpoint
from mmsa_dist.checkpoint import Checkpoint
from mmsa_dist.ledger import Ledger
from mmsa_dist.run_folder import Events

if TYPE_CHECKING:
    from mmsa_dist.loop import Progress
    from mmsa_dist.session import Session


@dataclass(frozen=True)
class Writing:
    """A checkpoint on its way to the disk.

    Attributes:
        step: of the engine.
        blocked: seconds for which training stood still.
        kept: where the run's time had gone when it was taken: what a restart keeps of it.
        done: gives the seconds that writing took.
    """

    step: int
    blocked: float
    kept: dict[str, float]
    done: "Future[float]"


class Saver:
    """Saves one rank's session. On rank 0 every method may raise TransientError: a checkpoint cannot be written."""

    def __init__(self, session: "Session", events: Events, ledger: Ledger) -> None:
        self._session, self._events, self._ledger = session, events, ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._writing: Writing | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()  # what is being written is finished, also where something else failed

    def due(self) -> bool:
        """Whether it is time for another one. Rank 0 has the clock; the others learn of it with the next step."""
        every = self._session.recipe.checkpoint.every_seconds
        return bool(every and self._session.rank == 0 and time.monotonic() - self._last >= every)

    def save(self, state: "Progress") -> None:
        """One checkpoint; all ranks gather it, rank 0 writes it."""
        session, began = self._session, time.monotonic()
        with self._ledger.under("checkpoint"):
            labels = session.generator.state_dict(keep=session.rank == 0)
            whole = session.engine.state()
            if whole is not None:
                content = Checkpoint(whole, labels, asdict(state), session.origin)
                self.wait()
                done = self._thread.submit(
                    _write, session.folder, content, session.recipe.checkpoint.keep, state.best_step or None
                )
                blocked = time.monotonic() - began
                self._writing = Writing(whole.step, blocked, self._ledger.booked(), done)
        self._last = time.monotonic()

    def tell(self) -> None:
        """Says among the events that the last one is on the disk, once it is."""
        if self._writing is not None and self._writing.done.done():
            told, self._writing = self._writing, None
            seconds = {"blocked": round(told.blocked, 4), "seconds": round(told.done.result(), 4)}
            self._events.write("saved", step=told.step, **seconds, kept=told.kept)

    def wait(self) -> None:
        """Until the last one is on the disk."""
        if self._writing is not None:
            with self._ledger.under("checkpoint"):
                self._writing.done.exception()
        self.tell()


def _write(folder: Path, content: Checkpoint, keep: int, best_step: int | None) -> float:
    began = time.monotonic()
    checkpoint.save(folder / "checkpoints", content, keep, best_step)
    return time.monotonic() - began
