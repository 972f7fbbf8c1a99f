"""`mmsa-dist sweep --resume`: goes on with a sweep that was killed, stopped, or is to have more trials."""

import argparse
import glob
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsa_dist import run_folder, train
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import Recipe, read_recipe
from tune.asked import Asked
from tune.course import carry_out, connected, ended, exportable
from tune.outcome import ERROR, TRIAL, read_outcomes
from tune.space import Space


def resume(options: argparse.Namespace, system: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Goes on with a sweep.

    Raises:
        ConfigError: there is none, or the command would change it; DataError: its folder is damaged.
    """
    names = ("recipe", "space", "name", "grace", "objectives", "search", "stopping", "seeds")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    address, overrides = _address(overrides)
    if system is not None or overrides or given:
        said = " ".join([*([system] if system else []), *given, *overrides])
        raise ConfigError(
            f"--resume goes on with what the sweep was asked at first; leave out {said} (--trials, --max-concurrent, "
            "--export, --address and --runs-dir may stand beside it)"
        )
    from tune.finish import reopened

    folder = _named(options.resume, Path(options.runs_dir))
    before = Asked.load(folder)
    asked = before.with_more(options.trials, options.max_concurrent)
    recipe, export = read_recipe(folder / "recipe.yaml"), exportable(options.export)
    if address is not None:
        recipe = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"address": address})})
    index, recipe = train.check(recipe)
    known = DataCard.load(folder)
    if known.fingerprint != index.fingerprint:
        raise ConfigError(
            f"--resume {folder}: it was begun on {known.name} (fingerprint {known.fingerprint[:12]}), but "
            f"{index.where} holds {index.name} ({index.fingerprint[:12]}); give the data back that it began with"
        )
    space = Space.load(recipe.system, folder / "space.yaml").checked(recipe)
    space = space.fixed(asked.fixed, recipe).without(set(space.keys) - set(asked.keys))
    _same_store(folder, recipe)
    with run_folder.locked(folder):
        room = connected(recipe, asked)
        _remove_unbegun(folder / "trials")
        _take_up(folder / "trials", recipe.train.monitor)
        if asked.trials > before.trials and (note := reopened(folder)):
            print(f"note: {note}", flush=True)
        asked.write(folder)
        if recipe.tracking.enabled:
            train.taken_up(folder, recipe)
        with ended(recipe, folder):
            return carry_out(space, recipe, folder, asked, room, export)


def _address(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The cluster that a sweep goes on in, where the command names one, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--address", "--launch.address")
    try:
        options, others = parser.parse_known_args(list(overrides))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist sweep --help") from error
    return options.address, others


def _same_store(folder: Path, recipe: Recipe) -> None:
    """
    Raises:
        ConfigError: the sweep's store came from an environment that this process does not have.
    """
    from mmsa_dist.tracking import Link

    link = Link.load(folder)
    if link and recipe.tracking.enabled and recipe.tracking.uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(f"--resume {folder}: the sweep is recorded at {link.uri}; set MLFLOW_TRACKING_URI to it")


def _remove_unbegun(trials_dir: Path) -> None:
    """Trials that a kill caught while they were drawn: nobody knows what they would have tried."""
    from mmsa_dist.tracking import end_run

    for folder in trials_dir.glob("*"):
        if not (folder / TRIAL).is_file():
            end_run(folder, "KILLED")
            shutil.rmtree(folder)


def _take_up(trials_dir: Path, monitor: str) -> None:
    """Trials that failed of what may be mended by now go on from their checkpoints."""
    for outcome in read_outcomes(trials_dir, monitor):
        if outcome.may_go_on:
            (outcome.folder / ERROR).unlink()


def _named(name: str, runs_dir: Path) -> Path:
    """The folder of the sweep that was called `name`, or is there.

    Raises:
        ConfigError: there is none, or there are several.
    """
    for folder in (Path(name), runs_dir / name):
        if name and folder.is_dir():
            return folder.resolve()
    plain = name and "/" not in name
    found = sorted(path.parent for path in runs_dir.glob(f"{glob.escape(name)}-*/sweep.json")) if plain else []
    if len(found) == 1:
        return found[0].resolve()
    if found:
        raise ConfigError(f"--resume {name}: there are {len(found)} in {runs_dir}; one of {', '.join(map(str, found))}")
    there = ", ".join(str(path.parent) for path in sorted(runs_dir.glob("*/sweep.json"))) or "none"
    raise ConfigError(f"--resume {name}: there is no such sweep; in {runs_dir}: {there}")
