"""Where ranks run, and how many of them there is room for: this machine's processors, or a Ray cluster."""

import os
import time
from collections.abc import Callable
from typing import Any

from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError, StoppedError, TransientError
from mmsa_dist.own_cluster import name_own_cluster
from mmsa_dist.recipe import Recipe
from shards import ray_cluster
from shards.suggest import counted

RANK_ENVIRONMENT = {
    # two ranks on two cores must not spin at barriers: one epoch was seen to take 1 to 42 s so
    "GOMP_SPINCOUNT": "0",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DEEPSPEED_LOG_LEVEL": "warning",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # glibc gives every freed large tensor back to the kernel, and each step faults its memory in anew: up to a third
    # of a rank's CPU time. One arena, as Ray trains in a thread, where large blocks always come from mmap otherwise.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""Set in the environment of every rank before it starts."""


def check_place(recipe: Recipe) -> None:
    """What can be known of the place before anything is written: this machine's CPUs, or whether the cluster answers.

    Raises:
        ConfigError: more CPUs or GPUs asked for than there are. TransientError: the address does not answer.
    """
    address = cluster_address(recipe)
    if recipe.launch.launcher == "local" or (recipe.launch.launcher == "ray" and address is None):
        check_cpus(recipe, own_cpus(), "this machine")
        if recipe.launch.gpus_per_worker:
            import torch

            check_gpus(recipe, torch.cuda.device_count(), "this machine")
    elif recipe.launch.launcher == "ray" and address not in (None, "auto"):
        ray_cluster.check_listens(str(address), "launch.address")


def cluster_address(recipe: Recipe) -> str | None:
    """The Ray cluster to join; None starts one here."""
    return recipe.launch.address or os.environ.get("RAY_ADDRESS") or None


def connect(recipe: Recipe, *, dashboard: bool = False) -> None:
    """Joins the Ray cluster of the recipe or of the environment, else starts one here.

    Ray cannot be kept to the loopback interface: but for the dashboard, the cluster's ports are open to the network.

    Raises:
        ConfigError: more workers than this machine has CPUs. TransientError: the address does not answer.
    """
    ray_cluster.set_environment()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # `report` waits for the controller's poll
    import ray

    if ray.is_initialized():
        return
    check_place(recipe)
    address = cluster_address(recipe)
    environment = {**RANK_ENVIRONMENT, "OMP_NUM_THREADS": str(recipe.launch.cpus_per_worker)}
    own: dict[str, Any] = {}
    if address is None:
        own = {"num_cpus": own_cpus(), "include_dashboard": dashboard}
        own["dashboard_host"] = "127.0.0.1"  # of no use to others
    runtime = {"env_vars": environment, "worker_process_setup_hook": name_own_cluster}
    ray_cluster.join(address or ray_cluster.LOCAL, "launch.address", runtime_env=runtime, **own)


def check_cpus(recipe: Recipe, cpus: int, where: str) -> None:
    """Says at once that a request cannot run, where Ray would wait for ever.

    Raises:
        ConfigError: more CPUs asked for than there are.
    """
    launch = recipe.launch
    least = launch.min_workers or launch.workers
    needed = least * launch.cpus_per_worker
    if needed > cpus:
        raise ConfigError(
            f"launch.workers: {least} workers x {launch.cpus_per_worker} CPUs need {needed} CPUs, "
            f"{where} has {cpus}; use --workers {max(1, cpus // launch.cpus_per_worker)} "
            "or a larger cluster (--address)"
        )


def check_gpus(recipe: Recipe, gpus: float, where: str) -> None:
    """The same for GPUs.

    Raises:
        ConfigError: more GPUs asked for than there are.
    """
    launch = recipe.launch
    least = launch.min_workers or launch.workers
    needed = least * launch.gpus_per_worker
    if needed > gpus:
        raise ConfigError(
            f"launch.gpus_per_worker: {least} workers x {launch.gpus_per_worker:g} GPUs need {needed:g} GPUs, "
            f"{where} has {gpus:g}; leave --launch.gpus-per-worker out, lower --workers, or name a larger cluster "
            "(--address)"
        )


def lacking(recipe: Recipe) -> str | None:
    """What the Ray cluster has too little of for a recipe's fewest ranks: a node of it may have gone."""
    import ray

    has = ray.cluster_resources()
    try:
        check_cpus(recipe, int(has.get("CPU", 0)), "the Ray cluster")
        check_gpus(recipe, has.get("GPU", 0.0), "the Ray cluster")
    except ConfigError as error:
        return str(error).partition(";")[0]
    return None


def wait_for_nodes(recipe: Recipe, say: Callable[[str], None], asked: Callable[[], bool]) -> None:
    """Before ranks start again: until the Ray cluster is as large as they need.

    Args:
        asked: whether the run is to end instead.

    Raises:
        StoppedError: it is. TransientError: no node came for ``launch.timeout`` seconds.
    """
    began, told = time.monotonic(), False
    while what := lacking(recipe):
        if asked():
            raise StoppedError("asked to end while it waited for a node")
        if (waited := time.monotonic() - began) >= recipe.launch.timeout:
            raise nobody_came(what, waited)
        if waited >= SETTLE and not told:
            say(f"waiting for a node: {what}")
            told = True
        time.sleep(0.5)


class Shortage:
    """Says once why there are no ranks yet, while Ray Train looks for places for them without a word: others hold them,
    or the cluster has become too small. Of a node that is killed Ray Train hears before the cluster's own list does,
    and then waits for another for ever."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self._recipe, self._say = recipe, say
        self._began = self._looked = time.monotonic()
        self._since, self._told, self._said = float("inf"), False, False

    def __call__(self) -> None:
        """One look, at most every few seconds.

        Raises:
            TransientError: no node came for ``launch.timeout`` seconds.
        """
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        what, before = lacking(self._recipe), self._since
        self._looked, self._since = now, min(before, now) if what else float("inf")
        if not what and not self._said and now - self._began >= SETTLE and (busy := queued(self._recipe.launch)):
            self._say(f"waiting for {busy}")
            self._said = True
        if not what or before > now:
            return
        if now - before >= self._recipe.launch.timeout:
            raise nobody_came(what, now - before)
        if not self._told:
            self._say(f"waiting for a node: {what}")
            self._told = True


def queued(launch: LaunchConfig) -> str | None:
    """What is waited for where the cluster is large enough but others use it; None where nobody waits for places."""
    import ray
    from ray.util import placement_group_table

    if not ray.is_initialized():  # else the next call would begin a cluster
        return None
    if all(group["state"] != "PENDING" for group in placement_group_table().values()):
        return None
    free, has = ray.available_resources(), ray.cluster_resources()
    kinds = {"CPU": launch.cpus_per_worker, **({"GPU": launch.gpus_per_worker} if launch.gpus_per_worker else {})}
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in kinds.items())
    left = ", ".join(f"{free.get(kind, 0):g} of {has.get(kind, 0):g} {kind}s are free" for kind in kinds)
    return f"room for {counted(launch.workers, 'worker')} of {each}: others use the cluster, {left}"


def nobody_came(what: str, waited: float) -> TransientError:
    return TransientError(
        f"{what}, and no node came in {waited:.0f} s (launch.timeout); add one and go on with --resume, or "
        "go on with fewer workers (--resume with --workers LEAST:MOST)"
    )


def own_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


# --- a number of ranks that may change --------------------------------------------------------------------------------

SETTLE = 10.0
"""Seconds in which the resources of ranks that just ended, or of a node that just joined, may come to be free."""

LOOK = 5.0
"""Seconds between two looks for more room."""


def room(launch: LaunchConfig) -> int:
    """How many workers of a recipe there is room for now, beside what runs."""
    if launch.launcher == "local":
        return own_cpus() // launch.cpus_per_worker
    import ray

    free = ray.available_resources()
    fitting = int(free.get("CPU", 0)) // launch.cpus_per_worker
    return min(fitting, int(free.get("GPU", 0) / launch.gpus_per_worker)) if launch.gpus_per_worker else fitting


def as_many_as_fit(recipe: Recipe, say: Callable[[str], None], asked: Callable[[], bool]) -> Recipe:
    """The recipe with as many workers as there is room for, where ``launch.min_workers`` lets that be fewer.

    Args:
        asked: whether the run is to end instead.

    Raises:
        StoppedError: it is.
        TransientError: there was no room for the fewest, for ``launch.timeout`` seconds.
    """
    launch = recipe.launch
    if launch.min_workers is None:
        return recipe
    began, told = time.monotonic(), False
    while (fitting := min(launch.workers, room(launch))) < launch.workers:
        if asked():
            raise StoppedError("asked to end while it waited for room for its workers")
        waited = time.monotonic() - began
        if waited >= SETTLE and fitting >= launch.min_workers:
            break
        if waited >= launch.timeout:
            raise TransientError(
                f"launch.workers: room for {fitting} workers, but no fewer than {launch.min_workers} were asked for, "
                f"and none came in {waited:.0f} s; add nodes, or lower the least (--workers LEAST:MOST)"
            )
        if waited >= SETTLE and not told:
            say(f"waiting for room for {launch.min_workers} workers, there is room for {fitting}")
            told = True
        time.sleep(0.5)
    if fitting < launch.workers:
        say(f"{fitting} of {launch.workers} workers, as there is room for no more; others join when there is")
    return recipe.model_copy(update={"launch": launch.model_copy(update={"workers": fitting})})


class Growth:
    """Looks for room for workers that could not be started, while those that could be train.

    Args:
        launch: of the ranks that run. most: workers that are wanted.
        begun: whether they do: until then the places that they are to take look like room for more.
    """

    def __init__(self, launch: LaunchConfig, most: int, begun: Callable[[], bool]) -> None:
        self._launch, self._most, self._begun = launch, most, begun
        self._looked, self._seen = time.monotonic(), 0

    def __call__(self) -> int | None:
        """The number of workers to go on with, once there has been room for it at two looks."""
        if self._launch.workers >= self._most or time.monotonic() - self._looked < LOOK or not self._begun():
            return None
        now = min(self._most, self._launch.workers + room(self._launch))
        self._looked, before, self._seen = time.monotonic(), self._seen, now
        return now if now > self._launch.workers and now == before else None
