"""`mmsa-dist train`."""

import argparse
import shutil
from pathlib import Path

import yaml

from mmsa_dist import forerunners
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import Recipe, absolute, differences, load_recipe, no_system, origin, read_recipe
from shards.remote.url import is_url

TRAIN_HELP = """usage: mmsa-dist train SYSTEM --data FOLDER [--recipe NAME|FILE] [--workers N] [--zero STAGE] [VALUES]
       mmsa-dist train --resume RUN [--workers N] [--zero 0|1|2|3]

Trains SYSTEM on a packed data set, chooses the best epoch on validation, reads the test split once, and registers the
model in MLflow. Leaves one folder, runs/<name>-<time>-<id>.

  --recipe NAME|FILE   a packaged recipe (mosi, mosei, sims) or a YAML file; unset: the packaged one of the data set
  --resume RUN         go on with an interrupted run, its folder or its place in --checkpoint.mirror; only what changes
                       no result may differ (workers, ZeRO)
  --runs-dir FOLDER    where run folders go (default: runs)
  --name NAME          the run's name (default: the system's)
  --print-config       print the resolved recipe and stop
  --help               this text; after a SYSTEM: every value of its recipe

The most used values:
  --data FOLDER …      what `mmsa-dist pack` wrote; several are trained on as one (--data.weights 1 2)
  --workers N          ranks (default 1); 1:4 are as many of four as there is room for
  --zero 0|1|2|3       ZeRO stage (default 1)
  --launcher ray|local|torchrun
  --epochs N           at most so many (default: the recipe's)
  --batch-size N       samples per step over all ranks
  --text.encoder PATH  read transcripts through a Hugging Face encoder: a local folder or a hub name
  --optim.lr.text X    learning rates per group: text, audio, vision, rest
  --profile N          trace N steps of each rank, for Perfetto
  --register NAME      name in the model registry (default: the system's; `none` registers nothing)
  --alias champion     move this alias to the new version
  --tracking-uri URI   MLflow server (default: MLFLOW_TRACKING_URI, else a sqlite file beside the runs)

Examples:
  mmsa-dist train ufen_mtfn --data data/mosi --workers 2 --zero 2
  mmsa-dist train self_mm --data data/mosi --text.encoder bert-base-uncased --optim.lr.text 3e-5
  OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 \\
      -m mmsa_dist train self_mm --data data/mosi --launcher torchrun"""


def train(argv: list[str]) -> int:
    """Entry of `mmsa-dist train`."""
    system, options, overrides = _split(argv)
    if system is None and not options.resume:
        if argv and not options.help:
            raise no_system("train", argv, "; `mmsa-dist train --resume RUN` goes on with a run")
        print(TRAIN_HELP)
        return 0 if options.help else 2
    if options.help:
        overrides = [*overrides, "--help"]
    with forerunners.ahead(() if options.help or options.print_config else overrides) as ahead:
        return _train(system, options, overrides, ahead)


def _train(
    system: str | None, options: argparse.Namespace, overrides: list[str], ahead: forerunners.Forerunners
) -> int:
    if options.resume:
        folder = _brought(options.resume, Path(options.runs_dir)) if is_url(options.resume) else Path(options.resume)
        folder, recipe = _resumed(folder, system, options.recipe, overrides)
    else:
        assert system is not None
        folder, recipe = None, load_recipe(system, options.recipe, overrides)
    if options.print_config:
        print(yaml.safe_dump(recipe.dump(), sort_keys=False), end="")
        return 0
    if folder is None:
        print(origin(recipe.system, options.recipe, overrides))
    ahead.meant_for(recipe, folder)
    from mmsa_dist import train as training

    training.train(recipe, folder=folder, runs_dir=Path(options.runs_dir), name=options.name, ahead=ahead)
    return 0


def _split(argv: list[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    """SYSTEM, our own options, and the recipe's overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--resume")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--name")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    system = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        options, overrides = parser.parse_known_args(argv[1:] if system else argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist train --help") from error
    return system, options, overrides


def _brought(address: str, runs_dir: Path) -> Path:
    """The folder of a run whose checkpoints were mirrored at `address`, made anew where this machine lacks it."""
    from mmsa_dist.mirror import Mirror

    mirror = Mirror(address)
    folder = runs_dir / mirror.address.rpartition("/")[2]
    if not (folder / "recipe.yaml").is_file():
        new = not folder.exists()
        for part in ("events", "checkpoints", "predictions"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        try:
            mirror.bring_description(folder)
        except BaseException:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    mirror.bring_end(folder)
    return folder


def _resumed(folder: Path, system: str | None, recipe_file: str | None, overrides: list[str]) -> tuple[Path, Recipe]:
    """The run to go on with and its recipe, changed only where that changes no result."""
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise ConfigError(f"--resume {folder}: there is no run (no recipe.yaml); give a folder under runs/")
    refuse_finished(folder)
    old = read_recipe(saved)
    if system not in (None, old.system):
        raise ConfigError(f"--resume {folder}: the run trains {old.system!r}, not {system!r}")
    new = load_recipe(old.system, recipe_file or str(saved), overrides)
    changed = differences(absolute(old), absolute(new))
    if changed:
        raise ConfigError(
            f"--resume {folder}: the recipe differs where it would change results: {'; '.join(changed)}. "
            "Train it as a new run instead"
        )
    folder = folder.resolve()
    if new.checkpoint.mirror and not (folder / "result.json").is_file():  # it may have been finished elsewhere
        from mmsa_dist.mirror import Mirror

        Mirror.of(new.checkpoint.mirror, folder).bring_end(folder)
        refuse_finished(folder)
    return folder, new


def refuse_finished(folder: Path) -> None:
    """A run that has its result, and is recorded, is not gone on with.

    Raises:
        ConfigError: this one is such.
    """
    if (folder / "result.json").is_file() and not unrecorded(folder):
        raise ConfigError(
            f"--resume {folder}: the run is finished; its result is in {folder / 'result.json'}. "
            f"To train longer begin a new run: mmsa-dist train SYSTEM --data FOLDER --recipe {folder / 'recipe.yaml'} "
            "--epochs N"
        )


def unrecorded(folder: Path) -> bool:
    """Whether a finished run still has to be recorded: MLflow was away at its end."""
    from mmsa_dist.tracking import Link

    link = Link.load(folder)
    return link is not None and not link.model
