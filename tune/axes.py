"""Two pictures of a sweep's trials by matplotlib: what each value did, and how the trials went through the space.

Optuna draws both too, in one row as wide as there are values, the trials that differ most from the best in white.
"""

from collections.abc import Sequence
from math import ceil, log10
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution

MOST = 6
"""Values that are drawn; sweep.html has all of them."""
COLUMNS = 3
MAP = "viridis_r"
"""Of colours: none is close to white."""


def slices(study: "optuna.Study", names: Sequence[str], objective: str) -> "Figure":
    """The objective over each of the values, a panel each; darker trials came later, the best one has a ring.

    Args:
        names: of all values, the first to be drawn first.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    shown = names[:MOST]
    rows, columns = ceil(len(shown) / COLUMNS), min(COLUMNS, len(shown))
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    reached = [trial.value for trial in study.trials]
    numbers = [trial.number + 1 for trial in study.trials]
    points = None
    for panel, name in zip(grid.flat, shown, strict=False):
        places = [_place(trial, name) for trial in study.trials]
        points = panel.scatter(places, reached, c=numbers, cmap=MAP, s=28)
        best = study.best_trial
        panel.scatter([_place(best, name)], [best.value], s=110, facecolors="none", edgecolors="tab:red")
        _mark(panel, study.trials[0].distributions[name])
        panel.set_xlabel(name)
    for panel in grid.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in grid[:, 0]:
        panel.set_ylabel(objective)
    if len(set(numbers)) > 1:
        figure.colorbar(points, ax=grid, label="trial", ticks=MaxNLocator(integer=True))
    figure.suptitle(_title(shown, names))
    return figure


def parallel(study: "optuna.Study", names: Sequence[str], objective: str) -> "Figure":
    """A line a trial from value to value and to the objective; the darker the better, the best one in red."""
    from matplotlib import cm, colors, pyplot

    shown = names[:MOST]
    figure, plot = pyplot.subplots(figsize=(2 + 1.8 * len(shown), 4.5), layout="constrained")
    reached = [float(trial.value or 0.0) for trial in study.trials]
    low, high = min(reached), max(reached)
    better = "viridis" if study.direction.name == "MINIMIZE" else MAP
    colour = cm.ScalarMappable(colors.Normalize(low, high), better)
    for trial in sorted(study.trials, key=lambda trial: trial.number == study.best_trial.number):
        heights = [_height(trial.distributions[name], _place(trial, name)) for name in shown]
        heights.append((float(trial.value or 0.0) - low) / (high - low or 1.0))
        is_best = trial.number == study.best_trial.number
        colour_of = "tab:red" if is_best else colour.to_rgba(np.asarray([trial.value]))[0]
        plot.plot(heights, color=colour_of, linewidth=2.2 if is_best else 1.1)
    for at, name in enumerate(shown):
        plot.axvline(at, color="0.75", linewidth=0.8, zorder=0)
        for height, text in _ticks(study.trials[0].distributions[name]):
            plot.annotate(text, (at, height), (4, 6), textcoords="offset points", fontsize=7, va="center")
    plot.set_xticks(range(len(shown) + 1), [*shown, objective], rotation=20, ha="right")
    plot.set_yticks([])
    plot.axvline(len(shown), color="0.75", linewidth=0.8, zorder=0)
    figure.colorbar(colour, ax=plot, label=objective)
    plot.set_title(_title(shown, names))
    return figure


def _title(shown: Sequence[str], names: Sequence[str]) -> str:
    return "" if len(shown) == len(names) else f"{len(shown)} of {len(names)} values; sweep.html has all"


def _place(trial: "optuna.trial.FrozenTrial", name: str) -> float:
    """Of a trial along the axis of a value: the number, or which of the choices it is."""
    choices = getattr(trial.distributions[name], "choices", None)
    return float(choices.index(trial.params[name]) if choices else trial.params[name])


def _mark(panel: "Axes", distribution: "BaseDistribution") -> None:
    """The axis of a value: its choices, or its range."""
    choices: Any = getattr(distribution, "choices", None)
    if choices:
        panel.set_xticks(range(len(choices)), choices)
        panel.set_xlim(-0.5, len(choices) - 0.5)
    elif getattr(distribution, "log", False):
        panel.set_xscale("log")


def _height(distribution: "BaseDistribution", place: float) -> float:
    """Where a place lies between the least and the greatest, 0 to 1."""
    low, high = _bounds(distribution)
    if getattr(distribution, "log", False):
        place, low, high = log10(place), log10(low), log10(high)
    return (place - low) / (high - low or 1.0)


def _bounds(distribution: "BaseDistribution") -> tuple[float, float]:
    choices: Any = getattr(distribution, "choices", None)
    return (0.0, len(choices) - 1.0) if choices else (float(distribution.low), float(distribution.high))


def _ticks(distribution: "BaseDistribution") -> list[tuple[float, str]]:
    """Heights with what stands at them."""
    choices: Any = getattr(distribution, "choices", None)
    if choices:
        return [(_height(distribution, at), str(choice)) for at, choice in enumerate(choices)]
    return [(_height(distribution, bound), f"{bound:g}") for bound in _bounds(distribution)]
