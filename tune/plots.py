"""A sweep in pictures: what each value did, how trials went through the space, which values mattered.

PNG files by matplotlib; one HTML page by plotly, which is one file and needs no network.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import run_folder
from tune import objectives, rates
from tune.axes import parallel, slices
from tune.outcome import DONE, STOPPED, Outcome
from tune.space import Knob, Space

if TYPE_CHECKING:
    import optuna

FEW = 4
"""Fewer trials than this, or of one value alone, say nothing of what mattered."""


def study_of(outcomes: Sequence[Outcome], space: Space, objective: str) -> "optuna.Study":
    """The trials that hold as Optuna's pictures want them: values by their own names, choices in words."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    held = [outcome for outcome in outcomes if outcome.status in (DONE, STOPPED)]
    distributions = {knob.short: _shown(knob, held) for knob in space.knobs if held}
    study = optuna.create_study(direction="maximize" if objectives.maximised(objective) else "minimize")
    for outcome in held:
        if found := objectives.values(outcome, [objective]):
            params = {knob.short: _text(outcome, knob) for knob in space.knobs}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=found[0]))
    return study


def importances(outcomes: Sequence[Outcome], space: Space, objective: str) -> dict[str, float]:
    """What share of the objective's variance each searched value explains (functional ANOVA over a random forest,
    Hutter et al. 2014), the greatest first; empty where there are too few trials."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    study = study_of(outcomes, space, objective)
    if len(study.trials) < FEW or len({trial.value for trial in study.trials}) < 2:
        return {}
    return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))


def draw(
    outcomes: Sequence[Outcome], space: Space, asked_for: Sequence[str], folder: Path, *, changing: bool = False
) -> list[Path]:
    """Writes the pictures into `folder` and gives their paths; none where no trial holds.

    Args:
        asked_for: the objectives; the first is drawn, several also against one another.
        changing: whether learning rates changed on the way; they are drawn over epochs then.
    """
    study = study_of(outcomes, space, asked_for[0])
    if not study.trials:
        return []
    folder.mkdir(exist_ok=True)
    drawn = _png(study, outcomes, space, asked_for, folder)
    lines = rates.lines(outcomes, space, asked_for[0]) if changing else None
    if lines is not None:
        drawn.append(rates.draw(lines, folder / "rates.png"))
    return [*drawn, _html(study, outcomes, space, asked_for, folder, [rates.plotly(lines)] if lines else [])]


def _png(
    study: "optuna.Study", outcomes: Sequence[Outcome], space: Space, asked_for: Sequence[str], folder: Path
) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name = asked_for[0]
    with pyplot.style.context("default"):
        importance = importances(outcomes, space, name)
        names = list(importance) or [knob.short for knob in space.knobs]
        drawn: list[tuple[str, Any]] = [
            ("parallel.png", parallel(study, names, name)),
            ("slices.png", slices(study, names, name)),
        ]
        if importance:
            _, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(importance)))
            axes.barh(list(importance)[::-1], list(importance.values())[::-1])
            axes.set_xlabel(f"importance for {name}")
            drawn.append(("importance.png", axes.figure))
        if len(asked_for) > 1:
            drawn.append(("front.png", _front(outcomes, asked_for).figure))
        paths = []
        for file, figure in drawn:
            figure.savefig(folder / file, dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            paths.append(folder / file)
    return paths


def _front(outcomes: Sequence[Outcome], asked_for: Sequence[str]) -> Any:
    """Each trial by the first two objectives; those that none betters in both stand out."""
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    front = {each.number for each in objectives.front(outcomes, asked_for)}
    for best, colour, name in ((False, "tab:gray", "trials"), (True, "tab:red", "Pareto front")):
        points = [
            found
            for each in outcomes
            if each.status in (DONE, STOPPED)
            and (each.number in front) is best
            and (found := objectives.values(each, asked_for[:2])) is not None
        ]
        axes.scatter([x for x, _ in points], [y for _, y in points], c=colour, label=name)
    axes.set_xlabel(asked_for[0])
    axes.set_ylabel(asked_for[1])
    axes.legend()
    return axes


def _html(
    study: "optuna.Study",
    outcomes: Sequence[Outcome],
    space: Space,
    asked_for: Sequence[str],
    folder: Path,
    more: Sequence[Any],
) -> Path:
    import plotly.graph_objects as figures
    from optuna import visualization
    from optuna.exceptions import ExperimentalWarning

    name = asked_for[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        shown = [
            visualization.plot_parallel_coordinate(study, target=_value, target_name=name),
            visualization.plot_slice(study, target=_value, target_name=name),
            visualization.plot_optimization_history(study, target=_value, target_name=name),
        ]
    if importance := importances(outcomes, space, name):
        bars = figures.Bar(x=list(importance.values())[::-1], y=list(importance)[::-1], orientation="h")
        shown.append(figures.Figure(bars, figures.Layout(title=f"importance for {name}")))
    shown += more
    parts = [figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(shown)]
    path = folder / "sweep.html"
    title = folder.parent.name
    head = f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title></head><body><h1>{title}</h1>"
    run_folder.write_text(path, head + "\n".join(parts) + "</body></html>\n")
    return path


def _value(trial: "optuna.trial.FrozenTrial") -> float:
    assert trial.value is not None
    return trial.value


def _shown(knob: Knob, outcomes: Sequence[Outcome]) -> "optuna.distributions.BaseDistribution":
    import optuna

    if knob.ranges:
        return knob.distribution()
    return optuna.distributions.CategoricalDistribution(sorted({_text(each, knob) for each in outcomes}, key=_order))


def _text(outcome: Outcome, knob: Knob) -> Any:
    """A trial's value as it is drawn: a number of a range, the words of a choice."""
    return outcome.values[knob.keys[0]] if knob.ranges else knob.text(outcome.values)


def _order(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
