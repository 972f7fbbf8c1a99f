"""Starts ranks, starts them again when they die, and says why when they cannot.

Three ways to run the same rank: Ray Train, processes of this machine, or torchrun (then this process is a rank).
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmsa_dist import checkpoint, run_folder
from mmsa_dist.errors import ConfigError, DataError, MmsaError, TrainingError, TransientError
from mmsa_dist.own_cluster import name_own_cluster
from mmsa_dist.recipe import Recipe, from_dict
from shards import ray_cluster

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


PAUSE = 15
"""Seconds before ranks start again that met a disk or a server in trouble; doubled each time. Ranks that were killed
start again at once."""


def run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Trains in `folder` with the launcher of the recipe, restarting ranks that died, and gives the result.

    Raises:
        MmsaError: of a rank, as its sentence; TransientError after more than ``launch.max_failures`` deaths.
    """
    start = {"ray": run_ray, "local": run_local}[recipe.launch.launcher]
    for attempt in range(recipe.launch.max_failures + 1):
        make_ready(folder)
        with attempted(folder, resumed=not attempt):
            outcome = start(recipe, folder)
        if (folder / "result.json").is_file():
            return dict(run_folder.read_json(folder / "result.json"))
        error = diagnose(folder, outcome)
        if not isinstance(error, TransientError) or attempt == recipe.launch.max_failures:
            raise error
        saved = any((folder / "checkpoints").glob("step-*"))
        wait = PAUSE * 2**attempt if written_down(folder) else 0
        print(
            f"{error}; starting again {'from the last checkpoint' if saved else 'from the beginning'}"
            + (f" in {wait} s" if wait else "")
            + f" ({attempt + 1} of {recipe.launch.max_failures})",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def attempted(folder: Path, *, resumed: bool) -> Iterator[None]:
    """Notes among the driver's events when an attempt begins and ends; `ledger.account` reads them.

    Args:
        resumed: the first attempt of this driver.
    """
    events = run_folder.Events(folder, None)
    events.write("attempt", resumed=resumed)
    try:
        yield
    finally:
        events.write("attempt_end")
        events.close()


def make_ready(folder: Path) -> None:
    """Clears what an attempt that ended badly has left in a run's folder; its failures stay, under a number.

    Raises:
        ConfigError, DataError: no checkpoint can be gone on from.
    """
    if (folder / "failures").is_dir():
        past = len(list(folder.glob("failures-*")))
        (folder / "failures").rename(folder / f"failures-{past + 1}")
    for stale in folder.glob(".rendezvous-*"):
        stale.unlink()
    for sentence in checkpoint.tidy(folder / "checkpoints"):
        print(sentence, file=sys.stderr)


def run_local(recipe: Recipe, folder: Path) -> str:
    """Ranks as processes of this machine; gives what was seen when the first of them ended badly, '' if none did."""
    world = recipe.launch.workers
    rendezvous = folder / f".rendezvous-{os.getpid()}-{time.time_ns()}"
    processes: list[subprocess.Popen[bytes]] = []
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    try:
        for rank in range(world):
            environment = {
                **os.environ,
                **RANK_ENVIRONMENT,
                "OMP_NUM_THREADS": str(recipe.launch.cpus_per_worker),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MMSA_RENDEZVOUS": str(rendezvous),
                "MMSA_LAUNCHER": str(os.getpid()),
                "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
                "PYTHONUNBUFFERED": "1",
            }
            with (logs / f"rank-{rank}.log").open("ab") as log:
                command = [sys.executable, "-m", "mmsa_dist.worker", str(folder)]
                processes.append(
                    # the run's lock is inherited: until all its ranks are gone nobody else may take the run up
                    subprocess.Popen(
                        command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, close_fds=False
                    )
                )
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()
        rendezvous.unlink(missing_ok=True)


def _wait(processes: list[subprocess.Popen[bytes]]) -> str:
    """Until all ranks ended well, or one did not: peers get two seconds to say what they saw."""
    while True:
        codes = [process.poll() for process in processes]
        bad = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0)]
        if bad:
            rank, code = bad[0]
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            if code is not None and code < 0:
                return f"rank {rank} was ended by {signal.Signals(-code).name}"
            return f"rank {rank} ended with exit code {code}"
        if all(code == 0 for code in codes):
            return ""
        time.sleep(0.05)


def run_ray(recipe: Recipe, folder: Path) -> str:
    """Ranks as Ray Train workers, in a cluster that is there or one of our own."""
    import ray

    connect(recipe)
    has = ray.cluster_resources()
    check_cpus(recipe, int(has.get("CPU", 0)), "the Ray cluster")
    check_gpus(recipe, has.get("GPU", 0.0), "the Ray cluster")
    try:
        # a name of its own: Ray resumes a run whose name it has seen, from what it knows of it
        trainer = ray_trainer(recipe, folder, name=f"{folder.name}-{secrets.token_hex(3)}")
        trainer.fit()
    except Exception as error:  # Ray wraps what a worker raised; the worker has written it down
        return f"Ray Train: {type(error).__name__}: {first_line(str(error))}"
    return ""


def ray_trainer(recipe: Recipe, folder: Path, *, name: str, callbacks: Any = (), report: bool = False) -> Any:
    """A TorchTrainer whose workers run `worker.run_rank`.

    Args:
        report: every rank reports each epoch's numbers to Ray, for a sweep that prunes.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    launch = recipe.launch
    resources = {"CPU": float(launch.cpus_per_worker)}
    if launch.gpus_per_worker:
        resources["GPU"] = launch.gpus_per_worker
    return TorchTrainer(
        train_function,
        train_loop_config={"recipe": recipe.dump(), "folder": str(folder), "report": report},
        torch_config=TorchConfig(backend="nccl" if launch.gpus_per_worker else "gloo", timeout_s=int(launch.timeout)),
        scaling_config=ScalingConfig(
            num_workers=launch.workers, use_gpu=bool(launch.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=0),  # `run` decides: what cannot succeed is not tried again
            callbacks=list(callbacks) or None,
        ),
    )


def train_function(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    import ray.train

    from mmsa_dist.worker import run_rank

    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())

    def report(summary: dict[str, Any]) -> None:
        ray.train.report({name: value for name, value in summary.items() if isinstance(value, int | float)})

    if config["report"] and context.get_world_rank() == 0:
        note_reservation(Path(config["folder"]))
    recipe = from_dict(config["recipe"])
    if not recipe.launch.gpus_per_worker:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a rank without a GPU of its own takes nobody else's
    run_rank(
        Path(config["folder"]),
        recipe,
        context.get_world_rank(),
        context.get_world_size(),
        report if config["report"] else None,
    )


RESERVATION = "placement-group"


def note_reservation(folder: Path) -> None:
    """Writes down which placement group this rank runs in: a sweep that stops a trial frees it by that."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is not None:
        run_folder.write_text(folder / RESERVATION, group.id.hex())


def check_place(recipe: Recipe) -> None:
    """What can be known of the place before anything is written: this machine's CPUs, or whether the cluster answers.

    Raises:
        ConfigError: more CPUs or GPUs asked for than there are. TransientError: the address does not answer.
    """
    address = cluster_address(recipe)
    if recipe.launch.launcher == "local" or (recipe.launch.launcher == "ray" and address is None):
        check_cpus(recipe, _own_cpus(), "this machine")
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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # `report` waits for the controller's poll
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    check_place(recipe)
    address = cluster_address(recipe)
    environment = {**RANK_ENVIRONMENT, "OMP_NUM_THREADS": str(recipe.launch.cpus_per_worker)}
    own: dict[str, Any] = {}
    if address is None:
        own = {"num_cpus": _own_cpus(), "include_dashboard": dashboard}
        own["dashboard_host"] = "127.0.0.1"  # of no use to others
    runtime = {"env_vars": environment, "worker_process_setup_hook": name_own_cluster}
    ray_cluster.join(address or ray_cluster.LOCAL, "launch.address", runtime_env=runtime, **own)


def check_cpus(recipe: Recipe, cpus: int, where: str) -> None:
    """Says at once that a request cannot run, where Ray would wait for ever.

    Raises:
        ConfigError: more CPUs asked for than there are.
    """
    launch = recipe.launch
    needed = launch.workers * launch.cpus_per_worker
    if needed > cpus:
        raise ConfigError(
            f"launch.workers: {launch.workers} workers x {launch.cpus_per_worker} CPUs need {needed} CPUs, "
            f"{where} has {cpus}; use --workers {max(1, cpus // launch.cpus_per_worker)} "
            "or a larger cluster (--address)"
        )


def check_gpus(recipe: Recipe, gpus: float, where: str) -> None:
    """The same for GPUs.

    Raises:
        ConfigError: more GPUs asked for than there are.
    """
    launch = recipe.launch
    needed = launch.workers * launch.gpus_per_worker
    if needed > gpus:
        raise ConfigError(
            f"launch.gpus_per_worker: {launch.workers} workers x {launch.gpus_per_worker:g} GPUs need {needed:g} GPUs, "
            f"{where} has {gpus:g}; leave --launch.gpus-per-worker out, lower --workers, or name a larger cluster "
            "(--address)"
        )


def _own_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def diagnose(folder: Path, outcome: str) -> MmsaError:
    """The error behind a failed attempt: what a rank wrote down first; connection errors of its peers come after it."""
    entries = failures(folder)
    if None in entries:
        outcome = f"{outcome or 'a rank failed'} and could not write down why (is the disk full?)"
    if own := written_down(folder):
        kinds: dict[int, type[MmsaError]] = {
            cls.exit_code: cls for cls in (ConfigError, DataError, TransientError, TrainingError)
        }
        return kinds.get(own[0]["exit_code"], TrainingError)(own[0]["message"])
    bugs = [entry for entry in entries if entry and not _of_a_peer(entry)]
    if bugs:
        first = bugs[0]
        return TrainingError(
            f"rank {first['rank']} failed: {first['type']}: {first_line(first['message'])}; "
            f"its traceback is in {folder / 'failures'}"
        )
    seen = outcome or "the ranks ended without a result"
    return TransientError(f"{seen}; what the ranks printed is in {folder / 'logs'}")


def failures(folder: Path) -> list[dict[str, Any] | None]:
    """What ranks wrote down of how they failed, in order of time; None for what is cut short."""
    entries: list[dict[str, Any] | None] = []
    for path in sorted((folder / "failures").glob("*.json")):
        try:
            entries.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError:
            entries.append(None)
    return entries


def written_down(folder: Path) -> list[dict[str, Any]]:
    """Failures that ranks could name themselves: errors of ours, with an exit code."""
    return [entry for entry in failures(folder) if entry and entry["exit_code"] is not None]


def first_line(text: str) -> str:
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "")


PEER_DIED = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "gloo",
    "nccl",
    "broken pipe",
    "timed out",
    "workergroup",
)


def _of_a_peer(entry: dict[str, Any]) -> bool:
    """Whether a rank failed only because another one was gone."""
    text = f"{entry['type']} {entry['message']}".lower()
    return entry["type"] in ("SystemExit", "KeyboardInterrupt") or any(mark in text for mark in PEER_DIED)
