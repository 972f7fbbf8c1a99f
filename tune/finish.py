"""How a sweep ends: its best trial is trained to its end, with several seeds where asked for, tested and registered."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from mmsa_dist import launch, run_folder, stopping, train
from mmsa_dist.errors import DataError, TrainingError
from mmsa_dist.follow import Follower
from mmsa_dist.metrics import is_better
from mmsa_dist.recipe import Recipe, read_recipe
from mmsa_dist.report import LABELS, value_text
from mmsa_dist.tracking import Link
from shards.progress import console
from tune.outcome import ERROR, RESULT, TRIAL, Outcome
from tune.space import with_rates

if TYPE_CHECKING:
    from tune.room import Room

CHOSEN = "winner.json"
"""Written once the search is over: from then on the winner is no trial like the others."""

SEEDS = "seeds"
"""Folder of the runs of the best recipe with other seeds."""


def choose(best: Outcome, recipe: Recipe, folder: Path, trials: int) -> None:
    """Writes down which trial is the best, and ``best.yaml``, the recipe that `mmsa-dist train` takes."""
    monitor = recipe.train.monitor
    chosen = with_rates(recipe, best.values, best.rates, "best.yaml")
    note = f"# Best of {trials} trials of {folder.name} by validation {monitor}: {value_text(monitor, best.best)}\n"
    if best.origin:
        note += (
            f"# Trial {best.number} began as a copy of trial {best.origin[0]} after epoch {best.origin[1]}, with other "
            "learning rates. optim.lr_from\n# gives each epoch those that the weights had then: trained anew, with the "
            "same seed, the recipe does what the search did.\n"
        )
    run_folder.write_text(folder / "best.yaml", note + yaml.safe_dump(chosen.dump(), sort_keys=False))
    as_judged = {"status": best.status, "epochs": best.epochs}
    run_folder.write_json(best.folder / TRIAL, run_folder.read_json(best.folder / TRIAL) | {"chosen": as_judged})
    run_folder.write_json(folder / CHOSEN, {"trial": best.number, "folder": best.folder.name})


def chosen(folder: Path) -> Path | None:
    """The folder of the trial that was the best, where the search is over.

    Raises:
        DataError: what says so is damaged.
    """
    file = folder / CHOSEN
    if not file.is_file():
        return None
    try:
        winner = folder / "trials" / str(run_folder.read_json(file)["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is damaged ({error}); remove it, the sweep then chooses again") from error
    if not (winner / TRIAL).is_file():
        raise DataError(
            f"{file}: names {winner.name}, which is not there; remove the file, the sweep then chooses again"
        )
    return winner


def reopened(folder: Path) -> str:
    """Takes the choice back, as more trials are asked for; what a person should know of that, '' if nothing."""
    winner = chosen(folder)
    for name in (CHOSEN, RESULT, "best.yaml"):
        (folder / name).unlink(missing_ok=True)
    if winner is None or not (winner / "predictions" / "test.npz").is_file():
        return ""
    return f"{winner.name} was tested already; if another trial wins, the test split is read once more, by that one"


class DivergedError(TrainingError):
    """The winner failed when it was trained to its end; another trial may win."""


def finish(recipe: Recipe, shared: Recipe, folder: Path, seeds: int, room: "Room") -> dict[str, Any]:
    """Trains the winner to its end, and its recipe with `seeds` - 1 other seeds; registers the best of them on
    validation. A second call takes up what is there.

    Args:
        recipe: of the sweep. shared: what trials share, as children of the sweep's run.

    Returns:
        The content of the sweep's ``result.json``.

    Raises:
        DivergedError: the winner did not hold when it went on.
    """
    winner = chosen(folder)
    assert winner is not None
    trial = run_folder.read_json(winner / TRIAL)
    values = {**trial["values"], "train.test": recipe.train.test}
    best = with_rates(shared, values, trial.get("rates", ()), "best.yaml")
    runs = [winner, *_others(best, folder, seeds, trial["number"])]
    print(f"trial {trial['number']} is the best on validation; {_reads(recipe, len(runs))}", flush=True)
    _to_its_end(best, winner)
    _all_to_their_ends(runs[1:], best, folder, room)
    results = [run_folder.read_json(run / RESULT) for run in runs]
    monitor, registered = recipe.train.monitor, 0
    for i, result in enumerate(results):
        if is_better(monitor, result["valid"].get(monitor), results[registered]["valid"].get(monitor)):
            registered = i
    for i, run in enumerate(runs):
        if i != registered:
            _record(read_recipe(run / "recipe.yaml"), run)
    if len(runs) > 1:
        console.print(seeds_table(runs, results))
    train.conclude(read_recipe(runs[registered] / "recipe.yaml"), runs[registered], results[registered])
    whole = {
        "trial": trial["number"],
        "values": trial["values"],
        **({"rates": trial["rates"]} if "rates" in trial else {}),
        "registered": str(runs[registered].relative_to(folder)),
    }
    if len(runs) > 1:
        whole["seeds"] = spread(results)
    whole |= results[registered]
    run_folder.write_json(folder / RESULT, whole)
    return whole


def _reads(recipe: Recipe, runs: int) -> str:
    if runs == 1:
        return "now the test split is read, once" if recipe.train.test else "the test split stays unread"
    return f"now {runs} seeds of its recipe are trained" + (
        ", each reads the test split once" if recipe.train.test else ""
    )


def _to_its_end(recipe: Recipe, winner: Path) -> None:
    """The winner from its last checkpoint on, with the test split at its end."""
    if (winner / RESULT).is_file() and read_recipe(winner / "recipe.yaml").train.test == recipe.train.test:
        return
    (winner / RESULT).unlink(missing_ok=True)  # it has no test result yet
    (winner / ERROR).unlink(missing_ok=True)
    run_folder.write_text(winner / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
    try:
        with Follower(winner, recipe.train.monitor):
            launch.run(recipe, winner)
    except TrainingError as error:
        train.shown_as_ended(recipe, winner, error)
        trial = run_folder.read_json(winner / TRIAL)
        run_folder.write_json(winner / ERROR, {"message": str(error), "exit_code": error.exit_code})
        kept = {key: value for key, value in trial.items() if key not in ("chosen", "stopped", "recorded")}
        run_folder.write_json(winner / TRIAL, kept)
        raise DivergedError(f"trial {trial['number']} did not hold when it went on to its end: {error}") from error
    except BaseException as error:
        train.shown_as_ended(recipe, winner, error)
        raise
    if stopping.requested(winner):  # as it ended; what comes after is another run
        raise KeyboardInterrupt


def _others(recipe: Recipe, folder: Path, seeds: int, winner: int) -> list[Path]:
    """Folders of the runs of the trial `winner`'s recipe with other seeds, made where there are none yet."""
    index, _ = train.check(recipe)
    runs = []
    for number in range(1, seeds):
        seed = recipe.seed + number
        name = f"trial-{winner:03d}-seed-{seed}"
        there = sorted((folder / SEEDS).glob(f"{name}-*/{TRIAL}"))
        if there:
            runs.append(there[0].parent)
            continue
        own = recipe.model_copy(update={"seed": seed})
        run = train.prepare(own, index, folder / SEEDS, name)
        run_folder.write_json(run / TRIAL, {"number": number, "values": {"seed": seed}})
        runs.append(run)
    return runs


def _all_to_their_ends(runs: Sequence[Path], recipe: Recipe, folder: Path, room: "Room") -> None:
    """
    Raises:
        DataError: one of them failed; says why.
    """
    left = [run for run in runs if not (run / RESULT).is_file()]
    if left:
        from tune.search import run_prepared
        from tune.watch import Watch

        for run in left:
            (run / ERROR).unlink(missing_ok=True)
        watch = Watch(folder / SEEDS, recipe.train.monitor, recipe.train.epochs, len(runs), spare=False)
        run_prepared(left, watch, recipe, folder, room)
    for run in left:
        if not (run / RESULT).is_file():
            if not (run / ERROR).is_file():
                for each in left:
                    if not (each / RESULT).is_file():
                        train.shown_as_ended(recipe, each, KeyboardInterrupt())
                raise KeyboardInterrupt
            why = run_folder.read_json(run / ERROR)["message"]
            raise DataError(f"the best recipe with another seed failed, {run.name}: {why}")


def _record(recipe: Recipe, run: Path) -> None:
    """What came out is in MLflow too; only one of the seeds is registered."""
    from mmsa_dist.tracking import finish_run

    if Link.load(run) is not None:
        silent = recipe.tracking.model_copy(update={"register_as": "none", "alias": ()})
        finish_run(run, recipe.model_copy(update={"tracking": silent}))


def spread(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation (of a sample) over the runs, by split and metric, where all have a value."""
    whole: dict[str, dict[str, dict[str, float]]] = {}
    for split in ("valid", "test"):
        for name in results[0].get(split, {}):
            found = [result[split].get(name) for result in results]
            if all(value is not None for value in found):
                mean, deviation = statistics.fmean(found), statistics.stdev(found)
                whole.setdefault(split, {})[name] = {"mean": mean, "std": deviation}
    return whole


def seeds_table(runs: Sequence[Path], results: Sequence[dict[str, Any]]) -> Table:
    """A metric a row: mean and deviation over the seeds, on validation and on the test split."""
    table = Table(
        "metric", title=f"the best recipe, {len(runs)} seeds: mean ± standard deviation", title_justify="left"
    )
    over = spread(results)
    for split in over:
        table.add_column(split, justify="right")
    for name in over.get("valid", {}):
        cells = [
            f"{value_text(name, at[name]['mean'])} ± {value_text(name, at[name]['std'])}" if name in at else "-"
            for at in over.values()
        ]
        table.add_row(LABELS.get(name, name), *cells)
    return table
