"""`mmsa-dist sweep`: searches a system's hyper-parameters, finishes the best trial, registers it.

Trials see train and valid only. The test split is read once, by the trial that won, at the very end (with several
seeds, once by each).
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmsa_dist import metrics, places, run_folder, train
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import ConfigError, TrainingError
from mmsa_dist.recipe import Recipe, load_recipe, no_system, read_recipe
from mmsa_dist.session import kind_of
from shards.mix import AnyIndex
from shards.progress import console
from shards.suggest import counted
from tune import objectives
from tune.asked import SEARCHES, STOPPINGS, Asked
from tune.outcome import FAILED, INTERRUPTED, TRIAL, Outcome, read_outcomes, winner
from tune.space import Space

HELP = f"""usage: mmsa-dist sweep SYSTEM --data FOLDER [--trials N] [--epochs N] [--space FILE] [--workers N]
                       [any value of the recipe]
       mmsa-dist sweep --resume FOLDER|NAME [--trials N] [--max-concurrent N]

Searches the hyper-parameters of SYSTEM with Ray Tune: Optuna draws, what does not promise is stopped early, several
trials run at once where the cluster has room. Each trial is a training run of its own, a child in MLflow of the sweep's
run. The best one on validation is trained to its end, tested once and registered; its recipe is written to best.yaml.

  --trials N           how many are drawn (default 4; with --search grid all); the first has the recipe's own values
  --space FILE         what is searched; default: what its paper searched, see `mmsa-dist spaces SYSTEM`
  --search NAME        how they are drawn (default tpe):
{chr(10).join(f"                         {name:7} {text}" for name, text in SEARCHES.items())}
  --stopping NAME      which trials are stopped before their end (default asha):
{chr(10).join(f"                         {name:7} {text}" for name, text in STOPPINGS.items())}
  --grace N            epochs that every trial may run before it can be stopped early (default: a quarter of --epochs)
  --objectives A B     validation metrics, and `parameters`, for how small a system is. The first decides (default: the
                       recipe's train.monitor); with several the trials that none betters in all are marked
  --max-concurrent N   trials at the same time; default: as many as fit into the free CPUs and GPUs
  --seeds N            how many times the best recipe is trained, each tested once (default 1); mean and deviation are
                       printed, the best on validation is registered
  --export FILE        where a copy of best.yaml goes
  --recipe NAME|FILE   what trials start from, as in `mmsa-dist train`
  --runs-dir FOLDER    where the sweep's folder goes (default: runs)
  --name NAME          the sweep's name (default: sweep-SYSTEM)
  --resume FOLDER|NAME goes on with a sweep that was killed or stopped: what is done stays, trials that were under way
                       go on from their checkpoints; --trials may be more than before
  --help               this text; after a SYSTEM: every value of its recipe

A value given here is not searched, e.g. --batch-size 32. The most used:
  --epochs N           at most so many a trial
  --workers N          ranks of one trial (default 1)
  --register NAME, --alias champion, --tracking-uri URI   as in `mmsa-dist train`

Examples:
  mmsa-dist sweep self_mm --data data/mosi --trials 50 --epochs 20 --seeds 5 --alias champion
  mmsa-dist sweep ufen_mtfn --data data/mosi --trials 30 --objectives mae parameters
  mmsa-dist sweep --resume runs/sweep-self_mm-20260101-120000-ab12"""

TRIALS = 4
"""Unless the command says another number."""

SHORT_FLAGS = {"batch_size": "data.batch_size"}
"""Flags of searched keys that are not their dotted names."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist sweep`."""
    system, options, overrides = _split(argv)
    if options.resume is not None:
        resume(options, system, overrides)
        return 0
    if system is None:
        if argv and not options.help:
            raise no_system("sweep", argv)
        print(HELP)
        return 0 if options.help else 2
    recipe = load_recipe(system, options.recipe, [*overrides, *(["--help"] if options.help else [])])
    if recipe.launch.launcher != "ray":
        raise ConfigError(f"--launcher {recipe.launch.launcher}: a sweep runs on Ray; leave --launcher out")
    if recipe.launch.min_workers is not None:
        raise ConfigError("--workers: the trials of a sweep all have the same number of workers; give one number")
    index, recipe = train.check(recipe)
    space = Space.load(system, Path(options.space) if options.space else None).checked(recipe)
    space = _narrowed(space, recipe, overrides)
    begin(space, recipe, _asked(options, space, recipe, index, _given_keys(overrides)), options)
    return 0


def _asked(options: argparse.Namespace, space: Space, recipe: Recipe, index: AnyIndex, given: set[str]) -> Asked:
    """The command's options with what they leave open decided.

    Raises:
        ConfigError: one is out of its range, or an objective is unknown.
    """
    epochs, monitor = recipe.train.epochs, recipe.train.monitor
    wanted = tuple(options.objectives or (monitor,))
    objectives.check(wanted, monitor, metrics.names(kind_of(index)))
    trials = options.trials
    if trials is None and options.search == "grid":
        from tune.draw import first_points

        trials = len(first_points(space, recipe, grid_too=True))
    return Asked(
        trials=TRIALS if trials is None else trials,
        search=options.search,
        stopping=options.stopping,
        grace=max(1, -(-epochs // 4)) if options.grace is None else options.grace,
        max_concurrent=options.max_concurrent,
        objectives=wanted,
        seeds=options.seeds,
        keys=tuple(space.keys),
        fixed=tuple(sorted(given)),
    )


def begin(space: Space, recipe: Recipe, asked: Asked, options: argparse.Namespace) -> dict[str, Any]:
    """A new sweep: searches, finishes the winner, and gives its ``result.json``."""
    index, recipe = train.check(recipe)
    name = options.name or f"sweep-{recipe.system.rpartition(':')[2]}"
    runs_dir = Path(options.runs_dir)
    recipe = _stored_in(recipe, runs_dir)
    at_once = _connected(recipe, asked)  # what cannot run leaves nothing behind
    folder = train.prepare(recipe, index, runs_dir, name)
    for part in ("events", "checkpoints", "predictions"):
        (folder / part).rmdir()  # a sweep trains nothing itself
    run_folder.write_text(folder / "space.yaml", Path(space.where).read_text(encoding="utf-8"))
    asked.write(folder)
    with run_folder.locked(folder), _ended(recipe, folder):
        return _run(space, recipe, folder, asked, at_once, options.export)


def resume(options: argparse.Namespace, system: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Goes on with a sweep.

    Raises:
        ConfigError: there is none, or the command would change it; DataError: its folder is damaged.
    """
    given = [f"--{name}" for name in ("recipe", "space", "name", "grace", "objectives") if getattr(options, name)]
    given += [f"--{name}" for name, usual in USUAL.items() if getattr(options, name) != usual]
    if system is not None or overrides or given:
        said = " ".join([*([system] if system else []), *given, *overrides])
        raise ConfigError(
            f"--resume goes on with what the sweep was asked at first; leave out {said} (--trials, --max-concurrent, "
            "--export and --runs-dir may stand beside it)"
        )
    from tune.finish import CHOSEN

    folder = _named(options.resume, Path(options.runs_dir))
    before = Asked.load(folder)
    asked = before.with_more(options.trials, options.max_concurrent)
    recipe = read_recipe(folder / "recipe.yaml")
    index, recipe = train.check(recipe)
    known = DataCard.load(folder)
    if known.fingerprint != index.fingerprint:
        raise ConfigError(
            f"--resume {folder}: it was begun on {known.name} (fingerprint {known.fingerprint[:12]}), but "
            f"{index.where} holds {index.name} ({index.fingerprint[:12]}); give the data back that it began with"
        )
    space = Space.load(recipe.system, folder / "space.yaml").checked(recipe)
    space = space.fixed(asked.fixed, recipe).without(set(space.keys) - set(asked.keys))
    at_once = _connected(recipe, asked)
    with run_folder.locked(folder):
        _remove_unbegun(folder / "trials")
        if asked.trials > before.trials:
            (folder / CHOSEN).unlink(missing_ok=True)  # another may be better
        asked.write(folder)
        if recipe.tracking.enabled:
            train.taken_up(folder, recipe)
        with _ended(recipe, folder):
            return _run(space, recipe, folder, asked, at_once, options.export)


def _remove_unbegun(trials_dir: Path) -> None:
    """Trials that a kill caught while they were drawn: nobody knows what they would have tried."""
    from mmsa_dist.tracking import end_run

    for folder in trials_dir.glob("*"):
        if not (folder / TRIAL).is_file():
            end_run(folder, "KILLED")
            shutil.rmtree(folder)


def _named(name: str, runs_dir: Path) -> Path:
    """The folder of the sweep that was called `name`, or is there.

    Raises:
        ConfigError: there is none, or there are several.
    """
    for folder in (Path(name), runs_dir / name):
        if folder.is_dir():
            return folder.resolve()
    found = sorted(path.parent for path in runs_dir.glob(f"{name}-*/sweep.json"))
    if len(found) == 1:
        return found[0].resolve()
    if found:
        raise ConfigError(f"--resume {name}: there are {len(found)} in {runs_dir}; one of {', '.join(map(str, found))}")
    there = ", ".join(str(path.parent) for path in sorted(runs_dir.glob("*/sweep.json"))) or "none"
    raise ConfigError(f"--resume {name}: there is no such sweep; in {runs_dir}: {there}")


def _run(space: Space, recipe: Recipe, folder: Path, asked: Asked, at_once: int, export: str | None) -> dict[str, Any]:
    from tune.finish import choose, chosen, finish

    monitor, shared = recipe.train.monitor, _for_trials(recipe, folder)
    print(f"sweep {folder}", flush=True)
    if chosen(folder) is None:
        outcomes = _searched(space, recipe, shared, folder, asked, at_once)
        best = winner(outcomes, monitor)
        if best is None:
            raise TrainingError(_all_failed(outcomes, folder))
        choose(best, recipe, folder, len(outcomes))
    if export is not None:
        shutil.copyfile(folder / "best.yaml", export)
    result = finish(recipe, shared, folder, asked.seeds, at_once)
    if recipe.tracking.enabled:
        from tune.record import record_sweep

        record_sweep(folder, monitor, result)
    _say_what_next(recipe, folder)
    return result


def _searched(space: Space, recipe: Recipe, shared: Recipe, folder: Path, asked: Asked, at_once: int) -> list[Outcome]:
    """Runs the trials that are left, shows all of them, and gives what became of them.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    from tune.plots import draw, importances
    from tune.record import record_rest
    from tune.search import search
    from tune.table import importance_table, trials_table, write_csv
    from tune.watch import spare_disk

    monitor, epochs = recipe.train.monitor, recipe.train.epochs
    before = read_outcomes(folder / "trials", monitor)
    print(_plan(space, asked, epochs, at_once, before), flush=True)
    search(space, shared, folder, asked, at_once=at_once, before=before)
    outcomes = read_outcomes(folder / "trials", monitor)
    spare_disk(folder / "trials", monitor)
    best = winner(outcomes, monitor)
    console.print(trials_table(outcomes, space, asked.objectives, best))
    write_csv(outcomes, space, asked.objectives, folder / "trials.csv")
    _unless_interrupted(outcomes, monitor)
    record_rest(outcomes, monitor)
    if found := importances(outcomes, space, monitor):
        console.print(importance_table(found, monitor))
    draw(outcomes, space, asked.objectives, folder / "pictures")
    return outcomes


def _plan(space: Space, asked: Asked, epochs: int, at_once: int, before: Sequence[Outcome]) -> str:
    """What will be done, in a line."""
    how = {"tpe": "drawn by TPE", "random": "drawn at random", "grid": "of a grid"}[asked.search]
    ends = {
        "asha": f"ASHA may stop a trial after {min(asked.grace, epochs)}",
        "median": f"the median rule may stop a trial after {min(asked.grace, epochs)}",
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
def _ended(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Says in MLflow how a sweep ended that did not end well, and to the user how to go on."""
    try:
        yield
    except BaseException as error:
        train.shown_as_ended(recipe, folder, error)
        if not isinstance(error, ConfigError):
            print(f"go on with: mmsa-dist sweep --resume {folder}", file=sys.stderr)
        raise


def _connected(recipe: Recipe, asked: Asked) -> int:
    """Joins or starts the cluster; gives how many trials fit into it at once."""
    import ray

    from tune.search import concurrency

    places.connect(recipe, dashboard=True)  # with its state API Ray Train tidies up after killed trials, mostly
    free = ray.available_resources()
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    fits = concurrency(recipe.launch, cpus, gpus)
    if asked.max_concurrent is not None and fits < asked.max_concurrent:
        print(f"--max-concurrent {asked.max_concurrent} is lowered to {fits}: {cpus:g} CPUs and {gpus:g} GPUs are free")
    return min(fits, asked.max_concurrent or fits)


def _narrowed(space: Space, recipe: Recipe, overrides: list[str]) -> Space:
    """The space without what the command fixes and what would change nothing in this run; says what was left out.

    Raises:
        ConfigError: nothing is left.
    """
    index, _ = train.check(recipe)
    given = _given_keys(overrides)
    left_out: dict[str, list[str]] = {}
    for key in space.keys:
        if reason := "the command fixes them" if key in given else _idle(key, recipe, index):
            left_out.setdefault(reason, []).append(key)
    for reason, keys in left_out.items():
        print(f"not searched, as {reason}: {', '.join(keys)}")
    narrowed = space.fixed(given, recipe).without(key for keys in left_out.values() for key in keys)
    if not narrowed.knobs:
        raise ConfigError(f"{space.where}: nothing is left to search; give fewer values on the command line")
    return narrowed


def _given_keys(overrides: list[str]) -> set[str]:
    """Dotted keys that the command line sets: ``--optim.lr.text 3e-5``, ``--batch-size=16``."""
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in overrides if word.startswith("--")]
    return {SHORT_FLAGS.get(flag, flag) for flag in flags}


def _idle(key: str, recipe: Recipe, index: AnyIndex) -> str:
    """Why `key` would change nothing in this run; '' where it would."""
    from mmsa_dist.session import data_spec

    spec = data_spec(recipe, index)
    words = key.replace(".", "_").split("_")
    absent = [m for m in ("text", "audio", "vision") if m not in spec.widths and m in words]
    if absent:
        return f"there is no {absent[0]}"
    if key in ("optim.lr.text", "optim.weight_decay.text") and not (spec.text and spec.text.finetune):
        return "no text encoder is fine-tuned"
    return ""


def _stored_in(recipe: Recipe, runs_dir: Path) -> Recipe:
    """`recipe` with its MLflow store spelt out: a trial's folder lies deeper than a run's.

    A store from the environment stays there: it may hold a password, which no recipe may.
    """
    if not recipe.tracking.enabled or (recipe.tracking.uri is None and os.environ.get("MLFLOW_TRACKING_URI")):
        return recipe
    from mmsa_dist.tracking import store

    uri = store.store_uri(recipe.tracking.uri, runs_dir)
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"uri": uri})})


def _for_trials(recipe: Recipe, folder: Path) -> Recipe:
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


def _all_failed(outcomes: list[Outcome], folder: Path) -> str:
    first = next((outcome for outcome in outcomes if outcome.status == FAILED), None)
    why = f"; trial {first.number}: {first.error}" if first else f"; no trial has a validation result, see {folder}"
    return f"all {len(outcomes)} trials failed{why}"


USUAL = {"search": "tpe", "stopping": "asha", "seeds": 1}
"""What the command takes where it says nothing."""


def _split(argv: list[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    """SYSTEM, our own options, and the recipe's overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("recipe", "space", "name", "resume", "export"):
        parser.add_argument(f"--{name}")
    for name in ("trials", "max-concurrent", "grace"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seeds", type=int, default=USUAL["seeds"])
    parser.add_argument("--search", default=USUAL["search"])
    parser.add_argument("--stopping", default=USUAL["stopping"])
    parser.add_argument("--objectives", nargs="+")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("-h", "--help", action="store_true")
    system = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        options, overrides = parser.parse_known_args(argv[1:] if system else argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist sweep --help") from error
    return system, options, overrides
