"""A search space: which values of a recipe a sweep tries, and which paper each range comes from.

A YAML file: headings, and under each the recipe's dotted keys with one of `KINDS` and a source::

    system: self_mm
    learning rates:
      optim.lr.text: {loguniform: [1.0e-5, 1.0e-4], source: "…"}
      optim.lr.audio, optim.lr.vision: {choice: [1.0e-4, 1.0e-3], source: "…"}     # one value for both
"""

from collections.abc import Iterable, Mapping
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
}

NOT_SEARCHED = (
    *("system", "launch.", "tracking.", "checkpoint.", "data.path", "data.readers", "data.eval_batch_size"),
    *("train.epochs", "train.monitor", "train.test", "engine.zero"),
)
"""Keys that change no result, or by which trials are compared."""

Value = Any


@dataclass(frozen=True)
class Knob:
    """One thing that is searched.

    Attributes:
        keys: dotted keys of the recipe that all take the value.
        kind: one of `KINDS`.
        values: the choices, or (low, high), or the one value.
        source: where the range comes from.
    """

    keys: tuple[str, ...]
    kind: str
    values: tuple[Value, ...]
    source: str

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
        shown = own[:1] if all(_same(each, own[0]) for each in own) else own
        return " / ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in shown)

    @property
    def ranges(self) -> bool:
        """Whether it is drawn from a range of numbers."""
        return self.kind in ("uniform", "loguniform", "randint")

    def holds(self, value: Value) -> bool:
        """Whether `value` lies inside."""
        if self.kind in ("choice", "value"):
            return any(_same(value, each) for each in self.values)
        low, high = self.values
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    def samples(self) -> list[Value]:
        """Values that stand for all of them when the recipe's types and bounds are checked."""
        if self.kind in ("choice", "value"):
            return list(self.values)
        low, high = self.values
        return [low, high, (low + high) // 2 if self.kind == "randint" else low + 0.37 * (high - low)]

    def distribution(self) -> "BaseDistribution":
        """What Optuna draws from. Choices are drawn by their number: they may be lists, which Optuna does not take."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind in ("choice", "value"):
            return CategoricalDistribution(range(len(self.values)))
        low, high = self.values
        if self.kind == "randint":
            return IntDistribution(low, high)
        return FloatDistribution(low, high, log=self.kind == "loguniform")

    def decoded(self, drawn: Value) -> Value:
        """The recipe's value of what Optuna drew."""
        return self.values[drawn] if self.kind in ("choice", "value") else drawn

    def encoded(self, value: Value) -> Value:
        """What Optuna would have drawn for a value that lies inside."""
        if self.kind in ("choice", "value"):
            return next(number for number, each in enumerate(self.values) if _same(value, each))
        return value


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
                    f"there is no packaged search space for {system!r} (there are: {known}); write one after "
                    f"{PACKAGED / 'ufen_mtfn.yaml'} and give it with --space FILE"
                )
        return cls(system, tuple(_knobs(_read(path), system, str(path))), str(path))

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
                with_values(recipe, dict.fromkeys(knob.keys, value), f"{self.where}: {knob.name}")
        return self

    def without(self, keys: Iterable[str]) -> "Space":
        """The space where `keys` keep the recipe's value."""
        fixed = set(keys)
        knobs = (replace(knob, keys=tuple(key for key in knob.keys if key not in fixed)) for knob in self.knobs)
        return replace(self, knobs=tuple(knob for knob in knobs if knob.keys))

    @property
    def keys(self) -> list[str]:
        """Every dotted key that is searched."""
        return [key for knob in self.knobs for key in knob.keys]

    def distributions(self) -> dict[str, "BaseDistribution"]:
        """What Optuna draws from, by the name of the knob."""
        return {knob.name: knob.distribution() for knob in self.knobs}

    def decoded(self, drawn: Mapping[str, Value]) -> dict[str, Value]:
        """Dotted key -> value, from what Optuna drew."""
        return {key: knob.decoded(drawn[knob.name]) for knob in self.knobs for key in knob.keys}

    def outside(self, recipe: Recipe) -> dict[str, Value]:
        """The recipe's own values that do not lie inside, by key."""
        values = flatten(recipe)
        return {key: values[key] for knob in self.knobs for key in knob.keys if not knob.holds(values[key])}

    def point(self, recipe: Recipe) -> dict[str, Value] | None:
        """The recipe's own values as Optuna would have drawn them; None where one lies outside or tied ones differ."""
        return self.encoded(flatten(recipe))

    def encoded(self, values: Mapping[str, Value]) -> dict[str, Value] | None:
        """Values by dotted key as Optuna would have drawn them; None where one lies outside or tied ones differ."""
        own: dict[str, Value] = {}
        for knob in self.knobs:
            value = values.get(knob.keys[0])
            if not knob.holds(value) or any(not _same(values.get(key), value) for key in knob.keys):
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


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"search space {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
            if twice := seen.intersection(knob.keys):
                raise ConfigError(f"{where}: `{min(twice)}` is there twice; keep one of them")
            seen.update(knob.keys)
            yield knob


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
    return Knob(keys, kind, _values(kind, entry[kind], where), source)


def _values(kind: str, given: Any, where: str) -> tuple[Value, ...]:
    wrong = ConfigError(f"{where}: {kind} expects {KINDS[kind]}, found {given!r}")
    if kind == "value":
        return (_number(given),)
    if not isinstance(given, list) or not given:
        raise wrong
    values = tuple(_number(value) for value in given)
    if kind == "choice":
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(values) != 2 or len(numbers) != 2 or not values[0] < values[1]:
        raise wrong
    if kind == "loguniform" and values[0] <= 0:
        raise wrong
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise wrong
    return values if kind == "randint" else tuple(float(value) for value in values)


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
        return list(one) == list(other)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)
