"""Learning rates that a recipe changes on the way (`optim.lr_from`), and a run that pauses after an epoch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mmsa_dist import checkpoint, run_folder, session, stopping
from mmsa_dist.config import GroupValues
from mmsa_dist.errors import ConfigError, StoppedError
from mmsa_dist.recipe import from_dict, load_recipe, recipe_class
from shards.index import Index
from tests.data import packed
from tests.mmsa_dist.test_laws import recipe_for, train

GROUPS = ("text", "audio", "vision", "rest")
SLOW = dict.fromkeys(GROUPS, 1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("rates"), samples=60)


def until(folder: Path, recipe: dict[str, Any], epoch: int) -> list[float]:
    """One rank of a run that pauses after `epoch`; the learning rate ``rest`` of each epoch that it ended."""
    from mmsa_dist.ledger import Ledger
    from mmsa_dist.loop import fit
    from mmsa_dist.session import open_session
    from mmsa_dist.tracking import NullTracker

    rank = dist.get_rank()
    for part in ("events", "checkpoints", "predictions"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    opened = open_session(from_dict(recipe), folder, rank, dist.get_world_size())
    events = run_folder.Events(folder, rank)
    epochs: list[dict[str, Any]] = []
    try:
        with pytest.raises(StoppedError, match=rf"saved after step {opened.engine.steps or 6}"):
            fit(opened, events, NullTracker(), epochs.append, Ledger(), stopping.Requests(folder, rank, epoch))
    finally:
        events.close()
        opened.close()
    return [each["lr_rest"] for each in epochs]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_pauses_and_goes_on_at_other_rates_is_one_that_changes_them_itself(
    world: int, ranks: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    def recipe(**optim: Any) -> dict[str, Any]:
        fast = dict.fromkeys(GROUPS, 1e-3)
        return recipe_for("self_mm", data, optim={"lr": fast, **optim}, train={"epochs": 4}).dump()

    whole = recipe(lr_from=[{"epoch": 3, **SLOW}])
    paused = tmp_path / "paused"
    assert ranks(until, world, paused, recipe(), 2)[0] == [1e-3, 1e-3]
    assert stopping.paused(paused) == 2 and not (paused / "result.json").exists()
    saved = checkpoint.load_latest(paused / "checkpoints")
    assert saved is not None and (saved.progress["epoch"], saved.progress["step_in_epoch"]) == (3, 0)

    stopping.forget(paused)
    assert ranks(until, world, paused, whole, 2)[0] == [], "it is there already: not a step is taken"
    assert stopping.paused(paused) == 2

    stopping.forget(paused)
    after = ranks(train, world, paused, whole)[0]
    alone = ranks(train, world, tmp_path / "alone", whole)[0]
    assert (
        after["losses"] == alone["losses"][6:] and after["epochs"][-1]["valid_mae"] == alone["epochs"][-1]["valid_mae"]
    )
    assert [each["lr_rest"] for each in alone["epochs"]] == [1e-3, 1e-3, 1e-4, 1e-4]
    constant = ranks(train, world, tmp_path / "constant", recipe())[0]
    assert constant["losses"][:7] == alone["losses"][:7] and constant["losses"][8:] != alone["losses"][8:]


def test_schedule_and_warm_up_scale_the_changed_rates_too(
    ranks: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    change = {"lr": dict.fromkeys(GROUPS, 1e-3), "lr_from": [{"epoch": 2, **SLOW}], "schedule": "linear"}
    recipe = recipe_for("self_mm", data, optim=change, train={"epochs": 2})
    epochs = ranks(train, 1, tmp_path / "run", recipe.dump())[0]["epochs"]
    assert [each["lr_rest"] for each in epochs] == pytest.approx([1e-3 * (1 - 2 / 6), 1e-4 * (1 - 5 / 6)])


def test_the_rates_of_an_epoch(data: Path) -> None:
    fast = dict.fromkeys(GROUPS, 1e-2)
    optim = recipe_for("self_mm", data, optim={"lr_from": [{"epoch": 2, **SLOW}, {"epoch": 5, **fast}]}).optim
    assert optim.rates(1) == GroupValues(**dict.fromkeys(GROUPS, 1e-3))
    assert [optim.rates(epoch).rest for epoch in range(1, 7)] == [1e-3, 1e-4, 1e-4, 1e-4, 1e-2, 1e-2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"epoch": 3, **SLOW}, {"epoch": 3, **SLOW}], r"`optim.lr_from`: .*the epochs must rise, found \[3, 3\]"),
        ([{"epoch": 1, **SLOW}], r"`optim.lr_from.0.epoch`: input should be greater than or equal to 2, found 1"),
        ([{"epoch": 2, **SLOW, "audoi": 1.0}], r"unknown key `optim.lr_from.0.audoi`; did you mean 'audio'"),
        ([{"epoch": 2}], r"`optim.lr_from.0.text`: field required"),
    ],
)
def test_wrong_changes_are_a_sentence(changes: list[Any], message: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for("self_mm", data, optim={"lr_from": changes})


def test_changes_stand_in_a_file_and_are_no_flag(tmp_path: Path, data: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "optim:\n  lr_from:\n  - {epoch: 3, text: 1.0e-5, audio: 1.0e-4, vision: 1.0e-4, rest: 1.0e-4}\n"
    )
    recipe = load_recipe("self_mm", str(tmp_path / "own.yaml"), ["--data", str(data), "--epochs", "2"])
    assert recipe.optim.lr_from[0].rest == 1e-4 and isinstance(recipe, recipe_class("self_mm"))
    notes = session.without_effect(recipe, Index.load(data))
    assert "optim.lr_from: epoch 3 comes after the last (train.epochs 2)" in notes
    with pytest.raises(ConfigError, match=r"lr-from"):
        load_recipe("self_mm", None, ["--data", str(data), "--optim.lr-from", "3"])
