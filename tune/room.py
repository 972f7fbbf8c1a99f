"""How many trials of a sweep run in a Ray cluster at once, counted anew while it runs: nodes join and go."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.tune.search import ConcurrencyLimiter, Searcher

from mmsa_dist import places
from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import Recipe
from shards.progress import console

LOOK = 5.0
"""Seconds between two counts."""


@dataclass(frozen=True)
class Room:
    """Of the cluster that this process has joined, for trials that are launched alike.

    Attributes:
        most: trials at once, whatever room there is; None for as many as fit.
    """

    launch: LaunchConfig
    most: int | None = None

    def count(self) -> int:
        """
        Raises:
            ConfigError: not even one fits.
        """
        fits = concurrency(self.launch, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        return min(fits, self.most or fits)


def joined(recipe: Recipe, most: int | None = None) -> Room:
    """Joins or starts the recipe's cluster; says where others hold what its trials need.

    Raises:
        ConfigError: not even one trial fits.
    """
    if places.cluster_address(recipe) is None:
        print("starting a Ray cluster on this machine", flush=True)
    places.connect(recipe, dashboard=True)  # with its state API Ray Train tidies up after killed trials, mostly
    room = Room(recipe.launch, most)
    say_if_busy(recipe.launch, room.count())
    return room


class AsManyAsFit(ConcurrencyLimiter):
    """Asks `searcher` for a trial while there is room for one more."""

    max_concurrent: int

    def __init__(self, searcher: Searcher, room: Room) -> None:
        super().__init__(searcher, max_concurrent=room.count())
        self._room, self._looked = room, time.monotonic()

    def suggest(self, trial_id: str) -> Any:
        if time.monotonic() - self._looked >= LOOK:
            self._look()
        return super().suggest(trial_id)

    def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            now = self._room.count()
        except ConfigError:  # what runs waits for a node, and so does what comes
            return
        if now != self.max_concurrent:
            console.print(f"the cluster has {'more' if now > self.max_concurrent else 'less'} room: {now} at a time")
            self.max_concurrent = now


def concurrency(launch: LaunchConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials the nodes hold at once: the workers that each has CPUs and GPUs for, over the workers of a trial.

    What others run there counts as room: trials that wait for it take turns with theirs.

    Raises:
        ConfigError: not even one.
    """
    fits = sum(workers_on(node, launch) for node in nodes) // launch.workers
    if fits:
        return fits
    for kind, each in (("CPU", launch.cpus_per_worker), ("GPU", launch.gpus_per_worker)):
        has = sum(node.get(kind, 0.0) for node in nodes)
        if launch.workers * each > has:
            raise ConfigError(
                f"one trial needs {launch.workers * each:g} {kind}s = {launch.workers} workers x {each:g}, the Ray "
                f"cluster has {has:g}; lower --workers, or name a larger cluster (--address)"
            )
    shapes = sorted({f"{node.get('CPU', 0.0):g} CPUs and {node.get('GPU', 0.0):g} GPUs" for node in nodes})
    raise ConfigError(
        f"one trial needs {launch.workers} workers, each with {launch.cpus_per_worker:g} CPUs and "
        f"{launch.gpus_per_worker:g} GPUs of one node; the Ray cluster's nodes have {', '.join(shapes)}; ask for less "
        "a worker (--launch.cpus-per-worker), lower --workers, or name a larger cluster (--address)"
    )


def workers_on(node: Mapping[str, float], launch: LaunchConfig) -> int:
    """How many workers a node has room for; a worker's share of a GPU is of one GPU."""
    fits = int(node.get("CPU", 0.0)) // launch.cpus_per_worker
    if not (each := launch.gpus_per_worker):
        return fits
    gpus = int(node.get("GPU", 0.0))
    return min(fits, gpus * int((1 + 1e-6) / each) if each < 1 else int(gpus / each))


def say_if_busy(launch: LaunchConfig, trials: int) -> None:
    """That trials will wait for others, where others hold what they need."""
    free = ray.available_resources()
    for kind, each in (("CPU", launch.cpus_per_worker), ("GPU", launch.gpus_per_worker)):
        if free.get(kind, 0.0) + 1e-6 < trials * launch.workers * each:
            has = ray.cluster_resources().get(kind, 0.0)
            print(
                f"{free.get(kind, 0.0):g} of the cluster's {has:g} {kind}s are free: what does not fit waits its turn"
            )
            return
