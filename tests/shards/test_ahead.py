"""Shards of a file system are verified before their samples are due, once, and what is wrong is said in its place."""

import time
from pathlib import Path

import pytest

from shards import trust
from shards.ahead import Ahead
from shards.batch import BatchSpec
from shards.errors import DataError
from shards.index import Index
from shards.loader import Loader
from shards.plan import Plan, training_plan
from shards.read import ShardReader
from tests.processes import wait_until
from tests.shards.made import overwrite, packed, utterances


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Index:
    index = packed(tmp_path_factory.mktemp("data") / "made", utterances({"train": 80}), 8192)
    time.sleep(0.2)  # what was written just now is not remembered
    return index


@pytest.fixture
def index(made: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    """Of which nothing was verified."""
    monkeypatch.setenv("MMSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "_verified", set())
    assert len(made.shards) > 5
    return made


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files in the order in which they are read for their checksums."""
    seen, sha256_of = list[Path](), trust.sha256_of

    def noted(path: Path) -> str:
        seen.append(path)
        return sha256_of(path)

    monkeypatch.setattr(trust, "sha256_of", noted)
    return seen


def needed(index: Index, plan: Plan) -> list[int]:
    """The shard of each step."""
    return [index.locate(int(plan.step(step)[0]))[0] for step in range(plan.num_steps)]


def test_those_that_come_next_are_verified(index: Index, hashed: list[Path]) -> None:
    plan = training_plan(index, "train", 1, 1, global_batch=1, window=2)
    order = needed(index, plan)
    wanted = list(dict.fromkeys(order))
    with Ahead(index, plan.order, begin=0, depth=2) as ahead:
        for count in (2, 4, len(wanted)):
            files = {path for n in wanted[:count] for path in (index.table_path(n), index.tar_path(n))}
            wait_until(lambda files=files: set(hashed) >= files, 20)  # type: ignore[misc]
            time.sleep(0.05)
            assert set(hashed) == files and len(hashed) == len(files)
            due = order.index(wanted[1]) + 1 if count == 2 else plan.num_steps
            ahead.reach(due)


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("verify", [True, False])
def test_each_is_read_once_for_all_who_need_it(index: Index, hashed: list[Path], readers: int, verify: bool) -> None:
    plan = training_plan(index, "train", 1, 1, global_batch=4, window=3)
    with ShardReader(index, verify) as reader, Loader(reader, BatchSpec.of(index), readers) as loader:
        assert len(list(loader.train(plan, 0, 1))) == plan.num_steps
    files = {path for n in index.shards_of("train") for path in (index.table_path(n), index.tar_path(n))}
    assert len(hashed) == len(set(hashed)) and set(hashed) == (files if verify else set())


def test_a_damaged_one_is_told_of_when_it_is_needed(tmp_path: Path) -> None:
    index = packed(tmp_path / "damaged", utterances({"train": 80}), 8192)
    plan = training_plan(index, "train", 1, 1, global_batch=2, window=1)
    steps = [{index.locate(int(number))[0] for number in plan.step(step)} for step in range(plan.num_steps)]
    (bad,) = steps[-1]
    overwrite(index.tar_path(bad), index.shards[bad].bytes - 2000, b"other bytes")
    due = next(step for step, shards in enumerate(steps) if bad in shards)
    with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), 0) as loader:
        batches = loader.train(plan, 0, 1)
        for _ in range(due):
            next(batches)
            time.sleep(0.01)  # it has been met, ahead
        with pytest.raises(DataError, match=r"sha256 is .*, expected"):
            next(batches)
