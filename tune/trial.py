"""One trial, in its own process of the cluster: an ordinary Ray Train run that tells Ray Tune about every epoch."""

from pathlib import Path
from typing import Any

from ray.train import Checkpoint
from ray.tune import get_context
from ray.tune.integration.ray_train import TuneReportCallback

from mmsa_dist import diagnosis, launch, run_folder, stopping
from mmsa_dist.errors import MmsaError, TransientError
from mmsa_dist.metrics import higher_is_better, is_better
from mmsa_dist.recipe import Recipe, read_recipe
from tune import reserved
from tune.outcome import ERROR, RESULT, TRIAL, best_so_far

OBJECTIVE = "objective"
"""What trials are compared by: the best validation result so far, as at its end a run keeps its best epoch."""

EPOCH = "epoch"


def run_trial(config: dict[str, Any]) -> None:
    """Trains in the folder that the sweep prepared, from its newest checkpoint on; what failed is in ``error.json``.

    Raises nothing of its own: where this process dies, and only there, Ray Tune calls it again.

    Args:
        config: ``folder``, with its ``recipe.yaml``; ``until``, an epoch to pause after, where it is to; and ``error``
            with its ``exit_code`` where nothing could be made of what was drawn.
    """
    folder = Path(config["folder"])
    if "error" in config:
        _failed(folder, config["error"], config["exit_code"])
        return
    try:
        reserved.free(folder)  # what an earlier process of this trial held
        _train(read_recipe(folder / "recipe.yaml"), folder, config.get("until"))
    except MmsaError as error:
        _failed(folder, str(error), error.exit_code)


def _failed(folder: Path, message: str, exit_code: int) -> None:
    run_folder.write_json(folder / ERROR, {"message": message, "exit_code": exit_code, "trial": True})


def _train(recipe: Recipe, folder: Path, until: int | None) -> None:
    for attempt in range(recipe.launch.max_failures + 1):
        launch.make_ready(folder)
        outcome = _attempt(recipe, folder, attempt, until)
        if (folder / RESULT).is_file() or stopping.paused(folder) is not None:
            return
        error = diagnosis.diagnose(folder, outcome)
        stopped = "stopped" in run_folder.read_json(folder / TRIAL)  # its ranks were taken from it
        if stopped or not isinstance(error, TransientError) or attempt == recipe.launch.max_failures:
            raise error


def _attempt(recipe: Recipe, folder: Path, attempt: int, until: int | None) -> str:
    """Runs the ranks once; gives what was seen where they ended badly, '' where they did not."""
    callback = ReportBest(recipe.train.monitor, best_so_far(folder, recipe.train.monitor).value)
    # a name of its own: Ray resumes a run whose name it has seen
    name = f"{get_context().get_trial_id()}-{attempt}"
    try:
        launch.ray_trainer(recipe, folder, name=name, callbacks=[callback], report=True, until=until).fit()
    except Exception as error:  # Ray wraps what a worker raised; the worker has written it down
        return f"Ray Train: {type(error).__name__}: {diagnosis.first_line(str(error))}"
    return ""


class ReportBest(TuneReportCallback):
    """Passes on the epoch and the best validation result so far; made inside a trial, called in Ray Train's controller.

    Args:
        best: of the epochs before a restart.
    """

    def __init__(self, monitor: str, best: float | None) -> None:
        super().__init__()
        self.monitor, self.best = monitor, best

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        value = metrics[0].get(f"valid_{self.monitor}")
        if is_better(self.monitor, value, self.best):
            self.best = value
        # a metric that is undefined yet (the correlation of constant predictions) is worse than any other
        worst = float("-inf") if higher_is_better(self.monitor) else float("inf")
        row = {EPOCH: metrics[0][EPOCH], OBJECTIVE: worst if self.best is None else self.best}
        super().after_report(run_context, [row], checkpoint)
