"""Processes of this machine that will be ranks: they import what ranks need while their driver checks and records.

Half of the time to a run's first step is imports. A forerunner makes them beside the driver, says so on a socket, which
is its standard input, and waits there for its `Place`: with it come the file that it writes to and the run's lock,
which it holds as long as it lives. It ends with its driver at any time.

Where there is no GPU one forerunner imports for many ranks: told of several places, it forks a process for each and
ends, and they are the driver's children from then on. With a GPU each rank imports for itself, as what the libraries
know of the device does not outlive a fork.
"""

import ctypes
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from mmsa_dist import places
from mmsa_dist.recipe import Recipe

COMMAND = [sys.executable, "-m", "mmsa_dist.worker"]
LARGEST = 2**15
"""Bytes of a message."""
MOST = 32
"""Ranks that one forerunner forks."""
FILES = MOST + 1
"""At most that many come with a message: the logs, and the lock where the run's file system has locks."""
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these is there where there is a GPU: by NVIDIA, by AMD, under Windows' Linux."""
ADOPT = 36
"""Linux' PR_SET_CHILD_SUBREAPER: what a child leaves behind when it ends becomes a child of this process."""


class Rank(Protocol):
    """A process that is a rank, as its driver has it: a part of what `subprocess.Popen` is."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class Forked:
    """A rank that a forerunner forked, which has ended: a child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@functools.cache
def ranks_of_one() -> int:
    """How many ranks a forerunner may become: 1 where it cannot fork them."""
    if sys.platform != "linux" or any(Path(device).exists() for device in GPUS):
        return 1
    return MOST if ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0) == 0 else 1


@dataclass(frozen=True)
class Place:
    """What a forerunner is told.

    Attributes:
        folder: of the run. rendezvous: file in which its ranks find one another.
    """

    folder: str
    rank: int
    world: int
    rendezvous: str

    def environment(self) -> dict[str, str]:
        """As torch and DeepSpeed look for it."""
        own, world = str(self.rank), str(self.world)
        there = {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        return {**there, "MMSA_RENDEZVOUS": self.rendezvous}


class Forerunner:
    """One of them, as its driver has it.

    Args:
        cpus: of its rank. log: where it writes from the first on; nowhere until it is told where.
    """

    def __init__(self, cpus: int, log: BinaryIO | None = None) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {
            **os.environ,
            **places.RANK_ENVIRONMENT,
            "OMP_NUM_THREADS": str(cpus),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "MMSA_LAUNCHER": str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        output = subprocess.DEVNULL if log is None else log.fileno()
        with theirs:
            self.process = subprocess.Popen(
                COMMAND,
                env=environment,
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
            )

    def become(self, where: list[Place], files: list[int], patience: float) -> "list[Rank]":
        """Tells it which ranks it is once it has imported, and hands it `files`, a log of each and what all hold.

        Returns:
            The ranks; none where it ended before that, or was not heard of for `patience` seconds.
        """
        with self._socket:
            self._socket.settimeout(patience)
            try:
                if not self._socket.recv(1):
                    return []
                message = json.dumps({"place": asdict(where[0]), "ranks": [place.rank for place in where]})
                socket.send_fds(self._socket, [message.encode()], files)
                # some systems lose files that are closed before they are taken: there is always an answer
                pids = [int(pid) for pid in self._socket.recv(LARGEST).split()]
                if pids and pids != [self.process.pid]:
                    self.process.wait(patience)
                    return [Forked(pid) for pid in pids]
                return [self.process] if pids else []
            except (OSError, subprocess.TimeoutExpired):
                return []

    def end(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()


class Forerunners:
    """Those that have not become ranks yet."""

    def __init__(self) -> None:
        self._waiting: list[Forerunner] = []
        self._cpus = 0

    def send(self, count: int, cpus: int) -> None:
        """As many as so many ranks need, with those that wait."""
        if cpus != self._cpus:
            self.end()
        self._cpus = cpus
        for _ in range(ranks_of_one() * len(self._waiting), count, ranks_of_one()):
            self._waiting.append(Forerunner(cpus))

    def meant_for(self, recipe: Recipe, folder: Path | None) -> None:
        """As many as the local ranks of a run need; none for other runs.

        Args:
            folder: of a run that is gone on with, which has no ranks where it has its result.
        """
        launch = recipe.launch
        if launch.launcher != "local" or (folder and (folder / "result.json").is_file()):
            self.end()
            return
        with suppress(OSError):  # of a machine that has no room for them; ranks say it
            self.send(min(launch.workers, places.own_cpus() // launch.cpus_per_worker), launch.cpus_per_worker)

    def start(self, where: list[Place], cpus: int, logs: Path, lock: list[int], patience: float) -> "list[Rank]":
        """The processes that are ranks from now on: of those that have run ahead, and of new ones; nobody waits any
        more.

        Args:
            logs: folder of the ranks' logs. patience: seconds that one may import.
        """
        shares = [where[first : first + ranks_of_one()] for first in range(0, len(where), ranks_of_one())]
        sent = [self._waiting.pop(0) for _ in shares[: len(self._waiting)]]
        self.end()  # there may be room for fewer than were sent
        files, ranks, later = list[BinaryIO](), list[Rank](), list[Forerunner]()
        try:
            for place in where:
                files.append((logs / f"rank-{place.rank}.log").open("ab"))
            log_of = dict(zip((place.rank for place in where), files, strict=True))
            later = [Forerunner(cpus, log_of[share[0].rank]) for share in shares[len(sent) :]]
            for share, each in zip(shares, [*sent, *later], strict=True):
                own = [log_of[place.rank] for place in share]
                told = [*(log.fileno() for log in own), *lock]
                became = each.become(share, told, patience)
                if not became and each in sent:
                    each.end()
                    later.append(each := Forerunner(cpus, own[0]))  # which says in its log what ends it
                    became = each.become(share, told, patience)
                ranks += became or [each.process]
            return ranks
        except BaseException:
            for each in [*sent, *later]:
                each.end()
            for rank in ranks:
                rank.kill()
                rank.wait()
            raise
        finally:
            for log in files:
                log.close()

    def end(self) -> None:
        while self._waiting:
            self._waiting.pop().end()


LOCAL = re.compile(r"--(launch\.)?launcher[ =]local\b")


@contextmanager
def ahead(words: Sequence[str] = ()) -> Iterator[Forerunners]:
    """Forerunners for a run; those that did not become ranks end with the context.

    Args:
        words: of its command. Where they alone say that ranks will be local, one is sent at once, as reading the
            recipe imports torch too.
    """
    sent = Forerunners()
    try:
        if LOCAL.search(" ".join(words)):
            with suppress(OSError):
                sent.send(1, 1)
        yield sent
    finally:
        sent.end()


def told() -> Place | None:
    """Of a forerunner that has imported: says so, waits for its place and takes it; None where the driver has ended.

    Told of several places it forks, and what returns is each of its forks.
    """
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as driver:
        try:
            driver.sendall(b".")
            message, files, _, _ = socket.recv_fds(driver, LARGEST, FILES)
            if not message:
                return None
            share = json.loads(message)
            ranks = share["ranks"]
            if len(ranks) > 1:
                nth = forked(driver, len(ranks))
            else:
                nth = 0
                driver.sendall(str(os.getpid()).encode())
        except (BrokenPipeError, ConnectionResetError):
            return None
    log = files[nth]  # what comes after the logs is the lock, held as long as it is open
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, stream in ((nothing, sys.stdin), (log, sys.stdout), (log, sys.stderr)):
        os.dup2(file, stream.fileno())
    for file in (nothing, *files[: len(ranks)]):
        os.close(file)
    place = Place(**{**share["place"], "rank": ranks[nth]})
    os.environ.update(place.environment())
    return place


def forked(driver: socket.socket, count: int) -> int:
    """Forks this process `count` times, tells the driver the forks' process ids, and ends.

    Returns:
        Which of the forks this is, once all are there and it is the driver's child.
    """
    parent, asked, (gate, opens) = os.getpid(), signal.sigpending(), os.pipe()
    pids = []
    for nth in range(count):
        with warnings.catch_warnings():  # of the thread that looks after the driver, which a fork does not need
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            os.close(opens)
            if not os.read(gate, 1):  # the forerunner ended before all were there
                os._exit(1)
            os.close(gate)
            while os.getppid() == parent:
                time.sleep(0.001)
            for number in asked:  # kept for later, and not forked
                os.kill(os.getpid(), number)
            return nth
        pids.append(pid)
    os.close(gate)
    driver.sendall(" ".join(map(str, pids)).encode())
    os.write(opens, b"." * count)
    os._exit(0)
