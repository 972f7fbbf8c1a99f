"""`mmsa-dist sweep`: searches a system's hyper-parameters, finishes the best trial, registers it.

Trials see train and valid only. The test split is read once, by the trial that won, at the very end.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmsa_dist import launch, places, run_folder, train
from mmsa_dist.errors import ConfigError, TrainingError
from mmsa_dist.follow import Follower
from mmsa_dist.recipe import Recipe, load_recipe, no_system
from shards.mix import AnyIndex
from shards.progress import console
from shards.suggest import counted
from tune.outcome import FAILED, INTERRUPTED, Outcome, read_outcomes, winner
from tune.space import Space, with_values

HELP = """usage: mmsa-dist sweep SYSTEM --data FOLDER [--trials N] [--epochs N] [--space FILE] [--workers N]
                       [any value of the recipe]

Searches the hyper-parameters of SYSTEM with Ray Tune: Optuna's TPE draws, ASHA stops what does not promise, several
trials run at once where the cluster has room. Each trial is a training run of its own, a child in MLflow of the sweep's
run. The best one on validation is trained to its end, tested once and registered; its recipe is written to best.yaml.

  --trials N           how many are drawn (default 4); the first has the recipe's own values
  --space FILE         what is searched; default: the packaged space of SYSTEM, from its paper (tune/spaces)
  --max-concurrent N   trials at the same time; default: as many as fit into the free CPUs and GPUs
  --grace N            epochs that every trial may run before it can be stopped early (default: a quarter of --epochs)
  --recipe NAME|FILE   what trials start from, as in `mmsa-dist train`
  --runs-dir FOLDER    where the sweep's folder goes (default: runs)
  --name NAME          the sweep's name (default: sweep-SYSTEM)
  --help               this text; after a SYSTEM: every value of its recipe

A value given here is not searched, e.g. --batch-size 32. The most used:
  --epochs N           at most so many a trial
  --workers N          ranks of one trial (default 1)
  --register NAME, --alias champion, --tracking-uri URI   as in `mmsa-dist train`

Example:
  mmsa-dist sweep self_mm --data data/mosi --trials 50 --epochs 20 --alias champion"""


@dataclass(frozen=True)
class Options:
    """What the command says beside the recipe; see `HELP`."""

    trials: int
    max_concurrent: int | None
    grace: int | None
    runs_dir: Path
    name: str | None


SHORT_FLAGS = {"batch_size": "data.batch_size"}
"""Flags of searched keys that are not their dotted names."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist sweep`."""
    system, options, overrides = _split(argv)
    if system is None:
        if argv and not options.help:
            raise no_system("sweep", argv)
        print(HELP)
        return 0 if options.help else 2
    recipe = load_recipe(system, options.recipe, [*overrides, *(["--help"] if options.help else [])])
    for name in ("trials", "max_concurrent", "grace"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if recipe.launch.launcher != "ray":
        raise ConfigError(f"--launcher {recipe.launch.launcher}: a sweep runs on Ray; leave --launcher out")
    if recipe.launch.min_workers is not None:
        raise ConfigError("--workers: the trials of a sweep all have the same number of workers; give one number")
    _, recipe = train.check(recipe)
    space = Space.load(system, Path(options.space) if options.space else None).checked(recipe)
    space = _narrowed(space, recipe, overrides)
    chosen = Options(options.trials, options.max_concurrent, options.grace, Path(options.runs_dir), options.name)
    sweep(space, recipe, chosen)
    return 0


def sweep(space: Space, recipe: Recipe, options: Options) -> dict[str, Any]:
    """Searches, finishes the winner, and gives its ``result.json``."""
    index, recipe = train.check(recipe)
    name = options.name or f"sweep-{recipe.system.rpartition(':')[2]}"
    recipe = _stored_in(recipe, options.runs_dir)
    folder = train.prepare(recipe, index, options.runs_dir, name)
    for part in ("events", "checkpoints", "predictions"):
        (folder / part).rmdir()  # a sweep trains nothing itself
    with train.ended(recipe, folder):
        return _run(space, recipe, folder, options)


def _run(space: Space, recipe: Recipe, folder: Path, options: Options) -> dict[str, Any]:
    trials, epochs, monitor = options.trials, recipe.train.epochs, recipe.train.monitor
    run_folder.write_text(folder / "space.yaml", Path(space.where).read_text(encoding="utf-8"))
    at_once = _connected(recipe, options)
    grace = options.grace or max(1, -(-epochs // 4))
    from tune.search import search
    from tune.table import trials_table, write_csv
    from tune.watch import spare_disk

    print(f"sweep {folder}")
    print(
        f"{counted(trials, 'trial')} over {counted(len(space.knobs), 'value')}, {min(at_once, trials)} at a time; "
        f"at most {counted(epochs, 'epoch')} each, ASHA may stop a trial after {min(grace, epochs)}",
        flush=True,
    )
    search(space, _for_trials(recipe, folder), folder, trials=trials, at_once=at_once, grace=grace)
    outcomes = read_outcomes(folder / "trials", monitor)
    spare_disk(folder / "trials", monitor)
    best = winner(outcomes, monitor)
    console.print(trials_table(outcomes, space, monitor, best))
    write_csv(outcomes, space, monitor, folder / "trials.csv")
    _unless_interrupted(outcomes, monitor)
    if best is None:
        raise TrainingError(_all_failed(outcomes, folder))
    return _finish(best, recipe, folder, len(outcomes))


def _connected(recipe: Recipe, options: Options) -> int:
    """Joins or starts the cluster; gives how many trials fit into it at once."""
    import ray

    from tune.search import concurrency

    places.connect(recipe, dashboard=True)  # with its state API Ray Train tidies up after killed trials, mostly
    free = ray.available_resources()
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    fits = concurrency(recipe.launch, cpus, gpus)
    if options.max_concurrent is not None and fits < options.max_concurrent:
        print(
            f"--max-concurrent {options.max_concurrent} is lowered to {fits}: {cpus:g} CPUs and {gpus:g} GPUs are free"
        )
    return min(fits, options.max_concurrent or fits)


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
    narrowed = space.without(key for keys in left_out.values() for key in keys)
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


def _finish(best: Outcome, recipe: Recipe, folder: Path, trials: int) -> dict[str, Any]:
    """Trains the winner to its end if ASHA had stopped it, tests it once, registers it, and says what to do next."""
    from mmsa_dist.report import value_text
    from tune.record import record_sweep

    monitor = recipe.train.monitor
    chosen = with_values(recipe, best.values, "best.yaml")
    note = f"# Best of {trials} trials of {folder.name} by validation {monitor}: {value_text(monitor, best.best)}\n"
    run_folder.write_text(folder / "best.yaml", note + yaml.safe_dump(chosen.dump(), sort_keys=False))
    print(f"trial {best.number} is the best on validation; now the test split is read, once")
    own = with_values(_for_trials(recipe, folder), {**best.values, "train.test": recipe.train.test}, "best.yaml")
    run_folder.write_text(best.folder / "recipe.yaml", yaml.safe_dump(own.dump(), sort_keys=False))
    (best.folder / "result.json").unlink(missing_ok=True)  # it has no test result yet
    with train.ended(own, best.folder):
        with Follower(best.folder, monitor):
            result = launch.run(own, best.folder)  # goes on from the trial's last checkpoint
        train.conclude(own, best.folder, result)
    run_folder.write_json(folder / "result.json", {"trial": best.number, "values": best.values, **result})
    if recipe.tracking.enabled:
        files = [folder / name for name in ("best.yaml", "trials.csv", "space.yaml")]
        record_sweep(folder, best, monitor, result, files)
    print(f"every trial is in {folder / 'trials.csv'}; train the best recipe again, with another seed:")
    data = " ".join(recipe.data.paths)
    print(f"  mmsa-dist train {recipe.system} --data {data} --recipe {folder / 'best.yaml'} --seed 2")
    if recipe.tracking.enabled and (recipe.tracking.uri or "").startswith("sqlite"):
        print(f"compare the trials: mlflow ui --backend-store-uri {recipe.tracking.uri}")
    return result


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


def _split(argv: list[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    """SYSTEM, our own options, and the recipe's overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--space")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--max-concurrent", type=int)
    parser.add_argument("--grace", type=int)
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--name")
    parser.add_argument("-h", "--help", action="store_true")
    system = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        options, overrides = parser.parse_known_args(argv[1:] if system else argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist sweep --help") from error
    return system, options, overrides
