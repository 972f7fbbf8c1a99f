"""A recipe: the whole configuration of a run, from defaults, a YAML file and the command line, in that order.

Packaged recipes are ``recipes/<system>.<data set>.yaml``; each value there says where it comes from.
"""

import contextlib
import difflib
import hashlib
import io
import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import tyro
import yaml
from pydantic import Field, ValidationError, create_model

from mmsa_dist.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LabelConfig,
    LaunchConfig,
    OptimConfig,
    Strict,
    TextConfig,
    TrackingConfig,
    TrainConfig,
)
from mmsa_dist.errors import ConfigError
from mmsa_dist.registry import theirs
from mmsa_dist.suggest import nearest
from shards.command_line import readable
from shards.remote.url import is_url

PACKAGED = Path(__file__).parent / "recipes"

RESUMABLE = (
    "launch.", "tracking.", "checkpoint.", "engine.zero", "engine.offload", "data.readers", "data.path",
    "data.eval_batch_size", "labels.divide_above", "text.gradient_checkpointing", "train.dry_run", "train.profile",
)  # fmt: skip
"""What may differ when a run is resumed: none of it changes a result."""


class Recipe(Strict):
    """The configuration of a run."""

    system: tyro.conf.Suppress[str] = ""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Of the weights, the order of samples and dropout."""
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    labels: LabelConfig = LabelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    model: Strict = Strict()

    @property
    def label_generator(self) -> str:
        """The name of the label generator: the one that ``labels`` names, else that of the system's paper."""
        from mmsa_dist.systems import get_system

        return self.labels.generator or get_system(self.system).labels

    def dump(self) -> dict[str, Any]:
        """Plain values; `from_dict` takes them back."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """sha256 of all that changes a result."""
        counts = {key: value for key, value in _flat(self.dump()).items() if not key.startswith(RESUMABLE)}
        return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()


def absolute(recipe: Recipe) -> Recipe:
    """`recipe` with the paths of this machine spelt out: ranks, and whoever resumes, run in other folders."""
    data, text = recipe.data, recipe.text
    if data.path:
        paths = tuple(path if is_url(path) else str(Path(path).resolve()) for path in data.paths)
        data = data.model_copy(update={"path": paths[0] if len(paths) == 1 else paths})
    if text.encoder and Path(text.encoder).is_dir():
        text = text.model_copy(update={"encoder": str(Path(text.encoder).resolve())})
    return recipe.model_copy(update={"data": data, "text": text})


@cache
def recipe_class(system: str) -> type[Recipe]:
    """The recipe type of `system`: `Recipe` with the system's own configuration as ``model``."""
    from mmsa_dist.systems import get_system

    cls = get_system(system)
    with theirs("system", system, cls, "when its Config was made"):
        return create_model(
            "Recipe",
            __base__=Recipe,
            __doc__="The configuration of a run.",
            system=(tyro.conf.Suppress[str], system),
            model=(cls.Config, cls.Config()),
        )


def from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe from plain values.

    Raises:
        ConfigError: an unknown key (with the nearest valid one) or a value of the wrong kind.
    """
    if not values.get("system"):
        raise ConfigError(f"{where}: the key `system` is missing; it names the system to train")
    if not isinstance(values["system"], str):
        raise ConfigError(f"{where}: `system` must be a system's name, found {values['system']!r}")
    return _validated(recipe_class(values["system"]), values, where)


def no_system(command: str, argv: list[str], more: str = "") -> ConfigError:
    """What to raise where the words of a command do not begin with a system."""
    return ConfigError(
        f"no SYSTEM before {argv[0]}: write mmsa-dist {command} SYSTEM --data FOLDER, "
        f"the systems are those of `mmsa-dist systems`{more}"
    )


def load_recipe(system: str, recipe: str | None, overrides: list[str]) -> Recipe:
    """Defaults, then a YAML recipe, then dotted overrides.

    Args:
        system: registered name or ``package.module:Class``.
        recipe: a YAML file, or the data set's name of a packaged recipe (``mosi``), or None: the packaged recipe for
            the data set given with ``--data`` where there is one.
        overrides: command-line words, e.g. ``["--optim.lr.text", "3e-5"]``.

    Raises:
        ConfigError: unknown recipe, key or value. SystemExit(0) after ``--help``.
    """
    cls = recipe_class(system)
    overrides = _spelt_out(overrides)
    values, origin = _recipe_values(system, recipe, overrides)
    default = _validated(cls, {**values, "system": system}, origin)
    return _with_overrides(cls, default, overrides, system)


def _spelt_out(words: list[str]) -> list[str]:
    """``--workers 1:4`` as the two values that it sets; ``--workers 4`` as well, which are as many at least.

    Raises:
        ConfigError: it is neither a number nor two.
    """

    def both(flag: re.Match[str]) -> str:
        value = re.fullmatch(r"(?:(\d+):)?(\d+)", flag[2])
        if value is None:
            raise ConfigError(
                f"--workers {flag[2]}: neither a number of workers nor LEAST:MOST; use --workers 4, or 1:4 for as many "
                "of four as there is room for"
            )
        least = value[1] or "None"
        return f"{flag[1]}--launch.workers\0{value[2]}" + f"\0--launch.min-workers\0{least}" * (
            value[1] is not None or not own
        )

    own = any(re.match(r"--launch\.min[-_]workers\b", word) for word in words)
    joined = re.sub(r"(^|\0)(?:--workers|--launch\.workers)[=\0](?!-)([^\0]+)(?=\0|$)", both, "\0".join(words))
    return joined.split("\0") if joined else []


def origin(system: str, recipe: str | None, overrides: list[str]) -> str:
    """Where the values come from that the command line does not name, for a person to read."""
    path = Path(_recipe_values(system, recipe, overrides)[1])
    if path.parent == PACKAGED:
        return f"recipe of {system} for {path.stem.removeprefix(f'{system}.')} (packaged)"
    if path.suffix:
        return f"recipe {path}"
    known = packaged(system)
    return f"general values of {system}" + (
        f"; --recipe {' or '.join(known)} takes those of a published set (packaged)" if known else ""
    )


def read_recipe(path: Path) -> Recipe:
    """The resolved recipe that a run saved."""
    return from_dict(_yaml(path), str(path))


def read_values(path: Path) -> dict[str, Any]:
    """Dotted key -> value of a recipe that a run saved, of whichever version and system; nothing is checked.

    Raises:
        ConfigError: it is no YAML.
    """
    return _flat(_yaml(path))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lines ``key: old -> new`` of what differs and would change results."""
    before, after = ({**flatten(each), "labels.generator": each.label_generator} for each in (old, new))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key) and not key.startswith(RESUMABLE)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value."""
    return _flat(recipe.dump())


def packaged(system: str) -> list[str]:
    """Data sets that `system` has a packaged recipe for."""
    return sorted(
        path.name.removeprefix(f"{system}.").removesuffix(".yaml") for path in PACKAGED.glob(f"{system}.*.yaml")
    )


def recipe_file(system: str, recipe: str) -> Path:
    """The YAML file of a packaged recipe, by its data set's name, or one that the user names.

    Raises:
        ConfigError: there is neither.
    """
    known = packaged(system)
    path = PACKAGED / f"{system}.{recipe}.yaml" if recipe in known else Path(recipe)
    if not path.is_file():
        raise ConfigError(
            f"recipe {recipe!r} is neither a file nor a packaged recipe of {system}{nearest(recipe, known)}"
        )
    return path


def sourced(path: Path) -> dict[str, tuple[Any, str]]:
    """Dotted key -> its value in a recipe, and what the comment `# source: …` behind it says.

    A comment behind a block holds for those of its keys that have none; without any it is empty.
    """
    found: dict[str, tuple[Any, str]] = {}
    values, said = _yaml(path), _sources(path.read_text(encoding="utf-8"))
    for name, value in values.items():
        block = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        for key, each in block.items():
            found[key] = (each, said.get(key) or said.get(name, ""))
    return found


def _sources(text: str) -> dict[str, str]:
    """Dotted key -> the source named on its line."""
    found, block = {}, ""
    for line in text.splitlines():
        if match := re.match(r"( *)(\w+):(?:\s.*?)?(?:\s# source: (.*))?$", line):
            block = block if match[1] else match[2]
            found[f"{block}.{match[2]}" if match[1] else match[2]] = (match[3] or "").strip()
    return found


def recipe_file_of(system: str, recipe: str | None, overrides: list[str]) -> Path | None:
    """The YAML file that `load_recipe` takes with the same arguments; None where defaults are all there is."""
    if recipe is None:
        name = _data_set_name(overrides)
        recipe = next((known for known in packaged(system) if known == name), None)
    return None if recipe is None else recipe_file(system, recipe)


def _recipe_values(system: str, recipe: str | None, overrides: list[str]) -> tuple[dict[str, Any], str]:
    path = recipe_file_of(system, recipe, overrides)
    if path is None:
        return {}, "defaults"
    values = _yaml(path)
    if values.setdefault("system", system) != system:
        raise ConfigError(f"{path}: the recipe is for system {values['system']!r}, but {system!r} was asked for")
    return values, str(path)


def _data_set_name(overrides: list[str]) -> str | None:
    """``mosi`` for ``--data FOLDER`` whose index is called mosi, synthetic-mosi, mosi-poria, …"""
    for flag in ("--data", "--data.path"):
        for i, word in enumerate(overrides):
            paths: list[str] = []
            if word == flag:
                paths = list(itertools.takewhile(lambda word: not word.startswith("-"), overrides[i + 1 :]))
            elif word.startswith(f"{flag}="):
                paths = [word.partition("=")[2]]
            if paths:
                from shards.index import Index

                found = {_published(Index.load(path).name) for path in paths}
                return found.pop() if len(found) == 1 else None  # sets of a mix may have recipes that differ
    return None


def _published(name: str) -> str | None:
    """The published set that a data set's name tells."""
    parts = re.split(r"[^a-z0-9]+", name.lower())
    return next((part for part in parts if part in ("mosi", "mosei", "sims", "simsv2", "iemocap")), None)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of recipe keys, found {type(values).__name__}")
    return values


def _validated(cls: type[Recipe], values: dict[str, Any], where: str) -> Recipe:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_sentence(cls, issue) for issue in error.errors())) from error


def _sentence(cls: type[Strict], issue: Any) -> str:
    """One validation error as a clause that names the key and, for an unknown one, the nearest valid one."""
    location = [str(part) for part in issue["loc"]]
    key = ".".join(location)
    if issue["type"] == "extra_forbidden":
        return f"unknown key `{key}`" + nearest(location[-1], _fields_at(cls, location[:-1]))
    found = issue.get("input")
    if issue["type"] == "value_error" and isinstance(found, dict):  # of several values together, which it names
        return f"`{key}`: {issue['msg'].removeprefix('Value error, ')}"
    return f"`{key}`: {issue['msg'][0].lower()}{issue['msg'][1:]}, found {found!r}"


def _fields_at(cls: Any, location: list[str]) -> list[str]:
    for part in location:  # or a number, of several values of a kind
        cls = cls.model_fields[part].annotation if hasattr(cls, "model_fields") else get_args(cls)[0]
    return list(cls.model_fields)


def _with_overrides(cls: type[Recipe], default: Recipe, overrides: list[str], system: str) -> Recipe:
    """Dotted overrides through tyro; its complaints become one sentence."""
    asked_for_help = any(word in ("-h", "--help") for word in overrides)
    output = io.StringIO()
    try:
        with contextlib.nullcontext() if asked_for_help else contextlib.redirect_stderr(output):
            return tyro.cli(
                cls,
                args=overrides,
                default=default,
                prog=f"mmsa-dist train {system}",
                description=f"Values of the recipe of {system}; each can stand in a YAML file given with --recipe too.",
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_unknown_option(default, overrides) or readable(output.getvalue())) from None
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(cls, issue) for issue in error.errors())) from error


def _unknown_option(default: Recipe, overrides: list[str]) -> str | None:
    valid = {f"--{key}".replace("_", "-") for key in flatten(default)} | {f"--{alias}" for alias in ALIASES}
    for word in overrides:
        flag = word.partition("=")[0].replace("_", "-")
        plain = re.sub(r"(^--|\.)no-", r"\1", flag)
        if (
            flag.startswith("--")
            and flag not in valid
            and plain not in valid
            and not any(v.startswith(f"{flag}.") for v in valid)
        ):
            close = difflib.get_close_matches(flag, sorted(valid), n=3, cutoff=0.7)
            return (
                f"unknown option {flag}"
                + (f"; did you mean {' or '.join(close)}?" if close else "")
                + " (--help lists all)"
            )
    return None


ALIASES = (
    "data",
    "batch-size",
    "epochs",
    "profile",
    "zero",
    "workers",
    "launcher",
    "address",
    "tracking-uri",
    "register",
    "alias",
    "seed",
)
"""Short flags; each stands beside its dotted name in --help."""
