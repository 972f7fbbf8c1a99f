"""What came out of a run, for people: a table on the terminal, a loss curve and confusion matrices as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsa_dist import run_folder
from shards.utterance import EMOTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

DPI = 110
SPLITS = ("train", "valid", "test")

LABELS = {
    "mae": "MAE ↓", "corr": "Corr ↑", "acc2_has0": "Acc-2 has0 ↑", "acc2_non0": "Acc-2 non0 ↑", "f1_has0": "F1 has0 ↑",
    "f1_non0": "F1 non0 ↑", "acc2": "Acc-2 ↑", "acc3": "Acc-3 ↑", "acc5": "Acc-5 ↑", "acc7": "Acc-7 ↑", "f1": "F1 ↑",
    "loss": "Loss ↓", "acc": "Acc ↑",
}  # fmt: skip
"""Metric -> its name in the papers and which way is better."""


def value_text(name: str, value: float | None) -> str:
    """A metric as the papers print it: MAE and correlation with four digits, shares in percent. Undefined: a dash."""
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if name.startswith(("acc", "f1")) else f"{value:.4f}"


def label(name: str) -> str:
    """A metric's name in the papers and which way is better; of one emotion that of its kind: ``F1 happy ↑``."""
    kind, _, emotion = name.partition("_")
    if emotion in EMOTIONS:
        return LABELS[kind].replace(" ", f" {emotion} ")
    return LABELS.get(name, name)


def metrics_table(columns: Mapping[str, Mapping[str, float | None]], title: str | None = None) -> "RenderableType":
    """A metric a row, a split a column."""
    from rich.table import Table

    table = Table("metric", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    for name in names:
        cells = (value_text(name, values.get(name)) for values in columns.values())
        table.add_row(label(name), *cells)
    return table


def result_table(result: Mapping[str, Any]) -> "RenderableType":
    """The table at a run's end, from ``result.json``: metrics of the best epoch, and how it was chosen."""
    from rich.console import Group
    from rich.text import Text

    columns = {split: result[split] for split in SPLITS if split in result}
    chosen = (
        f"epoch {result['best_epoch']} of {result['epochs']}, selected on {result.get('selected_on', 'validation')}"
    )
    if "test" in columns:
        chosen += "; the test split was read once"
    parts: list[Any] = [
        metrics_table(columns, f"{result.get('system', '')} on {data_name(result)}".strip()),
        Text(chosen),
    ]
    return Group(*parts)


def data_name(result: Mapping[str, Any]) -> str:
    """The data set, and that it is synthetic where it is."""
    return f"{result.get('data', 'data')}{' (synthetic)' if result.get('synthetic') else ''}"


def pictures(run_dir: Path, into: Path) -> list[Path]:
    """Writes ``loss_curve.png`` and ``confusion_<split>_<classes>.png``, two classes and the most, of a finished run;
    where labels are classes ``confusion_<split>_<task>.png`` for each task.

    Returns:
        The files written; there is no matrix for labels that the field does not put into classes.
    """
    into.mkdir(parents=True, exist_ok=True)
    result = run_folder.read_json(run_dir / "result.json")
    kind = run_folder.read_json(run_dir / "data.json")["kind"]
    files = []
    if epochs := epoch_events(run_dir):
        files.append(save(loss_curve(epochs, result), into / "loss_curve.png"))
    for split in ("valid", "test"):
        if (run_dir / "predictions" / f"{split}.npz").is_file():
            files += _matrices(run_dir, split, kind, result, into)
    return files


def epoch_events(run_dir: Path) -> list[dict[str, Any]]:
    """The epoch events in order, each epoch once: a restart may have repeated some, the last one counts."""
    last = {event["epoch"]: event for event in run_folder.read_events(run_dir) if event.get("event") == "epoch"}
    return [last[epoch] for epoch in sorted(last)]


def loss_curve(epochs: list[dict[str, Any]], result: Mapping[str, Any]) -> "Figure":
    """Training loss and its parts, and beside it the validation metric that chose the best epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    monitor = str(result.get("selected_on", "mae")).split()[-1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [event["epoch"] for event in epochs]
    left.plot(x, [_number(event["train_loss"]) for event in epochs], marker=".", label="train loss")
    if any("loss" in event.get("valid", {}) for event in epochs):
        left.plot(x, [_number(event.get("valid", {}).get("loss")) for event in epochs], marker=".", label="valid loss")
    right.plot(
        x, [_number(event["valid"].get(monitor)) for event in epochs], marker=".", color="C1", label=f"valid {monitor}"
    )
    for axes, name in ((left, "loss"), (right, monitor)):
        axes.axvline(result["best_epoch"], color="grey", linestyle=":", label=f"best epoch {result['best_epoch']}")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    figure.suptitle(f"{result.get('system', '')} on {data_name(result)}".strip())
    return figure


def confusion_matrix(counts: np.ndarray, labels: tuple[str, ...], title: str) -> "Figure":
    """A confusion matrix (C, C), true class down: shades are shares of the true class, numbers are counts."""
    from matplotlib.figure import Figure

    size = 2.6 + 0.6 * len(labels)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes: Axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(
            column, row, f"{count:,}", ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black"
        )
    return figure


def _matrices(run_dir: Path, split: str, kind: Any, result: Mapping[str, Any], into: Path) -> list[Path]:
    from mmsa_dist.metrics import class_counts, confusion

    with np.load(run_dir / "predictions" / f"{split}.npz", allow_pickle=False) as file:
        y, p = file["y"], file["p"]
        tasks = file["tasks"].tolist() if "tasks" in file else []
    title = f"{result.get('system', '')} on {data_name(result)}: {split}, {len(y):,} samples"
    if tasks:
        found = {task: (confusion(y[:, n], p[:, n], 2, kind), f"{title}, {task}") for n, task in enumerate(tasks)}
    else:
        counted = sorted({*class_counts(kind)[:1], *class_counts(kind)[-1:]})
        found = {str(classes): (confusion(y, p, classes, kind), title) for classes in counted}
    return [
        save(confusion_matrix(*matrix, above), into / f"confusion_{split}_{name}.png")
        for name, (matrix, above) in found.items()
    ]


def save(figure: "Figure", path: Path) -> Path:
    """Writes a picture; gives its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    figure.savefig(path, dpi=DPI)
    return path


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
