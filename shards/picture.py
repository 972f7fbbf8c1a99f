"""A picture of a packed data set: its labels per split, and how long its samples are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import ConfigError
from shards.index import Index
from shards.inspect import Columns, per_split

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
BINS = 40


def check(path: Path) -> None:
    """Says before the work what would stop `draw` after it.

    Raises:
        ConfigError: no format that can be drawn, or no folder to write into.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--picture {path}: give a file that ends in one of {', '.join(FORMATS)}")
    try:
        wrong = not path.resolve().parent.is_dir() or path.is_dir()
    except OSError:
        wrong = True
    if wrong:
        raise ConfigError(f"--picture {path}: give a file in a folder that exists")


def draw(index: Index, columns: Columns, path: Path) -> None:
    """Writes the picture: a panel a label, then a panel a modality.

    Raises:
        ConfigError: there is nothing to draw, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    lengths = sequences(index, columns)
    panels = [*index.tasks, *lengths]
    if not panels:
        raise ConfigError(f"--picture {path}: there is nothing to draw: neither labels nor sequences; leave it out")
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    figure.suptitle(index.name + (" (SYNTHETIC)" if index.synthetic else ""))
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        if panel in index.tasks:
            _labels(axis, index, panel, columns)
        else:
            _lengths(axis, index, panel, lengths[panel])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--picture {path}: cannot be written: {error.strerror or error}") from error


def sequences(index: Index, columns: Columns) -> dict[str, NDArray[np.int32]]:
    """Name -> lengths (samples,) of the modalities and token ids; vectors, of one step each, are left out."""
    lengths = columns.lengths | ({"tokens": columns.tokens} if index.has_tokens else {})
    return {name: steps for name, steps in lengths.items() if steps.max(initial=0) > 1}


def _labels(axis: "Axes", index: Index, task: str, columns: Columns) -> None:
    """Shares of a split's samples, so that splits of different sizes can be compared."""
    if task in index.classes:
        edges = np.arange(index.classes[task] + 1) - 0.5
    else:
        low, high = index.label_range
        width = 0.2 if high - low <= 10 else (high - low) / 30  # MOSI's and SIMS's labels are multiples of 0.2
        edges = low + width * (np.arange(round((high - low) / width) + 2) - 0.5)
    _shares(axis, index, columns.labels[task], edges)
    axis.set_title(f"label {task}")
    axis.set_ylabel("share of the split")


def _lengths(axis: "Axes", index: Index, name: str, lengths: Any) -> None:
    longest = max(1, int(lengths.max(initial=0)))
    step = -(-longest // BINS)  # as many lengths in each bar
    _shares(axis, index, np.where(lengths > 0, lengths, np.nan), np.arange(0.5, longest + step, step))
    axis.set_title("token ids" if name == "tokens" else name)
    axis.set_xlabel(f"{name}: length in steps, where it is there")


def _shares(axis: "Axes", index: Index, values: Any, edges: Any) -> None:
    for split, part in per_split(index, values).items():
        known = part[~np.isnan(part)]
        if len(known):
            counts, _ = np.histogram(known, edges)
            axis.stairs(counts / len(known), edges, label=split, fill=split == "train", alpha=0.7)
