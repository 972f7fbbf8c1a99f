"""Memory that ran out, said in a sentence: where, how much there was, what did not fit, and what to change."""

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmsa_dist.config import EngineConfig, OptimConfig, TextConfig
from mmsa_dist.errors import TrainingError
from shards.batch import Batch
from shards.suggest import counted

SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""In the messages of RuntimeErrors: torch has a type of its own only for what a GPU's allocator raises."""


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, of a GPU or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@dataclass(frozen=True)
class Held:
    """What of a rank's configuration decides what it holds."""

    optim: OptimConfig
    engine: EngineConfig
    text: TextConfig | None
    device: torch.device


@contextmanager
def explained(held: Held, batches: Sequence[Batch], where: str, *, learning: bool = True) -> Iterator[None]:
    """Memory that runs out inside is told of in our words.

    Args:
        batches: this rank's micro-batches of the step.
        where: what was being done.
        learning: whether it was a step; else it was an evaluation.

    Raises:
        TrainingError: it ran out. Other ranks may be waiting for this one: no collective may follow.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        less = activations(held, batches[0].size) if learning else EVALUATED
        raise TrainingError(sentence(held, batches, where, less)) from error


EVALUATED = "Evaluate fewer samples at a time (--data.eval-batch-size; --resume takes it)"
"""What makes an evaluation need less."""


def sentence(held: Held, batches: Sequence[Batch], where: str, less: str) -> str:
    """Peak, batch, stage and two remedies, of which one is what makes a batch need `less`."""
    engine, samples = held.engine, batches[0].size
    longest = {name: max(batch.values[name].shape[1] for batch in batches) for name in batches[0].values}
    steps = ", ".join(f"{count} of {name}" for name, count in longest.items())
    ranks = counted(dist.get_world_size(), "rank")
    return (
        f"{where}: out of memory at {peak(held.device)}; a micro-batch of {counted(samples, 'sample')} "
        f"(steps: {steps}), ZeRO {engine.zero}, {engine.precision}, {ranks}. {less}, or "
        f"{states(held)}; mmsa-dist plan shows what a rank must hold"
    )


def peak(device: torch.device) -> str:
    """The most that this rank has taken, and of what."""
    if device.type == "cuda":
        most, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        return f"{most / 1e9:.1f} GB of the {whole / 1e9:.1f} GB of {torch.cuda.get_device_name(device)}"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{most / 1e9:.1f} GB of this machine's {whole / 1e9:.1f} GB"


def activations(held: Held, samples: int) -> str:
    """What makes a batch need less."""
    if held.text is not None and held.text.finetune and not held.text.gradient_checkpointing:
        return "Keep less of a batch (--text.gradient-checkpointing; --resume takes it)"
    if samples > 1:
        return f"Take a batch in smaller parts (--optim.accumulation {2 * held.optim.accumulation}, in a new run)"
    return "Cut what a sample is (--text.max-tokens, or shorter sequences when packing)"


def states(held: Held) -> str:
    """What makes weights, gradients and the optimizer's state need less."""
    engine, world = held.engine, dist.get_world_size()
    if world > 1 and engine.zero < 3:
        return f"divide more over the ranks (--zero {engine.zero + 1}; --resume takes it)"
    if held.device.type == "cuda" and engine.offload == "none":
        return "put the optimizer's state on the host (--engine.offload optimizer --zero 1; --resume takes it)"
    return "take more workers and --zero 3 (--resume takes both)"
