"""What `benchmarks.training` measures of single steps, at each ZeRO stage, on the ranks of a process group."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.training import cpu_seconds, opened, over_ranks

if TYPE_CHECKING:
    from mmsa_dist.session import Session

COLLECTIVES = ("gloo:", "nccl:", "ncclKernel", "ncclDevKernel")
"""How a trace calls them."""


def step_costs(told: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step at each ZeRO stage: medians over steps of one kind after a few that warm up."""
    import torch

    answer: dict[str, Any] = {"stages": {}}
    precision = told["words"][told["words"].index("--engine.precision") + 1]
    for stage in (0, 1, 2, 3):
        if stage == 0 and precision != "fp32":
            continue
        session = opened(told, stage)
        pieces = (session.rank, session.world, session.recipe.optim.accumulation)
        batches = list(session.loader.train(session.plan(1), *pieces))
        batches = batches * (1 + 2 * (told["steps"] + 3) // len(batches))
        taken = iter(batches)

        def step(session: "Session" = session, taken: Any = taken) -> None:
            own = [batch.to(session.engine.device) for batch in next(taken)]
            generator = session.generator
            done = session.engine.step(own, lambda p, b: session.system.loss(p, b, generator.targets(b, p)))
            generator.observe(1, own, done.predictions)

        for _ in range(3):
            step()
        wall, cpu = [], cpu_seconds()
        for _ in range(told["steps"]):
            began = time.perf_counter()
            step()
            wall.append(time.perf_counter() - began)
        cpu = (cpu_seconds() - cpu) / told["steps"]
        answer["stages"][str(stage)] = {
            "wall": statistics.median(wall),
            "collectives": in_collectives(step, told["steps"]),
            "alone": all_reduce_alone(session),
            "cpu": float(torch.tensor(over_ranks([cpu])).sum()) * (session.world if torch.cuda.is_available() else 1),
        }
        session.close()
    return answer


def in_collectives(step: Callable[[], None], steps: int) -> float:
    """Seconds a step in which this rank had a collective under way, from a trace of some steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=kinds) as trace:
        for _ in range(steps):
            step()
    spans = [
        (event.time_range.start, event.time_range.end) for event in trace.events() if event.name.startswith(COLLECTIVES)
    ]
    return covered(spans) / 1e6 / steps


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the spans lasts; some run at the same time."""
    whole, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        whole += max(0.0, end - max(start, until))
        until = max(until, end)
    return whole


def all_reduce_alone(session: "Session") -> float:
    """Seconds of one all-reduce over as many numbers as learn, in buckets as gradients come."""
    import torch
    import torch.distributed as dist

    from mmsa_dist.engine import BUCKET, DTYPES, count_parameters

    if session.world == 1:
        return 0.0
    size = count_parameters(session.system)[1]
    buckets = [
        torch.zeros(min(BUCKET, size - at), dtype=DTYPES[session.recipe.engine.precision], device=session.engine.device)
        for at in range(0, size, BUCKET)
    ]
    taken = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        for bucket in buckets:
            dist.all_reduce(bucket)
        if session.engine.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
