"""Law 1 for the engine alone, and the portable state: every pair of ZeRO stages and numbers of ranks."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmsa_dist.config import EngineConfig, GroupValues, OptimConfig
from mmsa_dist.errors import ConfigError, TrainingError
from mmsa_dist.portable import State
from mmsa_dist.systems.base import Losses, Prediction
from shards.batch import Batch
from tests.mmsa_dist.toy import SPEC, Toy, ToyConfig, global_batch, share

OPTIM = OptimConfig(
    lr=GroupValues(text=1e-3, audio=3e-3, vision=1e-3, rest=1e-2),
    weight_decay=GroupValues(text=0, audio=0.1, vision=0, rest=0.01),
)
STAGES = (0, 1, 2, 3)


def plain_losses(steps: int, optim: OptimConfig = OPTIM) -> list[float]:
    """The same training in plain torch, one process."""
    torch.manual_seed(1)
    system = Toy(ToyConfig(), SPEC)
    rest = [p for name, p in system.named_parameters() if name.startswith(("mix", "out"))]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(system.audio.parameters()), "lr": optim.lr.audio, "weight_decay": optim.weight_decay.audio},
            {"params": rest, "lr": optim.lr.rest, "weight_decay": optim.weight_decay.rest},
        ]
    )
    losses = []
    for step in range(steps):
        batch = global_batch(step)
        loss = system.loss(system(batch), batch, batch.labels).total
        optimizer.zero_grad()
        loss.backward()
        if optim.clip:
            torch.nn.utils.clip_grad_norm_([p for p in system.parameters() if p.requires_grad], optim.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(
    stage: int,
    first: int,
    steps: int,
    state: State | None,
    optim: OptimConfig,
    save: bool,
    precision: str = "fp32",
    offload: str = "none",
) -> tuple[list[float], State | None]:
    """Steps `first` to `first + steps` on this rank; losses and, on rank 0, the state."""
    from mmsa_dist.engine import Engine

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    system = Toy(ToyConfig(), SPEC)
    config = EngineConfig(zero=stage, precision=precision, offload=offload)  # type: ignore[arg-type]
    engine = Engine(system, optim, config, micro_batch=12 // (world * optim.accumulation), total_steps=100, state=state)
    losses = []
    for step in range(first, first + steps):
        batches = share(global_batch(step), rank, world, optim.accumulation)
        losses.append(engine.step(batches, lambda p, b: system.loss(p, b, b.labels)).loss)
    saved = engine.state() if save else None
    engine.close()
    return losses, saved


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_follows_plain_torch(ranks: Callable[..., Any], world: int, stage: int) -> None:
    expected = plain_losses(8)
    for losses, _ in ranks(train, world, stage, 0, 8, None, OPTIM, False):
        assert losses == pytest.approx(expected, abs=1e-5)


def steps_at_once(stage: int, name: str) -> list[bool]:
    """Of each group of the optimizer that DeepSpeed steps with, whether it is torch's fused one."""
    from mmsa_dist.engine import Engine

    optim = OPTIM.model_copy(update={"name": name})
    engine = Engine(Toy(ToyConfig(), SPEC), optim, EngineConfig(zero=stage), micro_batch=6, total_steps=1)  # type: ignore[arg-type]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    found = [isinstance(inner, torch.optim.Adam) and bool(group["fused"]) for group in inner.param_groups]
    engine.close()
    return found


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_is_fused(ranks: Callable[..., Any], stage: int, name: str) -> None:
    for found in ranks(steps_at_once, 2, stage, name):
        assert len(found) == 2 and all(found)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_and_clipping_follow_plain_torch(ranks: Callable[..., Any], stage: int) -> None:
    """Two micro-batches of 3 on 2 ranks are one batch of 12; the clipped norm is that of the joint gradient."""
    optim = OPTIM.model_copy(update={"accumulation": 2, "clip": 0.05})
    expected = plain_losses(8, optim)
    for losses, _ in ranks(train, 2, stage, 0, 8, None, optim, False):
        assert losses == pytest.approx(expected, abs=1e-5)
    assert plain_losses(8) != pytest.approx(expected, abs=1e-4), "clipping must matter here"


def go_on(stage: int, states: dict[Any, State], steps: int) -> dict[Any, list[float]]:
    """What `train` gives from each of the states on, which are all of step 4."""
    return {saved: train(stage, 4, steps, state, OPTIM, False)[0] for saved, state in states.items()}


def test_state_loads_at_every_pair(ranks: Callable[..., Any]) -> None:
    """Saved after 4 steps at any stage on 1, 2 or 4 ranks, continued for 8 at any other: the losses of an unbroken run.

    DeepSpeed's own way from stage 3 to another number of ranks goes on too, and trains wrongly.
    """
    expected = plain_losses(12)[4:]
    worlds = (1, 2, 4)
    states = {(w, s): ranks(train, w, s, 0, 4, None, OPTIM, True)[0][1] for w in worlds for s in STAGES}
    for world, stage in itertools.product(worlds, STAGES):
        for found in ranks(go_on, world, stage, states, 8):
            assert found.keys() == states.keys()
            for saved, losses in found.items():
                assert losses == pytest.approx(expected, abs=1e-5), (saved, world, stage)


def test_state_loads_where_the_optimizer_is_the_hosts(ranks: Callable[..., Any]) -> None:
    """Saved so and continued otherwise at another number of ranks, and the other way round."""
    expected = plain_losses(8)
    ways = [(stage, offload) for stage in STAGES for offload in ("none", "optimizer") if stage or offload == "none"]
    on_host = [way for way in ways if way[1] == "optimizer"]
    for here, there, then in ((2, 1, ways), (1, 2, on_host)):
        for stage, offload in on_host if then is ways else ways:
            losses, state = ranks(train, here, stage, 0, 4, None, OPTIM, True, "fp32", offload)[0]
            assert losses == pytest.approx(expected[:4], abs=1e-5), (here, stage, offload)
            for way in then:
                for losses, _ in ranks(train, there, way[0], 4, 4, state, OPTIM, False, "fp32", way[1]):
                    assert losses == pytest.approx(expected[4:], abs=1e-5), (here, stage, offload, way)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_where_the_optimizer_is_changes_no_loss(ranks: Callable[..., Any], stage: int) -> None:
    """To the bit, with micro-batches and clipping."""
    optim = OPTIM.model_copy(update={"accumulation": 2, "clip": 0.05})
    for precision in ("fp32", "bf16"):
        device, host = (
            ranks(train, 2, stage, 0, 8, None, optim, False, precision, offload)[0][0]
            for offload in ("none", "optimizer")
        )
        assert device == host and len(set(host)) == 8, precision


def test_stage_0_divides_nothing_that_the_host_could_keep() -> None:
    with pytest.raises(ValueError, match="offload needs ZeRO 1, 2 or 3"):
        EngineConfig(zero=0, offload="optimizer")


@pytest.mark.parametrize("stage", STAGES)
def test_continuing_is_bitwise_at_the_same_world_size(ranks: Callable[..., Any], stage: int) -> None:
    whole = ranks(train, 2, stage, 0, 8, None, OPTIM, False)[0][0]
    state = ranks(train, 2, stage, 0, 4, None, OPTIM, True)[0][1]
    assert ranks(train, 2, stage, 4, 4, state, OPTIM, False)[0][0] == whole[4:]


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bf16_trains_and_continues(ranks: Callable[..., Any], stage: int) -> None:
    whole = ranks(train, 2, stage, 0, 8, None, OPTIM, False, "bf16")[0][0]
    assert whole == pytest.approx(plain_losses(8), abs=0.1)
    state = ranks(train, 2, stage, 0, 4, None, OPTIM, True, "bf16")[0][1]
    assert ranks(train, 2, stage, 4, 4, state, OPTIM, False, "bf16")[0][0] == pytest.approx(whole[4:], abs=1e-2)


def nan_on_rank_one(stage: int, where: str, precision: str = "fp32", offload: str = "none") -> str:
    """One step where rank 1 alone has a loss that is not finite, or a gradient that is not though its loss is."""
    from mmsa_dist.engine import Engine

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    system = Toy(ToyConfig(), SPEC)
    config = EngineConfig(zero=stage, precision=precision, offload=offload)  # type: ignore[arg-type]
    engine = Engine(system, OPTIM, config, micro_batch=6, total_steps=100)
    batch = global_batch(0)
    if where == "loss":
        batch.values["audio"][9] = float("nan")  # a sample of rank 1

    def loss_of(prediction: Prediction, batch: Batch) -> Losses:
        losses = system.loss(prediction, batch, batch.labels)
        if where == "gradient" and rank == 1:  # the root's slope at zero is infinite, and times zero it is NaN
            return Losses(losses.total + torch.sqrt(prediction.tasks["M"].sum() * 0.0), losses.parts)
        return losses

    before = engine.state()
    try:
        engine.step(share(batch, rank, world), loss_of)
    except TrainingError as error:
        after = engine.state()  # both ranks are here, so a collective call is safe
        if before is not None and after is not None:
            assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)
        return str(error)
    finally:
        engine.close()
    return "stepped"


@pytest.mark.parametrize("stage", STAGES)
def test_no_rank_steps_on_nan(ranks: Callable[..., Any], stage: int) -> None:
    here, there = ranks(nan_on_rank_one, 2, stage, "loss")
    assert "the loss is not finite (this rank's loss is finite)" in here
    assert "(keys sample0-9, sample0-6, " in there and "sample0-3" not in there, "first the one that is not finite"


@pytest.mark.parametrize(("stage", "precision"), [*((stage, "fp32") for stage in STAGES), (1, "bf16"), (3, "bf16")])
def test_no_rank_steps_on_a_gradient_that_is_not_finite(ranks: Callable[..., Any], stage: int, precision: str) -> None:
    here, there = ranks(nan_on_rank_one, 2, stage, "gradient", precision)
    for rank, told in enumerate((here, there)):  # which of them it came from nobody knows: it is reduced already
        assert f"step 1: the gradient is not finite (rank {rank}'s share of the batch: keys " in told
        assert "the samples at fault may be another's" in told


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_nor_where_the_optimizer_is_the_hosts(ranks: Callable[..., Any], stage: int) -> None:
    for precision in ("fp32", "bf16"):
        for where in ("loss", "gradient"):
            said = ranks(nan_on_rank_one, 2, stage, where, precision, "optimizer")
            assert all(f"step 1: the {where} is not finite" in each for each in said), (precision, where)


def refused(precision: str, stage: int) -> str:
    from mmsa_dist.engine import Engine

    config = EngineConfig(zero=stage, precision=precision)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        Engine(Toy(ToyConfig(), SPEC), OPTIM, config, micro_batch=12, total_steps=1)
    return str(caught.value)


def test_precisions_that_cannot_work_are_refused(ranks: Callable[..., Any]) -> None:
    assert "fp16 needs a GPU" in ranks(refused, 1, "fp16", 1)[0]
    assert "use --zero 1" in ranks(refused, 1, "bf16", 0)[0]


def compiled(folder: Path) -> list[str]:
    """What trainings at every stage leave in the folder that DeepSpeed would compile in."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    for stage, offload in ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (3, "optimizer")):
        train(stage, 0, 1, None, OPTIM, True, "fp32", offload)
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_stale_lock_of_the_compiler_holds_nobody_up(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing is compiled, by which a killed run would leave a lock that the next one waits for, for ever."""
    for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    assert ranks(compiled, 2, tmp_path) == [["lock"] * 4] * 2


def schedules() -> None:
    from mmsa_dist.learning_rates import schedule

    linear = schedule(OptimConfig(schedule="linear", warmup=0.1), 100)
    assert [linear(0), linear(9), linear(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert linear(55) == pytest.approx(0.5)
    cosine = schedule(OptimConfig(schedule="cosine"), 100)
    assert [cosine(0), cosine(50), cosine(100)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    assert schedule(OptimConfig(), 100)(99) == 1.0


def test_schedules(ranks: Callable[..., Any]) -> None:
    ranks(schedules, 1)


ECONOMY = """
import sys
from mmsa_dist.engine import imported

imported()
import deepspeed.runtime.zero.muon.muon_optimizer  # which it imports to look at an optimizer
from deepspeed.runtime import compiler

assert not {"mlflow", "torch._inductor.compile_fx"} & set(sys.modules)
import mlflow

assert imported() is sys.modules["deepspeed"] and mlflow.__version__
assert compiler.compile.__module__ == compiler.__name__
"""


def test_deepspeed_does_not_bring_what_nobody_needs() -> None:
    """MLflow and torch's compiler would be imported by every rank, before its first step; who wants one finds it."""
    subprocess.run([sys.executable, "-c", ECONOMY], check=True)
