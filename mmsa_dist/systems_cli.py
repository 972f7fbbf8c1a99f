"""`mmsa-dist systems`: what can be trained, and what one system is made of."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import packaged, recipe_file, sourced
from mmsa_dist.registry import theirs
from shards.command_line import parsed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmsa_dist.systems import DataSpec, System

EXAMPLES = """Lists the systems that can be trained; of one shows its forward pass, the recipe with the source of each
value, the switches of its paper's ablations, and its parts.

Examples:
  mmsa-dist systems
  mmsa-dist systems ufen_mtfn --recipe sims
  mmsa-dist systems self_mm --picture self_mm.png"""

OPEN_QUESTIONS = re.compile(r"^(What the paper leaves|Left) open", re.MULTILINE)
"""Begins the part of a system's docstring that is for those who read the code."""
TASKS = "MTAVF"
PICTURES = (".png", ".svg", ".pdf")


class SystemsOptions(Strict):
    """What to show."""

    system: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="SYSTEM")] = None
    """Registered name or package.module:Class. Unset: the list of all."""
    recipe: str | None = None
    """A packaged recipe (mosi, mosei, sims) or a YAML file. Unset: the first packaged one, mosi where there is one."""
    mermaid: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the drawing of the parts as Mermaid text, and nothing else."""
    picture: Path | None = None
    """Write the drawing of the parts to this file: .png, .svg or .pdf."""


@dataclass(frozen=True)
class Switch:
    """A configuration field that an ablation turns.

    Attributes:
        flag: the command line's words, away from the default.
        table: of the paper.
    """

    flag: str
    default: str
    table: str
    help: str


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist systems`."""
    options = parsed(SystemsOptions, argv, "mmsa-dist systems", EXAMPLES)
    if options.system is None:
        if options.recipe or options.mermaid or options.picture:
            raise ConfigError("--recipe, --mermaid and --picture are of one system; name it: mmsa-dist systems SYSTEM")
        return list_all()
    if options.picture and options.picture.suffix not in PICTURES:
        raise ConfigError(f"--picture {options.picture}: wanted a file that ends in {', '.join(PICTURES)}")
    return show(options.system, options.recipe, options.mermaid, options.picture)


def list_all() -> int:
    """Prints the table of all systems."""
    from rich.table import Table

    from mmsa_dist.systems import system_names
    from shards.progress import console, remarks

    table = Table("system", "paper", "tasks", "labels", "recipes")
    table.add_column("parameters", justify="right")
    for name in system_names():
        table.add_row(name, *_row(name))
    console.print(table)
    remarks.print(
        "tasks: M the utterance, T A V one modality each, F of what is fused early; "
        "parameters: at MOSI's widths, without text encoder. mmsa-dist systems SYSTEM shows one; "
        "mmsa-dist train SYSTEM --help every value of its recipe",
        soft_wrap=True,
    )
    return 0


def _row(name: str) -> list[str]:
    """What the list says of a system. A third party's that does not work says why, and does not hide the others."""
    import torch

    from mmsa_dist import anatomy
    from mmsa_dist.engine import count_parameters
    from mmsa_dist.systems import get_system

    try:
        cls: Any = get_system(name)
        labels, recipes = cls.labels, ", ".join(packaged(name)) or "-"
    except ConfigError as error:
        return [str(error), "-", "-", "-", "-"]
    try:
        system = built(cls, cls.Config(), "mosi")
        with torch.no_grad():
            answer = system.eval()(anatomy.made_up(system.spec, anatomy.Trial(1, dict.fromkeys(system.spec.widths, 4))))
        tasks = " ".join(sorted(answer.tasks, key=TASKS.find)) + (", or classes" if cls.classifies else "")
        return [cls.paper or "-", tasks, labels, recipes, f"{count_parameters(system)[0]:,}"]
    except Exception as error:  # whatever a third party's constructor does
        return [cls.paper or "-", "-", labels, recipes, f"- ({error})"]


def built(cls: "type[System]", config: Strict, data: str) -> "System":
    """A system for features as wide as a published data set's, without text encoder."""
    import torch

    torch.manual_seed(0)
    with theirs("system", cls.name or cls.__name__, cls, "when it was built"):
        return cls(config, published_spec(data))


def published_spec(data: str) -> "DataSpec":
    """The widths and labels of a published set; MOSI's where `data` is none."""
    from mmsa_dist.systems import DataSpec
    from shards.sources.generated import PRESETS
    from shards.utterance import EMOTIONS

    preset = PRESETS.get(data, PRESETS["mosi"])
    classes = {task: 2 for task in preset.tasks if task in EMOTIONS}
    return replace(DataSpec(preset.widths, preset.label_range, preset.tasks), classes=classes)


def show(name: str, recipe: str | None, mermaid: bool, picture: Path | None) -> int:
    """Prints one system's page."""
    from mmsa_dist import anatomy
    from mmsa_dist.label_generators import over_nothing
    from mmsa_dist.recipe import load_recipe
    from mmsa_dist.systems import get_system
    from shards.progress import console, remarks

    cls = get_system(name)
    known = packaged(name)
    recipe = recipe or ("mosi" if "mosi" in known else known[0] if known else None)
    values = load_recipe(name, recipe, [])
    data = recipe if recipe in known else "mosi"
    assert data is not None
    system = built(cls, values.model, data)
    generator = over_nothing(
        values.label_generator, system.feature_widths(), system.spec.label_range, **values.labels.given
    )
    at = f"at the widths of {data}, without text encoder"
    if generator.layers is not None:
        system.attach(generator.layers)
        at += f", with what {values.label_generator} learns"
    with theirs("system", name, cls, "in its forward pass"):
        parts = anatomy.dissect(system)
    if picture:
        anatomy.save_picture(parts, f"{cls.name or name} {at}: {parts.parameters:,} parameters", picture)
        remarks.print(f"drawing in {picture}", soft_wrap=True)
    if mermaid:
        print(anatomy.mermaid(parts))
    if mermaid or picture:
        return 0
    console.print(f"{name}: {cls.paper}", soft_wrap=True)
    console.print(f"\n{forward(cls)}\n")
    console.print(_recipe_table(name, recipe))
    console.print(_switch_table(cls))
    console.print(_parts_table(anatomy.lines(parts), at))
    where = f"{cls.__module__}.{cls.__qualname__}"
    remarks.print(f"how what the paper leaves open is settled: python -m pydoc {where}", soft_wrap=True)
    return 0


def forward(cls: "type[System]") -> str:
    """The docstring of a system as far as it describes what is computed."""
    import inspect

    text = inspect.getdoc(cls) or "No docstring."
    return text[: found.start() if (found := OPEN_QUESTIONS.search(text)) else None].rstrip()


def switches(config: type[Strict]) -> list[Switch]:
    """The fields that `config.switch` made."""
    found = []
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "ablation" in extra:
            flag = _flag(name, field.default, field.annotation)
            found.append(Switch(flag, plain(field.default), str(extra["ablation"]), field.description or ""))
    return found


def _flag(name: str, default: Any, annotation: Any) -> str:
    """The words that set a field to something else than its default."""
    key = name.replace("_", "-")
    if isinstance(default, bool):
        return f"--model.{'no-' if default else ''}{key}"
    others = [str(value) for value in get_args(annotation) if isinstance(value, str) and value != default]
    return f"--model.{key} {'|'.join(others) or key.rpartition('-')[2].upper()}"


def plain(value: Any) -> str:
    """A value as it stands in YAML."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _recipe_table(name: str, recipe: str | None) -> "RenderableType":
    from rich.table import Table

    if recipe is None:
        return "There is no packaged recipe; mmsa-dist train --help says what can be set.\n"
    table = Table("value", "", "source", title=f"recipe {recipe}", title_justify="left")
    for key, (value, source) in sourced(recipe_file(name, recipe)).items():
        if key != "system":
            table.add_row(key, plain(value), source or "-")
    return table


def _switch_table(cls: "type[System]") -> "RenderableType":
    from rich.console import Group
    from rich.table import Table

    from mmsa_dist.label_generators import label_generator_names

    table = Table("ablation", "table", "default", "", title="ablations of the paper", title_justify="left")
    found = switches(cls.Config)
    for each in found:
        table.add_row(each.flag, each.table, each.default, each.help)
    parts: list[RenderableType] = [table] if found else []
    if cls.labels != "none":
        generators = "|".join(label_generator_names())
        parts.append(f"unimodal labels: --labels.generator {generators} (the paper's: {cls.labels})\n")
    return Group(*parts)


def _parts_table(lines: Any, at: str) -> "RenderableType":
    from rich.table import Table

    table = Table("part", "", "gives", title=f"parts, {at}", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("optimizer group")
    for branch, part in lines:
        groups = ", ".join(part.groups) or "-"
        table.add_row(branch, part.kind, part.output, f"{part.parameters:,}", groups)
    return table
