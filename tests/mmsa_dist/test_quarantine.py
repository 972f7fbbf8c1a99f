"""FAULTS 3, "quarantine when asked": damaged shards are known before the run begins, to all ranks and all restarts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import session, train
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.recipe import Recipe, differences, from_dict
from shards.index import Index
from shards.write import pack
from tests.data import TinySource
from tests.mmsa_dist.test_laws import recipe_for
from tests.mmsa_dist.test_laws import train as train_ranks
from tests.shards.made import overwrite

pytestmark = pytest.mark.fault


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """A data set of which two shards of the train split are damaged."""
    made = pack(TinySource(60, 0.1, 0), tmp_path / "set", dtype="float32", shard_bytes=8_000)[0]
    overwrite(made.tar_path(0), 700, b"\x99\x99")
    made.table_path(1).unlink()
    return made


def asked(index: Index, **data: Any) -> Recipe:
    values = recipe_for("self_mm", index.folder, train={"epochs": 1}).dump()
    values["data"] |= data
    return from_dict(values)


def test_all_ranks_go_without_them(
    ranks: Callable[..., Any], index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, recipe = train.check(asked(index, quarantine=True))
    lost = index.shards[0].samples + index.shards[1].samples
    said = capsys.readouterr().out
    assert f"2 damaged shards left out, {lost} of {index.splits['train']} train samples lost" in said
    assert f"{index.tar_path(0)}: sha256 is" in said and str(index.table_path(1)) in said
    assert left.splits == {**index.splits, "train": index.splits["train"] - lost}
    folder = train.begin(recipe, left, None, tmp_path / "runs", "run")
    for run in ("one", "two"):
        shutil.copytree(folder, tmp_path / run)
    addresses = [f"{index.name}/{index.shards[n].url}" for n in (0, 1)]
    assert json.loads((folder / "plan.json").read_text())["left_out"] == addresses
    one = train_ranks_of(ranks, 1, tmp_path / "one", recipe)[0]
    two = train_ranks_of(ranks, 2, tmp_path / "two", recipe)
    assert one["result"]["left_out"] == two[0]["result"]["left_out"] == addresses
    assert two[1]["losses"] == two[0]["losses"] == pytest.approx(one["losses"], abs=1e-5)


def train_ranks_of(ranks: Callable[..., Any], world: int, folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    return list(ranks(train_ranks, world, folder, recipe.dump()))


def test_a_restart_agrees_whatever_became_of_the_files(index: Index, tmp_path: Path) -> None:
    left, recipe = train.check(asked(index, quarantine=True))
    folder = train.begin(recipe, left, None, tmp_path / "runs", "run")
    again = from_dict(recipe.dump())
    same, resumed = train.check(again)
    assert same.fingerprint == left.fingerprint and resumed.data.without == recipe.data.without
    train.begin(resumed, same, folder, tmp_path / "runs", "run")
    overwrite(index.tar_path(2), 700, b"\x99\x99")  # one more: the data is no longer that of the run
    other, resumed = train.check(again)
    with pytest.raises(ConfigError, match="give the data that it began with"):
        train.begin(resumed, other, folder, tmp_path / "runs", "run")


def test_a_restart_agrees_where_the_data_was_moved(index: Index, tmp_path: Path) -> None:
    left, recipe = train.check(asked(index, quarantine=True))
    moved = index.folder.rename(tmp_path / "moved")
    there, resumed = train.check(from_dict({**recipe.dump(), "data": {**recipe.dump()["data"], "path": str(moved)}}))
    assert there.fingerprint == left.fingerprint and resumed.data.without == recipe.data.without
    assert not differences(recipe, resumed)


def test_without_being_asked_it_stops(index: Index) -> None:
    with pytest.raises(DataError, match=r"train-00001\.arrow: cannot be read"):
        train.check(asked(index))
    whole = session.open_index(asked(index))
    assert whole.splits == index.splits
    with pytest.raises(DataError, match="sha256 is"):
        session.open_reader(whole).sample(0)


def test_what_is_left_out_must_be_there(index: Index) -> None:
    with pytest.raises(ConfigError, match=r"data\.without: train-00000\.tar is no shard of"):
        train.check(asked(index, without=["train-00000.tar"]))


def test_nothing_left(index: Index) -> None:
    for n, shard in enumerate(index.shards):
        if shard.split == "valid":
            index.tar_path(n).unlink()
    with pytest.raises(DataError, match=r"no valid shard of .* is whole, e\.g\. .*valid-00000\.tar: .* pack again$"):
        train.check(asked(index, quarantine=True))


def test_what_is_done_already_is_not_advised(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    train.check(asked(index, quarantine=True))
    assert "--data.quarantine" not in capsys.readouterr().out
