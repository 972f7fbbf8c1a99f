"""Processes of this machine that will be ranks: they import what ranks need while their driver checks and records.

Half of the time to a run's first step is imports. A forerunner makes them beside the driver, says so on a socket, which
is its standard input, and waits there for its `Place`: with it come the file that it writes to and the run's lock,
which it holds as long as it lives. It ends with its driver at any time.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from mmsa_dist import places
from mmsa_dist.recipe import Recipe

LARGEST = 2**16
"""Bytes of a place in a message."""
FILES = 2
"""At most that many come with it: the log, and the lock where the run's file system has locks."""


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
                [sys.executable, "-m", "mmsa_dist.worker"],
                env=environment,
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
            )

    def become(self, place: Place, files: list[int], patience: float) -> bool:
        """Tells it which rank it is once it has imported, and hands it `files`; False where it ended before that, or
        was not heard of for `patience` seconds."""
        with self._socket:
            self._socket.settimeout(patience)
            try:
                if not self._socket.recv(1):
                    return False
                socket.send_fds(self._socket, [json.dumps(asdict(place)).encode()], files)
                return bool(self._socket.recv(1))  # some systems lose files that are closed before they are taken
            except OSError:
                return False

    def end(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()


class Forerunners:
    """Those that have not become ranks yet."""

    def __init__(self) -> None:
        self._waiting: list[Forerunner] = []

    def send(self, count: int, cpus: int) -> None:
        for _ in range(count):
            self._waiting.append(Forerunner(cpus))

    def start(
        self, where: list[Place], cpus: int, logs: Path, lock: list[int], patience: float
    ) -> list["subprocess.Popen[bytes]"]:
        """The processes that are ranks from now on: those that have run ahead, and new ones; nobody waits any more.

        Args:
            logs: folder of the ranks' logs. patience: seconds that one may import.
        """
        ranks = [self._waiting.pop(0) for _ in where[: len(self._waiting)]]
        self.end()  # there may be room for fewer than were sent
        sent, files = len(ranks), list[BinaryIO]()
        try:
            for place in where:
                files.append((logs / f"rank-{place.rank}.log").open("ab"))
            for log in files[sent:]:
                ranks.append(Forerunner(cpus, log))
            for i, (place, log) in enumerate(zip(where, files, strict=True)):
                if not ranks[i].become(place, [log.fileno(), *lock], patience) and i < sent:
                    ranks[i].end()
                    ranks[i] = Forerunner(cpus, log)  # which says in its log what ends it
                    ranks[i].become(place, [log.fileno(), *lock], patience)
            return [each.process for each in ranks]
        except BaseException:
            for each in ranks:
                each.end()
            raise
        finally:
            for log in files:
                log.close()

    def end(self) -> None:
        while self._waiting:
            self._waiting.pop().end()


@contextmanager
def ahead(recipe: Recipe, folder: Path | None) -> Iterator[Forerunners]:
    """Forerunners of a run of local ranks, none of other runs; those that did not become ranks end with the context.

    Args:
        folder: of a run that is gone on with, which has no ranks where it has its result.
    """
    launch, sent = recipe.launch, Forerunners()
    try:
        if launch.launcher == "local" and not (folder and (folder / "result.json").is_file()):
            with suppress(OSError):  # of a machine that has no room for them; ranks say it
                sent.send(min(launch.workers, places.own_cpus() // launch.cpus_per_worker), launch.cpus_per_worker)
        yield sent
    finally:
        sent.end()


def told() -> Place | None:
    """Of a forerunner that has imported: says so, waits for its place and takes it; None where the driver has ended."""
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as driver:
        try:
            driver.sendall(b".")
            message, files, _, _ = socket.recv_fds(driver, LARGEST, FILES)
            if not message:
                return None
            driver.sendall(b".")
        except (BrokenPipeError, ConnectionResetError):
            return None
    log, *_ = files  # what else there is is the lock, held as long as it is open
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, stream in ((nothing, sys.stdin), (log, sys.stdout), (log, sys.stderr)):
        os.dup2(file, stream.fileno())
    for file in (nothing, log):
        os.close(file)
    place = Place(**json.loads(message))
    os.environ.update(place.environment())
    return place
