"""`mmsa-dist doctor`: the order of the questions, and what each node is asked."""

import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import tyro

from cluster.command_line import parsed
from cluster.doctor import across
from cluster.doctor.finding import Finding
from cluster.doctor.nodes import Node, Nodes, cluster_at, progress, this_machine
from cluster.doctor.table import Report, console
from cluster.errors import ConfigError

Group = Literal["network", "storage", "mlflow", "data", "trial"]
DEFAULT_RUNS = "runs"
"""Where `mmsa-dist train` writes by default."""


@dataclass(frozen=True)
class Doctor:
    """Whether this machine, or every node of a Ray cluster, can train: mmsa-dist doctor [--address HOST:PORT] …

    Prints one table: versions and whether they are the same everywhere, limits, disks and clocks, GPUs, all-reduce
    between nodes, storage (written, renamed, read from another node), MLflow, one shard of the data set, a trial of ten
    steps. Every red or yellow line says what to do. What is written is removed again.

    On a node of a cluster give --address (or set RAY_ADDRESS); from elsewhere `mmsa-dist submit -- doctor`.

    Exit codes: 0 no red line (yellow ones may be there); else the smallest of its red lines: 2 somebody has to mend
    something, 3 the data is wrong, 4 the trial run failed, 75 all that is red does not answer, and may later.
    """

    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of the cluster's head, or auto. Unset: RAY_ADDRESS, else this machine alone."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR|URL")] = None
    """A packed data set that every node shall be able to read."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="DIR|URL")] = None
    """Where runs or their checkpoints shall go: a folder that all nodes share, or s3://…, gs://…. Unset: `runs`, where
    this machine is looked at alone."""
    tracking_uri: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """MLflow's address. Unset: MLFLOW_TRACKING_URI, else, of this machine alone, the sqlite file beside the runs."""
    skip: tuple[Group, ...] = ()
    """Parts to leave out."""
    timeout: float = 120.0
    """Seconds that one check may take; the trial run may take three times as long."""
    storage_mib: int = 64
    """MiB that each node writes to the storage and reads again, all nodes at the same time."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what was found as JSON."""


def main(argv: list[str]) -> int:
    """The command line; gives the exit code that `Doctor` documents.

    Raises:
        ConfigError: options that are none, or a cluster that refuses this client.
        TransientError: no cluster answers.
    """
    options = parsed(Doctor, argv, "mmsa-dist doctor")
    _check(options)
    address = options.address or os.environ.get("RAY_ADDRESS") or None
    try:
        with _doing("the nodes"), cluster_at(address) if address else this_machine() as nodes:
            report = Visit(options, nodes, alone=address is None).examine()
    finally:
        progress("")
    if options.json:
        print(report.json())
    else:
        report.show(console())
    return report.exit_code


def _check(options: Doctor) -> None:
    """What can be known of the options alone.

    Raises:
        ConfigError: one of them is none.
    """
    if not 1 <= options.timeout < float("inf"):
        raise ConfigError(f"--timeout {options.timeout:g}: expected a number of seconds, 1 or more")
    if options.storage_mib < 1:
        raise ConfigError(f"--storage-mib {options.storage_mib}: expected a number of MiB, 1 or more")
    if options.tracking_uri and _secret(options.tracking_uri):
        raise ConfigError(
            "--tracking-uri holds a user or a password, which everybody sees in a list of processes; give it in the "
            "environment as MLFLOW_TRACKING_URI, or as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    for name in ("storage", "data"):
        if _secret(getattr(options, name) or ""):
            raise ConfigError(
                f"--{name} holds a user, a password or a signature, which everybody sees in a list of processes; give "
                "it to the nodes in their environment, or in a file (AWS_SHARED_CREDENTIALS_FILE, …)"
            )
    if options.storage and (bad := re.match(r"\w+:/(?!/)", options.storage)):
        raise ConfigError(f"--storage {options.storage}: neither a folder nor an address; {bad[0]}/… is one")
    if options.storage and re.match("https?://", options.storage):
        raise ConfigError(f"--storage {options.storage}: cannot be written to; give a folder, s3://… or gs://…")


def _secret(uri: str) -> bool:
    """Whether an address has somebody's password in it. Of a file's path `@` means nothing."""
    if uri.startswith("sqlite") or "://" not in uri:
        return False
    parts = urlsplit(uri)
    return "@" in parts.netloc or re.search(r"(?i)password|passwd|pwd|token|secret|sig", parts.query) is not None


class Visit:
    """One round of all questions.

    Args:
        alone: this machine without a cluster.
    """

    def __init__(self, options: Doctor, nodes: Nodes, *, alone: bool) -> None:
        self._options, self._nodes, self._alone = options, nodes, alone
        self._report = Report(list(nodes.found) or [node.name for node in nodes.nodes])
        self._token = f"mmsa-dist-doctor-{secrets.token_hex(4)}"
        self._gpus: dict[str, int] = {}

    def examine(self) -> Report:
        """Asks everything that was not left out."""
        self._report.add(self._nodes.found)
        if not self._nodes.nodes:
            return self._report
        if not self._alone:
            with _doing("clocks"):
                self._report.add(across.clocks(self._nodes.nodes))
        self._report.add(across.versions(self._ask("software", lambda node: {})))
        self._report.add(self._ask("machine", lambda node: {"cpus": node.cpus, **self._places()}))
        self._look_at_gpus()
        steps: dict[Group, Callable[[], None]] = {
            "network": self._network, "storage": self._storage, "mlflow": self._mlflow, "data": self._data,
            "trial": self._trial,
        }  # fmt: skip
        for group, step in steps.items():
            if group in self._options.skip:
                self._skip(group, "left out (--skip)")
            else:
                step()
        return self._report

    def _places(self) -> dict[str, Any]:
        return {"runs": self._storage_place(), "remote_data": "://" in (self._options.data or "")}

    def _storage_place(self) -> str | None:
        given = self._options.storage or (DEFAULT_RUNS if self._alone else None)
        return given if given is None or "://" in given else str(Path(given).absolute())

    def _look_at_gpus(self) -> None:
        answers = self._ask("gpus", lambda node: {"gpus": node.gpus})
        self._report.add(answers)
        for node, found in answers.items():
            seen = [each.facts.get("sees", 0) for each in found if each.check == "torch on GPUs"]
            self._gpus[node] = int(seen[0]) if seen else 0

    def _network(self) -> None:
        """All-reduce between the nodes, or between two processes of the only one; by NCCL too where GPUs allow it."""
        nodes = self._nodes.nodes
        ranks = nodes if len(nodes) > 1 else nodes * 2
        least = 1 if len(nodes) > 1 else 2
        backends = ["gloo"] + (["nccl"] if all(self._gpus[node.name] >= least for node in nodes) else [])
        for backend in backends:
            free = self._ask("port", lambda node: {}, of=nodes[:1])[nodes[0].name][0]
            if free.state == "fail":
                self._report.add({nodes[0].name: [free]})
                return
            host = f"[{nodes[0].address}]" if ":" in nodes[0].address else nodes[0].address
            meeting, number = f"tcp://{host}:{free.facts['port']}", iter(range(len(ranks)))

            def wanted(
                node: Node, backend: str = backend, meeting: str = meeting, number: Any = number
            ) -> dict[str, Any]:
                rank = next(number)
                return {
                    "backend": backend, "rank": rank, "world": len(ranks), "nodes": len(nodes), "rendezvous": meeting,
                    "gpu": rank if len(nodes) == 1 else 0, "seconds": 0.75 * self._options.timeout,
                }  # fmt: skip

            self._report.add(_once(self._ask("all_reduce", wanted, of=ranks, doing=f"all-reduce, {backend}")))

    def _storage(self) -> None:
        place, head = self._storage_place(), self._nodes.nodes[0]
        if place is None:
            self._skip("storage", "give the folder or the bucket that all nodes share with --storage")
            return
        asked = {"place": place, "token": self._token, "mib": self._options.storage_mib, "by": head.name}
        number = {node.name: n for n, node in enumerate(self._nodes.nodes)}
        left = self._ask("leave", lambda node: asked, of=[head])
        self._report.add(left)
        try:
            if left[head.name][0].state == "ok":
                self._report.add(self._ask("write", lambda node: {**asked, "node": number[node.name]}))
                if others := self._nodes.nodes[1:]:
                    self._report.add(self._ask("read", lambda node: asked, of=others))
        except BaseException:
            self._nodes.stop()  # before what it writes is removed
            raise
        finally:
            made = left[head.name][0].facts.get("made", [])
            self._report.add(self._ask("forget", lambda node: {**asked, "made": made}, of=[head]))

    def _mlflow(self) -> None:
        uri = self._options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
        if not uri and not self._alone:
            self._skip("mlflow", "give its address with --tracking-uri, or in MLFLOW_TRACKING_URI")
            return
        # a sqlite file is one machine's, and a password is not sent through the cluster
        here = uri.startswith("sqlite") or _secret(uri)
        if here and not self._alone:
            with this_machine() as own, _doing("mlflow"):
                answers = own.ask("mlflow", lambda node: {"uri": uri}, self._options.timeout)
            self._report.add({self._nodes.nodes[0].name: next(iter(answers.values()))})
            return
        self._report.add(self._ask("mlflow", lambda node: {"uri": uri}))

    def _data(self) -> None:
        if not self._options.data:
            self._skip("data", "give a packed data set with --data")
            return
        data = self._options.data if "://" in self._options.data else str(Path(self._options.data).absolute())
        self._report.add(self._ask("data", lambda node: {"data": data}))

    def _trial(self) -> None:
        answers = self._ask("trial", lambda node: {"gpu": self._gpus[node.name] > 0}, times=3)
        self._report.add(across.slow_ones(answers))

    def _skip(self, group: str, why: str) -> None:
        self._report.add({name: [Finding(group, "not looked at", "skip", why)] for name in self._report.nodes})

    def _ask(
        self,
        check: str,
        wanted: Callable[[Node], dict[str, Any]],
        *,
        of: list[Node] | None = None,
        doing: str = "",
        times: int = 1,
    ) -> across.ByNode:
        """Asks nodes, all or some, and shows how many have answered."""
        with _doing(doing or NAMES.get(check, check)) as tell:
            return self._nodes.ask(check, wanted, times * self._options.timeout, tell, of)


NAMES = {
    "leave": "storage", "write": "storage: writing and reading", "read": "storage: reading from other nodes",
    "forget": "storage: removing", "data": "data: one shard", "trial": "trial run of ten steps", "port": "all-reduce",
    "machine": "limits and disks", "gpus": "GPUs", "software": "versions",
}  # fmt: skip
"""What the progress line calls a check, where that is not its name."""


@contextmanager
def _doing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Says what is being done: a line that changes on a terminal, one that stays elsewhere."""
    if not sys.stderr.isatty():
        print(f"looking at {what}", file=sys.stderr, flush=True)
    progress(f"looking at {what} …")
    yield lambda done, of: progress(f"looking at {what}: {done} of {of} …")


def _once(answers: across.ByNode) -> across.ByNode:
    """Of two ranks on one node that failed for the same reason, one line."""
    return {node: list({(e.check, e.found): e for e in found}.values()) for node, found in answers.items()}
