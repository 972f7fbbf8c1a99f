"""A search space: which values of a recipe a sweep tries, and which paper each range comes from.

A YAML file: headings, and under each the recipe's dotted keys with one of `KINDS` and a source::

    system: self_mm
    learning rates:
      optim.lr.text: {loguniform: [1.0e-5, 1.0e-4], source: "…"}
      optim.lr.audio, optim.lr.vision: {choice: [1.0e-4, 1.0e-3], source: "…"}     # one value for both
    network:
      model.width, model.heads: {together: [[30, 6], [40, 10]], source: "…"}       # a value for each, drawn as a pair
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import Recipe, flatten, from_dict
from mmsa_dist.suggest import nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

PACKAGED = Path(__file__).parent / "spaces"

KINDS = {
    "choice": "a list of values",
    "uniform": "[low, high]",
    "loguniform": "[low, high], low above 0",
    "randint": "[low, high], whole numbers, both included",
    "value": "one value",
    "together": "rows with a value for each key",
}

LISTED = ("choice", "value", "together")
"""Kinds that say every value."""

NOT_SEARCHED = (
    *("system", "launch.", "tracking.", "checkpoint.", "data.path", "data.readers", "data.eval_batch_size"),
    *("train.epochs", "train.monitor", "train.test", "train.profile", "train.dry_run", "engine.zero", "seed"),
    *("data.without", "data.quarantine", "optim.lr_from"),
)
"""Keys that change no result, or by which trials are compared."""

Value = Any


@dataclass(frozen=True)
class Knob:
    """One thing that is searched.

    Attributes:
        keys: dotted keys of the recipe that all take the value; of kind ``together`` each takes its part of a row.
        kind: one of `KINDS`.
        values: the choices, or the rows, or (low, high), or the one value.
        source: where the range comes from.
        heading: what it stands under.
    """

    keys: tuple[str, ...]
    kind: str
    values: tuple[Value, ...]
    source: str
    heading: str = ""

    @property
    def name(self) -> str:
        """Its name among a trial's parameters."""
        return ", ".join(self.keys)

    @property
    def short(self) -> str:
        """``optim.lr.audio, optim.lr.rest`` -> ``lr.audio+rest``: what tells it apart from the others."""
        first, *others = (key.split(".", 1)[1] for key in self.keys)
        return "+".join([first, *(key.rsplit(".", 1)[-1] for key in others)])

    def text(self, values: Mapping[str, Value]) -> str:
        """What a trial has of it, in words."""
        own = [values.get(key) for key in self.keys]
        shown = own if self.kind == "together" else own[:1]
        return ", ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in shown)

    @property
    def ranges(self) -> bool:
        """Whether it is drawn from a range of numbers."""
        return self.kind not in LISTED

    def holds(self, value: Value) -> bool:
        """Whether `value` lies inside."""
        if self.kind in LISTED:
            return any(_same(value, each) for each in self.values)
        low, high = self.values
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    def samples(self) -> list[Value]:
        """Values that stand for all of them when the recipe's types and bounds are checked."""
        if self.kind in LISTED:
            return list(self.values)
        low, high = self.values
        return [low, high, (low + high) // 2 if self.kind == "randint" else low + 0.37 * (high - low)]

    def distribution(self) -> "BaseDistribution":
        """What Optuna draws from. Choices are drawn by their number: they may be lists, which Optuna does not take."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind in LISTED:
            return CategoricalDistribution(range(len(self.values)))
        low, high = self.values
        if self.kind == "randint":
            return IntDistribution(low, high)
        return FloatDistribution(low, high, log=self.kind == "loguniform")

    def decoded(self, drawn: Value) -> Value:
        """The value of what Optuna drew."""
        return self.values[drawn] if self.kind in LISTED else drawn

    def encoded(self, value: Value) -> Value:
        """What Optuna would have drawn for a value that lies inside."""
        if self.kind in LISTED:
            return next(number for number, each in enumerate(self.values) if _same(value, each))
        return value

    def spread(self, value: Value) -> dict[str, Value]:
        """Dotted key -> its value in a recipe."""
        if self.kind == "together":
            return dict(zip(self.keys, value, strict=True))
        return dict.fromkeys(self.keys, value)

    def read(self, values: Mapping[str, Value]) -> Value:
        """The value that a recipe has, from all of its values by dotted key; the first key's where they differ."""
        row = tuple(values[key] for key in self.keys)
        return row if self.kind == "together" else row[0]

    def outside(self, values: Mapping[str, Value]) -> list[str]:
        """The keys whose values in a recipe do not lie inside."""
        if self.kind == "together":
            return [] if self.holds(self.read(values)) else list(self.keys)
        return [key for key in self.keys if not self.holds(values[key])]

    def without(self, keys: Collection[str]) -> "Knob | None":
        """Itself without `keys`; None where no key is left. Rows lose those columns."""
        left = [column for column, key in enumerate(self.keys) if key not in keys]
        if not left:
            return None
        shorter = replace(self, keys=tuple(self.keys[column] for column in left))
        if self.kind != "together" or len(left) == len(self.keys):
            return shorter
        rows = _distinct(tuple(row[column] for column in left) for row in self.values)
        if len(left) > 1:
            return replace(shorter, values=rows)
        return replace(shorter, kind="choice", values=tuple(value for (value,) in rows))

    def having(self, values: Mapping[str, Value]) -> "Knob":
        """Itself with those rows alone that have the given values of some keys; there may be none."""
        if self.kind != "together":
            return self
        wanted = [(column, values[key]) for column, key in enumerate(self.keys) if key in values]
        rows = (row for row in self.values if all(_same(row[column], value) for column, value in wanted))
        return replace(self, values=tuple(rows))


@dataclass(frozen=True)
class Space:
    """All that a sweep searches."""

    system: str
    knobs: tuple[Knob, ...]
    where: str

    @classmethod
    def load(cls, system: str, path: Path | None = None) -> "Space":
        """The space in the file `path`, by default the packaged one of `system`.

        Raises:
            ConfigError: there is none, or it is wrong; says where and what.
        """
        if path is None:
            path = PACKAGED / f"{system}.yaml"
            if not path.is_file():
                known = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml")))
                raise ConfigError(
                    f"there is no packaged search space for {system!r} (there are: {known}); write one, "
                    "`mmsa-dist spaces ufen_mtfn --yaml` shows how, and give it with --space FILE"
                )
        return cls(system, tuple(_knobs(_read(path), system, str(path))), str(path))

    def told(self, values: Mapping[str, Any]) -> str:
        """What was drawn, in a line."""
        return " · ".join(f"{knob.short} {knob.text(values)}" for knob in self.knobs)

    def checked(self, recipe: Recipe) -> "Space":
        """Itself, after every value was tried in `recipe`.

        Raises:
            ConfigError: an unknown key (with the nearest), one that cannot be searched, or a value the recipe refuses.
        """
        valid = [key for key in flatten(recipe) if not key.startswith(NOT_SEARCHED)]
        for knob in self.knobs:
            for key in knob.keys:
                if key.startswith(NOT_SEARCHED):
                    raise ConfigError(f"{self.where}: `{key}` cannot be searched: it decides how trials run or compare")
                if key not in valid:
                    raise ConfigError(f"{self.where}: unknown key `{key}`{nearest(key, valid)}")
            for value in knob.samples():
                with_values(recipe, knob.spread(value), f"{self.where}: {knob.name}")
        return self

    def without(self, keys: Iterable[str]) -> "Space":
        """The space where `keys` are not searched."""
        gone = set(keys)
        knobs = (knob.without(gone) for knob in self.knobs)
        return replace(self, knobs=tuple(knob for knob in knobs if knob))

    def fixed(self, keys: Iterable[str], recipe: Recipe) -> "Space":
        """The space where `keys` keep the recipe's value; of rows those stay that have it, without its column.

        Raises:
            ConfigError: no row has it, and other keys of the row are to be searched.
        """
        values = flatten(recipe)
        given = {key: values[key] for key in keys if key in values}
        knobs = []
        for knob in self.knobs:
            having = knob.having(given)
            if not having.values and not given.keys() >= set(knob.keys):
                raise ConfigError(self._no_row(knob, given))
            knobs.append(having)
        return replace(self, knobs=tuple(knobs)).without(given)

    def _no_row(self, knob: Knob, given: Mapping[str, Value]) -> str:
        fixed = " and ".join(f"`{key}` {given[key]}" for key in knob.keys if key in given)
        others = " and ".join(f"`{key}`" for key in knob.keys if key not in given)
        rows = ", ".join(str(list(row)) for row in knob.values)
        return (
            f"{self.where}: no row of {knob.name} has {fixed}, which the command fixes (there are: {rows}); "
            f"fix {others} too, or give a value that a row has"
        )

    @property
    def keys(self) -> list[str]:
        """Every dotted key that is searched."""
        return [key for knob in self.knobs for key in knob.keys]

    def distributions(self) -> dict[str, "BaseDistribution"]:
        """What Optuna draws from, by the name of the knob."""
        return {knob.name: knob.distribution() for knob in self.knobs}

    def decoded(self, drawn: Mapping[str, Value]) -> dict[str, Value]:
        """Dotted key -> value, from what Optuna drew."""
        values: dict[str, Value] = {}
        for knob in self.knobs:
            values.update(knob.spread(knob.decoded(drawn[knob.name])))
        return values

    def outside(self, recipe: Recipe) -> dict[str, Value]:
        """The recipe's own values that do not lie inside, by key."""
        values = flatten(recipe)
        return {key: values[key] for knob in self.knobs for key in knob.outside(values)}

    def point(self, recipe: Recipe) -> dict[str, Value] | None:
        """The recipe's own values as Optuna would have drawn them; None where one lies outside or tied ones differ."""
        return self.encoded(flatten(recipe))

    def encoded(self, values: Mapping[str, Value]) -> dict[str, Value] | None:
        """Values by dotted key as Optuna would have drawn them; None where one lies outside or tied ones differ."""
        own: dict[str, Value] = {}
        for knob in self.knobs:
            value = knob.read(values)
            if not knob.holds(value) or any(not _same(values[key], each) for key, each in knob.spread(value).items()):
                return None
            own[knob.name] = knob.encoded(value)
        return own


def with_values(recipe: Recipe, values: Mapping[str, Value], where: str = "recipe") -> Recipe:
    """`recipe` with other values of some dotted keys.

    Raises:
        ConfigError: the recipe refuses one.
    """
    tree = recipe.dump()
    for key, value in values.items():
        *branches, leaf = key.split(".")
        node = tree
        for branch in branches:
            node = node[branch]
        node[leaf] = value
    return from_dict(tree, where)


RATES = "optim.lr."
"""Begins the keys of learning rates."""

Rates = Sequence[tuple[int, Mapping[str, float]]]
"""Learning rates by dotted key, each from an epoch (from 1) on."""


def with_rates(recipe: Recipe, values: Mapping[str, Value], rates: Rates = (), where: str = "recipe") -> Recipe:
    """`recipe` with a trial's values; where its learning rates changed on the way, with those of each epoch.

    Raises:
        ConfigError: the recipe refuses one.
    """
    if not rates:
        return with_values(recipe, values, where)
    (_, first), *later = rates
    made = with_values(recipe, {**values, **first}, where)
    own, changes = made.optim.lr.model_dump(), []
    for epoch, changed in later:
        own |= {key.removeprefix(RATES): rate for key, rate in changed.items()}
        changes.append({"epoch": epoch, **own})
    return with_values(made, {"optim.lr_from": changes}, where)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"search space {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"search space {path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"search space {path}: expected headings with keys under them, found {type(tree).__name__}")
    return tree


def _knobs(tree: dict[str, Any], system: str, where: str) -> Iterable[Knob]:
    named = tree.pop("system", system)
    if named != system:
        raise ConfigError(f"{where}: the space is for system {named!r}, but {system!r} is searched")
    if not tree:
        raise ConfigError(f"{where}: nothing is searched; write a heading and keys under it, as in {PACKAGED}")
    seen: set[str] = set()
    for heading, entries in tree.items():
        if not isinstance(entries, dict):
            raise ConfigError(
                f"{where}: under {heading!r} expected `key: {{choice: […], source: …}}`, found {entries!r}"
            )
        for name, entry in entries.items():
            knob = _knob(str(name), entry, f"{where}: {name}")
            for key in knob.keys:
                if key in seen:
                    raise ConfigError(f"{where}: `{key}` is there twice; keep one of them")
                seen.add(key)
            yield replace(knob, heading=str(heading))


def _knob(name: str, entry: Any, where: str) -> Knob:
    keys = tuple(key.strip() for key in name.split(","))
    if not isinstance(entry, dict):
        raise ConfigError(
            f"{where}: expected {{KIND: …, source: …}} with KIND one of {', '.join(KINDS)}, found {entry!r}"
        )
    unknown = [key for key in entry if key not in (*KINDS, "source")]
    if unknown:
        raise ConfigError(f"{where}: unknown kind {unknown[0]!r}{nearest(str(unknown[0]), [*KINDS, 'source'])}")
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        raise ConfigError(f"{where}: expected one of {', '.join(KINDS)}, found {' and '.join(kinds) or 'none'}")
    source = entry.get("source")
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"{where}: `source` is missing: say which paper or measurement the range comes from")
    kind = kinds[0]
    given = entry[kind]
    return Knob(keys, kind, _rows(given, keys, where) if kind == "together" else _values(kind, given, where), source)


def _values(kind: str, given: Any, where: str) -> tuple[Value, ...]:
    wrong = ConfigError(f"{where}: {kind} expects {KINDS[kind]}, found {given!r}")
    if kind == "value":
        return (_number(given),)
    if not isinstance(given, list) or not given:
        raise wrong
    values = tuple(_number(value) for value in given)
    if kind == "choice":
        return tuple(map(_frozen, values))
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(values) != 2 or len(numbers) != 2 or not values[0] < values[1]:
        raise wrong
    if kind == "loguniform" and values[0] <= 0:
        raise wrong
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise wrong
    return values if kind == "randint" else tuple(float(value) for value in values)


def _rows(given: Any, keys: tuple[str, ...], where: str) -> tuple[Value, ...]:
    if len(keys) < 2:
        raise ConfigError(f"{where}: together is for two keys or more, `KEY, KEY: …`; for one key write choice")
    wanted = f"together expects a list of rows [{', '.join(keys)}]"
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: {wanted}, found {given!r}")
    for number, row in enumerate(given, 1):
        if not isinstance(row, list) or len(row) != len(keys):
            raise ConfigError(f"{where}: {wanted}, found {row!r} as row {number}")
    return tuple(tuple(_frozen(_number(value)) for value in row) for row in given)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _distinct(rows: Iterable[tuple[Value, ...]]) -> tuple[tuple[Value, ...], ...]:
    found: list[tuple[Value, ...]] = []
    for row in rows:
        if not any(_same(row, each) for each in found):
            found.append(row)
    return tuple(found)


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text (it wants 1.0e-4): a text that is a number is meant as one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)
