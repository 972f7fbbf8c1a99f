"""Runs spread over the cluster: Ray Tune with a list in place of a search, as many at once as there is room for.

Imports Ray; `tune.reproduce` imports this when there is something to run, not before.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmsa_dist import run_folder
from mmsa_dist.errors import MmsaError, TransientError
from shards.mix import AnyIndex
from shards.progress import console, remarks
from tune.outcome import ERROR, RESULT, TRIAL
from tune.papers.measured import sentence
from tune.papers.runs import ENDED, Run, prepare, why_failed
from tune.reserved import Reserved
from tune.room import Room
from tune.search import run
from tune.trial import EPOCH


def spread(runs: Sequence[Run], index: AnyIndex, folder: Path, room: Room) -> None:
    """Trains `runs`; what became of each is in its own folder. Ctrl-C ends it as if it were done.

    Args:
        folder: of the reproduction, for what Ray Tune writes meanwhile.
    """
    run(Listed(runs, index), FIFOScheduler(), Told(runs), runs[0].recipe, folder, count=len(runs), room=room)


class Listed(Searcher):
    """Gives one run after the other. Its folder is made here, in the driver, before it starts anywhere."""

    def __init__(self, runs: Sequence[Run], index: AnyIndex) -> None:
        super().__init__()
        self._left, self._index = list(runs), index

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The configuration of `run_trial` for the next run."""
        if not self._left:
            return str(Searcher.FINISHED)
        run = self._left.pop(0)
        values: dict[str, Any] = {"folder": str(run.folder)}
        try:
            begin(run, self._index)
        except (MmsaError, OSError) as error:
            run.folder.mkdir(parents=True, exist_ok=True)
            code = error.exit_code if isinstance(error, MmsaError) else TransientError.exit_code
            values |= {"error": str(error), "exit_code": code}
        run_folder.write_json(run.folder / TRIAL, {"trial": trial_id, "number": run.seed, "values": {"row": run.row}})
        return values

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is left to do is known by the folders."""
        Path(checkpoint_path).touch()


def begin(run: Run, index: AnyIndex) -> None:
    """The run's folder and, where it is recorded, its run in MLflow; a server that is away holds nobody up."""
    shutil.rmtree(run.folder / "ray", ignore_errors=True)  # of an attempt before; Ray would go on from what it knows
    prepare(run, index)
    if run.recipe.tracking.enabled:
        from mmsa_dist.tracking import open_run

        try:
            open_run(run.folder, run.recipe)
        except TransientError as error:
            remarks.print(f"{run.name} is not recorded in MLflow: {error}", soft_wrap=True)


class Told(Callback):
    """Ray Tune calls this in the driver: a line for every run that begins or ends, and what it held is given back."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = {str(run.folder): run for run in runs}
        self._ended = 0
        self._reserved = Reserved()
        self._bar: Progress | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bar": None}  # Tune keeps a copy of its callbacks on disk; a bar is of this terminal

    def __enter__(self) -> Self:
        if console.is_terminal:
            columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._bar.add_task("runs", total=len(self._runs))
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._reserved.release_all()
        if self._bar is not None:
            self._bar.stop()

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._reserved.release()

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        console.print(f"begins: {self._runs[trial.config['folder']].name}")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        run, file = self._runs[trial.config["folder"]], Path(trial.config["folder"]) / ERROR
        if file.is_file():
            run_folder.write_json(file, {**run_folder.read_json(file), ENDED: True})
        self._say(run, (trial.last_result or {}).get(EPOCH, 0))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        run, file = self._runs[trial.config["folder"]], Path(trial.config["folder"]) / ERROR
        seen = " ".join(str(trial.get_error()).split())[:300]  # it could not say itself: it was killed
        error = {"message": f"the run's process died: {seen}", "exit_code": TransientError.exit_code}
        run_folder.write_json(file, {**error, ENDED: True})
        self._say(run, 0)

    def _say(self, run: Run, epochs: int) -> None:
        self._reserved.ended(run.folder)
        self._ended += 1
        if (run.folder / RESULT).is_file():
            became = sentence(run, run.recipe.train.monitor)
        else:
            became = f"failed: {why_failed(run) or f'ended after {epochs} epochs without a result'}"
        console.print(f"{self._ended} of {len(self._runs)} done: {run.name}: {became}", soft_wrap=True)
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
