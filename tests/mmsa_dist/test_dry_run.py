"""The largest batch before the first step: it finds what does not fit, and changes nothing."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmsa_dist.config import EngineConfig, OptimConfig
from mmsa_dist.errors import TrainingError
from mmsa_dist.out_of_memory import Held, activations, ran_out, states
from mmsa_dist.systems.base import Losses, Prediction
from shards.batch import Batch
from tests.data import packed
from tests.mmsa_dist.test_engine import OPTIM
from tests.mmsa_dist.test_laws import recipe_for, train
from tests.mmsa_dist.toy import SPEC, Toy, ToyConfig, global_batch, share
from tests.mmsa_dist.zero3 import as_if_large
from tests.ranks import ROOT

STAGES = (0, 1, 2, 3)


class Moving(Toy):
    """With dropout, and a running mean that every forward pass in training moves."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__(ToyConfig(), SPEC)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, batch: Batch) -> Prediction:
        prediction = super().forward(batch)
        hidden = self.drop(prediction.features["M"])
        self.mean.lerp_(hidden.detach().mean(0).to(self.mean.dtype), 0.1)
        return Prediction({"M": prediction.tasks["M"] + (hidden - self.mean).sum(1)}, prediction.features)


def steps(dry: tuple[int, ...], stage: int, precision: str, offload: str, optim: OptimConfig) -> dict[str, Any]:
    """Six steps; before those of `dry` a dry one. Dropout's generator is never set to anything."""
    from mmsa_dist.engine import Engine

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    system = Moving()
    config = EngineConfig(zero=stage, precision=precision, offload=offload)  # type: ignore[arg-type]
    with as_if_large():
        engine = Engine(system, optim, config, micro_batch=12 // (world * optim.accumulation), total_steps=100)

    def loss_of(prediction: Prediction, batch: Batch) -> Losses:
        return system.loss(prediction, batch, batch.labels)

    losses, norms = [], []
    for step in range(6):
        if step in dry:
            engine.dry_step(share(global_batch(77), rank, world, optim.accumulation), loss_of)
        done = engine.step(share(global_batch(step), rank, world, optim.accumulation), loss_of)
        losses.append(done.loss)
        norms.append(done.grad_norm)
    state = engine.state()
    counters = (engine.engine.global_steps, engine.engine.micro_steps, engine.engine.skipped_steps)
    engine.close()
    weights = {} if state is None else {**state.weights, **state.moments["exp_avg"]}
    return {"losses": losses, "norms": norms, "counters": counters, "weights": weights}


WAYS = [
    *((stage, "fp32", "none") for stage in STAGES),
    *((stage, "bf16", "none") for stage in (1, 2, 3)),
    *((stage, "fp32", "optimizer") for stage in (1, 2, 3)),
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("stage", "precision", "offload"), WAYS)
def test_a_dry_step_changes_no_bit(
    ranks: Callable[..., Any], stage: int, precision: str, offload: str, accumulation: int, world: int
) -> None:
    """Losses, norms, weights and moments, running statistics, what is drawn next and DeepSpeed's counters; also in the
    middle of a run."""
    optim = OPTIM.model_copy(update={"accumulation": accumulation, "clip": 0.05})
    without, with_some = (ranks(steps, world, dry, stage, precision, offload, optim) for dry in ((), (0, 3)))
    for one, other in zip(without, with_some, strict=True):
        assert one["losses"] == other["losses"] and len(set(one["losses"])) == 6
        assert one["norms"] == other["norms"] and one["counters"] == other["counters"]
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("dry"), samples=108)


@pytest.mark.parametrize(("system", "stage"), [("self_mm", 0), ("tam_ulag", 1), ("iam", 2), ("self_mm", 3)])
def test_a_run_is_the_same_with_it_and_without(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, system: str, stage: int
) -> None:
    """Label generators included, one with layers of its own; IAM's terms weigh one another, over two micro-batches."""
    found = []
    for dry in (False, True):
        changes = {"train": {"dry_run": dry, "epochs": 3}, "data": {"batch_size": 24}, "optim": {"accumulation": 2}}
        recipe = recipe_for(system, data, engine={"zero": stage}, **changes)
        found.append(ranks(train, 2, tmp_path / str(dry), recipe.dump()))
        events = (tmp_path / str(dry) / "events" / "rank-0.jsonl").read_text()
        assert ('"dry_run"' in events) == dry
    for one, other in zip(*found, strict=True):
        assert one["losses"] == other["losses"] and one["result"] == other["result"]
        assert all(torch.equal(tensor, other["labels"][name]) for name, tensor in one["labels"].items())


def shapes(folder: Path, recipe: dict[str, Any]) -> tuple[int, list[int]]:
    """The step that is taken for the largest, and of each step the numbers of the widest micro-batch, padding too."""
    from mmsa_dist.dry import largest
    from mmsa_dist.loop import read_epoch
    from mmsa_dist.recipe import from_dict
    from mmsa_dist.session import open_session

    session = open_session(from_dict(recipe), folder, dist.get_rank(), dist.get_world_size())
    text = session.spec.text is not None
    plan, batches = read_epoch(session, 1)
    sizes = [
        max(
            int((batch.lengths["text"] if text else sum(batch.lengths.values())).max()) * batch.size  # type: ignore[union-attr]
            for batch in each
        )
        for each in batches
    ]
    number = largest(session, plan, 0)
    session.close()
    return number, sizes


@pytest.mark.parametrize("encoder", [None, "bert"])
def test_the_largest_batch_is_found_from_the_tables(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, encoder: str | None, encoders: Callable[..., Path]
) -> None:
    """By the same rule on both ranks: each may have it or not, together they do."""
    text = {"encoder": str(encoders(encoder))} if encoder else {}
    recipe = recipe_for("self_mm", data, text=text, data={"batch_size": 7}).dump()
    (number, own), (same, others) = ranks(shapes, 2, tmp_path, recipe)
    both = np.maximum(own, others)
    assert number == same
    if encoder is None:
        assert both[number] == max(both) > min(both)
    else:  # bytes of a transcript, as nothing was made tokens yet: near enough
        assert both[number] > np.mean(both)


def hungry(folder: Path, recipe: dict[str, Any]) -> str:
    with pytest.raises(TrainingError) as caught:
        train(folder, recipe)
    return str(caught.value)


def test_memory_that_really_runs_out_is_explained(ranks: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """A petabyte is refused by the host."""
    recipe = recipe_for("tests.mmsa_dist.hungry:Hungry", data, model={"enough": 1})
    (said,) = ranks(hungry, 1, tmp_path, recipe.dump())
    assert said.startswith("dry run of the largest batch, before the first step: out of memory at ")
    assert "micro-batch of 12 samples (steps: 10 of text, " in said and "ZeRO 1, fp32, 1 rank." in said
    assert "--optim.accumulation 2" in said and "--zero 3" in said


def test_an_evaluation_that_does_not_fit_is_explained(ranks: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    recipe = recipe_for("tests.mmsa_dist.hungry:Hungry", data, model={"evaluating": True})
    (said,) = ranks(hungry, 1, tmp_path, recipe.dump())
    assert re.match(r"evaluation after step \d+: out of memory at ", said)
    assert "--data.eval-batch-size" in said and "--zero 3" in said and "--optim.accumulation" not in said


def limited(more: int) -> str:
    """A batch under a bound of the address space, which torch's allocator meets with an error of its own."""
    from mmsa_dist.engine import Engine

    system = Toy(ToyConfig(), SPEC)
    engine = Engine(system, OPTIM, EngineConfig(zero=1), micro_batch=12, total_steps=9)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def loss_of(prediction: Prediction, batch: Batch) -> Losses:
        wide = torch.ones(more // 4, 1) * prediction.tasks["M"].mean()
        return Losses(wide.mean(), {"M": wide.mean().detach()})

    resource.setrlimit(resource.RLIMIT_AS, (size + more, hard))
    try:
        engine.step([global_batch(0)], loss_of)
    except TrainingError as error:
        return f"{error} from {type(error.__cause__).__name__}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        engine.close()
    return "stepped"


def test_an_ordinary_step_is_explained_too(ranks: Callable[..., Any]) -> None:
    (said,) = ranks(limited, 1, 2**28)
    assert said.startswith("step 1: out of memory at ") and said.endswith("from RuntimeError")


def test_a_run_that_does_not_fit_ends_at_once_and_is_not_tried_again(data: Path, tmp_path: Path) -> None:
    """Exit code 4; without the dry run it ends in the middle of an epoch."""
    from shards.index import Index

    index = Index.load(data)
    table = [index.table(no) for no, shard in enumerate(index.shards) if shard.split == "train"]
    longest = max(int(sum(t[f"length_{m}"].to_numpy() for m in index.modalities).max()) for t in table)
    command = [sys.executable, "-m", "mmsa_dist", "train", "tests.mmsa_dist.hungry:Hungry", "--data", str(data)]
    command += ["--launcher", "local", "--workers", "2", "--batch-size", "8", "--model.enough", str(longest)]
    command += ["--tracking.no-enabled", "--data.readers", "0"]
    for name, words, said in (("dry", [], "dry run of the largest batch"), ("wet", ["--train.no-dry-run"], "step ")):
        done = subprocess.run(
            [*command, *words, "--runs-dir", str(tmp_path / name)], capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 4, done.stderr
        assert f"{said}" in done.stderr and "out of memory at" in done.stderr and "--zero 2" in done.stderr
        (run,) = (tmp_path / name).iterdir()
        events = [json.loads(line) for line in (run / "events" / "driver.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events].count("attempt") == 1
        steps = [line for line in (run / "events" / "rank-0.jsonl").read_text().splitlines() if '_step"' in line]
        assert bool(steps) == (name == "wet")


def test_what_is_not_for_want_of_memory_is_left_as_it_is() -> None:
    assert ran_out(MemoryError()) and ran_out(torch.OutOfMemoryError("CUDA out of memory."))
    assert ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."))
    assert not ran_out(RuntimeError("size mismatch")) and not ran_out(KeyError("out of memory"))


def remedies(stage: int, device: str, samples: int, text: Any) -> tuple[str, str]:
    held = Held(OptimConfig(), EngineConfig(zero=stage), text, torch.device(device))  # type: ignore[arg-type]
    return activations(held, samples), states(held)


def test_remedies_are_those_that_are_left(ranks: Callable[..., Any], encoders: Callable[..., Path]) -> None:
    from mmsa_dist.config import TextConfig

    text = TextConfig(encoder="any")
    again = text.model_copy(update={"gradient_checkpointing": True})
    (first, _), (second, _), (third, _) = (
        ranks(remedies, 1, 1, "cpu", n, each)[0] for n, each in ((8, text), (8, again), (1, None))
    )
    assert "--text.gradient-checkpointing" in first and "--optim.accumulation 2" in second and "max-tokens" in third
    assert "--zero 2" in ranks(remedies, 2, 1, "cpu", 8, None)[0][1]
    assert "--engine.offload optimizer" in ranks(remedies, 2, 3, "cuda", 8, None)[0][1]
    assert "more workers" in ranks(remedies, 1, 1, "cpu", 8, None)[0][1]
