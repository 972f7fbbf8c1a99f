"""Pictures of a reproduction: per row the loss over epochs, who is taken for whom among 2, 3, 5 and 7 classes, where
the fused features lie, and what labels were generated."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsa_dist.diagnosis import first_line
from mmsa_dist.metrics import CLASSES, class_counts, confusion
from mmsa_dist.report import confusion_matrix, epoch_events, save
from shards.progress import remarks
from shards.suggest import counted
from tune.papers import cases, fused
from tune.papers.measured import Measured, predictions
from tune.papers.page import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    measured: Iterable[Measured], kind: str, tasks: tuple[str, ...], monitor: str, where: str, into: Path
) -> list[Path]:
    """Writes ``loss-<row>.png`` and ``confusion-<row>-<classes or task>.png`` for every row with a finished run; of its
    first seed ``tsne-<row>.png``, where its system names fused features, and ``labels-<row>.png`` and
    ``cases-<row>.png``, where it generates labels.

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
            for kind_of, figure in of_first_seed(each, where).items():
                files.append(save(figure, into / f"{kind_of}-{slug(each.name)}.png"))
    return files


def of_first_seed(measured: Measured, where: str) -> "dict[str, Figure]":
    """Begin of the file's name -> picture of one run alone, the one with the lowest seed."""
    seed, folder = min(measured.folders.items())
    figures = {}
    try:
        points = fused.mapped(folder)
    except Exception as error:  # of a system of somebody's own, say: a picture less is no failure
        remarks.print(f"note: no t-SNE of {measured.name}: {first_line(str(error))}", soft_wrap=True)
        points = None
    if points is not None:
        title = f"{measured.name} on {where}, seed {seed}\nfused features of the test split, t-SNE"
        figures["tsne"] = fused.figure(points, title)
    if shown := cases.kept(folder):
        name = f"{measured.name} on {where}"
        figures |= {"labels": cases.scatter(name, seed, shown), "cases": cases.picture(name, seed, shown)}
    return figures


def generated(measured: Iterable[Measured]) -> list[Grid]:
    """Cases of generated labels, a table for each row that has some."""
    grids = []
    for each in measured:
        if each.folders:
            seed, folder = min(each.folders.items())
            if shown := cases.kept(folder):
                grids.append(cases.grid(each.name, seed, shown))
    return grids


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
