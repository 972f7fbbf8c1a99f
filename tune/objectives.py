"""What trials are compared by: validation metrics, and how large the system is."""

from collections.abc import Iterable, Sequence

from mmsa_dist.errors import ConfigError
from mmsa_dist.metrics import higher_is_better
from mmsa_dist.suggest import nearest
from tune.outcome import DONE, STOPPED, Outcome

PARAMETERS = "parameters"
"""Numbers that the system learns: known before a trial begins."""


def check(objectives: Sequence[str], monitor: str, known: Sequence[str]) -> None:
    """
    Args:
        monitor: by which each trial keeps its best epoch. known: the validation metrics of the data set.

    Raises:
        ConfigError: one is unknown or there twice, or the first is not `monitor`.
    """
    for name in objectives:
        if name not in (*known, PARAMETERS):
            raise ConfigError(f"--objectives: unknown {name!r}{nearest(name, [*known, PARAMETERS])}")
    if len(set(objectives)) < len(objectives):
        raise ConfigError(f"--objectives {' '.join(objectives)}: one of them is there twice")
    if objectives[0] != monitor:
        raise ConfigError(
            f"--objectives {' '.join(objectives)}: trials keep their best epoch by {monitor}, so the first must be "
            f"{monitor}; or give --train.monitor {objectives[0] if objectives[0] != PARAMETERS else 'METRIC'}"
        )


def maximised(objective: str) -> bool:
    return objective != PARAMETERS and higher_is_better(objective)


def values(outcome: Outcome, objectives: Iterable[str]) -> list[float] | None:
    """What a trial reached, in the order of `objectives`; None where one of them is not known."""
    found = [outcome.parameters if name == PARAMETERS else outcome.metrics.get(name) for name in objectives]
    return (
        None if any(value is None or value != value for value in found) else [float(v) for v in found if v is not None]
    )


def front(outcomes: Sequence[Outcome], objectives: Sequence[str]) -> list[Outcome]:
    """The Pareto front: trials that hold, and that no other betters in one objective without being worse in another."""
    held = {each.number: values(each, objectives) for each in outcomes if each.status in (DONE, STOPPED)}
    costs = {
        number: [-value if maximised(name) else value for name, value in zip(objectives, found, strict=True)]
        for number, found in held.items()
        if found is not None
    }
    best = [
        number
        for number, own in costs.items()
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in costs.values())
    ]
    return [outcome for outcome in outcomes if outcome.number in best]
