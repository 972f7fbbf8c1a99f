"""A distributed test is a function call: `run_ranks(fn, 2, ...)` calls `fn` on two ranks of a CPU process group.

Importing torch and DeepSpeed costs a process many seconds, so the ranks stay alive: one pool of processes per world
size, started at its first use and ended with the pytest session. A function travels as a reference to its module
(by file) and name, its arguments and results as pickles between our own processes.

A call ends in one of three ways. Every rank returns: their results, by rank. A rank raises: `RankError` with that
rank's traceback first. A rank dies or does not answer in time: `RankError` with what it printed and, after a time-out,
where each of its threads stands. After the last two the pool is started afresh, unless all ranks raised the same
error at the same line: then none of them can be left inside a collective.
"""

import atexit
import contextlib
import faulthandler
import importlib
import importlib.util
import inspect
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_SECONDS = 300.0
"""Cold imports on a busy machine take over a minute."""
GRACE_SECONDS = 2.0
"""How long the other ranks may take to answer after the first one raised."""
LOG_TAIL = 6000
"""Characters of a rank's output shown where it failed."""


class RankError(AssertionError):
    """A rank raised, died or did not answer.

    Attributes:
        rank: the first rank that failed; -1 for a time-out.
        cause: what it raised, where that could be pickled.
    """

    def __init__(self, message: str, rank: int, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Calls ``fn(*args)`` on every rank of a gloo process group of `world_size` processes.

    Args:
        fn: a function at the top level of a module; it asks `torch.distributed` for its rank. Every call begins with
            the same seeds, one computing thread and the environment as it was when the rank started.
        args: anything that pickles.
        timeout: seconds for the call, in which a first one imports its modules; starting the ranks is not counted.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: a rank raised, died or did not answer in time.
    """
    if "<" in fn.__qualname__:
        raise TypeError(
            f"{fn.__qualname__} cannot be sent to another process: define it at the top level of its module"
        )
    pool = _POOLS.get(world_size)
    if pool is None:
        pool = _POOLS[world_size] = _Pool(world_size)
    try:
        results, reusable = pool.call(fn, args, timeout)
    except BaseException:  # an interrupt too: ranks in the middle of a call cannot be used again
        _discard(world_size)
        raise
    failures = [r for r in results if isinstance(r, _Failure)]
    if failures:
        if not reusable:
            _discard(world_size)
        first = failures[0]
        raise RankError(_message(failures, world_size), first.rank, first.cause) from first.cause
    return [r.value for r in sorted(results, key=lambda r: r.rank)]


def close_pools() -> None:
    """Ends every rank process."""
    for world_size in list(_POOLS):
        _discard(world_size)


@dataclass(frozen=True)
class _Result:
    rank: int
    value: Any


@dataclass(frozen=True)
class _Failure:
    """where: file and line that raised; text: the traceback."""

    rank: int
    kind: str
    where: str
    text: str
    cause: BaseException | None


class _Pool:
    """`world_size` processes in one process group."""

    def __init__(self, world_size: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"ranks-{world_size}-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = Pipe()
            command = [sys.executable, str(Path(__file__)), str(theirs.fileno()), str(rank), str(world_size)]
            with (self.folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, str(self.folder)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(rank, world_size),
                )
            theirs.close()  # the rank's end is the only one left: its death ends our read
            self.processes.append(process)
            self.pipes.append(ours)
        try:
            self._collect(START_SECONDS, "start")
        except BaseException:
            self.close()
            raise

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> tuple[list[Any], bool]:
        """Results and failures in the order of arrival; whether the ranks can be used again."""
        # The reference first, alone: unpickling the arguments may need the module that defines their classes.
        reference = (fn.__module__, inspect.getsourcefile(fn), fn.__qualname__)
        message = pickle.dumps((reference, pickle.dumps(args)))
        for log in self.folder.glob("*.log"):
            os.truncate(log, 0)  # opened for appending by the rank
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send_bytes(message)
            except OSError:
                raise RankError(self._death(rank), rank) from None
        results = self._collect(timeout, fn.__qualname__)
        failures = [r for r in results if isinstance(r, _Failure)]
        symmetric = len(failures) == len(self.pipes) and len({(f.kind, f.where) for f in failures}) == 1
        return results, not failures or symmetric

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # a rank that waits for its next call ends here
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                continue
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _collect(self, timeout: float, what: str) -> list[Any]:
        """One answer of every rank; after a failure only those that come soon."""
        results: list[Any] = []
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        end = time.monotonic() + timeout
        failed = False
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                if failed:
                    return results
                raise RankError(self._hang(what, timeout, sorted(waiting.values())), -1)
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    results.append(pickle.loads(pipe.recv_bytes()))  # type: ignore[union-attr]
                except (EOFError, OSError):
                    if failed:  # brought down by the first failure, which is the one to show
                        continue
                    raise RankError(self._death(rank), rank) from None
                if isinstance(results[-1], _Failure) and not failed:
                    failed = True
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        return results

    def _log(self, rank: int) -> str:
        text = (self.folder / f"{rank}.log").read_text(errors="replace")[-LOG_TAIL:].strip()
        return f"\n--- output of rank {rank}\n{text}" if text else ""

    def _death(self, rank: int) -> str:
        code = self.processes[rank].wait(10)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} of {len(self.pipes)} {how}{self._log(rank)}"

    def _hang(self, what: str, timeout: float, silent: list[int]) -> str:
        for rank in silent:
            with contextlib.suppress(ProcessLookupError):
                self.processes[rank].send_signal(signal.SIGUSR1)  # prints where every thread stands
        time.sleep(0.5)
        names = ", ".join(map(str, silent))
        logs = "".join(map(self._log, silent))
        return f"{what}: no answer within {timeout:g} s from rank {names} of {len(self.pipes)}{logs}"


_POOLS: dict[int, _Pool] = {}
atexit.register(close_pools)


def _discard(world_size: int) -> None:
    pool = _POOLS.pop(world_size, None)
    if pool is not None:
        pool.close()


def _message(failures: list[_Failure], world_size: int) -> str:
    first, *others = failures
    lines = [f"rank {first.rank} of {world_size} raised {first.kind}\n{first.text}"]
    lines += [f"then rank {f.rank} raised {f.text.strip().splitlines()[-1]}" for f in others]
    return "\n".join(lines)


def _environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # ranks share the machine's few cores with each other
        "GOMP_SPINCOUNT": "0",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


# What follows runs in a rank's process.


def _serve(pipe: Connection, rank: int, world_size: int, folder: Path) -> None:
    import torch.distributed as dist

    from mmsa_dist.worker import take_cores

    take_cores(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    pipe.send_bytes(pickle.dumps(_Result(rank, None)))
    environment = dict(os.environ)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # no tear-down: another rank may be gone already
        try:
            answer = pickle.dumps(_Result(rank, _call(message)))
        except BaseException as error:
            answer = _failure(rank, error)
        pipe.send_bytes(answer)
        os.chdir(ROOT)
        os.environ.clear()
        os.environ.update(environment)


def _call(message: bytes) -> Any:
    import random

    import numpy as np
    import torch

    (module_name, file, qualname), arguments = pickle.loads(message)
    fn: Any = _module(module_name, file)
    for part in qualname.split("."):
        fn = getattr(fn, part)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return fn(*pickle.loads(arguments))


def _module(name: str, file: str) -> Any:
    """The module as pytest knows it: by its name, else from its file (a test module need not be importable)."""
    if name in sys.modules and name != "__main__":
        return sys.modules[name]
    with contextlib.suppress(ImportError):
        if (found := importlib.util.find_spec(name)) is not None and found.origin == file:
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failure(rank: int, error: BaseException) -> bytes:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    text = "".join(traceback.format_exception(error))
    for cause in (error, None):
        failure = _Failure(rank, type(error).__name__, where, text, cause)
        with contextlib.suppress(Exception):
            answer = pickle.dumps(failure)
            pickle.loads(answer)  # an exception may pickle and not come back
            return answer
    raise AssertionError("a failure without its exception always pickles")


def _end_with(parent: int) -> None:
    """Ends this rank when the process that started it is gone, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(argv: list[str]) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Appending, so that the starter can empty the file between calls.
    for stream in (sys.stdout, sys.stderr):
        log = os.open(str(Path(argv[3]) / f"{argv[1]}.log"), os.O_WRONLY | os.O_APPEND)
        os.dup2(log, stream.fileno())
    _serve(Connection(int(argv[0])), int(argv[1]), int(argv[2]), Path(argv[3]))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not tests/, whose `mmsa_dist` and `shards` would hide the packages
    # As `tests.ranks`: pickles name the classes of this module by where they are imported from.
    from tests.ranks import main as serve

    serve(sys.argv[1:])
