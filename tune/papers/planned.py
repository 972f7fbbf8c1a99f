"""What a table's rows are here: each with its recipe and its runs, or with the reason why it is not trained.

The recipe is the system's for the table's data set, then the command's values, then what makes the row.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmsa_dist import session, train
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import RESUMABLE, Recipe, flatten, load_recipe, packaged
from mmsa_dist.suggest import nearest
from shards.mix import AnyIndex
from tune.papers.published import DATA, KIND, Paper, Row, Table
from tune.papers.runs import Run, run_of
from tune.space import with_values


@dataclass(frozen=True)
class Asked:
    """What the command says beside the recipe.

    Attributes:
        rows: those to train; None for all. recipe: a packaged recipe's name, a file, or a folder of SYSTEM.yaml.
    """

    paper: Paper
    number: str
    rows: tuple[str, ...] | None
    seeds: int
    recipe: str | None
    overrides: tuple[str, ...]
    runs_dir: Path

    @property
    def table(self) -> Table:
        return self.paper.table(self.number)

    @property
    def where(self) -> Path:
        """The folder of all runs of reproductions."""
        return (self.runs_dir / "reproduce").resolve()


@dataclass(frozen=True)
class PlannedRow:
    """One row.

    Attributes:
        recipe: with the first seed; None where it is not trained.
        runs: one a seed; several rows may have the same.
        why: it is not trained, in a sentence; '' where it is, or where the paper's figures are all that is asked for.
        changed: ``key: packaged value -> value`` of what the command sets, not the row.
    """

    name: str
    row: Row
    recipe: Recipe | None
    runs: tuple[Run, ...]
    why: str
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """A whole table.

    Attributes:
        data: the data set that it is trained on, a key of `DATA`.
        named: whether the data set's own name says so.
    """

    asked: Asked
    index: AnyIndex
    data: str
    named: bool
    rows: tuple[PlannedRow, ...]

    @property
    def trained(self) -> list[PlannedRow]:
        return [row for row in self.rows if row.recipe is not None]

    @property
    def runs(self) -> list[Run]:
        """Each once; all rows with the first seed, then with the second, …"""
        by_seed = [run for each in zip(*(row.runs for row in self.trained), strict=True) for run in each]
        return [run for n, run in enumerate(by_seed) if run.key not in (each.key for each in by_seed[:n])]

    @property
    def same_runs(self) -> list[list[str]]:
        """Names of rows that come to the same, as without a text encoder "w/o BERT" does."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.trained:
            groups.setdefault(tuple(run.key for run in row.runs), []).append(row.name)
        return [names for names in groups.values() if len(names) > 1]

    @property
    def doubt(self) -> str:
        """Why its figures may say little, in a sentence; '' where nothing is known."""
        if self.index.synthetic:
            return "The data is synthetic: these figures say nothing about the systems, nor about the paper."
        return "" if self.named else f"The name of the data set does not say that it is {DATA[self.data]}."

    @property
    def launch(self) -> Recipe:
        """A recipe to learn where and how the runs take place: the command says it for all of them."""
        recipe = self.trained[0].recipe
        assert recipe is not None
        return recipe


def plan(asked: Asked) -> Planned:
    """The rows of the table that is asked for.

    Raises:
        ConfigError: no such row; a value that a recipe refuses; data of another kind than the table's; no row that can
            be trained.
        DataError: the data set is damaged.
    """
    table, chosen = asked.table, _chosen(asked)
    index = _index(asked, chosen[0])
    data, named = _data_set(asked, index)
    rows, refused = [], []
    for name, row in table.rows.items():
        if name not in chosen:
            rows.append(PlannedRow(name, row, None, (), "", ()))
            continue
        recipe, why = _checked(asked, row, name, data, index)
        refused += [why] if why else []
        runs = (
            []
            if recipe is None
            else [run_of(recipe, index, name, recipe.seed + step, asked.where) for step in range(asked.seeds)]
        )
        changed = () if recipe is None else _changed(asked, row, name, data, index)
        rows.append(PlannedRow(name, row, recipe, tuple(runs), why, changed))
    if len(refused) == len(chosen):
        raise ConfigError(refused[0])
    return Planned(asked, index, data, named, tuple(rows))


def _chosen(asked: Asked) -> list[str]:
    """The names of the rows to train."""
    able = asked.table.trains
    for name in asked.rows or ():
        if name in asked.table.rows and name not in able:
            raise ConfigError(f"--rows {name}: nothing here trains it (there are: {', '.join(able)})")
        if name not in able:
            raise ConfigError(f"--rows: table {asked.number} has no row {name!r}{nearest(name, able)}")
    return [name for name in able if asked.rows is None or name in asked.rows]


def _index(asked: Asked, name: str) -> AnyIndex:
    recipe = _recipe(asked, asked.table.rows[name], name, asked.table.data[0])
    if not recipe.data.path:
        raise ConfigError("no data: give --data FOLDER, a folder that `mmsa-dist pack` wrote, or its address")
    index = session.open_index(recipe)
    if not index.splits.get("test"):
        raise ConfigError(f"--data {index.where}: {index.name} has no test split, of which the papers' figures are")
    return index


def _data_set(asked: Asked, index: AnyIndex) -> tuple[str, bool]:
    """The table's data set that `index` is, and whether its name says so.

    Raises:
        ConfigError: it is another.
    """
    wanted = asked.table.data
    words = re.split(r"[^a-z0-9]+", index.name.lower())
    names = [data for data in DATA if data in words]
    kind = session.kind_of(index)
    fitting = [data for data in wanted if KIND[data] == kind and (not names or data in names)]
    if not fitting:
        raise ConfigError(
            f"--data {index.where}: table {asked.number} of {asked.paper.paper} is of "
            f"{' or '.join(DATA[data] for data in wanted)}, but this is {index.name} with "
            f"{'classes' if index.classes else 'labels {:g} to {:g}'.format(*index.label_range)}; "
            f"mmsa-dist reproduce {asked.paper.system} lists the tables"
        )
    return fitting[0], bool(names)


def _recipe(asked: Asked, row: Row, name: str, data: str) -> Recipe:
    """The recipe of a row's system with the command's values, without what makes the row."""
    assert row.system is not None
    given = asked.recipe
    if given is not None and Path(given).is_dir():
        given = str(Path(given) / f"{row.system}.yaml")
    try:
        return _loaded(row.system, given or _usual(row.system, data), asked.overrides)
    except ConfigError as error:
        raise ConfigError(f"row {name} ({row.system}): {error}") from error


def _usual(system: str, data: str) -> str | None:
    """The packaged recipe of a data set, where there is one."""
    return data if data in packaged(system) else None


@cache
def _loaded(system: str, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """As `load_recipe`: the rows of an ablation have the same one."""
    return load_recipe(system, recipe, list(overrides))


def _checked(asked: Asked, row: Row, name: str, data: str, index: AnyIndex) -> tuple[Recipe | None, str]:
    """The row's recipe, settled; or why the row cannot be trained on this data.

    Raises:
        ConfigError: a reproduction cannot be run like that.
    """
    recipe = _recipe(asked, row, name, data)
    if recipe.launch.launcher != "ray":
        raise ConfigError(f"--launcher {recipe.launch.launcher}: reproductions run on Ray; leave --launcher out")
    if recipe.seed + asked.seeds > 2**63:
        raise ConfigError(f"--seed {recipe.seed}: {asked.seeds} seeds from there on go beyond 2^63 - 1")
    if recipe.launch.min_workers is not None:
        raise ConfigError("--workers: the runs of a table all have the same number of workers; give one number")
    if not recipe.train.test:
        raise ConfigError("--train.no-test: the papers' figures are of the test split; leave it out")
    if "text.encoder" in row.set and recipe.text.encoder and "text" not in index.modalities:
        return None, f"{name} reads the data set's own text features, and {index.name} has none"
    try:
        recipe = train.check(with_values(recipe, row.set, f"row {name}"))[1]
    except ConfigError as error:
        return None, f"{name} cannot be trained: {error}"
    spelt_out = getattr(recipe.model, "subtasks", None) or ()
    if set(spelt_out) == session.data_spec(recipe, index).widths.keys():  # as unset: the same run as other tables'
        recipe = with_values(recipe, {"model.subtasks": None})
    return recipe, ""


def _changed(asked: Asked, row: Row, name: str, data: str, index: AnyIndex) -> tuple[str, ...]:
    """What the command changes of the packaged recipe; what either leaves open is decided first."""
    assert row.system is not None
    used = _recipe(asked, row, name, data)
    packed = _loaded(row.system, _usual(row.system, data), ("--data", *used.data.paths))
    usual = flatten(session.settled(packed, index))
    skipped = (*RESUMABLE, "seed", *row.set)
    found = [
        " -> ".join((f"{key} {_spelt(usual.get(key))}", _spelt(value)))
        for key, value in flatten(session.settled(used, index)).items()
        if value != usual.get(key) and not key.startswith(skipped)
    ]
    return tuple(found)


def _spelt(value: object) -> str:
    return "unset" if value is None else "none" if value == [] else str(value)
