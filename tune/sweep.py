"""`mmsa-dist sweep`: searches a system's hyper-parameters, finishes the best trial, registers it.

Trials see train and valid only. The test split is read once, by the trial that won, at the very end (with several
seeds, once by each).
"""

import argparse
import re
from pathlib import Path
from typing import Any

from mmsa_dist import metrics, run_folder, train
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import Recipe, load_recipe, no_system
from mmsa_dist.session import kind_of
from shards.mix import AnyIndex
from tune import objectives, population
from tune.asked import SEARCHES, STOPPINGS, Asked
from tune.course import carry_out, connected, ended, exportable
from tune.resumed import resume
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
  --grace N            epochs that every trial may run before it can be stopped early, and with pbt from one generation
                       to the next (default: a quarter of --epochs)
  --objectives A B     validation metrics, and `parameters`, for how small a system is. The first decides (default: the
                       recipe's train.monitor); with several the trials that none betters in all are marked
  --max-concurrent N   trials at the same time; default: as many as the cluster has room for
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
  mmsa-dist sweep self_mm --data data/mosi --trials 12 --epochs 24 --stopping pbt --grace 4
  mmsa-dist sweep --resume runs/sweep-self_mm-20260101-120000-ab12"""

TRIALS, SEARCH, STOPPING, SEEDS = 4, "tpe", "asha", 1
"""Unless the command says otherwise."""

SHORT_FLAGS = {"batch_size": "data.batch_size"}
"""Flags of searched keys that are not their dotted names."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist sweep`."""
    system, options, overrides = _split(argv)
    if options.resume is not None and not options.help:
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
    asked = _asked(options, space, recipe, index, _given_keys(overrides))
    if asked.stopping == "pbt":
        population.check(space, recipe, asked)
    begin(space, recipe, asked, options)
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
    if options.search == "grid":
        from tune.draw import first_points

        whole = len(first_points(space, recipe, grid_too=True))
        trials = whole if trials is None else min(trials, whole)
    return Asked(
        trials=TRIALS if trials is None else trials,
        search=options.search or SEARCH,
        stopping=options.stopping or STOPPING,
        grace=max(1, -(-epochs // 4)) if options.grace is None else options.grace,
        max_concurrent=options.max_concurrent,
        objectives=wanted,
        seeds=SEEDS if options.seeds is None else options.seeds,
        keys=tuple(space.keys),
        fixed=tuple(sorted(given)),
    )


def begin(space: Space, recipe: Recipe, asked: Asked, options: argparse.Namespace) -> dict[str, Any]:
    """A new sweep: searches, finishes the winner, and gives its ``result.json``."""
    index, recipe = train.check(recipe)
    name = f"sweep-{recipe.system.rpartition(':')[2]}" if options.name is None else options.name
    run_folder.check_name(name)
    export = exportable(options.export)
    runs_dir = Path(options.runs_dir)
    recipe = _stored_in(recipe, runs_dir)
    room = connected(recipe, asked)  # what cannot run leaves nothing behind
    folder = train.prepare(recipe, index, runs_dir, name)
    for part in ("events", "checkpoints", "predictions"):
        (folder / part).rmdir()  # a sweep trains nothing itself
    run_folder.write_text(folder / "space.yaml", Path(space.where).read_text(encoding="utf-8"))
    asked.write(folder)
    with run_folder.locked(folder), ended(recipe, folder):
        return carry_out(space, recipe, folder, asked, room, export)


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
    flags = [re.sub(r"(^|\.)no_", r"\1", flag) for flag in flags]
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
    """`recipe` with its MLflow store spelt out, where it may stand in one."""
    from tune.record import store_of

    uri = store_of(recipe, runs_dir)
    if uri is None:
        return recipe
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"uri": uri})})


def _split(argv: list[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    """SYSTEM, our own options, and the recipe's overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("recipe", "space", "name", "resume", "export", "search", "stopping"):
        parser.add_argument(f"--{name}")
    for name in ("trials", "max-concurrent", "grace", "seeds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--objectives", nargs="+")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("-h", "--help", action="store_true")
    system = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        options, overrides = parser.parse_known_args(argv[1:] if system else argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist sweep --help") from error
    return system, options, overrides
