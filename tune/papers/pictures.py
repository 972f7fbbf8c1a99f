"""Pictures of a reproduction: per row the loss over epochs, and who is taken for whom among 2, 3, 5 and 7 classes."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsa_dist.metrics import CLASSES, class_counts, confusion
from mmsa_dist.report import confusion_matrix, epoch_events, save
from shards.suggest import counted
from tune.papers.measured import Measured, predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    measured: Iterable[Measured], kind: str, tasks: tuple[str, ...], monitor: str, where: str, into: Path
) -> list[Path]:
    """Writes ``loss-<row>.png`` and ``confusion-<row>-<classes or task>.png`` for every row with a finished run.

    Args:
        kind: of labels, as in `mmsa_dist.metrics`. tasks: of classes. monitor: what chose the best epochs.
        where: what the data set is called in titles.
    """
    into.mkdir(parents=True, exist_ok=True)
    files = []
    for each in measured:
        if each.tests:
            files.append(save(loss_curves(each, monitor, where), into / f"loss-{slug(each.name)}.png"))
            for classes, figure in confusions(each, kind, tasks, where).items():
                files.append(save(figure, into / f"confusion-{slug(each.name)}-{classes}.png"))
    return files


def slug(name: str) -> str:
    """A row's name as a part of a file's: ``w/o BERT`` -> ``w-o-BERT``."""
    return re.sub(r"[^\w.+]+", "-", name).strip("-")


def loss_curves(measured: Measured, monitor: str, where: str) -> "Figure":
    """Training loss and the validation metric, a line a seed; a dot is the epoch that was kept."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for seed, folder in measured.folders.items():
        epochs = epoch_events(folder)
        numbers = [event["epoch"] for event in epochs]
        left.plot(numbers, [event["train_loss"] for event in epochs], label=f"seed {seed}")
        valid = [_number(event["valid"].get(monitor)) for event in epochs]
        (line,) = right.plot(numbers, valid, label=f"seed {seed}")
        kept = [(n, value) for n, value in zip(numbers, valid, strict=True) if epochs and n == epochs[-1]["best_epoch"]]
        right.plot(*zip(*kept, strict=True), marker="o", color=line.get_color()) if kept else None
    for axes, name in ((left, "training loss"), (right, f"validation {monitor}")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    figure.suptitle(f"{measured.name} on {where}")
    return figure


def confusions(measured: Measured, kind: str, tasks: tuple[str, ...], where: str) -> "dict[str, Figure]":
    """Number of classes, or the task -> its matrix, with the counts of all seeds."""
    truth, said = (
        np.concatenate(each) for each in zip(*(predictions(f)[1:] for f in measured.folders.values()), strict=True)
    )
    title = f"{measured.name} on {where}: test, {counted(len(measured.folders), 'seed')}"
    if kind == CLASSES:
        columns = {task: confusion(truth[:, n], said[:, n], 2, kind) for n, task in enumerate(tasks)}
        return {task: confusion_matrix(*matrix, f"{title}, {task}") for task, matrix in columns.items()}
    return {str(n): confusion_matrix(*confusion(truth, said, n, kind), title) for n in class_counts(kind)}


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
