"""What became of a trial, read from the folder it left: the sweep's memory is on disk, not in a process.

``trial.json`` is written when a trial is drawn, ``error.json`` where it failed; all else is an ordinary run folder.
A trial that is stopped early may train a little on before its ranks end, and the winner goes on to its end: only the
epochs that they were judged by count.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmsa_dist import run_folder
from mmsa_dist.errors import DataError, TransientError
from mmsa_dist.metrics import is_better

TRIAL, ERROR, RESULT = "trial.json", "error.json", "result.json"

DONE, STOPPED, FAILED, INTERRUPTED = "done", "stopped early", "failed", "interrupted"


@dataclass(frozen=True)
class Outcome:
    """One trial.

    Attributes:
        number: from 1, in the order they were drawn.
        values: dotted key -> value that was tried.
        status: `DONE`, `STOPPED` (before its end), `FAILED` or `INTERRUPTED`.
        best: its best validation result, at `best_epoch`; None where there is none.
        epochs: how many it ran.
        metrics: all validation metrics of its best epoch. parameters: that it learns, where its recipe could be made.
        error: why it failed, in a sentence. exit_code: which kind of error it was.
        origin: the trial whose copy it began as, and after which epoch; None of one that was drawn.
        rates: of such a one the learning rates that its weights had, by dotted key, each from an epoch (from 1) on.
    """

    folder: Path
    number: int
    values: dict[str, Any]
    status: str
    best: float | None
    best_epoch: int
    epochs: int
    error: str | None
    metrics: dict[str, float | None] = field(default_factory=dict)
    parameters: int | None = None
    origin: tuple[int, int] | None = None
    rates: tuple[tuple[int, dict[str, float]], ...] = ()
    exit_code: int | None = None

    @property
    def may_go_on(self) -> bool:
        """Whether it failed of what may be mended: a full disk, a server that was away."""
        return self.status == FAILED and self.exit_code == TransientError.exit_code


def read_outcome(folder: Path, monitor: str) -> Outcome:
    """The outcome of the trial in `folder`, judged by the validation metric `monitor`.

    Raises:
        DataError: what is written of it is damaged.
    """
    try:
        return _read_outcome(folder, monitor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder}: what is written of this trial is damaged ({TRIAL}, {ERROR} or {RESULT}: {error}); remove the "
            "folder, the sweep goes on without it"
        ) from error


def _read_outcome(folder: Path, monitor: str) -> Outcome:
    trial = run_folder.read_json(folder / TRIAL)
    error: dict[str, Any] = {}
    chosen = trial.get("chosen")  # as the winner; what it does later is no part of the search
    if chosen:
        status = chosen["status"]
    elif (folder / RESULT).is_file():
        status = DONE
    elif "stopped" in trial:  # what its processes say of being killed then is no failure
        status = STOPPED
    elif (folder / ERROR).is_file():
        status, error = FAILED, dict(run_folder.read_json(folder / ERROR))
    else:
        status = INTERRUPTED
    until = chosen["epochs"] if chosen else trial.get("stopped") if status == STOPPED else None
    reached = best_so_far(folder, monitor, until)
    return Outcome(
        folder=folder,
        number=trial["number"],
        values=trial["values"],
        status=status,
        best=reached.value,
        best_epoch=reached.epoch,
        epochs=reached.epochs,
        error=error["message"] if error else None,
        exit_code=error.get("exit_code"),
        metrics=reached.metrics,
        parameters=trial.get("parameters"),
        origin=(trial["from"]["trial"], trial["from"]["epoch"]) if "from" in trial else None,
        rates=tuple((epoch, rates) for epoch, rates in trial.get("rates", ())),
    )


def read_outcomes(trials_dir: Path, monitor: str) -> list[Outcome]:
    """All trials below `trials_dir`, in the order they were drawn."""
    outcomes = [read_outcome(file.parent, monitor) for file in trials_dir.glob(f"*/{TRIAL}")]
    return sorted(outcomes, key=lambda outcome: outcome.number)


@dataclass(frozen=True)
class Reached:
    """The best validation result of a run yet, its epoch, all metrics of that epoch, and how many epochs it ran."""

    value: float | None = None
    epoch: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)
    epochs: int = 0


def best_so_far(folder: Path, monitor: str, until: int | None = None) -> Reached:
    """How far a run has come (until epoch `until`)."""
    best = Reached()
    for epoch, valid in epochs_of(folder):
        if until is None or epoch <= until:
            best = replace(best, epochs=max(best.epochs, epoch))
            if is_better(monitor, valid.get(monitor), best.value):
                best = replace(best, value=valid[monitor], epoch=epoch, metrics=valid)
    return best


def epochs_of(folder: Path) -> list[tuple[int, dict[str, float | None]]]:
    """Each epoch that a run has evaluated, with its validation metrics; one that it ran twice is there once."""
    ended = {e["epoch"]: e["valid"] for e in run_folder.read_events(folder) if e["event"] == "epoch"}
    return sorted(ended.items())


def winner(outcomes: Iterable[Outcome], monitor: str) -> Outcome | None:
    """The trial with the best validation result, the earlier of equals; one that was stopped early may win.

    A failed trial cannot: whether its training holds is not known.
    """
    best: Outcome | None = None
    for outcome in outcomes:
        if outcome.status in (DONE, STOPPED) and is_better(monitor, outcome.best, best.best if best else None):
            best = outcome
    return best
