"""Parts predicted with Ray Data: every process of a pool holds the model, and takes one part after the other.

Ray Data brings parts to processes, starts those anew that die and gives their parts to others, and stops handing out
when the driver does not keep up. What goes through it are numbers of samples on the way in and finished rows on the way
out: the features, which are thousands of times larger, are read where they are predicted from. Ray Data has no memory
of what was done before a driver died; that is `kept`.
"""

import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmsa_dist import launch, places
from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.prediction.inputs import Input
from mmsa_dist.prediction.job import Job, Part, digest
from mmsa_dist.prediction.kept import Kept
from mmsa_dist.prediction.rows import column_names
from mmsa_dist.prediction.worker import CONTENT, ERROR, PART, Order, Worker, read_error
from mmsa_dist.predictor import Predictor
from shards import ray_cluster
from shards.ray_cluster import LOCAL
from shards.remote.url import is_url

RETRIES = 3
"""How often a process that died is started anew, and a part that died with it is given out again."""

IN_FLIGHT = 2
"""Parts that a process has at a time: one that it works on, one that waits, so that it never does."""


def job_of(
    data: Input, where: str, splits: Sequence[str], batch_size: int, predictor: Predictor, files: Mapping[str, bytes]
) -> Job:
    """What is to be predicted.

    Args:
        data: a packed data set. where: its folder or address.
        files: of the model, `job.model_files`.
    """
    assert data.index is not None, where
    return Job(
        data=where if is_url(where) else str(Path(where).resolve()),
        fingerprint=data.index.fingerprint,
        without=data.left_out,
        splits=tuple(splits),
        batch_size=batch_size,
        labelled=data.classes == predictor.card.classes,
        columns=tuple(column_names(predictor)),
        judged=predictor.card.judged,
        model=digest(files),
    )


def predict_parts(
    job: Job,
    kept: Kept,
    parts: Sequence[Part],
    files: Mapping[str, bytes],
    address: str,
    workers: int | None,
    device: str,
    tell: Callable[[int, int], None],
) -> None:
    """Predicts every part that `kept` does not have yet, and keeps it.

    Args:
        files: of the model, `job.model_files`.
        address: of the cluster, or `LOCAL`.
        workers: processes; None for as many as there is room for.
        device: ``auto``, ``cpu`` or ``cuda``.
        tell: is told of each part: its samples, and bytes.

    Raises:
        MmsaError: what went wrong with the first part that did. TransientError: processes die again and again.
    """
    left = [part for part in parts if part.number not in kept.done]
    by_number = {part.number: part for part in left}
    settings: dict[str, Any] = {"num_cpus": places.own_cpus()} if address == LOCAL else {}
    settings["runtime_env"] = {"env_vars": {**places.RANK_ENVIRONMENT, "OMP_NUM_THREADS": "1"}}
    with ray_cluster.joined(address, **settings):
        import ray

        pool, gpus = _room(workers, device, address)
        model = [ray.put(dict(files))]
        order = Order(job, model, "cuda" if gpus else "cpu", launch.versions())
        with closing(_answers(left, order, min(pool, len(left)), gpus)) as answers:  # before Ray itself ends
            for number, content, error in answers:
                if error:
                    raise read_error(error)
                kept.save(by_number[number], content)
                tell(by_number[number].count, len(content))


def _answers(left: Sequence[Part], order: Order, pool: int, gpus: int) -> Generator[tuple[int, bytes, str]]:
    """What the workers give, in whatever order they finish."""
    import ray.data
    from ray.exceptions import RayError, RayTaskError

    _quiet()
    asked = ray.data.from_items([asdict(part) for part in left], override_num_blocks=len(left))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of RETRIES, which have no other way in yet
        data = asked.map_batches(
            Worker,
            fn_constructor_args=(order,),
            batch_size=1,  # a block is one part: it comes back as soon as it is done
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool, max_tasks_in_flight_per_actor=IN_FLIGHT),
            num_cpus=1,
            num_gpus=gpus or None,
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
    try:
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from zip(*(table.column(name).to_pylist() for name in (PART, CONTENT, ERROR)), strict=True)
    except RayTaskError:  # ours to mend: its text says where
        raise
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise TransientError(
            f"a process that predicts was lost, {1 + RETRIES} times ({reason}); what is finished is kept: give the "
            "same command again, with fewer --workers or a smaller --batch-size where memory was short"
        ) from error


def _room(workers: int | None, device: str, address: str) -> tuple[int, int]:
    """How many processes, and how many GPUs each has, 0 or 1.

    Raises:
        ConfigError: more are asked for than there is room for, or GPUs where there are none.
    """
    import ray

    has = ray.cluster_resources()
    cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    where = "this machine" if address == LOCAL else "the Ray cluster"
    if device == "cuda" and not gpus:
        raise ConfigError(f"--device cuda: {where} has no GPU; leave it out or use --device cpu")
    each = int(device == "cuda" or (device == "auto" and gpus > 0))
    most = min(cpus, gpus) if each else cpus
    if most < 1:
        raise ConfigError(f"--ray: {where} has no CPU for a process that predicts; add a node to it")
    if workers is not None and workers > most:
        what = f"{gpus} GPUs" if each and gpus < cpus else f"{cpus} CPUs"
        raise ConfigError(f"--workers {workers}: {where} has {what}, and a process takes one; use --workers {most}")
    return workers or most, each


def _quiet() -> None:
    """Ray Data says nothing on the terminal; its log files have it."""
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL + 1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
