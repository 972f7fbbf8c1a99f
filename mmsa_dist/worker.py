"""One rank: joins the process group, trains, and says in a file how it failed if it did.

Under Ray Train `run_rank` is the training function; otherwise ``python -m mmsa_dist.worker`` is a rank of the local
launcher, which tells it over its standard input which one (`forerunners`).
"""

import datetime
import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mmsa_dist import forerunners, run_folder
from mmsa_dist.errors import MmsaError, StoppedError, TransientError
from mmsa_dist.ledger import Ledger
from mmsa_dist.stopping import Requests
from mmsa_dist.watch import Watch

if TYPE_CHECKING:
    from mmsa_dist.loop import Report
    from mmsa_dist.recipe import Recipe


def run_rank(
    folder: Path,
    recipe: "Recipe",
    rank: int,
    world: int,
    report: "Report | None" = None,
    requests: Requests | None = None,
    exporter: "Callable[[run_folder.Events, Ledger], AbstractContextManager[object]] | None" = None,
) -> dict[str, Any]:
    """Trains as rank `rank` of `world`, in a process group that exists already.

    Args:
        exporter: gives what shows the rank to others meanwhile, by what it notes itself.

    Raises:
        StoppedError: the run was asked to end, and is saved.
        whatever went wrong, after writing it to ``failures/``. No collective is called then: peers may be dead.
    """
    launch = recipe.launch
    watch = Watch(folder, rank, launch.timeout, launch.step_timeout, lambda error: record_failure(folder, rank, error))
    ledger = Ledger(watcher=watch.alive)
    events = run_folder.Events(folder, rank, ledger.booked)
    events.write("start", pid=os.getpid(), rank=rank, world=world)
    readers, told = ExitStack(), Told(folder, rank, grouped=world > 1)
    try:
        with told:
            readers.enter_context(watch)
            if exporter is not None:
                readers.enter_context(exporter(events, ledger))
            take_cores(recipe.launch.cpus_per_worker)
            from mmsa_dist.loop import fit
            from mmsa_dist.session import open_session
            from mmsa_dist.tracking import open_tracker

            session = open_session(recipe, folder, rank, world)
            readers.callback(session.loader.close)
            events.write("ready", steps=session.engine.steps)
            with open_tracker(folder, rank) as tracker:
                result = fit(session, events, tracker, report or (lambda summary: None), ledger, requests, told)
            session.close()
            return result
    except StoppedError:
        session.close()
        raise
    finally:
        readers.close()  # after a failure was told: they may be waiting for a server
        events.close()


SWITCH = 0.0005
"""Seconds that a thread of a rank may keep the interpreter from another that asks for it. By Python's 5 ms, the threads
that read samples would hold the training thread up by as much after every operation of torch, each of which lets go."""


def take_cores(cpus: int) -> None:
    """Makes this process a rank of `cpus` cores: torch's threads, how they alternate with those that read, and no
    numbers below 1e-38, which the gradient of a long sequence's first steps is full of: processors by Intel take a
    hundred cycles for each, and so three to four times as long for the backward pass of an LSTM over 500 steps.
    Holds for the calling thread and those that it starts."""
    import torch

    torch.set_flush_denormal(True)  # before torch's own threads start
    torch.set_num_threads(cpus)
    sys.setswitchinterval(SWITCH)


class Told:
    """Writes down how a rank failed, as a context, which may be entered within itself: the innermost writes, so that
    nothing that ends slowly (a checkpoint on its way, a server that is away) comes before it or hides it.

    Args:
        grouped: whether the rank is in a process group with others. Ray Train takes it away from under a rank that
            trains, when it has lost another; whatever comes of that is no fault of this one.
    """

    def __init__(self, folder: Path, rank: int, *, grouped: bool = False) -> None:
        self._folder, self._rank, self._grouped, self._done = folder, rank, grouped, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._done or isinstance(error, StoppedError):
            return
        self._done = True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = error.filename or self._folder
            full = TransientError(f"{place}: {error.strerror}; free space, then go on with --resume")
            record_failure(self._folder, self._rank, full)
            raise full from error
        record_failure(self._folder, self._rank, error, alone=self._grouped and not _in_group())


def _in_group() -> bool:
    import torch.distributed as dist  # not before there was a group: it may be torch that cannot be imported

    return dist.is_initialized()


def record_failure(folder: Path, rank: int, error: BaseException, *, alone: bool = False) -> None:
    """``failures/<time>-rank-<r>.json``: the sentence, the exit code where it is one of ours, the traceback.

    Args:
        alone: whether the rank's process group had been taken away.
    """
    entry = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, MmsaError) else None,
        "message": str(error),
        "alone": alone,
        "traceback": traceback.format_exc(),
    }
    failures = folder / "failures"
    try:
        failures.mkdir(exist_ok=True)
        (failures / f"{time.time_ns()}-rank-{rank}.json").write_text(json.dumps(entry, indent=1), encoding="utf-8")
    except OSError:
        print(f"rank {rank} failed: {error}", file=sys.stderr)  # the disk may be what failed


def join_group(rank: int, world: int, timeout: float) -> None:
    """The process group of a rank that Ray did not start."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    patience = datetime.timedelta(seconds=timeout)
    if rendezvous := os.environ.get("MMSA_RENDEZVOUS"):
        where: dict[str, Any] = {"init_method": f"file://{rendezvous}"}
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # one store for all attempts of a torchrun: ranks that it started again found the addresses of dead ones there
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, world, is_master=False, timeout=patience)
        where = {"store": dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)}
    else:
        where = {"init_method": "env://"}
    dist.init_process_group(backend, **where, rank=rank, world_size=world, timeout=patience)


def end_with(parent: int) -> None:
    """Ends this rank when the launcher is gone: a killed driver must not leave ranks behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def main() -> int:
    """A rank that the local launcher started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears it
    signal.pthread_sigmask(signal.SIG_BLOCK, LATER)  # of all threads that begin from now on
    end_with(int(os.environ["MMSA_LAUNCHER"]))
    failure: Exception | None = None
    try:
        run_ahead()
    except Exception as error:  # is said once there is a run to say it of
        failure = error
    ahead = os.getpid()
    place = forerunners.told()
    if os.getpid() != ahead:  # threads are not forked
        end_with(int(os.environ["MMSA_LAUNCHER"]))
    if place is None:
        print("the driver has ended, or waits no longer for these imports (--launch.timeout)", file=sys.stderr)
        return TransientError.exit_code
    from mmsa_dist.recipe import read_recipe

    folder = Path(place.folder)
    requests = Requests(folder, place.rank)
    requests.listen(driven=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LATER)
    if failure is not None:
        with Told(folder, place.rank):
            raise failure
    recipe = read_recipe(folder / "recipe.yaml")
    try:
        import torch.distributed as dist

        join_group(place.rank, place.world, recipe.launch.timeout)
        run_rank(folder, recipe, place.rank, place.world, requests=requests)
        dist.destroy_process_group()
    except StoppedError:
        return 0  # the driver reads it in the run's folder; a failure would end rank 0 while its mirror still takes it
    except MmsaError as error:
        print(f"rank {place.rank}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


LATER = {signal.SIGTERM, signal.SIGHUP}
"""What a rank hears once it knows its run: asked before, it ends with its first step."""

NEEDED = ("torch.distributed", "mmsa_dist.loop", "mmsa_dist.session", "mmsa_dist.tracking", "torch._dynamo")
"""Modules that every rank imports sooner or later; the last for Adam, when it is made."""


def run_ahead() -> None:
    """Imports what every rank needs, of whatever run it will be."""
    for name in NEEDED:
        importlib.import_module(name)
    from mmsa_dist.engine import imported

    imported()


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a peer that died must not hold this one in a destructor
