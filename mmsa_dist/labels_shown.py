"""Generated labels for people: tables of cases and of counts, a csv of all, a picture of y_m against y_s.

Shapes: N training samples.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsa_dist import run_folder
from mmsa_dist.errors import ConfigError, TransientError
from shards import picture
from shards.utterance import UNIMODAL_TASK

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from mmsa_dist.labels import Labels

MODALITY_OF = {task: modality for modality, task in UNIMODAL_TASK.items()}
MOVED = 0.1
"""A label has moved where it differs from y_m by more than this share of H, half the label range."""


def check(count: int, to: Path | None, drawn: Path | None) -> None:
    """Says before the work what would stop it at its end.

    Raises:
        ConfigError: an option that cannot be done.
    """
    if count < 1:
        raise ConfigError(f"--cases {count}: give a number from 1")
    if to is not None and (to.suffix.lower() != ".csv" or not to.resolve().parent.is_dir() or to.is_dir()):
        raise ConfigError(f"--to {to}: give a file that ends in .csv, in a folder that exists")
    if drawn is not None:
        picture.check(drawn)


def moves(labels: "Labels") -> NDArray[np.float32]:
    """(tasks, N) y_s - y_m; NaN where a label is not known or its modality absent."""
    return np.stack(list(labels.labels.values())) - labels.truth


def turned(labels: "Labels") -> NDArray[np.bool_]:
    """(tasks, N) where the generated label has the other sign than y_m."""
    return np.stack(list(labels.labels.values())) * labels.truth < 0


def cases(labels: "Labels", count: int) -> Iterator[tuple[NDArray[np.int64], str]]:
    """Rows to be shown, and what they are; of samples whose y_m is not known those whose labels differ the most."""
    if not labels.known:
        values = np.stack(list(labels.labels.values()))
        yield order(values.max(0) - values.min(0), np.ones(values.shape[1], bool))[:count], "furthest apart"
        return
    largest = np.nan_to_num(np.abs(moves(labels))).max(0)
    changed: NDArray[np.bool_] = np.logical_or.reduce(turned(labels))
    kept = " that keep the sign" if changed.any() else ""
    yield order(largest, np.isfinite(labels.truth) & ~changed)[:count], f"largest changes{kept}"
    if changed.any():
        yield order(largest, changed)[:count], f"changes of sign, {changed.sum():,} of {len(changed):,} samples"


def order(values: NDArray[np.float32], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows `among` which to choose, by falling value."""
    rows = np.flatnonzero(among)
    return rows[np.argsort(-values[rows], kind="stable")]


def case_table(labels: "Labels", rows: NDArray[np.int64], said: list[str], title: str) -> "RenderableType":
    """As table 9 of TAM-ULAG: a sample a row, y_m and the label of each modality, and what was said."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", expand=any(said))
    table.add_column("sample" if labels.known else "sample (hash of its key)", overflow="fold")
    for name in ("m", *labels.labels):
        table.add_column(f"y_{name.lower()}", justify="right", no_wrap=True)
    if any(said):
        table.add_column("transcript", overflow="ellipsis", no_wrap=True, ratio=1)  # what the others leave
    changed = dict(zip(labels.labels, turned(labels), strict=True))
    for row, words in zip(rows, said, strict=True):
        own = [Text(_number(v[row]), "bold red" if changed[s][row] else "") for s, v in labels.labels.items()]
        table.add_row(labels.names[row], _number(labels.truth[row]), *own, *([words] if any(said) else []))
    return table


@dataclass(frozen=True)
class Change:
    """How the labels of one modality differ from y_m.

    Attributes:
        samples: that have the modality and whose y_m is known.
        moved: of these, further from y_m than `MOVED`. turned: with the other sign.
        distance: mean |y_s - y_m|; None of no sample.
    """

    modality: str
    samples: int
    moved: int
    turned: int
    distance: float | None


def changes(labels: "Labels") -> Iterator[Change]:
    """Of each modality that has labels."""
    bound = MOVED * labels.half_range
    for task, moved, changed in zip(labels.labels, np.abs(moves(labels)), turned(labels), strict=True):
        known = np.isfinite(moved)
        distance = float(moved[known].mean()) if known.any() else None
        yield Change(_modality(task), int(known.sum()), int((moved > bound).sum()), int(changed.sum()), distance)


def summary(labels: "Labels") -> "RenderableType":
    """A modality a row: how many labels moved away from y_m, how many changed sign, and the mean distance."""
    from rich.table import Table

    if not labels.known:
        table = Table("modality", "samples", "lowest", "mean", "highest")
        for task, values in labels.labels.items():
            low, mean, high = values.min(), values.mean(), values.max()
            table.add_row(_modality(task), f"{len(values):,}", _number(low), _number(mean), _number(high))
        return table
    bound = MOVED * labels.half_range
    table = Table("modality", "samples", f"moved by more than {bound:g}", "changed sign", "mean |y_s - y_m|")
    for change in changes(labels):
        n = change.samples
        mean = "-" if change.distance is None else f"{change.distance:.4f}"
        table.add_row(change.modality, f"{n:,}", _share(change.moved, n), _share(change.turned, n), mean)
    return table


def write_csv(labels: "Labels", path: Path) -> None:
    """All samples: ``key,y_m,y_t,y_a,y_v`` with empty cells for what is not known; there whole or not at all.

    Raises:
        TransientError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key" if labels.known else "id", "y_m", *(f"y_{task.lower()}" for task in labels.labels)])
    columns = [labels.truth, *labels.labels.values()]
    for name, *values in zip(labels.names, *columns, strict=True):
        writer.writerow([name, *("" if np.isnan(value) else f"{value:.6g}" for value in values)])
    try:
        run_folder.write_text(path, text.getvalue())
    except OSError as error:
        raise TransientError(f"--to {path}: cannot be written: {error.strerror or error}") from error


def draw(labels: "Labels", title: str, path: Path) -> None:
    """Writes the picture.

    Raises:
        TransientError: it cannot be written.
    """
    try:
        figure(labels, title).savefig(path, dpi=120)
    except OSError as error:
        raise TransientError(f"--picture {path}: cannot be written: {error.strerror or error}") from error


def figure(labels: "Labels", title: str) -> "Figure":
    """y_m to the right, y_s up, a panel a modality; what changed sign in another colour."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4 * len(labels.labels), 4.4), layout="constrained")
    picture.suptitle(title)
    low, high = np.nanmin(labels.truth), np.nanmax(labels.truth)
    panels = picture.subplots(1, len(labels.labels), squeeze=False)[0]
    for axes, (task, values), changed in zip(panels, labels.labels.items(), turned(labels), strict=True):
        for rows, colour, name in ((~changed, "C0", "sign as y_m"), (changed, "C3", "other sign")):
            axes.scatter(labels.truth[rows], values[rows], s=8, alpha=0.5, color=colour, linewidths=0, label=name)
        axes.plot([low, high], [low, high], color="grey", linewidth=0.8)
        axes.set(title=_modality(task), xlabel="y_m", ylabel=f"y_{task.lower()}")
    panels[0].legend()
    return picture


def _modality(task: str) -> str:
    return MODALITY_OF.get(task, task)


def _number(value: Any) -> str:
    return "-" if np.isnan(value) else f"{value:+.2f}"


def _share(part: Any, of: int) -> str:
    return f"{part:,} ({part / of:.1%})" if of else "-"
