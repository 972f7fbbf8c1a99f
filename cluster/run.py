"""`mmsa-dist cluster run -- COMMAND …`: runs a command within a cluster, as soon as the cluster has nodes for it.

Three things that a manifest cannot do and a person would do by hand:

- the autoscaler is asked for all nodes that the command can use, and told when it has ended. A training run takes the
  room that there is, so without that no autoscaler would ever know that it could use more;
- the command begins when there are nodes enough, not when the head is there;
- a training run that was begun before (the job was retried, requeued, submitted again) is gone on with.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from cluster.command_line import parsed, value_of
from cluster.errors import ConfigError, TransientError

LOOK = 2.0
"""Seconds between two looks at the cluster."""
MOST = 10_000
"""Nodes that can be asked for."""
CONNECT_SECONDS = 20.0
"""How long the head may take to answer before it counts as unreachable."""
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the processes of a Ray job, which are all signalled when it is stopped."""


@dataclass(frozen=True)
class Run:
    """Run a command within a Ray cluster once it has nodes: mmsa-dist cluster run --nodes 1:4 --cpus 8 -- train …

    Asks the autoscaler for the nodes, waits for them, and goes on with a training run that an earlier attempt of the
    same command has begun in its --runs-dir. Gives the command's own exit code. The manifests that `mmsa-dist cluster
    render` writes submit this.
    """

    nodes: Annotated[str, tyro.conf.arg(metavar="N|LEAST:MOST")] = "1"
    """Nodes that the command is to have, and the fewest that it begins with."""
    cpus: int = 1
    """CPUs of a node."""
    gpus: int = 0
    """GPUs of a node."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of the cluster's head. Unset: that of the cluster in which this runs."""
    timeout: float = 1800.0
    """Seconds to wait for the fewest nodes."""
    patience: float = 60.0
    """Seconds to wait for the others, once the fewest are there."""


def main(argv: list[str]) -> int:
    """The command line.

    Raises:
        ConfigError: no command, or options that are none. TransientError: the nodes did not come.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    options = parsed(Run, argv[:at], "mmsa-dist cluster run")
    command = argv[at + 1 :]
    if not command:
        raise ConfigError(
            'nothing to run: put the command after "--", as in mmsa-dist cluster run -- train ufen_mtfn …'
        )
    least, most = span(options.nodes)
    _check(options)
    room = Room(options, least, most)
    room.wait()
    try:
        words = continued(command)
        return 0 if words is None else carried_out(words, options.address)
    finally:
        room.release()


def _check(options: Run) -> None:
    """What can be known of the options alone.

    Raises:
        ConfigError: one of them is none.
    """
    if options.cpus < 1 or options.gpus < 0:
        raise ConfigError(f"--cpus {options.cpus} --gpus {options.gpus}: a node has 1 CPU or more, and 0 GPUs or more")
    for name in ("timeout", "patience"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigError(f"--{name} {getattr(options, name):g}: expected a number of seconds")


def span(text: str) -> tuple[int, int]:
    """The fewest and the most nodes.

    Raises:
        ConfigError: not a number, or two in order, or more than there can be.
    """
    least, _, most = text.rpartition(":")
    if most.isdecimal() and int(most) > MOST:
        raise ConfigError(f"--nodes {text}: at most {MOST:,} nodes")
    if not most.isdecimal() or (least and not least.isdecimal()) or not 0 < int(least or most) <= int(most):
        raise ConfigError(f"--nodes {text}: neither a number of nodes nor LEAST:MOST; use --nodes 4, or 1:4")
    return int(least or most), int(most)


class Room:
    """The nodes that a command is to have."""

    def __init__(self, options: Run, least: int, most: int) -> None:
        self._options, self._least, self._most = options, least, most
        self._asked = False

    def wait(self) -> None:
        """Asks for all nodes, and returns when they are there, or the fewest are and no more have come for a while.

        Raises:
            TransientError: the fewest did not come.
        """
        import ray

        self._connect()
        shape = {"CPU": self._options.cpus, **({"GPU": self._options.gpus} if self._options.gpus else {})}
        self._ask([shape] * self._most)
        began = enough = time.monotonic()
        said = -1
        try:
            while (there := self._there(ray.nodes())) < self._most:
                now = time.monotonic()
                enough = enough if there >= self._least else now
                if there >= self._least and now - enough >= self._options.patience:
                    break
                if there < self._least and now - began >= self._options.timeout:
                    raise TransientError(
                        f"{there} of {self._least} nodes with {_shape(shape)} after {self._options.timeout:.0f} s; see "
                        "what keeps them (`ray status` on the head), or begin with fewer (--nodes LEAST:MOST)"
                    )
                if there != said:
                    print(f"waiting for nodes: {there} of {self._options.nodes} with {_shape(shape)}", flush=True)
                    said = there
                time.sleep(LOOK)
            print(f"{min(there, self._most)} of {self._most} nodes with {_shape(shape)}", flush=True)
        except BaseException:
            self._ask([])
            raise
        finally:
            ray.shutdown()

    def release(self) -> None:
        """Tells the autoscaler that the nodes are needed no longer. A cluster that is gone by then needs no telling."""
        import ray

        if not self._asked:
            return
        try:
            Path.cwd()
        except FileNotFoundError:  # Ray has removed it with the command
            os.chdir("/")
        try:
            self._connect()
            self._ask([])
        except (TransientError, OSError, RuntimeError) as error:
            print(f"note: the autoscaler could not be told that its nodes are free: {error}", file=sys.stderr)
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        import ray

        address = self._options.address or os.environ.get("RAY_ADDRESS") or "auto"
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if ":" in address:  # Ray itself would try for ten minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            with _without_its_files():
                ray.init(address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TransientError(
                f"no Ray cluster at {address}: {why}; run this on a node of one (`mmsa-dist submit`), or name its head "
                "with --address HOST:6379"
            ) from error
        signal.signal(signal.SIGTERM, handler)  # Ray's own ends this process on the spot

    def _ask(self, bundles: list[dict[str, int]]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)
        self._asked = bool(bundles)

    def _there(self, nodes: list[dict[str, Any]]) -> int:
        """How often what a node is to have fits into the nodes that there are."""

        def times(has: dict[str, float]) -> int:
            by_cpus = int(has.get("CPU", 0) // self._options.cpus)
            return min(by_cpus, int(has.get("GPU", 0) // self._options.gpus)) if self._options.gpus else by_cpus

        return sum(times(node["Resources"]) for node in nodes if node["Alive"])


@contextmanager
def _without_its_files() -> Iterator[None]:
    """Without the working directory of the job: Ray removes it as soon as a process that has it leaves the cluster, and
    so from under the command that comes next."""
    told = os.environ.pop(IN_JOB, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[IN_JOB] = told


def _shape(shape: dict[str, int]) -> str:
    return " and ".join(f"{number} {kind}s" for kind, number in shape.items())


# --- going on ---------------------------------------------------------------------------------------------------------


def continued(command: list[str]) -> list[str] | None:
    """The command, or the one that goes on with the run that it has begun; None where that run is finished.

    Only ``train`` has runs to go on with here: ``reproduce`` finds its own, other commands begin anew.
    """
    if command[0] != "train" or "--resume" in command or any(word.startswith("--resume=") for word in command):
        return command
    folder = Path(value_of(command, "--runs-dir") or "runs")
    runs = (
        path.parent for path in folder.glob("*/recipe.yaml") if not path.with_name("space.yaml").exists()
    )  # a sweep's
    there = list(runs)
    newest = max((run for run in there if _same(command, run)), key=_begun, default=None)
    if newest is None:
        if there:
            print(f"no run in {folder} is of this command: a new one begins", flush=True)
        return command
    if (newest / "result.json").is_file() and not _unrecorded(newest):
        print(f"{newest} is finished: its result is in {newest / 'result.json'}; another run needs another name")
        return None
    print(f"going on with {newest}", flush=True)
    return [*_without(command, "--recipe"), "--resume", str(newest)]  # with the run's own recipe


def carried_out(words: list[str], address: str | None = None) -> int:
    """Runs a command of ours, which hears every signal that this process does; gives its exit code as a shell would."""
    environment = {**os.environ, **({"RAY_ADDRESS": address} if address else {})}
    child = subprocess.Popen([sys.executable, "-m", "mmsa_dist", *words], env=environment)
    alone = IN_JOB not in os.environ

    def heard(number: int, frame: FrameType | None) -> None:
        if alone and number == signal.SIGTERM:  # Ctrl-C reaches both, and Ray signals all processes of a job
            child.send_signal(number)

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


PLACES = ("--runs-dir", "--workers", "--zero", "--address", "--launcher", "--register", "--alias", "--tracking-uri")
ABOUT = ("--launch.", "--tracking.", "--checkpoint.", "--engine.zero", "--engine.offload", "--data.readers")
"""Options that may differ where a run goes on: none of them changes its result."""


def _same(command: list[str], run: Path) -> bool:
    """Whether a run was begun by this command, but for words that change no result."""
    try:
        told = json.loads((run / "environment.json").read_text(encoding="utf-8"))["command"]
        return _meant(told[told.index("train") :]) == _meant(command)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _meant(command: list[str]) -> list[str]:
    """The words of a command that decide what comes out."""
    kept: list[str] = []
    before = ""
    for word in (part for each in command for part in _parts(each)):
        option = word.startswith("--")
        about = before if not option else word  # a value belongs to the option before it
        switch = before.startswith(("--tracking.no-", "--checkpoint.no-")) and not option
        if switch or not (about in PLACES or about.startswith(ABOUT)):
            kept.append(word)
        before = word if option else ""
    return kept


def _parts(word: str) -> list[str]:
    """``--option=value`` as two words, as ``--option value`` has them."""
    option, equals, value = word.partition("=")
    return [option, value] if equals and option.startswith("--") else [word]


def _begun(run: Path) -> float:
    return (run / "recipe.yaml").stat().st_mtime


def _unrecorded(run: Path) -> bool:
    """Whether MLflow was away when the run ended, so that it has still to be recorded."""
    try:
        return not json.loads((run / "mlflow.json").read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError):
        return False


def _without(command: list[str], option: str) -> list[str]:
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
