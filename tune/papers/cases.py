"""Labels that a run's label generator made: y_m against y_s, and cases, as in table 9 of TAM-ULAG.

They are in a run's checkpoints, which go when it is done: what is shown of them is kept in its folder.

Shapes: N training samples.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mmsa_dist import checkpoint, labels, labels_shown
from mmsa_dist.errors import ConfigError, MmsaError
from mmsa_dist.labels import Labels
from tune.papers.page import Grid
from tune.papers.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FILE = "generated-labels.npz"
"""In a run's folder."""

CASES = 8
"""Samples that are shown."""


@dataclass(frozen=True)
class Shown:
    """What a run has generated.

    Attributes:
        when: of which checkpoint, in words. rows: of `labels`, the cases. what: what cases they are. said: transcript
            of each, '' where there is none.
    """

    generator: str
    when: str
    labels: Labels
    rows: npt.NDArray[np.int64]
    what: str
    said: list[str]


def keep(run: Run) -> None:
    """Writes down what a run that is done has generated, while its checkpoints are there; nothing where it generates
    no labels. Never raises: a picture less is no failure."""
    there = checkpoint.saved(run.folder / "checkpoints")
    if (run.folder / FILE).is_file() or not there or run.recipe.label_generator == "none":
        return
    try:
        made = labels.generated(run.folder, run.recipe)
        found = labels.beside_truth(made, run.recipe)
        rows, what = list(labels_shown.cases(found, CASES))[-1]  # changes of sign, where there are any
        partial = run.folder / f".{FILE}"
        with partial.open("wb") as file:
            np.savez(
                file,
                names=np.array(found.names, dtype=np.str_),
                truth=found.truth,
                tasks=np.array(list(found.labels), dtype=np.str_),
                labels=np.stack(list(found.labels.values())),
                half_range=np.float64(found.half_range),
                rows=rows,
                said=np.array(labels.transcripts(found, rows), dtype=np.str_),
                about=np.array([made.generator, made.when, what]),
            )
        partial.replace(run.folder / FILE)
    except ConfigError:
        return  # a generator that makes none: the multimodal label is all there is
    except (MmsaError, OSError) as error:
        log.warning("%s: its generated labels cannot be shown: %s", run.folder.name, error)


def kept(folder: Path) -> Shown | None:
    """What `keep` wrote of the run in `folder`; None where it generated nothing, or nothing is known of its samples."""
    if not (folder / FILE).is_file():
        return None
    with np.load(folder / FILE, allow_pickle=False) as file:
        by_task = dict(zip(file["tasks"].tolist(), file["labels"], strict=True))
        names, numbers = file["names"].tolist(), np.full(len(file["names"]), -1, dtype=np.int64)
        found = Labels(names, file["truth"], by_task, float(file["half_range"]), None, numbers)
        generator, when, what = file["about"].tolist()
        return Shown(generator, when, found, file["rows"], what, file["said"].tolist()) if found.known else None


def grid(name: str, seed: int, shown: Shown) -> Grid:
    """The cases as a table; a generated label of the other sign has a star."""
    tasks = list(shown.labels.labels)
    changed = dict(zip(tasks, labels_shown.turned(shown.labels), strict=True))
    rows = []
    for row, words in zip(shown.rows.tolist(), shown.said, strict=True):
        own = [_text(shown.labels.labels[task][row]) + "*" * bool(changed[task][row]) for task in tasks]
        rows.append((shown.labels.names[row], words, _text(shown.labels.truth[row]), *own))
    title = f"labels that {shown.generator} generated for {name}, seed {seed}, {shown.when}: {shown.what}"
    return Grid(title, ("sample", "transcript", "y_m", *(f"y_{task.lower()}" for task in tasks)), rows)


def scatter(name: str, seed: int, shown: Shown) -> "Figure":
    """y_m to the right, y_s up, a panel a modality."""
    return labels_shown.figure(shown.labels, f"{name}, seed {seed}: labels by {shown.generator} {shown.when}")


def picture(name: str, seed: int, shown: Shown) -> "Figure":
    """A case a line: its label, and what each modality's became."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7.5, 1.6 + 0.32 * len(shown.rows)), layout="constrained")
    axes = drawn.subplots()
    lines = np.arange(len(shown.rows))[::-1]
    axes.scatter(shown.labels.truth[shown.rows], lines, marker="D", s=46, color="black", label="y_m", zorder=3)
    for task, marker, colour in zip(shown.labels.labels, "o^sPX", ("C0", "C1", "C2", "C4", "C5"), strict=False):
        axes.scatter(
            shown.labels.labels[task][shown.rows], lines, marker=marker, s=36, color=colour, label=f"y_{task.lower()}"
        )
    axes.axvline(0, color="grey", linewidth=0.8)
    keys = [shown.labels.names[row] for row in shown.rows.tolist()]
    axes.set_yticks(lines, keys, parse_math=False)  # video$_$clip is no formula
    axes.set(xlabel="label", title=f"{name}, seed {seed}: {shown.what}")
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def _text(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.2f}"
