"""Laws 1, 3 and 6 for whole systems: data, plan, label generator, engine, evaluation and checkpoints together."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from mmsa_dist import run_folder
from mmsa_dist.recipe import Recipe, from_dict
from mmsa_dist.systems import get_system, system_names
from shards.index import Index
from tests.data import packed
from tests.mmsa_dist.batches import SMALL

SYSTEMS = ("ufen_mtfn", "self_mm")
"""On these, one with a label generator and one without, everything is tried."""
OTHERS = tuple(
    name for name in system_names() if name not in SYSTEMS and get_system(name).__module__.startswith("mmsa_dist.")
)
STAGES = (0, 1, 2, 3)


def no_dropout(system: str) -> dict[str, Any]:
    """The system's configuration, narrow and without dropout: losses must not depend on the number of ranks."""
    fields = get_system(system).Config.model_fields
    return {name: 0.0 for name in fields if "dropout" in name}


def recipe_for(system: str, data: Path, /, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "system": system,
        "seed": 3,
        "data": {"path": str(data), "batch_size": 12, "eval_batch_size": 16, "readers": 1},
        "optim": {"lr": {"text": 1e-3, "audio": 1e-3, "vision": 1e-3, "rest": 1e-3}},
        "train": {"epochs": 2},
        "tracking": {"enabled": False},
        "model": {**no_dropout(system), **SMALL.get(system, {})},
    }
    for key, value in changes.items():
        values.setdefault(key, {}).update(value)
    return from_dict(values)


class Recorder(run_folder.Events):
    """Events that keep every step's loss, and stop the run dead where told to."""

    def __init__(self, folder: Path, rank: int, stop_after: int | None = None) -> None:
        super().__init__(folder, rank)
        self.losses: list[float] = []
        self.stop_after = stop_after

    def step(self, epoch: int, step: int, of: int, loss: float) -> None:
        self.losses.append(loss)
        if self.stop_after is not None and len(self.losses) > self.stop_after:
            raise StoppedError


class StoppedError(Exception):
    """Where a test interrupts a run: the step was taken, nothing after it was saved."""


def train(folder: Path, recipe: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """One rank of a run in `folder`: losses of its steps, epochs' results, and what it ended with."""
    from mmsa_dist.ledger import Ledger
    from mmsa_dist.loop import fit
    from mmsa_dist.session import open_session
    from mmsa_dist.tracking import NullTracker

    rank = dist.get_rank()
    for part in ("events", "checkpoints", "predictions"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    session = open_session(from_dict(recipe), folder, rank, dist.get_world_size())
    events = Recorder(folder, rank, stop_after)
    epochs: list[dict[str, Any]] = []
    result: dict[str, Any] | None = None
    try:
        result = fit(session, events, NullTracker(), epochs.append, Ledger())
    except StoppedError:
        pass
    finally:
        events.close()
        session.close()
    generated = {name: tensor.clone() for name, tensor in session.generator.state_dict().items()}
    return {"losses": events.losses, "epochs": epochs, "result": result, "labels": generated}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 + 22 + 22 short utterances in several shards; 64 does not divide by 12, so the last step has filler."""
    return packed(tmp_path_factory.mktemp("laws"), samples=108)


def learning(system: str, data: Path, /, **changes: Any) -> Recipe:
    """Three epochs of three steps: a label that is made in the second epoch is learned from in the third, so the 7th
    and 8th step are the first whose loss knows the label generator."""
    # at 1e-3 PMR's first steps with Adam magnify the rounding of a sum a thousandfold, at 1e-4 not at all
    slow = {"lr": dict.fromkeys(("text", "audio", "vision", "rest"), 1e-4)} if system == "pmr" else {}
    few = {"data": {"batch_size": 24}, "train": {"epochs": 3}}
    return recipe_for(system, data, **{**few, **changes, "optim": {**slow, **changes.get("optim", {})}})


@pytest.fixture(scope="module")
def alone(
    ranks: Callable[..., Any], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """system -> its run at one rank, which all others must equal; trained once."""

    @cache
    def run(system: str) -> dict[str, Any]:
        one: dict[str, Any] = ranks(train, 1, tmp_path_factory.mktemp(system), learning(system, data).dump())[0]
        assert len(one["losses"]) == 9
        if get_system(system).labels != "none":
            assert set(one["labels"]), "no labels were generated: there is nothing to compare"
            assert any(one["epochs"][2][f"loss_{task}"] > 1e-3 for task in "TAV"), "no step has learned from them"
        return one

    return run


def assert_equal(found: dict[str, Any], one: dict[str, Any], where: Any) -> None:
    """The same losses over the first 8 steps, and the same generated labels."""
    assert found["losses"][:8] == pytest.approx(one["losses"][:8], abs=1e-5), where
    assert found["labels"].keys() == one["labels"].keys()
    for name, value in one["labels"].items():
        if not value.is_floating_point():
            assert torch.equal(found["labels"][name], value), (where, name)
            continue
        # a class's sum is as exact as each of the features that it adds up
        of = one["labels"][name.replace("sum.", "count.")].clamp(min=1)[:, None] if name.startswith("sum.") else 1.0
        assert ((found["labels"][name] - value).abs() / of).max() < 1e-4, (where, name)


@pytest.mark.parametrize("system", SYSTEMS + OTHERS)
def test_two_ranks_equal_one(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, system: str, alone: Callable[[str], dict[str, Any]]
) -> None:
    """Law 1: at every ZeRO stage the same losses over the first 8 steps and the same generated labels."""
    for stage in STAGES if system in SYSTEMS else (3,):
        recipe = learning(system, data, engine={"zero": stage})
        for of_rank in ranks(train, 2, tmp_path / f"two-{stage}", recipe.dump()):
            assert_equal(of_rank, alone(system), stage)


@pytest.mark.parametrize("system", [*SYSTEMS, "tam_ulag"])
def test_four_ranks_and_accumulation_equal_one(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, system: str, alone: Callable[[str], dict[str, Any]]
) -> None:
    """TAM-ULAG's label generator has layers of its own, which learn."""
    for of_rank in ranks(train, 4, tmp_path / "four", learning(system, data, engine={"zero": 1}).dump()):
        assert_equal(of_rank, alone(system), "four")
    twice = learning(system, data, optim={"accumulation": 2})
    for of_rank in ranks(train, 2, tmp_path / "accumulated", twice.dump()):
        assert_equal(of_rank, alone(system), "accumulated")


@pytest.mark.parametrize("system", ["self_mm", "tam_ulag", "iam", "ufen_mtfn"])
def test_micro_batches_that_do_not_divide_equal_one_batch(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, system: str
) -> None:
    """25 samples as six micro-batches of five, and the 14 of an epoch's tail as six of three: one is filler alone.

    Labels are generated from them, and IAM's terms weigh one another over all of them.
    """
    odd = {"data": {"batch_size": 25}}
    (one,) = ranks(train, 1, tmp_path / "one", learning(system, data, **odd).dump())
    assert len(one["losses"]) == 9
    for world, accumulation, stages in ((2, 3, STAGES), (1, 6, (0, 2))):
        for stage in stages:
            recipe = learning(system, data, **odd, engine={"zero": stage}, optim={"accumulation": accumulation})
            for of_rank in ranks(train, world, tmp_path / f"{world}-{stage}", recipe.dump()):
                assert_equal(of_rank, one, (world, stage))


def observed(folder: Path, recipe: dict[str, Any]) -> list[tuple[int, bool]]:
    """Of each step the epoch that the label generator was told, and whether a label of text differs from y_m then."""
    from mmsa_dist.label_generators.state import GeneratedLabels

    own, steps = GeneratedLabels.observe, []
    at_first: list[torch.Tensor] = []  # y_m

    def observe(self: Any, epoch: int, *seen: Any) -> None:
        at_first.append(self.state_dict()["label.T"])
        own(self, epoch, *seen)
        steps.append((epoch, not torch.equal(self.state_dict()["label.T"], at_first[0])))

    GeneratedLabels.observe = observe  # type: ignore[method-assign]
    try:
        train(folder, recipe)
    finally:
        GeneratedLabels.observe = own  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize("system", ["self_mm", "sugrm", "tam_ulag"])
def test_labels_move_from_the_second_epoch_on(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, system: str
) -> None:
    """In the first the subtasks' losses are to be zero, and in epoch n labels move by 2 / (n + 1) (`test_ulgm`, …)."""
    (steps,) = ranks(observed, 1, tmp_path, learning(system, data).dump())
    assert [epoch for epoch, _ in steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert not any(moved for _, moved in steps[:3]) and steps[-1][1]


def evaluated(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    from mmsa_dist.evaluation import evaluate
    from mmsa_dist.session import open_session

    session = open_session(from_dict(recipe), folder, dist.get_rank(), dist.get_world_size())
    found = {split: evaluate(session, split) for split in ("train", "valid", "test")}
    session.close()
    return {split: (e.numbers, e.truth, e.predicted, e.metrics) for split, e in found.items()}


@pytest.mark.parametrize("system", SYSTEMS + OTHERS)
def test_evaluation_does_not_depend_on_ranks(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, system: str
) -> None:
    """Each sample once, predictions and metrics equal to the bit, at 1, 2 and 4 ranks and stages 1 and 3."""
    index = Index.load(data)
    expected = ranks(evaluated, 1, tmp_path, recipe_for(system, data).dump())[0]
    for world, stage in ((2, 1), (2, 3), (4, 1)) if system in SYSTEMS else ((2, 3), (4, 1)):
        for found in ranks(evaluated, world, tmp_path, recipe_for(system, data, engine={"zero": stage}).dump()):
            for split, (numbers, truth, predicted, metrics) in found.items():
                assert numbers.tolist() == list(index.numbers(split))
                assert np.array_equal(truth, expected[split][1])
                assert np.array_equal(predicted, expected[split][2]), (world, stage, split)
                assert metrics == expected[split][3]


@pytest.mark.parametrize(
    ("system", "stage"),
    [("ufen_mtfn", 1), ("ufen_mtfn", 3), ("self_mm", 0), ("self_mm", 2)]
    + [pytest.param(s, 2, marks=[] if get_system(s).labels != "none" else pytest.mark.slow) for s in OTHERS],
)
def test_a_restart_is_invisible(ranks: Callable[..., Any], data: Path, tmp_path: Path, system: str, stage: int) -> None:
    """Law 3: stopped in epoch 2 after a checkpoint in mid-epoch; bitwise at the same world size, 1e-5 at another.

    Dropout is on where the system has it: its randomness is a function of the step.
    """
    changes: dict[str, Any] = {"engine": {"zero": stage}, "checkpoint": {"every_steps": 4}, "train": {"epochs": 3}}
    recipe = recipe_for(system, data, **changes).dump()
    whole = ranks(train, 2, tmp_path / "whole", recipe)[0]
    ranks(train, 2, tmp_path / "cut", recipe, 10)
    again = ranks(train, 2, tmp_path / "cut", recipe)[0]
    assert again["losses"] == whole["losses"][-len(again["losses"]) :]
    assert len(again["losses"]) < len(whole["losses"]) - 4, "it must have gone on from a checkpoint, not from the start"
    assert again["result"] == whole["result"]
    for name, value in whole["labels"].items():
        assert torch.equal(again["labels"][name], value), name

    ranks(train, 2, tmp_path / "moved", recipe, 10)
    moved = ranks(train, 1, tmp_path / "moved", recipe_for(system, data, **{**changes, "engine": {"zero": 1}}).dump())[
        0
    ]
    n = min(8, len(moved["losses"]))
    assert moved["losses"][:n] == pytest.approx(again["losses"][:n], abs=1e-5)


def test_a_restart_is_invisible_wherever_the_run_stopped(ranks: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """Law 3: right after a checkpoint, in an epoch's last step, and in the first of the next."""
    recipe = recipe_for("self_mm", data, checkpoint={"every_steps": 4}).dump()
    whole = ranks(train, 2, tmp_path / "whole", recipe)[0]
    assert len(whole["losses"]) == 12, "six steps an epoch"
    for taken, saved in ((4, 4), (5, 4), (6, 6)):
        ranks(train, 2, tmp_path / str(taken), recipe, taken)
        again = ranks(train, 2, tmp_path / str(taken), recipe)[0]
        assert again["losses"] == whole["losses"][saved:], taken
        assert again["result"] == whole["result"], taken


def opened(folder: Path, recipe: dict[str, Any]) -> int:
    """The step that this rank goes on from; all but the first do not see the newest checkpoint in a list yet."""
    from mmsa_dist import checkpoint
    from mmsa_dist.session import open_session

    saved = checkpoint.saved
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            patch.setattr(checkpoint, "saved", lambda folder: saved(folder)[:-1])
        session = open_session(from_dict(recipe), folder, dist.get_rank(), dist.get_world_size())
    session.close()
    return session.engine.steps


def test_all_ranks_go_on_from_the_same_step(ranks: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """A folder that nodes share may be listed late on some."""
    recipe = recipe_for("ufen_mtfn", data, checkpoint={"every_steps": 4, "keep": 2}).dump()
    assert ranks(opened, 2, tmp_path, recipe) == [0, 0]
    ranks(train, 2, tmp_path, recipe, 10)
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2
    assert ranks(opened, 2, tmp_path, recipe) == [8, 8]


def test_the_test_split_is_sacred(ranks: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """Law 6: with its shards gone, everything works but the very last read, and not even that where it is not asked."""
    import shutil

    copy = tmp_path / "no-test"
    shutil.copytree(data, copy)
    for file in copy.glob("test-*"):
        file.unlink()
    recipe = recipe_for("ufen_mtfn", copy, train={"test": False})
    result = ranks(train, 2, tmp_path / "run", recipe.dump())[0]["result"]
    assert "test" not in result and result["valid"]["mae"] is not None
    kept = ranks(train, 2, tmp_path / "with", recipe_for("ufen_mtfn", data).dump())[0]["result"]
    assert kept["valid"] == result["valid"] and kept["best_epoch"] == result["best_epoch"]


def test_early_stopping_keeps_the_best(ranks: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """Learning rates far too high: validation gets worse, the run stops, and the best epoch's weights are reported."""
    high = {"lr": {"text": 0.3, "audio": 0.3, "vision": 0.3, "rest": 0.3}}
    recipe = recipe_for("self_mm", data, optim=high, train={"epochs": 12, "patience": 2})
    run = ranks(train, 1, tmp_path / "run", recipe.dump())[0]
    values = [epoch["valid_mae"] for epoch in run["epochs"]]
    best = int(np.argmin(values))
    assert len(values) == best + 3 < 12
    assert run["result"]["best_epoch"] == best + 1
    assert run["result"]["valid"]["mae"] == pytest.approx(values[best], abs=1e-6)
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(steps) == 2, "the best and the newest are kept"


def test_recipe_of_a_run_reads_back(data: Path, tmp_path: Path) -> None:
    from mmsa_dist.recipe import read_recipe

    recipe = recipe_for("self_mm", data)
    folder = run_folder.create(tmp_path, "x", recipe.dump())
    assert read_recipe(folder / "recipe.yaml") == recipe
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["system"] == "self_mm"
