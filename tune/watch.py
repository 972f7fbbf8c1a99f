"""What a sweep's driver does while trials run: says how they go, closes their MLflow runs, frees disk."""

import shutil
from pathlib import Path
from typing import Any, Self

from ray.tune import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmsa_dist import run_folder
from mmsa_dist.report import value_text
from shards.progress import console
from tune.outcome import (
    DONE,
    ERROR,
    FAILED,
    RESULT,
    STOPPED,
    TRIAL,
    Outcome,
    best_so_far,
    read_outcome,
    read_outcomes,
    winner,
)
from tune.record import record_trial
from tune.reserved import Reserved
from tune.trial import EPOCH


class Watch(Callback):
    """Ray Tune calls this in the driver, between two looks at the trials: nothing here may take long.

    Args:
        monitor: the validation metric that is shown.
        epochs: that a trial runs at most.
        trials: how many there will be.
    """

    def __init__(self, monitor: str, epochs: int, trials: int) -> None:
        self.monitor, self.epochs, self.trials = monitor, epochs, trials
        self._reserved = Reserved()
        self._bar: Progress | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bar": None}  # Tune keeps a copy of its callbacks on disk; a bar is of this terminal

    def __enter__(self) -> Self:
        if console.is_terminal:
            columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._bar.add_task("trials", total=self.trials)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._reserved.release_all()
        if self._bar is not None:
            self._bar.stop()

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._reserved.release()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        folder = Path(trial.config["folder"])
        number = run_folder.read_json(folder / TRIAL)["number"]
        best, best_epoch, _ = best_so_far(folder, self.monitor)
        console.print(
            f"trial {number} of {self.trials}  epoch {result[EPOCH]} of {self.epochs}  "
            f"best valid {self.monitor} {value_text(self.monitor, best)} at epoch {best_epoch}"
        )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        folder = Path(trial.config["folder"])
        if not (folder / RESULT).is_file():
            judged = (trial.last_result or {}).get(EPOCH, 0)
            run_folder.write_json(folder / TRIAL, {**run_folder.read_json(folder / TRIAL), "stopped": judged})
        self._ended(folder)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        folder = Path(trial.config["folder"])
        if not (folder / ERROR).is_file():  # its process could not say: it was killed
            seen = trial.get_error()
            message = f"the trial's process died: {' '.join(str(seen).split())[:300]}"
            run_folder.write_json(folder / ERROR, {"message": message, "exit_code": 75})
        self._ended(folder)

    def _ended(self, folder: Path) -> None:
        self._reserved.ended(folder)
        outcome = read_outcome(folder, self.monitor)
        console.print(self._sentence(outcome))
        record_trial(outcome, self.monitor)
        spare_disk(folder.parent, self.monitor)
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def _sentence(self, outcome: Outcome) -> str:
        head = f"trial {outcome.number} of {self.trials}  {outcome.status}"
        if outcome.error is not None:
            return f"{head}: {outcome.error}"
        shown = value_text(self.monitor, outcome.best)
        after = "" if outcome.status == DONE else f" after {outcome.epochs} of {self.epochs} epochs"
        return f"{head}{after}: valid {self.monitor} {shown}"


def spare_disk(trials_dir: Path, monitor: str) -> None:
    """Removes the checkpoints of all trials that ended, but the best one's: fifty of BERT's would need 100 GB."""
    outcomes = read_outcomes(trials_dir, monitor)
    best = winner(outcomes, monitor)
    for outcome in outcomes:
        if outcome.status in (DONE, STOPPED, FAILED) and outcome != best:
            for part in ("checkpoints", "best", "ray"):
                shutil.rmtree(outcome.folder / part, ignore_errors=True)
