"""A whole run as its driver sees it: check, record, launch, follow, register, say what came out."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from mmsa_dist import launch, run_folder, session
from mmsa_dist.errors import ConfigError, MmsaError, TransientError
from mmsa_dist.follow import Follower
from mmsa_dist.recipe import Recipe, absolute
from shards.index import Index


def train(recipe: Recipe, *, folder: Path | None, runs_dir: Path, name: str | None) -> dict[str, Any]:
    """Trains, tests once, records and registers; prints what a person wants to know.

    Args:
        folder: an interrupted run to go on with; None starts a new one in `runs_dir`.

    Returns:
        result.json's content.
    """
    if recipe.launch.launcher == "torchrun":
        return train_under_torchrun(recipe, folder, runs_dir, name)
    index, recipe = check(recipe)
    folder = begin(recipe, index, folder, runs_dir, name)
    with run_folder.locked(folder):
        if (folder / "result.json").is_file():
            result = run_folder.read_json(folder / "result.json")
        else:
            with ended(recipe, folder), Follower(folder, recipe.train.monitor):
                result = launch.run(recipe, folder)
        conclude(recipe, folder, result)
    return result


def check(recipe: Recipe) -> tuple[Index, Recipe]:
    """All that can be known to be wrong before anything starts; paths made absolute, as ranks may run elsewhere."""
    if not recipe.data.path:
        raise ConfigError("no data: give --data FOLDER, a folder that `mmsa-dist pack` wrote")
    recipe = absolute(recipe)
    index = Index.load(recipe.data.path)
    session.check_data(recipe, index)
    session.check_system(recipe, index)
    if recipe.engine.precision == "fp16" and not recipe.launch.gpus_per_worker and not _has_gpu():
        raise ConfigError("engine.precision: fp16 needs a GPU, and there is none here; use bf16 or fp32")
    if recipe.engine.precision != "fp32" and recipe.engine.zero == 0:
        raise ConfigError(f"engine.zero: {recipe.engine.precision} needs ZeRO 1, 2 or 3 here; use --zero 1")
    if recipe.data.batch_size < recipe.optim.accumulation * recipe.launch.workers:
        raise ConfigError(
            f"data.batch_size: {recipe.data.batch_size} samples cannot be shared by {recipe.launch.workers} workers x "
            f"{recipe.optim.accumulation} accumulation; raise --batch-size or lower --workers"
        )
    launch.check_place(recipe)
    return index, recipe


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def begin(recipe: Recipe, index: Index, folder: Path | None, runs_dir: Path, name: str | None) -> Path:
    """A new run's folder, or `folder` where its data is what it was trained on; says what will be done.

    Raises:
        ConfigError: `folder` is of a run on other data.
    """
    if folder is None:
        folder = prepare(recipe, index, runs_dir, name)
    else:
        known = run_folder.read_json(folder / "data.json")
        if known["fingerprint"] != index.fingerprint:
            raise ConfigError(
                f"--resume {folder}: it was trained on {known['name']} (fingerprint {known['fingerprint'][:12]}), but "
                f"{index.folder} holds {index.name} ({index.fingerprint[:12]}); give the data that it began with"
            )
        run_folder.write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
    print(f"run {folder}\n{session.sentence(session.arithmetic(recipe, index))}")
    for note in session.without_effect(recipe, index):
        print(f"note: {note}", flush=True)
    return folder


def prepare(recipe: Recipe, index: Index, runs_dir: Path, name: str | None) -> Path:
    """A run folder with its description, and the MLflow run where tracking is on: an unreachable server is said now."""
    folder = run_folder.create(runs_dir, name or recipe.system.rpartition(":")[2], recipe.dump())
    try:
        session.write_description(folder, recipe, index)
        if recipe.tracking.enabled:
            from mmsa_dist.tracking import open_run

            open_run(folder, recipe)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a run that never began leaves nothing
        raise
    return folder


@contextmanager
def ended(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Says in MLflow how a run ended that did not end well, and to the user how to go on."""
    try:
        yield
    except BaseException as error:
        if recipe.tracking.enabled:
            from mmsa_dist.tracking import end_run

            end_run(folder, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        stopped = isinstance(error, KeyboardInterrupt | TransientError)
        if stopped and any((folder / "checkpoints").glob("step-*")):
            print(f"go on with: mmsa-dist train --resume {folder}", file=sys.stderr)
        raise


def conclude(recipe: Recipe, folder: Path, result: dict[str, Any]) -> None:
    """Records and registers the model, and prints the table."""
    from mmsa_dist.report import result_table
    from shards.progress import console

    console.print(result_table(result))
    published = None
    if recipe.tracking.enabled:
        from mmsa_dist.tracking import finish_run

        try:
            published = finish_run(folder, recipe)
        except TransientError as error:
            raise TransientError(
                f"{error}; the run itself is whole: record it later with mmsa-dist train --resume {folder}"
            ) from error
    if published and published.name:
        named = ", ".join(f"@{alias}" for alias in published.aliases)
        print(f"registered {published.uri}" + (f" as {named}" if named else ""))
    for note in published.notes if published else ():
        print(note)
    print(
        f"everything of this run is in {folder}; predict with:\n"
        f"  mmsa-dist predict {folder} --data FOLDER --out predictions.csv"
    )


def train_under_torchrun(recipe: Recipe, folder: Path | None, runs_dir: Path, name: str | None) -> dict[str, Any]:
    """This process is one of torchrun's ranks: rank 0 is also the driver."""
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing:
        raise ConfigError(
            f"launch.launcher: torchrun sets {', '.join(missing)}, which this process lacks; start it as "
            "`torchrun --standalone --nproc-per-node N -m mmsa_dist train … --launcher torchrun`, "
            "or use --launcher local"
        )
    for key, value in launch.RANK_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    recipe = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"workers": world})})
    index, recipe = check(recipe)
    import torch.distributed as dist

    from mmsa_dist.worker import join_group, run_rank

    join_group(rank, world, recipe.launch.timeout)
    with ExitStack() as driver:
        shared: list[tuple[str, bool] | MmsaError | None] = [None]
        if rank == 0:
            try:
                folder = begin(recipe, index, folder, runs_dir, name)
                driver.enter_context(run_folder.locked(folder))
                done = (folder / "result.json").is_file()
                if not done:
                    launch.make_ready(folder)
                shared = [(str(folder), done)]
            except MmsaError as error:
                shared = [error]
        dist.broadcast_object_list(shared)
        if not isinstance(shared[0], tuple):
            raise shared[0] or TransientError("rank 0 ended before the run began")
        folder, done = Path(shared[0][0]), shared[0][1]
        if done:
            result = run_folder.read_json(folder / "result.json")
        else:
            with ExitStack() as training:
                if rank == 0:
                    training.enter_context(ended(recipe, folder))
                    training.enter_context(Follower(folder, recipe.train.monitor))
                result = run_rank(folder, recipe, rank, world)
        dist.destroy_process_group()
        if rank == 0:
            conclude(recipe, folder, result)
    return result
