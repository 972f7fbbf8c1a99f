"""When a trial is stopped before its end: Ray Tune's schedulers over epochs, none of which stops one at its last."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from mmsa_dist.metrics import is_better
from tune.asked import Asked
from tune.outcome import DONE, STOPPED, Outcome, epochs_of
from tune.trial import EPOCH, OBJECTIVE

REDUCTION = 3
"""ASHA: of the trials that reach a rung, the best third goes on."""

ENOUGH = 3
"""Trials that the median is taken of, at least."""


class _UntilTheLast:
    """A scheduler that stops no trial at its last epoch, where it ends by itself, and lets none wait for others."""

    epochs: int

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]
        ends = decision == TrialScheduler.STOP and result.get(EPOCH, 0) < self.epochs
        return TrialScheduler.STOP if ends else TrialScheduler.CONTINUE


class Asha(_UntilTheLast, ASHAScheduler):
    """Asynchronous successive halving."""

    def __init__(self, epochs: int, grace: int, mode: str) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode=mode,
            max_t=epochs,
            grace_period=grace,
            reduction_factor=REDUCTION,
            stop_last_trials=False,
        )
        self.epochs = epochs


class Median(_UntilTheLast, MedianStoppingRule):
    """The median of what the others reached on average until then."""

    def __init__(self, epochs: int, grace: int, mode: str) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode=mode,
            grace_period=grace,
            min_samples_required=ENOUGH,
            min_time_slice=float("inf"),
        )
        self.epochs = epochs

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: its last result was judged already, and a trial that failed before its first has none."""


def make_scheduler(asked: Asked, epochs: int, mode: str) -> TrialScheduler:
    """
    Args:
        epochs: that a trial runs at most. mode: "max" or "min", of the first objective.
    """
    grace = min(asked.grace, epochs)
    if asked.stopping == "asha":
        return Asha(epochs, grace, mode)
    return Median(epochs, grace, mode) if asked.stopping == "median" else FIFOScheduler()


@dataclass(frozen=True)
class Past:
    """A trial that has ended, as schedulers tell trials apart."""

    trial_id: str


def replay(scheduler: TrialScheduler, before: Iterable[Outcome], monitor: str) -> None:
    """Tells a new scheduler what the trials of the same sweep reached earlier, epoch by epoch."""
    for outcome in before:
        if outcome.status not in (DONE, STOPPED):
            continue
        trial = Past(f"before-{outcome.number}")
        scheduler.on_trial_add(None, trial)
        best = None
        for epoch, valid in epochs_of(outcome.folder):
            if epoch > outcome.epochs:
                break
            if is_better(monitor, valid.get(monitor), best):
                best = valid[monitor]
            row = {EPOCH: epoch, OBJECTIVE: best}
            if best is None:
                continue
            decision = scheduler.on_trial_result(None, trial, row)
            if decision == TrialScheduler.STOP and isinstance(scheduler, Median):
                break  # it judges no trial again that it has stopped
