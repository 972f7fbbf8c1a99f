"""The course of a sweep, from its search to the model that is registered; what is done already is not done again."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import train
from mmsa_dist.errors import ConfigError, TrainingError
from mmsa_dist.recipe import Recipe
from shards.progress import console
from shards.suggest import counted
from tune import rates
from tune.asked import Asked
from tune.outcome import FAILED, INTERRUPTED, Outcome, read_outcomes, winner
from tune.space import Space

if TYPE_CHECKING:
    from tune.room import Room


def carry_out(
    space: Space, recipe: Recipe, folder: Path, asked: Asked, room: "Room", export: Path | None
) -> dict[str, Any]:
    """Runs the trials that are left, trains the best to its end, registers it; gives the sweep's ``result.json``.

    Args:
        room: for trials. export: where a copy of ``best.yaml`` goes.
    """
    from tune.finish import DivergedError, chosen, finish
    from tune.record import record_rest

    monitor, shared = recipe.train.monitor, for_trials(recipe, folder)
    print(f"sweep {folder}", flush=True)
    if chosen(folder) is None:
        _searched(space, recipe, shared, folder, asked, room)
    record_rest(read_outcomes(folder / "trials", monitor), monitor)
    while True:
        if export is not None:
            try:
                shutil.copyfile(folder / "best.yaml", export)
            except OSError as error:
                print(f"warning: --export {export}: {error.strerror}", file=sys.stderr)
        try:
            result = finish(recipe, shared, folder, asked.seeds, room)
            break
        except DivergedError as error:
            print(f"{error}; the next best is chosen", file=sys.stderr, flush=True)
            _choose(read_outcomes(folder / "trials", monitor), recipe, folder)
    if recipe.tracking.enabled:
        from tune.record import record_sweep

        record_sweep(folder, monitor, result)
    _say_what_next(recipe, folder)
    return result


def _choose(outcomes: Sequence[Outcome], recipe: Recipe, folder: Path) -> None:
    """
    Raises:
        TrainingError: there is none to choose.
    """
    from tune.finish import CHOSEN, choose

    best = winner(outcomes, recipe.train.monitor)
    if best is None:
        (folder / CHOSEN).unlink(missing_ok=True)
        raise TrainingError(_all_failed(outcomes, folder))
    choose(best, recipe, folder, len(outcomes))


def _searched(space: Space, recipe: Recipe, shared: Recipe, folder: Path, asked: Asked, room: "Room") -> None:
    """Runs the trials that are left, shows all of them, and chooses the best.

    Raises:
        KeyboardInterrupt: it was stopped. TrainingError: all of them failed.
    """
    from tune.table import trials_table, write_csv
    from tune.watch import spare_disk

    monitor, epochs = recipe.train.monitor, recipe.train.epochs
    before = read_outcomes(folder / "trials", monitor)
    print(_plan(space, asked, epochs, room.count(), before), flush=True)
    if asked.stopping == "pbt":
        from tune.population import breed

        breed(space, shared, folder, asked, room=room)
    else:
        from tune.search import search

        search(space, shared, folder, asked, room=room, before=before)
    outcomes = read_outcomes(folder / "trials", monitor)
    spare_disk(folder / "trials", monitor)
    best = winner(outcomes, monitor)
    console.print(trials_table(outcomes, space, asked.objectives, best))
    write_csv(outcomes, space, asked.objectives, folder / "trials.csv")
    if asked.stopping == "pbt":
        rates.write_csv(outcomes, monitor, folder / "rates.csv")
    _unless_interrupted(outcomes, monitor)
    _choose(outcomes, recipe, folder)
    try:
        _draw(outcomes, space, asked, folder)
    except Exception as error:  # of a library for pictures, which the sweep must not end with
        print(f"warning: not all pictures could be drawn: {type(error).__name__}: {error}", file=sys.stderr)


def _draw(outcomes: Sequence[Outcome], space: Space, asked: Asked, folder: Path) -> None:
    from tune.plots import draw, importances
    from tune.table import importance_table

    if found := importances(outcomes, space, asked.objectives[0]):
        console.print(importance_table(found, asked.objectives[0]))
    draw(outcomes, space, asked.objectives, folder / "pictures", changing=asked.stopping == "pbt")


def _plan(space: Space, asked: Asked, epochs: int, at_once: int, before: Sequence[Outcome]) -> str:
    """What will be done, in a line."""
    how = {"tpe": "drawn by TPE", "random": "drawn at random", "grid": "of a grid"}[asked.search]
    ends = {
        "asha": f"ASHA may stop a trial after {min(asked.grace, epochs)}",
        "median": f"the median rule may stop a trial after {min(asked.grace, epochs)}",
        "pbt": f"a generation is {counted(asked.grace, 'epoch')}",
        "none": "none is stopped early",
    }[asked.stopping]
    done = sum(each.status != INTERRUPTED for each in before)
    there = f"{done} done, {len(before) - done} under way; " if before else ""
    return (
        f"{there}{counted(asked.trials, 'trial')} over {counted(len(space.knobs), 'value')} {how}, "
        f"{min(at_once, asked.trials)} at a time; at most {counted(epochs, 'epoch')} each, {ends}"
    )


def _say_what_next(recipe: Recipe, folder: Path) -> None:
    print(f"every trial is in {folder / 'trials.csv'}, pictures are in {folder / 'pictures'}")
    print("train the best recipe again, with another seed:")
    data = " ".join(recipe.data.paths)
    print(f"  mmsa-dist train {recipe.system} --data {data} --recipe {folder / 'best.yaml'} --seed 2")
    if recipe.tracking.enabled and (recipe.tracking.uri or "").startswith("sqlite"):
        print(f"compare the trials: mlflow ui --backend-store-uri {recipe.tracking.uri}")


@contextmanager
def ended(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Says in MLflow how a sweep ended that did not end well, and to the user how to go on."""
    try:
        yield
    except BaseException as error:
        train.shown_as_ended(recipe, folder, error)
        if not isinstance(error, ConfigError):
            print(f"go on with: mmsa-dist sweep --resume {shlex.quote(str(folder))}", file=sys.stderr)
        raise


def connected(recipe: Recipe, asked: Asked) -> "Room":
    """Joins or starts the cluster, which has room for a trial."""
    from tune.room import joined

    room = joined(recipe, asked.max_concurrent)
    if asked.max_concurrent is not None and (count := room.count()) < asked.max_concurrent:
        print(f"--max-concurrent {asked.max_concurrent}: the cluster has room for {count} until nodes join")
    return room


def for_trials(recipe: Recipe, folder: Path) -> Recipe:
    """What trials run: never the test split, a child of the sweep in MLflow."""
    from mmsa_dist.tracking import Link

    link = Link.load(folder)
    tags = {**recipe.tracking.tags, "sweep": folder.name}
    tracking = recipe.tracking.model_copy(update={"parent": link.run_id if link else None, "tags": tags})
    return recipe.model_copy(update={"tracking": tracking, "train": recipe.train.model_copy(update={"test": False})})


def _unless_interrupted(outcomes: list[Outcome], monitor: str) -> None:
    """Ray Tune ends on Ctrl-C as if it were done: then no winner is trained."""
    left = [outcome for outcome in outcomes if outcome.status == INTERRUPTED]
    if not left:
        return
    from tune.record import record_trial

    for outcome in left:
        record_trial(outcome, monitor)
    raise KeyboardInterrupt


def _all_failed(outcomes: Sequence[Outcome], folder: Path) -> str:
    first = next((outcome for outcome in outcomes if outcome.status == FAILED), None)
    why = f"; trial {first.number}: {first.error}" if first else f"; no trial has a validation result, see {folder}"
    return f"all {len(outcomes)} trials failed{why}; mmsa-dist sweep --resume with more --trials draws others"


def exportable(export: str | None) -> Path | None:
    """
    Raises:
        ConfigError: nothing can be written there.
    """
    if export is None:
        return None
    path = Path(export).absolute()
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--export {export}: cannot be written there; give a file in a folder that is there")
    return path
