"""The learning rates that trials had in each epoch: as ``rates.csv``, and as lines in the sweep's pictures."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import run_folder
from mmsa_dist.report import save
from tune.outcome import Outcome, winner
from tune.population import knobs_of
from tune.space import RATES, Space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = ("text", "audio", "vision", "rest")


@dataclass(frozen=True)
class Line:
    """A trial over its epochs, those before it became a trial of its own first.

    Attributes:
        begins: its own first epoch.
        rows: panel -> the value of each epoch.
    """

    number: int
    begins: int
    best: bool
    epochs: list[int]
    rows: dict[str, list[float]]


def epochs_of(outcome: Outcome) -> list[dict[str, Any]]:
    """Of each epoch that the trial's weights have seen, as far as it was judged, the event that says what was."""
    last = {e["epoch"]: e for e in run_folder.read_events(outcome.folder) if e["event"] == "epoch"}
    return [last[epoch] for epoch in sorted(last) if epoch <= outcome.epochs]


def write_csv(outcomes: Sequence[Outcome], monitor: str, path: Path) -> None:
    """A row for each trial and epoch: the rates of its last step, and the validation result. Epochs that a trial has of
    another one are that one's."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["trial", "epoch", *(f"lr_{group}" for group in GROUPS), f"valid_{monitor}"])
        for each in outcomes:
            begins = each.origin[1] if each.origin else 0
            for event in (event for event in epochs_of(each) if event["epoch"] > begins):
                rates, value = event.get("lr", {}), event["valid"].get(monitor)
                found = [rates.get(group, "") for group in GROUPS]
                out.writerow([each.number, event["epoch"], *found, "" if value is None else value])


def lines(outcomes: Sequence[Outcome], space: Space, monitor: str) -> list[Line]:
    """Every trial with each learning rate that is searched, and the validation result."""
    groups = [(knob.short, knob.keys[0].removeprefix(RATES)) for knob in knobs_of(space)]
    best = winner(outcomes, monitor)
    drawn = []
    for each in outcomes:
        events = epochs_of(each)
        rows = {name: [_number(event.get("lr", {}).get(group)) for event in events] for name, group in groups}
        rows[f"validation {monitor}"] = [_number(event["valid"].get(monitor)) for event in events]
        begins = each.origin[1] + 1 if each.origin else 1
        drawn.append(Line(each.number, begins, each == best, [event["epoch"] for event in events], rows))
    return drawn


def draw(trials: Sequence[Line], path: Path) -> Path:
    """Writes the picture; gives its path."""
    return save(figure(trials), path)


def figure(trials: Sequence[Line]) -> "Figure":
    """A panel a learning rate and one of the validation result; the best trial stands out, from its first epoch on,
    others begin where they became trials of their own."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = list(trials[0].rows)
    picture = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    for axes, panel in zip(picture.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for each in sorted(trials, key=lambda line: line.best):
            epochs, values = _own(each, panel)
            style = {"color": "C3", "linewidth": 2.2, "label": f"trial {each.number}, the best"} if each.best else {}
            axes.plot(epochs, values, **{"color": "grey", "linewidth": 0.9, "marker": ".", **style})
        if not panel.startswith("validation"):
            axes.set_yscale("log")
        axes.set(xlabel="epoch", ylabel=panel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    picture.axes[0].legend() if any(each.best for each in trials) else None
    return picture


def plotly(trials: Sequence[Line]) -> Any:
    """The same, to hover over."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    panels = list(trials[0].rows)
    picture = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, subplot_titles=panels)
    for row, panel in enumerate(panels, 1):
        for each in sorted(trials, key=lambda line: line.best):
            epochs, values = _own(each, panel)
            line = {"color": "crimson" if each.best else "grey", "width": 3 if each.best else 1}
            name = f"trial {each.number}" + (", the best" if each.best else "")
            shown = {"name": name, "legendgroup": name, "showlegend": row == 1, "mode": "lines+markers", "line": line}
            picture.add_trace(Scatter(x=epochs, y=values, **shown), row=row, col=1)
        if not panel.startswith("validation"):
            picture.update_yaxes(type="log", row=row, col=1)
    picture.update_layout(title="learning rates over epochs", height=280 * len(panels))
    return picture


def _own(line: Line, panel: str) -> tuple[list[int], list[float]]:
    """What is drawn of a trial: of the best all that its weights have seen, of others from the epoch before their own
    first one on, so that one sees where they come from."""
    from_epoch = 1 if line.best else line.begins - 1
    there = [n for n, epoch in enumerate(line.epochs) if epoch >= from_epoch]
    return [line.epochs[n] for n in there], [line.rows[panel][n] for n in there]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
