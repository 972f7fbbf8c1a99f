"""Starts ranks, starts them again when they die, and says why when they cannot.

Three ways to run the same rank: Ray Train, processes of this machine, or torchrun (then this process is a rank).
"""

import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mmsa_dist import checkpoint, places, run_folder, stopping
from mmsa_dist.diagnosis import diagnose, first_line, written_down
from mmsa_dist.errors import ConfigError, StoppedError, TransientError
from mmsa_dist.forerunners import Forerunners, Place, Rank
from mmsa_dist.recipe import Recipe, from_dict

PAUSE = 15
"""Seconds before ranks start again that met a disk or a server in trouble; doubled each time. Ranks that were killed
start again at once."""


def run(recipe: Recipe, folder: Path, ahead: Forerunners | None = None) -> dict[str, Any]:
    """Trains in `folder` with the launcher of the recipe, restarting ranks that died, and gives the result.

    Ranks that were asked to end and saved start again too, where it was not this process that was asked; that is no
    failure.

    Args:
        ahead: processes that the first local ranks come from.

    Raises:
        MmsaError: of a rank, as its sentence; TransientError after more than ``launch.max_failures`` deaths.
        StoppedError: this process got a signal.
    """
    local = partial(run_local, ahead=ahead or Forerunners())
    start = run_ray if recipe.launch.launcher == "ray" else local
    failed, first = 0, True
    with stopping.Signals(folder) as signals:
        while True:
            make_ready(folder)
            if signals.number:
                raise signals.stopped()
            try:
                with attempted(folder, first=first):
                    if not first and recipe.launch.launcher == "ray":
                        places.wait_for_nodes(recipe, say, partial(stopping.requested, folder))
                    outcome = start(recipe, folder)
            except StoppedError:  # there were no ranks yet
                raise signals.stopped() from None
            first = False
            if (folder / "result.json").is_file():
                return dict(run_folder.read_json(folder / "result.json"))
            if signals.number:
                raise signals.stopped()
            if done := stopping.ended(folder):
                say(f"{done['why']}; saved after step {done['step']:,}, starting again from there")
                continue
            error = diagnose(folder, outcome, printed=PRINTED.get(recipe.launch.launcher, str(folder / "logs")))
            failed += 1
            if not isinstance(error, TransientError) or failed > recipe.launch.max_failures:
                raise error
            saved = any((folder / "checkpoints").glob("step-*"))
            pause = PAUSE * 2 ** (failed - 1) if written_down(folder) else 0
            say(
                f"{error}; starting again {'from the last checkpoint' if saved else 'from the beginning'}"
                + (f" in {pause} s" if pause else "")
                + f" ({failed} of {recipe.launch.max_failures})"
            )
            stopping.pause(folder, pause)


def say(sentence: str) -> None:
    """What a person at the driver should know, beside the progress that goes to stdout."""
    print(sentence, file=sys.stderr, flush=True)


PRINTED = {"ray": "the logs of Ray's session (/tmp/ray/session_latest/logs of each node)"}
"""Where what ranks print lies, by launcher, unless it is in the run's folder."""


@contextmanager
def attempted(folder: Path, *, first: bool) -> Iterator[None]:
    """Notes among the driver's events when an attempt begins and ends; `ledger.account` reads them.

    Args:
        first: of this driver, whose command and environment it notes too; it resumes a run that another one began.
    """
    begun = any(folder.glob("checkpoints/step-*")) or bool(run_folder.read_events(folder, None))
    events = run_folder.Events(folder, None)
    events.write("attempt", resumed=first and begun, **({"environment": run_folder.environment()} if first else {}))
    try:
        yield
    finally:
        events.write("attempt_end")
        events.close()


def make_ready(folder: Path) -> None:
    """Clears what an attempt that ended badly has left in a run's folder; its failures stay, under a number.

    Raises:
        ConfigError, DataError: no checkpoint can be gone on from.
    """
    if (folder / "failures").is_dir():
        past = len(list(folder.glob("failures-*")))
        (folder / "failures").rename(folder / f"failures-{past + 1}")
    for stale in folder.glob(".rendezvous-*"):
        stale.unlink()
    stopping.forget(folder)
    for sentence in checkpoint.tidy(folder / "checkpoints"):
        print(sentence, file=sys.stderr)


def run_local(recipe: Recipe, folder: Path, ahead: Forerunners) -> str:
    """Ranks as processes of this machine; gives what was seen when the first of them ended badly, '' if none did."""
    world = places.as_many_as_fit(recipe, say, partial(stopping.requested, folder)).launch.workers
    rendezvous = folder / f".rendezvous-{os.getpid()}-{time.time_ns()}"
    where = [Place(str(folder), rank, world, str(rendezvous)) for rank in range(world)]
    processes: list[Rank] = []
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    lock = run_folder.lock_of(folder)  # until all its ranks are gone nobody else may take the run up
    try:
        processes = ahead.start(where, recipe.launch.cpus_per_worker, logs, lock, recipe.launch.timeout)
        return _wait(processes, folder)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()
        rendezvous.unlink(missing_ok=True)


def _wait(processes: list[Rank], folder: Path) -> str:
    """Until all ranks ended well, or one did not and its peers are gone too."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            # of several at a look the one that a signal ended was first: it is what its peers ended of, who may have
            # been looked at after it
            ended = [(rank, code) for rank, process in enumerate(processes) if (code := process.poll())]
            rank, code = min(ended, key=lambda each: each[1] > 0)
            for late, process in enumerate(processes):
                if process.poll() is None and _is_stopped(process.pid):
                    say(f"rank {late} (process {process.pid}) is stopped by a signal, and answers nobody")
            _let_finish(processes, folder)
            if code < 0:
                return f"rank {rank} was ended by {signal.Signals(-code).name}"
            return f"rank {rank} ended with exit code {code}"
        if all(code == 0 for code in codes):
            return ""
        time.sleep(0.05)


def _let_finish(processes: list[Rank], folder: Path) -> None:
    """Until all ranks are gone: each gets two seconds to say what it saw, and then the time to bring to the disk and to
    the mirror what it has of a checkpoint. Whoever does neither is ended, as others may wait for it."""
    deadline, said = time.monotonic() + 2, set[int]()
    while left := [(rank, process) for rank, process in enumerate(processes) if process.poll() is None]:
        for rank, process in left if time.monotonic() >= deadline else []:
            if _is_stopped(process.pid) or not checkpoint.is_held(folder / "checkpoints", process.pid):
                process.kill()
            elif rank not in said:
                say(f"waiting for rank {rank}, which finishes a checkpoint; a second signal ends it")
                said.add(rank)
        time.sleep(0.05)


def _is_stopped(pid: int) -> bool:
    """Whether a process is held by SIGSTOP, where that can be known."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def run_ray(recipe: Recipe, folder: Path) -> str:
    """Ranks as Ray Train workers, in a cluster that is there or one of our own."""
    import ray

    places.connect(recipe)
    has = ray.cluster_resources()
    places.check_cpus(recipe, int(has.get("CPU", 0)), "the Ray cluster")
    places.check_gpus(recipe, has.get("GPU", 0.0), "the Ray cluster")
    if recipe.launch.min_workers is not None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    while True:
        fitting = places.as_many_as_fit(recipe, say, partial(stopping.requested, folder))
        seen = _fit(fitting, folder, most=recipe.launch.workers)
        if seen is not None:
            return seen
        say(f"others took the room for {fitting.launch.workers} workers before they could start; looking again")


def _fit(recipe: Recipe, folder: Path, most: int) -> str | None:
    """As `run_ray`, of ranks whose number is settled; None where places that may be fewer were not to be had.

    Args:
        most: workers that are wanted.
    """
    told = _told_by_ranks(folder)
    growth = places.Growth(recipe.launch, most, begun=lambda: _told_by_ranks(folder) > told)
    shortage = places.Shortage(recipe, say)

    def look() -> None:
        if _told_by_ranks(folder) <= told:  # nobody is there who could end after a step, or miss a peer
            if stopping.requested(folder):
                raise StoppedError("asked to end before there were ranks")
            shortage()
        if more := growth():
            stopping.request(folder, f"{recipe.launch.workers} -> {more} workers, as there is room for them")

    try:
        # a name of its own: Ray resumes a run whose name it has seen, from what it knows of it
        trainer = ray_trainer(recipe, folder, name=f"{folder.name}-{secrets.token_hex(3)}")
        beside(trainer.fit, look)
    except (StoppedError, TransientError):  # of `look`: the command ends, and what waits in Ray with it
        raise
    except Exception as error:  # Ray wraps what a worker raised; the worker has written it down
        no_room = type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"
        return None if no_room else _seen_by_ray(error)
    return ""


def _told_by_ranks(folder: Path) -> int:
    """Bytes of rank 0's events: there are more as soon as an attempt's ranks run."""
    events = run_folder.events_file(folder, 0)
    return events.stat().st_size if events.is_file() else 0


def _seen_by_ray(error: Exception) -> str:
    """What Ray Train says of the rank that ended first, or of itself: a killed one has died, its peers have raised."""
    failed: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    died = {rank: seen for rank, seen in failed.items() if "HealthCheck" in type(seen).__name__}
    for rank, seen in sorted((died or failed).items()):
        why = getattr(seen, "health_check_failure", seen)
        return f"rank {rank} ended, Ray Train says {type(why).__name__}: {first_line(str(why)).rstrip('.')}"
    return f"Ray Train: {type(error).__name__}: {first_line(str(error))}"


def beside(call: Callable[[], object], look: Callable[[], None]) -> None:
    """Makes a call in a thread of its own: in the main one Ray takes Ctrl-C for itself, and drops what is unsaved.

    Args:
        look: is called now and then meanwhile; signals are heard as well.
    """
    outcome: Future[object] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="ray-train", daemon=True).start()
    while not wait([outcome], timeout=0.5).done:
        look()
    outcome.result()


def ray_trainer(
    recipe: Recipe, folder: Path, *, name: str, callbacks: Any = (), report: bool = False, until: int | None = None
) -> Any:
    """A TorchTrainer whose workers run `worker.run_rank`. It waits for places; where there may be fewer, not for ever.

    Args:
        report: every rank reports each epoch's numbers to Ray, for a sweep that prunes.
        until: an epoch after which all save and end, whether or not it is the last.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    launch = recipe.launch
    resources = {"CPU": float(launch.cpus_per_worker)}
    if launch.gpus_per_worker:
        resources["GPU"] = launch.gpus_per_worker
    return TorchTrainer(
        train_function,
        train_loop_config={
            "recipe": recipe.dump(),
            "folder": str(folder),
            "report": report,
            "until": until,
            "versions": versions(),
        },
        torch_config=TorchConfig(backend="nccl" if launch.gpus_per_worker else "gloo", timeout_s=int(launch.timeout)),
        scaling_config=ScalingConfig(
            num_workers=launch.workers, use_gpu=bool(launch.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            # `run` decides: what cannot succeed is not tried again
            failure_config=FailureConfig(
                max_failures=0,
                max_preemption_failures=0,
                controller_failure_limit=-1 if launch.min_workers is None or report else 0,
            ),
            callbacks=list(callbacks) or None,
        ),
    )


def train_function(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    import ray.train

    from mmsa_dist import exported
    from mmsa_dist.worker import record_failure, run_rank

    context = ray.train.get_context()
    try:
        check_versions(config["versions"])
    except ConfigError as error:
        record_failure(Path(config["folder"]), context.get_world_rank(), error)
        raise
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())

    def report(summary: dict[str, Any]) -> None:
        ray.train.report({name: value for name, value in summary.items() if isinstance(value, int | float)})

    if config["report"] and context.get_world_rank() == 0:
        note_reservation(Path(config["folder"]))
    recipe = from_dict(config["recipe"])
    if not recipe.launch.gpus_per_worker:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a rank without a GPU of its own takes nobody else's
    folder, rank = Path(config["folder"]), context.get_world_rank()
    world, told = context.get_world_size(), report if config["report"] else None
    requests = stopping.Requests(folder, rank, config["until"])
    exporter = partial(exported.of_rank, recipe, folder, rank, world)
    with suppress(StoppedError):  # the driver reads it in the run's folder; Ray would take it for a failure
        run_rank(folder, recipe, rank, world, told, requests, exporter)


UNCOMPARED = ("ray", "mlflow")
"""Packages whose versions may differ: Ray compares its own, and MLflow computes nothing."""


def versions() -> dict[str, str | None]:
    """Of Python and of what computes; not for which devices that is built, in which nodes may differ."""
    found = run_folder.environment()
    packages = {name: value for name, value in found["packages"].items() if name not in UNCOMPARED}
    return {"python": found["python"], **{name: value and value.partition("+")[0] for name, value in packages.items()}}


def check_versions(meant: dict[str, str | None]) -> None:
    """Says that this node has other versions than the driver, whose `versions` are `meant`.

    Raises:
        ConfigError: so it is.
    """
    differing = [
        f"{name} {own or 'is missing'}, the driver has {meant.get(name) or 'none'}"
        for name, own in versions().items()
        if own != meant.get(name)
    ]
    if differing:
        raise ConfigError(
            f"node {platform.node()}: {'; '.join(differing)}; ranks must compute alike: install the same versions there"
        )


RESERVATION = "placement-group"


def note_reservation(folder: Path) -> None:
    """Writes down which placement group this rank runs in: a sweep that stops a trial frees it by that."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is not None:
        run_folder.write_text(folder / RESERVATION, group.id.hex())
