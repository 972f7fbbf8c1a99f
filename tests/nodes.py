"""Machines of a network, on one machine: each in a network namespace of its own, with an address, a name and a cable.

    with Network() as network:
        head, second = network.node("head"), network.node("second")
        head.start_ray()
        second.start_ray(head)
        second.cut()   # the cable is pulled
        second.mend()
        second.kill()  # kill -9 of all its processes

All cables lead to a bridge in a namespace of its own, and nowhere else: nothing of the machine's own network is
touched, and nothing in this one reaches the world. It takes root and iproute2; where one lacks, tests are skipped.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pytest

REPOSITORY = Path(__file__).parents[1]
PREFIX = "mmsa-nodes"
SUBNET = "10.77.0"
"""Of every network: each is alone in its namespaces."""
PATIENCE = 600.0
"""Seconds that a server or a node of Ray may take to start: busy machines are slow."""
PORT = 6379
"""Of Ray's head; in a namespace all ports are free."""
TOO_SLOW = "timed out during startup"
"""What Ray says of a node that is not up after 30 s, a bound that is fixed in it."""
ATTEMPTS = 4
"""How often a node of Ray is started until it is up."""
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
"""What a node's processes start with, in name and mount spaces of their own: gloo looks its own name up to learn
which address others reach it by."""

_numbers = itertools.count(1)


def ip(*words: str) -> str:
    """The output of iproute2's command.

    Raises:
        RuntimeError: with its own sentence, where it refuses.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def lacking() -> str | None:
    """Why there can be no network of namespaces here, None where there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed (iproute2, util-linux)"
    tried = f"{PREFIX}-{os.getpid()}-tried"
    try:
        ip("netns", "add", tried)
        try:
            ip("-n", tried, "link", "add", "br0", "type", "bridge")
            ip("-n", tried, "link", "add", "one", "type", "veth", "peer", "name", "two")
        finally:
            ip("netns", "delete", tried)
    except RuntimeError as error:
        return f"no network namespace can be made here: {error}"
    return None


class Network:
    """A bridge in a namespace of its own, and the nodes on it; all is gone when the context is left.

    Attributes:
        folder: what nodes write; short, as it holds sockets.
        hosts: names of all nodes, which each of them has as its /etc/hosts.
    """

    def __init__(self) -> None:
        self.name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.nodes: dict[str, Node] = {}
        self.hub = f"{self.name}-hub"

    def __enter__(self) -> Self:
        if why := lacking():
            pytest.skip(why)
        _remove_left_behind()
        self.folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        self.hosts = self.folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        try:
            ip("netns", "add", self.hub)
            ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
            ip("-n", self.hub, "address", "add", f"{SUBNET}.254/24", "dev", "br0")
            ip("-n", self.hub, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def node(self, name: str, **environment: str) -> "Node":
        """Plugs in one more machine.

        Args:
            name: its host name; twelve letters at most, as its cable's end is called by it.
            environment: what its processes have in theirs, beside ours.
        """
        self.nodes[name] = node = Node(self, name, f"{SUBNET}.{len(self.nodes) + 1}", environment)
        return node

    def close(self) -> None:
        """Ends every process of its nodes and removes the namespaces, whatever state they are in."""
        for namespace in [*(node.namespace for node in self.nodes.values()), self.hub]:
            _remove(namespace)
        shutil.rmtree(self.folder, ignore_errors=True)


class Node:
    """A machine of a `Network`: its own address, name, loopback and cable; the disk is everybody's.

    Attributes:
        environment: of its processes, beside ours; what a user of that machine has set.
        folder: its own, for logs and caches.
    """

    def __init__(self, network: Network, name: str, address: str, environment: Mapping[str, str]) -> None:
        assert len(name) <= 12, "a network interface's name may have 15 letters"
        self.network, self.name, self.address = network, name, address
        self.namespace, self.cable = f"{network.name}-{name}", f"to-{name}"
        self.folder = network.folder / name
        self.folder.mkdir()
        with network.hosts.open("a") as hosts:  # in place: it is mounted
            hosts.write(f"{address} {name}\n")
        self.environment = {
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled",
            "RAY_agent_register_timeout_ms": "120000",  # a node whose helpers take 15 s to start ends otherwise
            "RAY_worker_niceness": "10",  # added to the node's own, -10
            "MMSA_CACHE": str(self.folder / "cache"), **environment,
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self.namespace)
        hub = ("-n", network.hub, "link")
        ip(*hub, "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip(*hub, "set", self.cable, "master", "br0", "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        ip("-n", self.namespace, "address", "add", f"{address}/24", "dev", "eth0")
        # leads nowhere, but who asks the kernel for this machine's address wants a way out
        ip("-n", self.namespace, "route", "add", "default", "via", f"{SUBNET}.254")

    # --- processes ----------------------------------------------------------------------------------------------------

    @property
    def enter(self) -> list[str]:
        """What a command begins with to run on this node."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        return [*inside, "sh", "-c", ENTER, "sh", self.name, str(self.network.hosts)]

    @property
    def variables(self) -> dict[str, str]:
        """The whole environment of its processes."""
        return {**os.environ, **self.environment}

    def run(self, *command: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Runs a command here until it ends."""
        return subprocess.run(
            [*self.enter, *command], env=self.variables, capture_output=True, text=True, timeout=timeout
        )

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Starts a command here; what it says goes into `log` of that name."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*self.enter, *command], env=self.variables, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def pids(self) -> list[int]:
        """Of all processes that run here."""
        return _pids(self.namespace)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def serve(self, name: str, port: int, *command: str) -> None:
        """Starts a server here, and waits until it listens at `port`."""
        process = self.start(name, *command)
        connect = f"import socket; socket.create_connection(({self.address!r}, {port}), 5).close()"
        self._wait(process, name, lambda: self.run(sys.executable, "-c", connect).returncode == 0)

    def start_ray(self, head: "Node | None" = None, *, cpus: int = 1, dashboard: bool = False) -> None:
        """Starts Ray here, as its own head or as a node of `head`'s cluster, and waits until it is one."""
        # before ranks and others that keep the machine busy, as a node that takes longer than Ray's 30 s ends
        ray = ["nice", "-n", "-10", str(Path(sys.executable).with_name("ray"))]
        command = [*ray, "start", f"--node-ip-address={self.address}"]
        if head is None:
            command += ["--head", f"--port={PORT}", f"--include-dashboard={str(dashboard).lower()}"]
        else:
            command += [f"--address={head.address}:{PORT}"]
        command += [f"--temp-dir={self.folder}", f"--num-cpus={cpus}", "--object-store-memory=80000000", "--block"]
        # of one that was killed here: Ray takes a head with its address, in another network of the machine, for it
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        for left in reversed(range(ATTEMPTS)):
            self.log("ray").write_text("")
            process = self.start("ray", *command, "--disable-usage-stats")
            try:
                self._wait(process, "ray", lambda: "Ray runtime started" in self.log("ray").read_text())
                break
            except AssertionError as error:
                if TOO_SLOW not in str(error) or not left:
                    raise
                _end_all(self.namespace)

    def restart_ray(self, head: "Node | None" = None) -> None:
        """Ends what is left here of Ray, and of everything else, and starts it again."""
        self.kill()
        self.start_ray(head)

    @property
    def ray_address(self) -> str:
        """Of the cluster whose head this is."""
        return f"{self.address}:{PORT}"

    def _wait(self, process: subprocess.Popen[bytes], name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            log = self.log(name).read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"{self.name}: {name} ended:\n{log}"
            assert time.monotonic() < deadline, f"{self.name}: {name} is not up after {PATIENCE:.0f} s:\n{log}"
            time.sleep(0.2)

    # --- what may befall it -------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Pulls the cable: nothing is refused, it only never comes."""
        ip("-n", self.network.hub, "link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("-n", self.network.hub, "link", "set", self.cable, "up")

    def kill(self) -> None:
        """Every process of the node ends at once, and its kernel closes their connections."""
        _end_all(self.namespace)
        for process in self.processes:
            process.wait()

    def hamper(self, *netem: str) -> None:
        """Makes the network to this node bad, e.g. ``"delay", "50ms", "loss", "1%"``; skips where the kernel cannot."""
        words = ["qdisc", "replace", "dev", self.cable, "root", "netem", *netem]
        done = subprocess.run(["tc", "-n", self.network.hub, *words], capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.split())
            pytest.skip(f"the kernel has no netem, which delays and loses packets: tc says {said!r}")


# --- cleaning up ------------------------------------------------------------------------------------------------------


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", namespace).split()]


def _end_all(namespace: str) -> None:
    """Kills every process in a namespace, those too that one of them starts meanwhile."""
    deadline = time.monotonic() + 60
    while pids := _pids(namespace):
        assert time.monotonic() < deadline, f"processes {pids} do not end"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(
            ChildProcessError, psutil.NoSuchProcess
        ):  # ours are to be asked for their exit code, or they stay listed
            psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=1)


def _remove(namespace: str) -> None:
    if Path(f"/run/netns/{namespace}").exists():
        _end_all(namespace)
        ip("netns", "delete", namespace)  # and with it its end of the cable, which takes the other end along


def _remove_left_behind() -> None:
    """What a test run that was killed has left: its process is no more."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0] if line else ""
        owner = name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if name.startswith(f"{PREFIX}-") and owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove(name)
