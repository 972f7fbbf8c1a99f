"""DeepSpeed behind five calls: step, predict, state (in two halves), load_weights, close.

The loop knows nothing of ZeRO: at every stage and number of ranks one step over the same global batch gives the
same loss and the same update.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import torch.distributed as dist
from torch import Tensor, nn

from mmsa_dist import divided, out_of_memory, parts, portable
from mmsa_dist.config import EngineConfig, OptimConfig
from mmsa_dist.diagnosis import ELSEWHERE
from mmsa_dist.errors import ConfigError, TrainingError
from mmsa_dist.learning_rates import parameter_groups, rate_of, schedule
from mmsa_dist.reduction import Reduction
from mmsa_dist.systems.base import Losses, Prediction, System
from shards.batch import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LossOf = Callable[[Prediction, Batch], Losses]


@dataclass(frozen=True)
class Step:
    """One optimizer step: the global batch's loss, its parts, the learning rates used and the gradient's norm.

    Attributes:
        skipped: fp16's loss scale was too high: no rank has learned anything.
        asked: of each of the questions put to `Engine.step`, whether any rank said yes; the same on all ranks.
    """

    loss: float
    parts: dict[str, float]
    lr: dict[str, float]
    grad_norm: float | None
    predictions: list[Prediction]
    asked: tuple[bool, ...] = ()
    skipped: bool = False


def imported() -> Any:
    """DeepSpeed, without what it would import for nothing: each as long to wait for as all the rest of it.

    That is MLflow, for its autotuner, and the backend of torch's compiler, for the Muon optimizer's functions.
    """
    away = "deepspeed" not in sys.modules and "mlflow" not in sys.modules
    if away:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if away:
            del sys.modules["mlflow"]
    from deepspeed.runtime import compiler

    compiles, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # which no run of ours uses
    finally:
        compiler.compile = compiles
    return deepspeed


class Engine:
    """A system under DeepSpeed.

    Args:
        system: freshly built, on the CPU, the same on every rank; for ZeRO-3 an outline will do on all but the first.
        micro_batch: samples of a rank's micro-batch, for DeepSpeed's own arithmetic.
        total_steps: optimizer steps of the whole run, for the schedule.
        state: what `state()` gave, at any number of ranks and any stage; None starts anew.

    Raises:
        ConfigError: a precision that the device or stage lacks.
    """

    def __init__(
        self,
        system: System,
        optim: OptimConfig,
        config: EngineConfig,
        *,
        micro_batch: int,
        total_steps: int,
        state: portable.State | None = None,
    ) -> None:
        deepspeed = imported()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # compiling the shared-memory collective takes 20 s and a compiler, and gains nothing at these sizes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.device = device()
        _check_precision(config, self.device)
        self.system = system
        self.stage = config.zero
        self.dtype = DTYPES[config.precision]
        self.optim = optim
        self.factor = schedule(optim, total_steps)
        self.accumulation = optim.accumulation
        self.held = out_of_memory.Held(optim, config, system.spec.text, self.device)
        settings = deepspeed_config(optim, config, micro_batch, count_parameters(system)[1])
        if state is not None:  # before initialize, which copies the weights into its partitions
            portable.load_module(system, state.weights)
        if config.zero == 3:
            divided.divide(system, settings, self.dtype, self.device)
        groups = parameter_groups(system, optim)
        kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
        # fused reads and writes each number once, where torch's ordinary step does so for every operation
        optimizer = kind(groups, betas=optim.betas, eps=optim.eps, fused=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=system,
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        self._reduction = Reduction(system) if config.zero == 0 else None
        self.engine.enable_backward_allreduce = self._reduction is None
        if state is not None:
            portable.load_optimizer(self.engine, system, self.stage, state)
        self.steps = 0 if state is None else state.step
        self._room = parts.Room(self.device.type == "cuda")
        # checkpoints travel in it, whatever training sends meanwhile
        self._beside = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        if self._beside is not None:
            dist.barrier(self._beside)  # one that closes before its peer has seen the connection looks dead to it

    def begin_epoch(self, epoch: int) -> None:
        """Takes the learning rates of `epoch` (from 1); a recipe may change them on the way (`OptimConfig.lr_from`)."""
        rates = self.optim.rates(epoch)
        for group in self.engine.optimizer.param_groups:
            group["base_lr"] = rate_of(group, rates)

    def step(self, batches: Sequence[Batch], loss_of: LossOf, asks: Sequence[bool] = ()) -> Step:
        """Forward, backward, guard, optimizer over one global batch, of which `batches` are this rank's micro-batches.

        Args:
            asks: what this rank answers to questions that all ranks must agree on (to save, to end); they travel with
                the loss, in the all-reduce that there is anyway.

        Raises:
            TrainingError: the loss or the gradient is not finite on some rank, and no rank has stepped; or memory ran
                out on this one.
        """
        with out_of_memory.explained(self.held, batches, f"step {self.steps + 1}"):
            return self._step(batches, loss_of, asks)

    def _step(self, batches: Sequence[Batch], loss_of: LossOf, asks: Sequence[bool]) -> Step:
        self.engine.train()
        lr = self._set_learning_rates()
        total: Tensor | None = None
        predictions: list[Prediction] = []
        names: list[str] = []
        means = self._rehearse(batches, loss_of) if self.system.weighs_terms and len(batches) > 1 else None
        for i, batch in enumerate(batches):
            prediction, losses = self._losses(batch, loss_of, means)
            names = list(losses.parts)
            row = torch.stack([losses.total.detach(), *losses.parts.values()]).float()
            total = row if total is None else total + row
            predictions.append(prediction)
            last = i == len(batches) - 1
            self._backward(losses.total, last=last)
            if last:
                answers = torch.tensor(asks, dtype=torch.float32, device=total.device)
                values = self._agree(torch.cat([total / len(batches), answers]), batches, predictions)
                norm = self._norm_before_step(batches)
            self.engine.step()
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))  # DeepSpeed has asked all ranks
        if self.stage:
            norm = self.engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        parts = dict(zip(names, values[1:], strict=False))
        asked = tuple(value > 0 for value in values[1 + len(names) :])
        if self.dtype == torch.float16 and skipped:  # the loss scale was too high: it is lowered, nothing was learnt
            return Step(values[0], parts, lr, None, predictions, asked, skipped)
        if skipped or (norm is not None and not math.isfinite(norm)):
            raise self._not_finite("gradient", _share(batches))
        self.steps += 1
        return Step(values[0], parts, lr, norm, predictions, asked)

    def dry_step(self, batches: Sequence[Batch], loss_of: LossOf) -> None:
        """Forward and backward of a step that is not taken: it needs the step's memory, and leaves nothing behind.

        Raises:
            TrainingError: memory ran out on this rank.
        """
        self.engine.train()
        buffers = [(buffer, buffer.clone()) for buffer in self.system.buffers()]
        with out_of_memory.explained(self.held, batches, "dry run of the largest batch, before the first step"):
            moments = self._room_for_moments()
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                means = self._rehearse(batches, loss_of) if self.system.weighs_terms and len(batches) > 1 else None
                predictions = []  # a step keeps them
                for i, batch in enumerate(batches):
                    last = i == len(batches) - 1
                    self.engine.set_gradient_accumulation_boundary(last)
                    prediction, losses = self._losses(batch, loss_of, means)
                    predictions.append(prediction)
                    self._backward(losses.total, last=last)
            del moments
        portable.forget_gradients(self.engine, self.stage)
        with torch.no_grad():
            for buffer, before in buffers:  # running statistics, say
                buffer.copy_(before)

    def _room_for_moments(self) -> Tensor | None:
        """What a GPU will hold of Adam's moments after the first step, which makes them; None where it has them."""
        if self.device.type != "cuda" or self.steps or self.held.engine.offload == "optimizer":
            return None
        own = count_parameters(self.system)[1] // (dist.get_world_size() if self.stage else 1)
        return torch.empty(8 * own, dtype=torch.uint8, device=self.device)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """The system's answer without dropout; every rank must call it equally often.

        Raises:
            TrainingError: memory ran out on this rank.
        """
        self.engine.eval()
        with out_of_memory.explained(self.held, [batch], f"evaluation after step {self.steps}", learning=False):
            return self._forward(batch)

    def part(self) -> parts.Part:
        """A copy of what this rank holds of weights and optimizer state, good until the next call. Nobody waits."""
        places, numbers = self._room.copy(portable.held(self.engine, self.system, self.stage, self.steps))
        buffers = portable.buffers(self.system) if dist.get_rank() == 0 else {}
        scale = portable.loss_scale(self.engine)
        return parts.Part(self.steps, scale, places, numbers, portable.shapes(self.system), buffers)

    def assembled(self, part: parts.Part) -> portable.State | None:
        """All ranks' parts as a whole, by parameter name, on rank 0 (None elsewhere). A collective call, which a thread
        may make while others train."""
        return parts.assemble(part, self._beside)

    def state(self) -> portable.State | None:
        """Both in one: a collective call."""
        return self.assembled(self.part())

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Replaces the weights for evaluation; the optimizer is left behind, so no step may follow."""
        portable.replace_weights(self.system, self.stage, weights)

    def agree(self, answer: bool) -> bool:
        """Whether any rank says yes. A collective call, for where there is no step to ask with."""
        return bool(self._mean_over_ranks(torch.tensor(float(answer), device=self.device)) > 0)

    def close(self) -> None:
        """Frees DeepSpeed's hooks; ZeRO-3 may abort at exit otherwise."""
        if self._reduction is not None:
            self._reduction.close()
        self.engine.destroy()
        if self._beside is not None:
            dist.destroy_process_group(self._beside)

    def _losses(self, batch: Batch, loss_of: LossOf, means: Tensor | None) -> tuple[Prediction, Losses]:
        prediction = self._forward(batch)
        return prediction, self._within_step(loss_of(prediction, batch), means)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if self._reduction is None:
            self.engine.backward(loss)
        else:
            self._reduction.backward(self.engine.backward, loss, last=last)

    def _forward(self, batch: Batch) -> Prediction:
        batch = batch.to(self.device)
        if self.dtype != torch.float32:
            values = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.values.items()}
            batch = _replace_values(batch, values)
        prediction: Prediction = self.engine(batch)
        if self.dtype == torch.float32:
            return prediction
        said = (prediction.tasks, prediction.features, prediction.learned)
        return Prediction(*({name: values.float() for name, values in part.items()} for part in said))

    @torch.no_grad()
    def _rehearse(self, batches: Sequence[Batch], loss_of: LossOf) -> Tensor:
        """`Losses.means` of the whole step, which micro-batches need before the first of them is learned from.

        A forward pass more over each, without a graph; dropout then draws the same once more.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            own = [loss_of(self._forward(batch), batch).means for batch in batches]
        return self._mean_over_ranks(torch.stack([means for means in own if means is not None]).mean(0))

    def _within_step(self, losses: Losses, means: Tensor | None) -> Losses:
        """The losses as they count in the step, where their terms weigh one another; all others as they are."""
        if losses.within is None or losses.means is None:
            return losses
        return losses.within(self._mean_over_ranks(losses.means) if means is None else means)

    def _mean_over_ranks(self, row: Tensor) -> Tensor:
        if dist.get_world_size() == 1:
            return row
        mean = row / dist.get_world_size()
        dist.all_reduce(mean)
        return mean

    def _norm_before_step(self, batches: Sequence[Batch]) -> float | None:
        """The gradient's norm at stage 0, which steps on any gradient; the other stages look for themselves, and skip.

        Raises:
            TrainingError: it is not finite; on every rank, as gradients are reduced already.
        """
        if self.stage:
            return None
        norm = float(nn.utils.get_total_norm([p.grad for p in self.system.parameters() if p.grad is not None]))
        if not math.isfinite(norm):
            raise self._not_finite("gradient", _share(batches))
        return norm

    def _not_finite(self, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"step {self.steps + 1}: the {what} is not finite ({where}); no rank has stepped and "
            "no checkpoint was written. Lower the learning rates (--optim.lr.*), clip the gradient "
            "(--optim.clip 1) or look at these samples"
        )

    def _set_learning_rates(self) -> dict[str, float]:
        factor = self.factor(self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return {group["name"]: group["lr"] for group in self.engine.optimizer.param_groups}

    def _agree(self, row: Tensor, batches: Sequence[Batch], predictions: Sequence[Prediction]) -> list[float]:
        """The mean over ranks of the loss and its parts: one small all-reduce, which also tells if all are finite.

        Here the host waits for the device: forward and backward never do.
        """
        mean: list[float] = self._mean_over_ranks(row).tolist()
        if not all(map(math.isfinite, mean)):
            finite = bool(torch.isfinite(row).all())
            raise self._not_finite("loss", ELSEWHERE if finite else f"keys {_keys(batches, predictions)}")
        return mean


def _share(batches: Sequence[Batch]) -> str:
    """Which samples a gradient came from, as far as one rank knows: it is reduced over all before anybody looks."""
    if dist.get_world_size() == 1:
        return f"keys {_keys(batches)}"
    return (
        f"rank {dist.get_rank()}'s share of the batch: keys {_keys(batches)}; the gradient is all ranks', so the "
        "samples at fault may be another's"
    )


def _keys(batches: Sequence[Batch], predictions: Sequence[Prediction] = ()) -> str:
    """The samples' keys, or the first of them; those come before the others whose prediction is not finite."""
    keys = [key for batch in batches for key in batch.keys]
    finite = [torch.stack([t.isfinite() for t in said.tasks.values()]).all(0) for said in predictions]
    if finite:
        keys = [key for _, key in sorted(zip(torch.cat(finite).tolist(), keys, strict=True), key=lambda each: each[0])]
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def _replace_values(batch: Batch, values: dict[str, Tensor]) -> Batch:
    from dataclasses import replace

    return replace(batch, values=values)


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def _check_precision(config: EngineConfig, device: torch.device) -> None:
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("engine.precision: fp16 needs a GPU, and this rank computes on the CPU; use bf16 or fp32")
    if config.precision != "fp32" and config.zero == 0:
        raise ConfigError(
            f"engine.zero: {config.precision} needs ZeRO 1, 2 or 3 here; use --zero 1, which also saves memory"
        )


BUCKET = 50_000_000
"""Gradients that are reduced at a time, in numbers. DeepSpeed's own 500 million are 2 GB, which stage 3 keeps all along
and the others take in every backward pass, however small the system is."""


def deepspeed_config(optim: OptimConfig, config: EngineConfig, micro_batch: int, trained: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Args:
        micro_batch: samples of a rank. trained: numbers that are.
    """
    zero: dict[str, Any] = {"stage": config.zero, "reduce_bucket_size": min(BUCKET, max(1, trained))}
    if config.offload == "optimizer":  # pinned memory is what a GPU reads and writes while it computes
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }


def count_parameters(system: nn.Module) -> tuple[int, int]:
    """(all, trained) parameters, also where ZeRO-3 has partitioned them."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in system.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
