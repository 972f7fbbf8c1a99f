"""The loops that `benchmarks.training` sets beside ours: what one would write by hand for the same system, recipe and
order of samples."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmsa_dist.checkpoint import step_folder
from mmsa_dist.engine import count_parameters, deepspeed_config, imported
from mmsa_dist.learning_rates import parameter_groups, schedule
from mmsa_dist.loop import seed_step
from mmsa_dist.session import batch_spec, label_generator
from mmsa_dist.systems import make_system
from shards.loader import Loader

if TYPE_CHECKING:
    from mmsa_dist.session import Session
    from shards.batch import Batch


class Bare:
    """With torch's DistributedDataParallel; at one rank the module itself."""

    def __init__(self, session: "Session") -> None:
        recipe = self.recipe = session.recipe
        torch.manual_seed(recipe.seed)
        self.device = session.engine.device
        self.system = make_system(recipe.system, recipe.model, session.spec)
        self.labels = label_generator(recipe, session.index, self.system, self.device)
        if self.labels.layers is not None:
            self.system.attach(self.labels.layers)
        self.system.to(self.device)
        kind = torch.optim.AdamW if recipe.optim.name == "adamw" else torch.optim.Adam
        groups = parameter_groups(self.system, recipe.optim)
        self.optimizer: torch.optim.Optimizer = kind(groups, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=True)
        steps = session.plan(1).num_steps * recipe.train.epochs
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(recipe.optim, steps))
        self.session = session
        self.loader = Loader(session.reader, batch_spec(recipe, session.index, session.spec), 0)
        self.losses: list[float] = []
        self.steps = 0
        self.divide()

    def divide(self) -> None:
        """Readies the module for its ranks."""
        on_gpu = [self.device.index] if self.device.type == "cuda" else None
        self.module = DistributedDataParallel(self.system, on_gpu) if self.session.world > 1 else self.system

    def close(self) -> None:
        """Frees what the ranks hold together."""
        self.loader.close()

    def wait_for_checkpoint(self, step: int) -> None:
        """Until our loop's is written: the thread that does it takes CPU time, which is not the bare loop's."""
        while self.session.rank == 0 and not step_folder(self.session.folder / "checkpoints", step).exists():
            time.sleep(0.01)
        dist.barrier()

    def epoch(self, number: int, now: Callable[[], float]) -> float:
        """Trains one; what it took after its batches were in memory."""
        session = self.session
        read = self.loader.train(session.plan(number), session.rank, session.world, 1)
        ready = [batch.to(self.device) for (batch,) in read]
        self.module.train()
        losses = []
        began = now()
        for batch in ready:
            seed_step(self.recipe.seed, self.steps, session.rank)
            losses.append(self.step(number, batch))
            self.steps += 1
        spent = now() - began
        mean = torch.tensor(losses, device=self.device) / session.world
        dist.all_reduce(mean)
        self.losses += [float(value) for value in mean]
        return spent

    def step(self, epoch: int, batch: "Batch") -> float:
        """One optimizer step; the loss."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.engine.precision == "bf16"):
            loss, learn = self.loss(batch, epoch)
        loss.backward()
        if self.recipe.optim.clip:
            torch.nn.utils.clip_grad_norm_(self.system.parameters(), self.recipe.optim.clip)
        self.optimizer.step()
        self.scheduler.step()
        learn()
        return loss.item()

    def loss(self, batch: "Batch", epoch: int) -> tuple[Tensor, Callable[[], None]]:
        """The loss, and what updates the generated labels."""
        prediction = self.module(batch)
        loss = self.system.loss(prediction, batch, self.labels.targets(batch, prediction)).total
        return loss, lambda: self.labels.observe(epoch, [batch], [prediction])


class BareDeepSpeed(Bare):
    """With DeepSpeed's engine, which clips and divides by itself."""

    def divide(self) -> None:
        recipe, micro = self.recipe, self.recipe.data.batch_size // self.session.world
        config = deepspeed_config(recipe.optim, recipe.engine, micro, count_parameters(self.system)[1])
        self.engine, _, _, _ = imported().initialize(
            model=self.system, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self.module = self.engine

    def close(self) -> None:
        super().close()
        self.engine.destroy()

    def step(self, epoch: int, batch: "Batch") -> float:
        loss, learn = self.loss(batch, epoch)
        self.engine.backward(loss)
        self.engine.step()
        self.scheduler.step()
        learn()
        return loss.item()


BARE: dict[str, type[Bare]] = {"torch DDP": Bare, "DeepSpeed": BareDeepSpeed}
"""As the figures name them."""
