"""The parts of a system: its modules as a tree, with what each gives, how many parameters it has and who trains them.

Shapes: B batch, T time. A module's output is found by sending made-up samples through the system, twice, in batches and
sequences of other sizes: an axis that has another size then is one of batch or time, whatever width it looks like.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmsa_dist.errors import ConfigError
from mmsa_dist.systems.base import GROUPS, DataSpec, Prediction, System
from shards.batch import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """How many samples are sent through a system, and how many steps they have by modality."""

    batch: int
    steps: Mapping[str, int]


TRIALS = (
    Trial(23, {"text": 101, "audio": 103, "vision": 107}),
    Trial(29, {"text": 131, "audio": 137, "vision": 139}),
)

COLOURS = {"text": "#cfe2f3", "audio": "#d9ead3", "vision": "#fce5cd", "rest": "#eeeeee", "": "#ffffff"}
"""Optimizer group -> its colour; "" where there is nothing to train."""

_SYMBOLS = {tuple(trial.batch for trial in TRIALS): "B"} | {
    tuple(-(-trial.steps[modality] // 2**k) for trial in TRIALS): ("T", "T/2", "T/4")[k]
    for modality in TRIALS[0].steps
    for k in (2, 1, 0)
}
"""Sizes of an axis in both trials -> what it is."""


@dataclass(frozen=True)
class Part:
    """A module, or a parameter that stands beside modules.

    Attributes:
        name: within the part above.
        kind: its class.
        output: the shape of what it gives, e.g. ``(B, T, 64)``; empty where it is not called by itself.
        parameters: how many it has, its parts' among them.
        groups: the optimizer groups they are in.
    """

    name: str
    kind: str
    output: str
    parameters: int
    groups: tuple[str, ...]
    parts: "list[Part]" = field(default_factory=list)

    @property
    def group(self) -> str:
        """One word for the groups."""
        return "" if not self.groups else self.groups[0] if len(self.groups) == 1 else "several"


def dissect(system: System, depth: int = 2) -> Part:
    """The parts of `system` down to `depth`; those without parameters, such as dropout, only where they read an input.

    Leaves the system in evaluation mode.
    """
    once, again = (_outputs(system, made_up(system.spec, trial)) for trial in TRIALS)
    outputs = {path: _told(shapes, again.get(path, shapes)) for path, shapes in once.items()}
    return _part(system, system, "", system.name or type(system).__name__, outputs, depth)


def _part(system: System, module: nn.Module, path: str, name: str, outputs: dict[str, str], depth: int) -> Part:
    own = {f"{path}{key}": value.numel() for key, value in module.named_parameters()}
    groups = {system.parameter_group(key) for key in own}
    part = Part(name, type(module).__name__, outputs.get(path, ""), sum(own.values()), _in_order(groups))
    children = list(module.named_children()) if depth else []
    for child_name, child in children:
        below = _part(system, child, f"{path}{child_name}.", child_name, outputs, depth - 1)
        if below.parameters or child_name in GROUPS:
            part.parts.append(below)
    if children:
        for key, value in module.named_parameters(recurse=False):
            group = system.parameter_group(f"{path}{key}")
            part.parts.append(Part(key, "Parameter", _told([value.shape], [value.shape]), value.numel(), (group,)))
    return part


def _in_order(groups: set[str]) -> tuple[str, ...]:
    return tuple(group for group in GROUPS if group in groups)


def made_up(spec: DataSpec, trial: Trial) -> Batch:
    """Samples of nothing, every modality of its own length."""
    size = trial.batch
    values = {name: torch.zeros(size, trial.steps[name], width) for name, width in spec.widths.items()}
    return Batch(
        values=values,
        lengths={name: torch.full((size,), trial.steps[name]) for name in values},
        present={name: torch.ones(size, dtype=torch.bool) for name in values},
        labels={task: torch.zeros(size) for task in spec.tasks},
        numbers=torch.arange(size),
        weight=torch.ones(size),
        norm=float(size),
        keys=[str(row) for row in range(size)],
    )


def _outputs(system: System, batch: Batch) -> dict[str, list[Sizes]]:
    """Module's path with a dot behind it -> the shapes of what it gave when it was called first."""
    found: dict[str, list[Sizes]] = {}
    hooks = []
    for path, module in system.named_modules():
        if path:

            def note(module: nn.Module, given: Any, output: Any, path: str = f"{path}.") -> None:
                found.setdefault(path, _shapes(output))

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            prediction: Prediction = system.eval()(batch)
            if hasattr(system, "label_layers"):  # a label generator's, which read features in training only
                system.get_submodule("label_layers")(prediction.features)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _shapes(output: Any) -> list[Sizes]:
    """The shape of a tensor; of a tuple or a mapping its tensors', e.g. of an answer and a feature."""
    if isinstance(output, Tensor):
        return [tuple(output.shape)]
    output = list(output.values()) if isinstance(output, Mapping) else output
    return [shape for each in output for shape in _shapes(each)] if isinstance(output, Sequence) else []


def _told(once: list[Sizes], again: list[Sizes]) -> str:
    """Shapes in symbols, from both trials."""
    told = [[_symbol(*sizes) for sizes in zip(*shapes, strict=False)] for shapes in zip(once, again, strict=False)]
    return " ".join(f"({', '.join(axes)}{',' if len(axes) == 1 else ''})" for axes in told)


def _symbol(*sizes: int) -> str:
    """An axis: its width; B, T, or B·T where the steps of all samples stand behind one another."""
    packed = all(size % trial.batch == 0 for size, trial in zip(sizes, TRIALS, strict=True))
    return str(sizes[0]) if len(set(sizes)) == 1 else _SYMBOLS.get(sizes, "B·T" if packed else str(sizes[0]))


def lines(part: Part) -> Iterator[tuple[str, Part]]:
    """Every part with its name drawn as a branch, from the top."""
    yield part.name, part
    yield from _branches(part, "")


def _branches(part: Part, before: str) -> Iterator[tuple[str, Part]]:
    for child in part.parts:
        last = child is part.parts[-1]
        yield f"{before}{'└── ' if last else '├── '}{child.name}", child
        yield from _branches(child, f"{before}{'    ' if last else '│   '}")


def mermaid(part: Part) -> str:
    """The tree as Mermaid text, which GitHub and many editors draw."""
    text = ["flowchart LR"]
    numbers = {id(each): f"p{number}" for number, (_, each) in enumerate(lines(part))}
    for _, each in lines(part):
        label = "<br/>".join([f"<b>{each.name}</b>", *_caption(each)])
        text.append(f'  {numbers[id(each)]}["{label}"]:::{each.group or "none"}')
        text += [f"  {numbers[id(each)]} --> {numbers[id(child)]}" for child in each.parts]
    colours = {**COLOURS, "several": COLOURS[""], "none": COLOURS[""]}
    text += [f"  classDef {name} fill:{colour},stroke:#888" for name, colour in colours.items() if name]
    return "\n".join(text)


def _caption(part: Part) -> list[str]:
    """What stands in a box below the name."""
    kind = [] if part.kind in ("ModuleDict", "ModuleList") else [part.kind]
    return [*kind, *filter(None, [part.output]), f"{part.parameters:,}"]


def picture(part: Part, title: str) -> "Figure":
    """The tree as boxes, a column for each depth; a box is as high as its parts together, coloured by its group."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    rows = _rows(part)
    columns = max(depth for depth, *_ in _places(part, 0, 0)) + 1
    figure = Figure(figsize=(4.2 * columns, 0.62 * rows + 1.2), layout="constrained")
    axes = figure.subplots()
    for depth, top, height, each in _places(part, 0, 0):
        colour = COLOURS.get(each.group, COLOURS[""])
        box = Rectangle((depth + 0.02, top + 0.04), 0.96, height - 0.08, facecolor=colour, edgecolor="grey")
        axes.add_patch(box)
        caption = "  ".join(_caption(each))
        axes.text(depth + 0.5, top + height / 2 - 0.14, each.name, ha="center", va="center", weight="bold", size=9)
        axes.text(depth + 0.5, top + height / 2 + 0.18, caption, ha="center", va="center", size=7.5)
    axes.set(xlim=(0, columns), ylim=(rows, 0), title=title)
    axes.axis("off")
    legend = [Patch(facecolor=COLOURS[group], edgecolor="grey", label=group) for group in GROUPS]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(GROUPS), title="optimizer group")
    return figure


def _rows(part: Part) -> int:
    return sum(map(_rows, part.parts)) or 1


def _places(part: Part, depth: int, top: int) -> Iterator[tuple[int, int, int, Part]]:
    """(column, first row, rows, part) of every box."""
    yield depth, top, _rows(part), part
    for child in part.parts:
        yield from _places(child, depth + 1, top)
        top += _rows(child)


def save_picture(part: Part, title: str, path: Path) -> None:
    """Writes `picture` to a file, whose ending says the format (.png, .svg, .pdf).

    Raises:
        ConfigError: it cannot be written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = picture(part, title)
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"--picture {path}: cannot be written: {error.strerror or error}") from error
