"""`mmsa-dist spaces`: what a sweep searches, and where each range comes from."""

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import flatten, load_recipe, packaged
from mmsa_dist.systems_cli import plain
from shards.command_line import parsed
from shards.suggest import counted
from tune.space import PACKAGED, Knob, Space, Value

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """Lists the systems that have a search space; of one shows what `mmsa-dist sweep` draws from, beside it the
values of its packaged recipes, and which paper each range comes from.

A space is a YAML file: headings, and under each the recipe's dotted keys with a range and its source. Two keys or more
before a colon take the same value. Ranges:
  choice: [16, 32]                  one of these
  uniform: [0.0, 0.5]               any number between
  loguniform: [1.0e-4, 1.0e-2]      any number between, as many below 1e-3 as above
  randint: [1, 6]                   a whole number, both included
  value: 5.0e-5                     always this
  together: [[30, 6], [40, 10]]     a row, a value of it for each key: `model.width, model.heads: {together: …}`

Examples:
  mmsa-dist spaces
  mmsa-dist spaces mult
  mmsa-dist spaces mult --yaml > my.yaml        a start for a space of one's own
  mmsa-dist spaces mult --space my.yaml         is it right, and do the recipes' values lie inside?
  mmsa-dist sweep mult --data data/mosi --space my.yaml --trials 20"""

DEFAULT = "default"
"""Heads the values of a system without packaged recipes."""

WIDE = 120
"""A narrower terminal has no room for all columns."""


class SpacesOptions(Strict):
    """What to show."""

    system: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="SYSTEM")] = None
    """Registered name or package.module:Class. Unset: the list of all that have a space."""
    space: Path | None = None
    """A space of your own. Unset: the packaged one of SYSTEM."""
    yaml: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the file itself and nothing else, as a start for a space of your own."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist spaces`."""
    options = parsed(SpacesOptions, argv, "mmsa-dist spaces", EXAMPLES)
    if options.system is None:
        if options.space or options.yaml:
            raise ConfigError("--space and --yaml are of one system; name it: mmsa-dist spaces SYSTEM")
        return list_all()
    recipe = load_recipe(options.system, None, [])
    space = Space.load(options.system, options.space).checked(recipe)
    if options.yaml:
        print(Path(space.where).read_text(encoding="utf-8"), end="")
        return 0
    return show(space, options.space)


def list_all() -> int:
    """Prints the table of all systems with a packaged space."""
    from rich.table import Table

    from mmsa_dist.systems import get_system
    from shards.progress import console, remarks

    table = Table("system")
    for name in ("values", "keys"):
        table.add_column(name, justify="right")
    table.add_column("file", no_wrap=True)
    table.add_column("paper")
    for file in sorted(PACKAGED.glob("*.yaml")):
        space = Space.load(file.stem)
        count = str(len(space.knobs)), str(len(space.keys))
        table.add_row(file.stem, *count, file.name, get_system(file.stem).paper or "-")
    console.print(table)
    remarks.print(
        f"values: what is drawn, some for several keys of the recipe; files are in {PACKAGED}. mmsa-dist spaces SYSTEM "
        "shows one; mmsa-dist sweep SYSTEM --data FOLDER searches it",
        soft_wrap=True,
    )
    return 0


def show(space: Space, file: Path | None) -> int:
    """Prints one space, with the values of the system's recipes beside it.

    Args:
        file: where it comes from, if not from us.
    """
    from shards.progress import console, remarks

    recipes = {name: flatten(load_recipe(space.system, name, [])) for name in _recipes(space.system)}
    recipes = recipes or {DEFAULT: flatten(load_recipe(space.system, None, []))}
    if head := _head(space.where):
        console.print(f"{head}\n")
    console.print(_table(space, recipes, console.width >= WIDE))
    first = next(iter(recipes))
    said = [f"{counted(len(space.knobs), 'value')} for {counted(len(space.keys), 'key')}, from {space.where}"]
    if any(_differs(knob, values, recipes[first]) for knob in space.knobs for values in recipes.values()):
        said.append(f"*: not the value for {first}")
    if any(knob.outside(values) for knob in space.knobs for values in recipes.values()):
        said.append("(…): outside of the space; a sweep from such a recipe does not begin with its values")
    remarks.print("; ".join(said), soft_wrap=True)
    own = f" --space {file}" if file else ""
    start = "" if file else f"; a space of your own begins with mmsa-dist spaces {space.system} --yaml > my.yaml"
    remarks.print(
        f"mmsa-dist sweep {space.system} --data FOLDER{own} searches all of it that the command does not give{start}",
        soft_wrap=True,
    )
    return 0


def _recipes(system: str) -> list[str]:
    """Data sets with a packaged recipe, mosi first: the others are compared with it."""
    return sorted(packaged(system), key=lambda name: (name != "mosi", name))


def _head(path: str) -> str:
    """What the comment at the head of the file says."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))


def _table(space: Space, recipes: Mapping[str, Mapping[str, Value]], wide: bool) -> "Table":
    """A knob a row under its heading.

    Args:
        wide: recipes and source have columns of their own; else they stand below the range.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("key", no_wrap=True)
    for name in ["range", *recipes, "source"] if wide else ["range; recipes; source"]:
        table.add_column(name)
    compared = next(iter(recipes.values()))
    heading = None
    for knob in space.knobs:
        if knob.heading != heading:
            heading = knob.heading
            table.add_section()
            table.add_row(Text(heading, style="bold"))
        cells = [Text(range_text(knob))]
        for values in recipes.values():
            other = _differs(knob, values, compared)
            cells.append(Text(own_value(knob, values) + " *" * other, style="bold" if other else ""))
        cells.append(Text(knob.source))
        if not wide:
            own = [Text.assemble(f"{name} ", cell) for name, cell in zip(recipes, cells[1:-1], strict=True)]
            cells = [Text("\n").join([cells[0], Text(", ").join(own), cells[-1]])]
        table.add_row("\n".join(f"  {key}" for key in knob.keys), *cells)
    return table


def range_text(knob: Knob) -> str:
    """A range as people write it: ``16 | 32``, ``1e-05 … 0.001 (log)``, ``[30,6] | [40,10]``."""
    if knob.kind == "value":
        return f"{_told(knob.values[0])} (fixed)"
    if knob.kind in ("choice", "together"):
        return " | ".join(map(_told, knob.values))
    low, high = map(_told, knob.values)
    return f"{low} … {high}" + {"loguniform": " (log)", "randint": " (whole)"}.get(knob.kind, "")


def own_value(knob: Knob, values: Mapping[str, Value]) -> str:
    """A recipe's own value of what is searched, in brackets where it lies outside; each key's where they differ."""
    value = knob.read(values)
    text = _told(value)
    if knob.kind != "together" and any(values[key] != value for key in knob.keys):
        text = ", ".join(_told(values[key]) for key in knob.keys)
    return f"({text})" if knob.outside(values) else text


def _differs(knob: Knob, values: Mapping[str, Value], others: Mapping[str, Value]) -> bool:
    return any(values[key] != others[key] for key in knob.keys)


def _told(value: Value) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_told, value))}]"  # no space: a row stays in one line
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:e}".partition("e")
        return f"{float(digits):g}e{exponent}"  # 1e-04, as 1e-05: a range reads best in one notation
    return plain(value)
