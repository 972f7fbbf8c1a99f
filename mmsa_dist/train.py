"""A whole run as its driver sees it: check, record, launch, follow, register, say what came out."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from mmsa_dist import launch, places, profiling, run_folder, session, torchrun
from mmsa_dist.checks import check_labels, check_system
from mmsa_dist.data_card import DataCard
from mmsa_dist.diagnosis import diagnose
from mmsa_dist.errors import ConfigError, DataError, MmsaError, StoppedError, TrainingError, TransientError
from mmsa_dist.follow import Follower
from mmsa_dist.forerunners import Forerunners
from mmsa_dist.ledger import account
from mmsa_dist.recipe import Recipe, absolute, read_recipe
from mmsa_dist.run_log import logged
from mmsa_dist.stopping import Requests
from shards.mix import AnyIndex, Mix
from shards.quarantine import damaged
from shards.suggest import counted


def train(
    recipe: Recipe, *, folder: Path | None, runs_dir: Path, name: str | None, ahead: Forerunners | None = None
) -> dict[str, Any]:
    """Trains, tests once, records and registers; prints what a person wants to know.

    Args:
        folder: an interrupted run to go on with; None starts a new one in `runs_dir`. ahead: for the first local ranks.

    Returns:
        result.json's content.
    """
    if recipe.launch.launcher == "torchrun":
        return train_under_torchrun(recipe, folder, runs_dir, name)
    index, recipe = check(recipe)
    with begun(recipe, index, folder, runs_dir, name) as folder:
        if (folder / "result.json").is_file():
            result = run_folder.read_json(folder / "result.json")
        else:
            with ended(recipe, folder), Follower(folder, recipe.train.monitor):
                result = launch.run(recipe, folder, ahead)
        conclude(recipe, folder, result)
    return result


def check(recipe: Recipe) -> tuple[AnyIndex, Recipe]:
    """All that can be known to be wrong before anything starts; paths made absolute, as ranks may run elsewhere."""
    index, recipe = fit_together(recipe)
    if recipe.engine.precision == "fp16" and not recipe.launch.gpus_per_worker and not _has_gpu():
        raise ConfigError("engine.precision: fp16 needs a GPU, and there is none here; use bf16 or fp32")
    places.check_place(recipe)
    return index, recipe


def fit_together(recipe: Recipe) -> tuple[AnyIndex, Recipe]:
    """The part of `check` that is the same wherever the run would take place."""
    if not recipe.data.path:
        raise ConfigError("no data: give --data FOLDER, a folder that `mmsa-dist pack` wrote, or its address")
    recipe = quarantined(absolute(recipe))
    index = session.open_index(recipe)
    session.check_data(recipe, index)
    check_system(recipe, index)
    check_labels(recipe, index)
    recipe = session.settled(recipe, index)
    if recipe.engine.precision != "fp32" and recipe.engine.zero == 0:
        raise ConfigError(f"engine.zero: {recipe.engine.precision} needs ZeRO 1, 2 or 3 here; use --zero 1")
    if recipe.data.batch_size < recipe.optim.accumulation * recipe.launch.workers:
        raise ConfigError(
            f"data.batch_size: {recipe.data.batch_size} samples cannot be shared by {recipe.launch.workers} workers x "
            f"{recipe.optim.accumulation} accumulation; raise --batch-size or lower --workers"
        )
    return index, recipe


def quarantined(recipe: Recipe) -> Recipe:
    """The recipe without the shards that are damaged, where it asks for that; says which they are.

    Raises:
        DataError: they are all that there is for training, or for validation.
    """
    if not recipe.data.quarantine:
        return recipe
    index = session.open_index(recipe)
    found = [shard for part in (index.parts if isinstance(index, Mix) else (index,)) for shard in damaged(part)]
    if not found:
        return recipe
    lost = {split: sum(shard.samples for shard in found if shard.split == split) for split in index.splits}
    for shard in found:
        if shard.split in ("train", "valid") and lost[shard.split] == index.splits[shard.split]:
            raise DataError(f"data.quarantine: no {shard.split} shard of {index.where} is whole, e.g. {shard.why}")
    said = ", ".join(f"{count:,} of {index.splits[split]:,} {split}" for split, count in lost.items() if count)
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {counted(len(found), 'damaged shard')} left out, {said} samples lost:", flush=True)
        for shard in found:
            print(f"  {shard.why}", flush=True)
    return _without(recipe, (*recipe.data.without, *(shard.address for shard in found)))


def _without(recipe: Recipe, addresses: tuple[str, ...]) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"without": addresses})})


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def begun(recipe: Recipe, index: AnyIndex, folder: Path | None, runs_dir: Path, name: str | None) -> Iterator[Path]:
    """As `begin`; the run is this process's meanwhile, one that is gone on with before a word of it is changed.

    Raises:
        ConfigError: as `begin`, or another process trains it.
    """
    with logged() as log, ExitStack() as held:
        if folder is not None:
            held.enter_context(run_folder.locked(folder))
        started = begin(recipe, index, folder, runs_dir, name)
        if folder is None:
            held.enter_context(run_folder.locked(started))
        log.into(started)
        yield started


def begin(recipe: Recipe, index: AnyIndex, folder: Path | None, runs_dir: Path, name: str | None) -> Path:
    """A new run's folder, or `folder` where its data is what it was trained on; says what will be done.

    Raises:
        ConfigError: `folder` is of a run on other data.
    """
    kept = None
    if folder is None:
        folder = prepare(recipe, index, runs_dir, name)
    else:
        known = DataCard.load(folder)
        if known.fingerprint != index.fingerprint:
            raise ConfigError(
                f"--resume {folder}: it was trained on {known.name} (fingerprint {known.fingerprint[:12]}), but "
                f"{index.where} holds {index.name} ({index.fingerprint[:12]}); give the data that it began with"
            )
        before = read_recipe(folder / "recipe.yaml").launch.workers
        if before != recipe.launch.workers:
            print(
                f"note: {before} -> {recipe.launch.workers} workers: the order of samples stays, but each worker draws "
                "dropout of its own, so losses will differ from those of an undisturbed run"
            )
        kept = (folder / "recipe.yaml").read_text(encoding="utf-8")
        run_folder.write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
    try:
        if recipe.checkpoint.mirror:
            mirrored(recipe.checkpoint.mirror, folder)
        if kept is not None and recipe.tracking.enabled and not (folder / "result.json").is_file():
            taken_up(folder, recipe)
    except BaseException:
        unbegun(folder, recipe, kept)
        raise
    numbers = session.arithmetic(recipe, index)
    if kept is not None:  # the number of ranks may be another
        run_folder.write_json(folder / "plan.json", numbers)
    print(f"run {folder}\n{session.inputs(recipe, index)}\n{session.sentence(numbers)}")
    for note in session.without_effect(recipe, index):
        print(f"note: {note}", flush=True)
    return folder


def taken_up(folder: Path, recipe: Recipe) -> None:
    """The run in MLflow stands as running again, where there is one. A server that is away holds nobody up.

    Raises:
        DataError: what names the run in MLflow is damaged.
    """
    from mmsa_dist.tracking import Link, open_run

    if Link.load(folder) is None:
        return
    try:
        open_run(folder, recipe)
    except (ConfigError, TransientError) as error:
        print(f"warning: MLflow does not show that the run goes on: {error}", file=sys.stderr, flush=True)


def unbegun(folder: Path, recipe: Recipe, kept: str | None) -> None:
    """Takes back what `begin` wrote: a new run leaves nothing, an old one its recipe, which was `kept`."""
    if kept is not None:
        run_folder.write_text(folder / "recipe.yaml", kept)
        return
    if recipe.tracking.enabled:
        from mmsa_dist.tracking import end_run

        end_run(folder)
    shutil.rmtree(folder, ignore_errors=True)


def mirrored(address: str, folder: Path) -> None:
    """The mirror knows the run, and the run what is in the mirror; a bucket that is away is said before ranks start.

    Raises:
        ConfigError, DataError, TransientError: as of `Mirror`.
    """
    from mmsa_dist.mirror import Mirror

    mirror = Mirror.of(address, folder)
    mirror.describe(folder)
    if step := mirror.restore(folder):
        print(f"checkpoint of step {step:,} comes from {mirror.address}")


def prepare(recipe: Recipe, index: AnyIndex, runs_dir: Path, name: str | None, *, tracked: bool = True) -> Path:
    """A run folder with its description, and the MLflow run where tracking is on: an unreachable server is said now.

    Args:
        tracked: False leaves the MLflow run to be opened later.
    """
    folder = run_folder.create(runs_dir, name or recipe.system.rpartition(":")[2], recipe.dump())
    try:
        session.write_description(folder, recipe, index)
        if recipe.tracking.enabled and tracked:
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
        shown_as_ended(recipe, folder, error)
        if isinstance(error, KeyboardInterrupt | StoppedError | TransientError):
            print(f"go on with: mmsa-dist train --resume {folder}", file=sys.stderr)
        raise


def shown_as_ended(recipe: Recipe, folder: Path, error: BaseException) -> None:
    """In MLflow, where the run is recorded there: stopped by somebody, or failed."""
    if recipe.tracking.enabled:
        from mmsa_dist.tracking import end_run

        end_run(folder, "KILLED" if isinstance(error, KeyboardInterrupt | StoppedError) else "FAILED")


def conclude(recipe: Recipe, folder: Path, result: dict[str, Any]) -> None:
    """Records and registers the model, and prints the table."""
    with recorded_later(recipe, folder):
        _conclude(recipe, folder, result)


@contextmanager
def recorded_later(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Says how a run that is whole is recorded where that did not end well; and in MLflow, where that is there."""
    later = f"the run itself is whole: record it later with mmsa-dist train --resume {folder}"
    try:
        yield
    except TransientError as error:
        raise TransientError(f"{error}; {later}") from error
    except BaseException as error:
        shown_as_ended(recipe, folder, error)
        if recipe.tracking.enabled and isinstance(error, KeyboardInterrupt):
            print(later, file=sys.stderr)
        raise


def _conclude(recipe: Recipe, folder: Path, result: dict[str, Any]) -> None:
    from mmsa_dist.report import result_table
    from shards.progress import console

    console.print(result_table(result))
    if trace := profiling.shown(folder):
        print(trace)
    if not (folder / "time.json").is_file():
        spent = account(folder)
        if spent.wall:  # none of a run that an older version began
            run_folder.write_json(folder / "time.json", spent.dump())
            print(spent)
    if recipe.checkpoint.mirror:
        finish_mirror(recipe.checkpoint.mirror, folder)
    published = None
    if recipe.tracking.enabled:
        from mmsa_dist.tracking import finish_run

        published = finish_run(folder, recipe)
        if recipe.checkpoint.mirror:  # it knows the model now
            finish_mirror(recipe.checkpoint.mirror, folder, "mlflow.json")
    if published and published.name:
        named = ", ".join(f"@{alias}" for alias in published.aliases)
        print(f"registered {published.uri}" + (f" as {named}" if named else ""))
    for note in published.notes if published else ():
        print(note)
    print(
        f"everything of this run is in {folder}; predict with:\n"
        f"  mmsa-dist predict {folder} --data FOLDER --out predictions.csv"
    )


def finish_mirror(address: str, folder: Path, *names: str) -> None:
    """The mirror knows that the run is finished, so that nobody who goes on from there reads the test split again.

    Args:
        names: files to send; all that a finished run leaves where none is named.
    """
    from mmsa_dist.mirror import END, Mirror

    try:
        Mirror.of(address, folder).put_files(folder, names or END)
    except MmsaError as error:
        print(f"warning: the result is not in the mirror: {error}", file=sys.stderr)


def train_under_torchrun(recipe: Recipe, folder: Path | None, runs_dir: Path, name: str | None) -> dict[str, Any]:
    """This process is one of torchrun's ranks: rank 0 is also the driver."""
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing:
        raise ConfigError(
            f"launch.launcher: torchrun sets {', '.join(missing)}, which this process lacks; start it as "
            "`torchrun --standalone --nproc-per-node N -m mmsa_dist train … --launcher torchrun`, "
            "or use --launcher local"
        )
    for key, value in places.RANK_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    notes = torchrun.without_effect(recipe.launch, world, resumed=folder is not None)
    decided = {"workers": world, "min_workers": None}
    recipe = recipe.model_copy(update={"launch": recipe.launch.model_copy(update=decided)})
    index, recipe = check(recipe)
    import torch.distributed as dist

    from mmsa_dist.worker import join_group, run_rank

    join_group(rank, world, recipe.launch.timeout)
    with ExitStack() as driver:
        shared: list[tuple[str, bool, tuple[str, ...]] | MmsaError | None] = [None]
        if rank == 0:
            try:
                folder = folder or torchrun.begun_before(runs_dir)
                folder = driver.enter_context(begun(recipe, index, folder, runs_dir, name))
                torchrun.mark(folder)
                for note in notes:
                    print(f"note: {note}", flush=True)
                done = (folder / "result.json").is_file()
                if not done:
                    launch.make_ready(folder)
                shared = [(str(folder), done, recipe.data.without)]  # a copy of the data may be whole on one node only
            except MmsaError as error:
                shared = [error]
        dist.broadcast_object_list(shared)
        if not isinstance(shared[0], tuple):
            raise shared[0] or TransientError("rank 0 ended before the run began")
        folder, done, recipe = Path(shared[0][0]), shared[0][1], _without(recipe, shared[0][2])
        if done:
            result = run_folder.read_json(folder / "result.json")
        else:
            with ExitStack() as training:
                if rank == 0:
                    training.enter_context(ended(recipe, folder))
                    training.enter_context(Follower(folder, recipe.train.monitor))
                    training.enter_context(launch.attempted(folder, first=not torchrun.restarts()))
                requests = Requests(folder, rank)
                requests.listen(driven=False)
                try:
                    result = run_rank(folder, recipe, rank, world, requests=requests)
                except MmsaError:
                    raise
                except Exception as error:  # what it was is written down; it may be a peer's
                    found = diagnose(folder, "")
                    if isinstance(found, TrainingError):
                        raise found from error
                    raise
        dist.destroy_process_group()
        if rank == 0:
            conclude(recipe, folder, result)
    return result
