"""The training loop, on one page. Every rank runs it; it knows neither Ray nor MLflow nor ZeRO."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mmsa_dist import checkpoint, metrics, run_folder
from mmsa_dist.dry import dry_run
from mmsa_dist.errors import StoppedError, TrainingError
from mmsa_dist.evaluation import by_set, evaluate, save_predictions
from mmsa_dist.ledger import Ledger
from mmsa_dist.profiling import Profile, profiled
from mmsa_dist.run_folder import Events
from mmsa_dist.saving import Saver
from mmsa_dist.session import Session, left_out
from mmsa_dist.stopping import Requests
from mmsa_dist.tracking import Tracker
from shards.batch import Batch
from shards.plan import Plan

Report = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """Where a run stands; plain values, saved with every checkpoint.

    Attributes:
        epoch: from 1. step_in_epoch: optimizer steps taken in it.
        loss_sum: of the epoch's steps so far. best_*: the best validation result yet. stale: epochs since then.
    """

    epoch: int = 1
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    best_value: float | None = None
    best_epoch: int = 0
    best_step: int = 0
    stale: int = 0


@dataclass(frozen=True)
class Hooks:
    """What goes along with training, and changes none of its results."""

    events: Events
    tracker: Tracker
    report: Report
    ledger: Ledger
    requests: Requests
    saver: Saver
    profile: Profile


def fit(
    session: Session,
    events: Events,
    tracker: Tracker,
    report: Report,
    ledger: Ledger,
    requests: Requests | None = None,
    told: AbstractContextManager[object] | None = None,
) -> dict[str, Any]:
    """Trains to the end, tests once, and gives ``result.json``'s content.

    Args:
        told: is told of what went wrong before anything is waited for that is still being written or sent.

    Raises:
        StoppedError: the run was asked to end; all ranks have saved.
    """
    requests = requests or Requests(session.folder, session.rank)
    dry_run(session, events)
    recipe = session.recipe
    with (
        ledger.under("other"),
        Saver(session, events, ledger) as saver,
        profiled(session.folder, session.rank, recipe.train.profile, events) as profile,
        told or nullcontext(),
    ):
        return train(session, Hooks(events, tracker, report, ledger, requests, saver, profile))


def train(session: Session, hooks: Hooks) -> dict[str, Any]:
    recipe, engine, generator = session.recipe, session.engine, session.generator
    events, ledger, saver = hooks.events, hooks.ledger, hooks.saver
    state = Progress(**session.progress)
    began = time.monotonic()

    if state.epoch > 1 and engine.agree(hooks.requests.come(state.epoch - 1)):  # it was to pause there already
        raise stopped(session, hooks)
    ahead = None
    while state.epoch <= recipe.train.epochs and state.stale < recipe.train.patience:
        plan, steps = ahead or read_epoch(session, state.epoch, state.step_in_epoch)
        engine.begin_epoch(state.epoch)
        for batches in ledger.waiting(steps):
            with ledger.under("step"):
                seed_step(recipe.seed, engine.steps, session.rank)
                batches = [batch.to(engine.device) for batch in batches]
                asks = (saver.due(), hooks.requests.come())
                done = engine.step(batches, lambda p, b: session.system.loss(p, b, generator.targets(b, p)), asks)
                if not done.skipped:
                    generator.observe(state.epoch, batches, done.predictions)
            hooks.profile.step()
            state.step_in_epoch += 1
            state.loss_sum += done.loss
            events.step(state.epoch, state.step_in_epoch, plan.num_steps, done.loss)
            saver.tell()
            save, stop = done.asked
            every = recipe.checkpoint.every_steps
            save |= every is not None and engine.steps % every == 0 and not done.skipped
            if (save or stop) and state.step_in_epoch < plan.num_steps:
                saver.save(state)
                if stop:
                    raise stopped(session, hooks)
        generator.end_epoch()
        another = state.epoch < recipe.train.epochs and state.stale + 1 < recipe.train.patience  # whatever comes out
        ahead = read_epoch(session, state.epoch + 1) if another else None
        with ledger.under("evaluation"):
            valid = evaluate(session, "valid", ledger.beat).metrics
        value = valid[recipe.train.monitor]
        if metrics.is_better(recipe.train.monitor, value, state.best_value):
            state.best_value, state.best_epoch, state.best_step, state.stale = value, state.epoch, engine.steps, 0
        else:
            state.stale += 1
        summary = {
            "epoch": state.epoch, "step": engine.steps, "train_loss": state.loss_sum / plan.num_steps,
            "parts": done.parts, "grad_norm": done.grad_norm, "lr": done.lr, "valid": valid,
            "best_epoch": state.best_epoch, "seconds": time.monotonic() - began,
        }  # fmt: skip
        events.write("epoch", **summary)
        hooks.tracker.epoch(flat(summary), engine.steps)
        state.epoch, state.step_in_epoch, state.loss_sum = state.epoch + 1, 0, 0.0
        saver.save(state)
        hooks.report(flat(summary))
        if another and engine.agree(hooks.requests.come(state.epoch - 1)):
            raise stopped(session, hooks)
    saver.wait()
    hooks.profile.close()
    return finish(session, state, events, ledger)


def stopped(session: Session, hooks: Hooks) -> StoppedError:
    """What to raise once the last checkpoint is on the disk; no rank leaves before that."""
    hooks.saver.wait()
    dist.barrier()
    hooks.events.write("stopped", step=session.engine.steps)
    return hooks.requests.stopped(session.engine.steps)


def read_epoch(session: Session, epoch: int, start_step: int = 0) -> tuple[Plan, Iterator[list[Batch]]]:
    """The plan of an epoch, and its batches from a step on, which are being read from now on."""
    plan = session.plan(epoch)
    accumulation = session.recipe.optim.accumulation
    return plan, session.loader.train(plan, session.rank, session.world, accumulation, start_step)


def finish(session: Session, state: Progress, events: Events, ledger: Ledger) -> dict[str, Any]:
    """The best epoch's weights: kept, evaluated on validation and, once, on the test split.

    Raises:
        TrainingError: no epoch had a defined validation result. DataError: the best checkpoint is damaged.
    """
    if not state.best_step:
        monitor = session.recipe.train.monitor
        raise TrainingError(
            f"train.monitor: {monitor} was undefined on validation in all {state.epoch - 1} epochs (constant "
            "predictions or labels, or a single sample); use --train.monitor "
            f"{metrics.default_monitor(session.kind)}, or lower the learning rates"
        )
    best = checkpoint.step_folder(session.folder / "checkpoints", state.best_step)
    dist.barrier()  # rank 0 may still be writing it
    session.engine.load_weights(checkpoint.load_weights(best))
    result: dict[str, Any] = {
        "system": session.recipe.system, "data": session.index.name, "synthetic": session.index.synthetic,
        "fingerprint": session.index.fingerprint, "selected_on": f"validation {session.recipe.train.monitor}",
        "best_epoch": state.best_epoch, "epochs": state.epoch - 1, "steps": session.engine.steps,
    }  # fmt: skip
    result |= left_out(session.recipe)
    splits = ["valid", *(["test"] if session.recipe.train.test and session.index.splits.get("test") else [])]
    for split in splits:
        with ledger.under("evaluation"):
            evaluation = evaluate(session, split, ledger.beat)
        result[split] = evaluation.metrics
        for name, of_set in by_set(session, split, evaluation).items():
            result.setdefault("sets", {}).setdefault(name, {})[split] = of_set
        if session.rank == 0:
            save_predictions(session, split, evaluation)
    if session.rank == 0:
        checkpoint.keep_weights(best, session.folder / "best")
        run_folder.write_json(session.folder / "result.json", result)  # last: a run with a result is a finished one
    events.write("end", **result)
    return result


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's randomness as a function of (seed, step, rank): a restart needs no generator state."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(number)  # torch.manual_seed asks for every kind of device, every step
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)


def flat(summary: dict[str, Any]) -> dict[str, Any]:
    """The epoch's numbers under plain names: valid_mae, loss_T, lr_text, …"""
    prefixes = {"valid": "valid_", "parts": "loss_", "lr": "lr_"}
    numbers: dict[str, Any] = {}
    for name, value in summary.items():
        if name in prefixes:
            numbers.update({prefixes[name] + key: number for key, number in value.items()})
        else:
            numbers[name] = value
    return numbers
