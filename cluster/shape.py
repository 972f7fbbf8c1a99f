"""Whether a cluster can hold what a command asks for, seen before anything is sent.

Where the nodes are all that there will be, what does not fit is refused; with an autoscaler, whose bounds no head
tells, or where a command waits for nodes, it is a note.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TRAINS = ("train", "sweep", "reproduce")
"""Commands that start ranks."""
SECONDS = 20
"""How long the head may take to say which nodes it has."""


@dataclass(frozen=True)
class Need:
    """What a command asks for: `count` times so many CPUs and GPUs, each on one node.

    Attributes:
        waits: the command waits for nodes that are not there yet.
    """

    what: str
    count: int
    cpus: float
    gpus: float
    waits: bool = False

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.count} {self.what}{'s' * (self.count != 1)} x {self.cpus:g} CPUs{gpus}"


@dataclass(frozen=True)
class Nodes:
    """The nodes of a cluster, each with its resources by name; `fixed`: none come by themselves."""

    each: tuple[Mapping[str, float], ...]
    fixed: bool

    def fits(self, need: Need) -> int:
        """How often the need fits into the nodes while nothing else runs."""

        def times(node: Mapping[str, float]) -> float:
            by_cpus = (node.get("CPU", 0.0) + 1e-9) // need.cpus if need.cpus else float("inf")
            by_gpus = (node.get("GPU", 0.0) + 1e-9) // need.gpus if need.gpus else float("inf")
            return min(by_cpus, by_gpus)

        return int(min(sum(map(times, self.each)), 10**9))

    def __str__(self) -> str:
        shapes = [
            f"{each.get('CPU', 0):g} CPUs" + (f" and {each['GPU']:g} GPUs" if each.get("GPU") else "")
            for each in self.each
        ]
        counted = {shape: shapes.count(shape) for shape in shapes}
        return ", ".join(f"{count} node{'s' * (count != 1)} with {shape}" for shape, count in counted.items())


def needed(command: list[str]) -> Need | None:
    """The fewest that a command begins with, from its words; None where they do not say, or it is not Ray's to place.

    A recipe of one's own may say more: the run itself sees to that.
    """
    if command[:2] == ["cluster", "run"]:
        words = command[2 : command.index("--")] if "--" in command else command[2:]
        values = dict(_options(words))
        return _need("node", values.get("nodes", "1"), values.get("cpus", "1"), values.get("gpus", "0"), waits=True)
    if not command or command[0] not in TRAINS:
        return None
    values = dict(_options(command[1:]))
    elsewhere = values.get("address") or values.get("launch.address")
    if elsewhere or values.get("launcher", values.get("launch.launcher", "ray")) != "ray":
        return None
    workers = values.get("workers", values.get("launch.workers", "1"))
    least = values.get("launch.min-workers", workers)
    cpus, gpus = values.get("launch.cpus-per-worker", "1"), values.get("launch.gpus-per-worker", "0")
    return _need("rank", least, cpus, gpus, waits=False)


def _need(what: str, count: str, cpus: str, gpus: str, *, waits: bool) -> Need | None:
    try:
        need = Need(what, int(count.partition(":")[0]), float(cpus), float(gpus), waits)
    except ValueError:
        return None  # the command itself says what is wrong with it
    return need if isfinite(need.cpus + need.gpus) else None


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    for at, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name.replace("_", "-"), value if equals else words[at + 1] if at + 1 < len(words) else ""


def nodes_of(client: "JobSubmissionClient") -> Nodes | None:
    """The cluster's nodes, as its dashboard knows them; None where it does not say: it may have been started just now.

    No command of Ray's job client lists them, so its request is made by that client's own hand, with its token.
    """
    listed = _asked(client, "/api/v0/nodes?detail=1&limit=10000")
    rows = ((listed.get("data") or {}).get("result") or {}).get("result") or []
    alive = {str(row["node_id"]): row["resources_total"] for row in rows if row.get("state") == "ALIVE"}
    if not alive:
        return None
    status = (_asked(client, "/api/cluster_status").get("data") or {}).get("clusterStatus") or {}
    types = (status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
    # a head without an autoscaler gives each node a type of its own, called after it
    fixed = bool(types) and all(kind == f"node_{node}" for node, kind in types.items())
    return Nodes(tuple(alive.values()), fixed)


def _asked(client: "JobSubmissionClient", path: str) -> dict[str, Any]:
    try:
        answer = client._do_request("GET", path, timeout=SECONDS).json()
    except (OSError, ValueError):  # requests' errors are of the former kind
        return {}
    return answer if isinstance(answer, dict) else {}


def check(need: Need | None, nodes: Nodes | None) -> str | None:
    """A note where a cluster has less than a command asks for, and may get it.

    Raises:
        ConfigError: it has less, no more will come, and the command does not wait.
    """
    if need is None or nodes is None or (fits := nodes.fits(need)) >= need.count:
        return None
    lack = f"the command begins with {need}, and the cluster has {nodes}, room for {fits}"
    if need.waits:
        return f"{lack}: it waits until there are more"
    wait = "put `cluster run --nodes N --cpus N --` before the command, which asks for nodes and waits for them"
    if not nodes.fixed:
        return f"{lack}: it is refused unless nodes come first; {wait}"
    fewer = f"use --workers {fits}" if fits else "lower --launch.cpus-per-worker and --launch.gpus-per-worker"
    raise ConfigError(f"{lack}; {fewer}, start more nodes (`ray start --address=HEAD:6379`), or {wait}")
