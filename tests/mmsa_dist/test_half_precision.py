"""fp16: what a step that it skips leaves alone, and its loss scale over a restart. On a CPU, where it is refused
otherwise (`half`), but is DeepSpeed's own at ZeRO 1 to 3."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmsa_dist import checkpoint, run_folder
from mmsa_dist.config import EngineConfig
from mmsa_dist.portable import SCALE, State
from tests.data import packed
from tests.mmsa_dist.half import half_precision
from tests.mmsa_dist.test_engine import OPTIM
from tests.mmsa_dist.test_laws import learning, train
from tests.mmsa_dist.toy import SPEC, Toy, ToyConfig, global_batch, share

POWER = 20
"""The loss scale begins so high that the first step overflows."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("half"), samples=108)


def observed(folder: Path, recipe: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """A run, and of each step whether it was skipped, and whether the label generator saw it."""
    from mmsa_dist.engine import Engine
    from mmsa_dist.label_generators.state import GeneratedLabels

    skipped: list[bool] = []
    seen: list[int] = []
    step, observe = Engine.step, GeneratedLabels.observe

    def stepping(self: Any, *arguments: Any) -> Any:
        done = step(self, *arguments)
        skipped.append(done.skipped)
        return done

    def observing(self: Any, *arguments: Any) -> None:
        seen.append(len(skipped) - 1)
        observe(self, *arguments)

    with half_precision(POWER), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        patch.setattr(GeneratedLabels, "observe", observing)
        return {**train(folder, recipe, stop_after), "skipped": skipped, "seen": seen}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_is_skipped_moves_no_label_and_a_restart_keeps_the_scale(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, stage: int
) -> None:
    more: dict[str, Any] = {"engine": {"zero": stage, "precision": "fp16"}, "checkpoint": {"every_steps": 1}}
    recipe = learning("self_mm", data, **more).dump()
    (whole,) = ranks(observed, 1, tmp_path / "whole", recipe)
    assert any(whole["skipped"][:3]) and any(whole["skipped"][6:]), "in the first epoch, and after labels have moved"
    assert whole["seen"] == [n for n, skipped in enumerate(whole["skipped"]) if not skipped]

    (begun,) = ranks(observed, 1, tmp_path / "killed", recipe, 4)
    (resumed,) = ranks(observed, 1, tmp_path / "killed", recipe)
    assert begun["losses"] == whole["losses"][:5]
    assert resumed["losses"] == whole["losses"][4:], "the fifth was taken, and nothing saved after it"
    assert resumed["skipped"] == whole["skipped"][4:]
    assert resumed["labels"].keys() == whole["labels"].keys()
    assert all(torch.equal(resumed["labels"][name], value) for name, value in whole["labels"].items())


def scaled(
    stage: int, first: int, steps: int, state: State | None
) -> tuple[list[bool], dict[str, float], State | None]:
    """Steps on this rank: which were skipped, the scale after them, the state."""
    from mmsa_dist.engine import Engine

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    system = Toy(ToyConfig(), SPEC)
    config = EngineConfig(zero=stage, precision="fp16")  # type: ignore[arg-type]
    with half_precision(POWER):
        engine = Engine(system, OPTIM, config, micro_batch=12 // world, total_steps=100, state=state)
    skipped = []
    for step in range(first, first + steps):
        batches = share(global_batch(step), rank, world)
        skipped.append(engine.step(batches, lambda p, b: system.loss(p, b, b.labels)).skipped)
    scaler = engine.engine.optimizer.loss_scaler
    found = skipped, {name: getattr(scaler, name) for name in SCALE}, engine.state()
    engine.close()
    return found


@pytest.mark.parametrize(("before", "after"), [((1, 1), (3, 2)), ((3, 2), (2, 1)), ((2, 2), (1, 1))])
def test_the_scale_goes_on_at_another_stage_and_number_of_ranks(
    ranks: Callable[..., Any], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Through a checkpoint on the disk: what an undisturbed run has after as many steps."""
    skipped, scale, state = ranks(scaled, before[1], before[0], 0, 6, None)[0]
    assert skipped[0] and not skipped[-1] and scale["cur_scale"] < 2**POWER
    assert state is not None and state.scale == scale
    checkpoint.save(tmp_path, checkpoint.Checkpoint(state, {}, {}), 1, None)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None and loaded.engine.scale == scale
    whole = ranks(scaled, before[1], before[0], 0, 9, None)[0]
    for skipped, scale, _ in ranks(scaled, after[1], after[0], 6, 3, loaded.engine):
        assert (skipped, scale) == (whole[0][6:], whole[1])


def test_other_precisions_have_none(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """And a checkpoint of an older version, which kept none, goes on."""
    from tests.mmsa_dist.test_engine import train as steps

    for precision in ("fp32", "bf16"):
        _, state = ranks(steps, 1, 1, 0, 2, None, OPTIM, True, precision)[0]
        assert state.scale == {}
    path = checkpoint.save(tmp_path, checkpoint.Checkpoint(state, {}, {}), 1, None)
    progress = run_folder.read_json(path / "progress.json")
    del progress["loss_scale"]
    (path / "progress.json").write_text(json.dumps(progress))
    checkpoint.write_manifest(path)
    loaded = checkpoint.load(path)
    assert loaded.engine.scale == {}
    assert len(ranks(scaled, 1, 1, 2, 2, loaded.engine)[0][0]) == 2
