"""Who is asked: this machine, or every node of a Ray cluster, each by an agent that lives there for as long as this."""

import io
import os
import signal
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.doctor import agent
from cluster.doctor.finding import ASIDE, Finding
from cluster.errors import ConfigError, TransientError

CONNECT_SECONDS = 20.0
"""How long the head may take to answer before it counts as unreachable."""
START_SECONDS = 90.0
"""How long a node may take to start a process."""
GRACE = 30.0
"""Seconds beyond a check's own time until a node counts as silent."""
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the processes of a Ray job."""
HEAD = "node:__internal_head__"
"""A resource that Ray gives the head of a cluster."""
PARTS = ("__init__", "finding", "look", "software", "machine", "gpus", "reduce", "storage", "programs")
"""Modules of this package that run on the nodes."""


@dataclass
class Node:
    """One machine, or one node of a cluster.

    Attributes:
        call: calls a method of its agent, of its name, arguments, and seconds after which TimeoutError is raised.
        cpus, gpus: that Ray gives away there; None without Ray.
        address: where its peers reach it.
    """

    name: str
    call: Callable[..., Any]
    cpus: float | None = None
    gpus: float | None = None
    address: str = "127.0.0.1"

    def ask(self, check: str, wanted: dict[str, Any], seconds: float) -> list[Finding]:
        """What one check finds there. Who does not answer in time, or breaks, is a red line."""
        group, line = ABOUT.get(check, (check, check))
        try:
            answer = self.call("ask", check, wanted, seconds, timeout=seconds + GRACE)
        except TimeoutError:
            remedy = "see whether the node still lives (`ray status`), and restart Ray there; then run the doctor again"
            return [Finding(group, line, "fail", "the node does not answer any more", remedy, code=ASIDE)]
        except Exception as error:  # of Ray: the node, or its agent, has died
            remedy = "see `ray status` and the node's logs (/tmp/ray/session_latest/logs), and restart Ray there"
            return [Finding(group, line, "fail", f"the node was lost: {_short(error)}", remedy, code=ASIDE)]
        if "late" in answer:
            return [Finding(group, line, "fail", f"not done after {answer['late']:.0f} s", LATE[group], code=ASIDE)]
        if "broken" in answer:
            remedy = "this is a fault of the doctor itself, or of Python there: report it with this line"
            return [Finding(group, line, "fail", f"the check ended without an answer: {answer['broken']}", remedy)]
        return [Finding(**each) for each in answer["found"]]


ABOUT = {
    "software": ("software", "versions"),
    "machine": ("machine", "limits and disks"),
    "gpus": ("gpu", "GPUs"),
    "all_reduce": ("network", "all-reduce"),
    "port": ("network", "all-reduce"),
    "leave": ("storage", "write"),
    "write": ("storage", "write"),
    "read": ("storage", "read from another node"),
    "forget": ("storage", "list and remove"),
    "mlflow": ("mlflow", "reachable, writable"),
    "data": ("data", "one shard"),
    "trial": ("trial", "10 steps"),
}
"""Check -> the group and the line of the table that stand for it where it gives none."""

LATE = {
    "software": "see what keeps the node's disk busy: reading the versions takes a second",
    "machine": "see which disk hangs (`df` on the node; a network disk whose server is gone?), and remount it",
    "gpu": "nvidia-smi or torch hangs there: see `dmesg`, and restart the machine",
    "network": "open all TCP ports between the nodes, and set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) on every node to "
    "the interface of the cluster's network before Ray is started",
    "storage": "see whether the disk's or the bucket's server answers (`df`, `mount`), or allow more with --timeout",
    "mlflow": "see whether the server answers and how busy its database is, or allow more with --timeout",
    "data": "see whether the disk's or the bucket's server answers, or allow more with --timeout",
    "trial": "run `mmsa-dist train` on the node and see where it waits, or allow more with --timeout",
}
"""Group -> what to do where a check takes too long."""


def archive() -> bytes:
    """What looks at a node, as a zip that Python runs."""
    here, packed = Path(__file__).parent, io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("__main__.py", "from cluster.doctor.look import main\n\nmain()\n")
        file.writestr("cluster/__init__.py", "")
        for part in PARTS:
            file.write(here / f"{part}.py", f"cluster/doctor/{part}.py")
    return packed.getvalue()


class Nodes:
    """All that are asked, the head first.

    Attributes:
        found: what was found while they were joined.
    """

    def __init__(self, nodes: list[Node], found: dict[str, list[Finding]]) -> None:
        self.nodes, self.found = nodes, found
        self._all_nodes = list(nodes)
        self._pool = ThreadPoolExecutor(max_workers=max(2, min(256, len(nodes))))

    def ask(
        self,
        check: str,
        wanted: Callable[[Node], dict[str, Any]],
        seconds: float,
        tell: Callable[[int, int], object] = lambda done, of: None,
        of: list[Node] | None = None,
    ) -> dict[str, list[Finding]]:
        """Asks nodes all at once.

        Args:
            wanted: of a node, what it is asked for.
            tell: is told how many have answered, and of how many.
            of: the nodes; all of them by default. One may stand there twice.

        Returns:
            By node, its findings.
        """
        asked = self.nodes if of is None else of
        found: dict[str, list[Finding]] = {node.name: [] for node in asked}
        futures = {self._pool.submit(node.ask, check, wanted(node), seconds): node for node in asked}
        for done, future in enumerate(as_completed(futures), 1):
            found[futures[future].name] += future.result()
            tell(done, len(futures))
        return found

    def stop(self) -> None:
        """Ends what still runs on the nodes, which removes what it has written."""
        self._all("stop")

    def close(self) -> None:
        """The same for good."""
        self._all("close")
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _all(self, method: str) -> None:
        # beside the pool, all of whose workers may be waiting for the checks that this ends; and those nodes too that
        # were ready too late to be asked. One that does not answer has been told of already
        pool = ThreadPoolExecutor(max_workers=max(1, min(256, len(self._all_nodes))))
        calls = [pool.submit(node.call, method, timeout=2 * agent.LAST_WORDS) for node in self._all_nodes]
        wait(calls, timeout=3 * agent.LAST_WORDS)
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def this_machine() -> Iterator[Nodes]:
    """This machine alone.

    Raises:
        TransientError: its temporary folder cannot be written to.
    """
    try:
        here = agent.Agent(archive())
    except OSError as error:
        raise TransientError(
            f"{error.filename or 'the temporary folder'}: cannot be written to ({error.strerror}); make room there, or "
            "set TMPDIR to another folder"
        ) from error

    def call(method: str, *arguments: Any, timeout: float) -> Any:
        return getattr(here, method)(*arguments)

    nodes = Nodes([Node("this machine", call)], {})
    try:
        yield nodes
    finally:
        nodes.close()


@contextmanager
def cluster_at(address: str) -> Iterator[Nodes]:
    """Every living node of the Ray cluster at `address`; no process of Ray's outlives this.

    Raises:
        ConfigError: it is no address, another version of Ray or Python, or a token that is refused.
        TransientError: no cluster answers, or no node of it starts a process.
    """
    _join(address)
    import ray

    nodes: Nodes | None = None
    try:
        nodes = _with_agents(ray)
        yield nodes
    finally:
        if nodes:
            nodes.close()
        if IN_JOB not in os.environ:  # else Ray would remove the job's working directory from under what follows
            ray.shutdown()


def _join(address: str) -> None:
    """`ray.init` without Ray's logs and its handler of SIGTERM, and with an answer within seconds."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        if "://" in address or not host or not port.isdigit() or int(port) > 65535:
            raise ConfigError(
                f"--address {address}: is not HOST:PORT of a head (port 6379 by default) or auto; run this on a node "
                "of the cluster, or send it there with `mmsa-dist submit -- doctor`"
            )
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise TransientError(
                f"--address {address}: no Ray cluster answers there ({error.strerror or error}); start one (ray start "
                "--head), or leave the address out to look at this machine alone"
            ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # of 40 s each: a head may listen, and not answer
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    except Exception as error:
        text = _short(error)
        if "ersion mismatch" in text:
            raise ConfigError(
                f"--address {address}: {text}; install the same versions here and on the cluster"
            ) from error
        if "uthentication" in f"{type(error).__name__} {text}":
            raise ConfigError(
                f"--address {address} refuses this client: {text.split('. ')[0]}; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or RAY_AUTH_MODE=disabled as the cluster does"
            ) from error
        raise TransientError(
            f"--address {address}: no Ray cluster answers there: {text}; run this on a node of it, or send it there "
            "with `mmsa-dist submit -- doctor`"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _with_agents(ray: Any) -> Nodes:
    """An agent on each living node, pinned to it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(agent)  # nodes may lack this package
    program = ray.put(archive())
    alive = sorted((each for each in ray.nodes() if each["Alive"]), key=lambda each: HEAD not in each["Resources"])
    addresses = [each["NodeManagerAddress"] for each in alive]
    nodes: list[Node] = []
    found: dict[str, list[Finding]] = {}
    for each, address in zip(alive, addresses, strict=True):
        here = NodeAffinitySchedulingStrategy(node_id=each["NodeID"], soft=False)
        settings = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 8, "scheduling_strategy": here}
        actor = ray.remote(agent.Agent).options(**settings).remote(program)

        def call(method: str, *arguments: Any, timeout: float, actor: Any = actor) -> Any:
            try:
                return ray.get(getattr(actor, method).remote(*arguments), timeout=timeout)
            except ray.exceptions.GetTimeoutError as error:
                raise TimeoutError from error

        name = address if addresses.count(address) == 1 else f"{address} ({each['NodeID'][:6]})"
        resources = each["Resources"]
        nodes.append(Node(name, call, resources.get("CPU", 0.0), resources.get("GPU", 0.0), address))
    ready = Nodes(nodes, found)
    deadline = time.monotonic() + START_SECONDS
    calls = {node.name: ready._pool.submit(node.call, "hello", timeout=START_SECONDS) for node in nodes}
    for node in nodes:
        try:
            host = calls[node.name].result(timeout=max(1.0, deadline - time.monotonic()) + GRACE)
            found[node.name] = [Finding("cluster", "answers", "ok", f"starts processes (host {host})")]
        except Exception as error:
            text = (
                f"does not start a process in {START_SECONDS:.0f} s"
                if isinstance(error, TimeoutError)
                else _short(error)
            )
            remedy = "see `ray status` and the node's logs (/tmp/ray/session_latest/logs), and restart Ray there"
            found[node.name] = [Finding("cluster", "answers", "fail", text, remedy, code=ASIDE)]
    ready.nodes = [node for node in nodes if found[node.name][0].state == "ok"]
    return ready


def _short(error: BaseException) -> str:
    """The last line that says something: Ray puts the cause there, below its stacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if "Traceback" in str(error) and lines else " ".join(lines)
    return " ".join(text.split())[:300] or type(error).__name__


def progress(text: str) -> None:
    """A line on standard error that the next one takes the place of; nothing where that is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
