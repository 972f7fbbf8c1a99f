"""The loader: the plan's batches in the plan's order, whatever reads them; errors at their place; no thread left."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.batch import Batch, BatchSpec
from shards.costs import CostRule
from shards.errors import DataError
from shards.index import Index
from shards.loader import Loader
from shards.mix import AnyIndex, Mix, open_reader
from shards.plan import evaluation_plan, training_plan
from shards.read import ShardReader
from shards.utterance import Utterance
from tests.shards.made import overwrite, packed, utterances

COUNTS = {"train": 61, "valid": 13, "test": 4}
LENGTHS = CostRule((("length_text", 6), ("length_audio", 5)))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return packed(tmp_path_factory.mktemp("data") / "made", utterances(COUNTS, absent=0.2))


SETS = {
    "one sample": (1, 8192),
    "a sample a shard": (9, 1),
    "one shard": (30, 1 << 20),
    "few shards": (17, 20_000),
    "many shards": (61, 8192),
    "most": (131, 30_000),
}
"""Training samples, and about how many bytes a shard has."""

MIXES = {"a mix": ("few shards", "many shards"), "an uneven mix": ("one sample", "one shard", "a sample a shard")}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AnyIndex]:
    """`SETS` and `MIXES`, packed."""
    folder = tmp_path_factory.mktemp("sets")
    held: dict[str, AnyIndex] = {}
    for seed, (name, (samples, shard_bytes)) in enumerate(SETS.items()):
        made = utterances({"train": samples}, seed, absent=0.2 if samples > 9 else 0)
        held[name] = index = packed(folder / str(seed), made, shard_bytes, name=f"set-{seed}")
        assert index.splits["train"] == samples
    shards = [len(held[name].shards_of("train")) for name in SETS]
    assert shards[:3] == [1, 9, 1] and 1 < shards[3] < shards[5] < shards[4], shards
    return held | {name: Mix([cast(Index, held[part]) for part in parts]) for name, parts in MIXES.items()}


def make_loader(index: AnyIndex, readers: int, spec: BatchSpec | None = None) -> Loader:
    return Loader(open_reader(index), spec or BatchSpec.of(index), readers)


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mmsa-reader")]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys and one.norm == other.norm
    for field in ("values", "lengths", "present", "labels"):
        mine, others = getattr(one, field), getattr(other, field)
        assert mine.keys() == others.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], others[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one.numbers, other.numbers) and torch.equal(one.weight, other.weight)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from([*SETS, *MIXES]),
    pool=st.integers(0, 3),
    seed=st.integers(0, 99),
    epoch=st.integers(1, 9),
    batch=st.integers(1, 40),
    window=st.integers(1, 8),
    world=st.integers(1, 8),
    accumulation=st.integers(1, 4),
    readers=st.integers(0, 4),
    data=st.data(),
)
def test_law_2_through_real_shards(
    sets: dict[str, AnyIndex],
    name: str,
    pool: int,
    seed: int,
    epoch: int,
    batch: int,
    window: int,
    world: int,
    accumulation: int,
    readers: int,
    data: st.DataObject,
) -> None:
    """Every key of the split once an epoch, over all ranks, with a restart in the middle at another number of ranks.

    Of one data set of any size or of several, sorted by length or not: each sample's length is looked up in its
    shard's table.
    """
    held = sets[name]
    plan = training_plan(held, "train", seed, epoch, batch, window, pool, LENGTHS if pool else None)
    stop = data.draw(st.integers(0, plan.num_steps - 1), label="stop")
    after = data.draw(st.integers(1, 8), label="ranks after the restart")

    def steps(ranks: int, start: int) -> list[list[list[Batch]]]:
        """Per step, per rank, its micro-batches."""
        with make_loader(held, readers) as loader:
            return list(
                zip(*(list(loader.train(plan, rank, ranks, accumulation, start)) for rank in range(ranks)), strict=True)
            )

    run = steps(world, 0)[:stop] + steps(after, stop)
    assert len(run) == plan.num_steps
    seen = []
    for s, ranks in enumerate(run):
        batches = [micro for rank in ranks for micro in rank]
        assert len({len(rank) for rank in ranks}) == 1 == len({b.size for b in batches})
        real = [(key, int(n)) for b in batches for key, n, w in zip(b.keys, b.numbers, b.weight, strict=True) if w]
        assert [number for _, number in real] == plan.step(s).tolist()
        assert sum(float(b.weight.sum()) for b in batches) == pytest.approx(batches[0].norm * len(batches))
        if pool and len(real) == batch:
            costs = [6 * int(t) + 5 * int(a) * bool(p) for b in batches for t, a, p, w in rows(b) if w]
            assert costs == sorted(costs)
        seen += [key for key, _ in real]
    assert sorted(seen) == sorted(key for n in held.shards_of("train") for key in held.table(n)["key"].to_pylist())


def rows(batch: Batch) -> Iterator[tuple[torch.Tensor, ...]]:
    """Text length, audio length, whether it has audio, weight of each sample."""
    return zip(batch.lengths["text"], batch.lengths["audio"], batch.present["audio"], batch.weight, strict=True)


def test_one_step_alone_is_the_epochs(index: Index) -> None:
    plan = training_plan(index, "train", 3, 1, 8)
    with make_loader(index, 1) as loader:
        for step, batches in enumerate(loader.train(plan, 1, 2, 2)):
            alone = loader.step(plan, step, 1, 2, 2)
            assert len(alone) == len(batches) == 2
            for one, other in zip(alone, batches, strict=True):
                assert_equal(one, other)


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_readers_do_not_change_a_batch(index: Index, readers: int) -> None:
    plan = training_plan(index, "train", seed=1, epoch=2, global_batch=9, window=3)
    valid = evaluation_plan(index, "valid", 4)
    with make_loader(index, 0) as inline, make_loader(index, readers) as loader:
        for rank in range(2):
            for one, other in zip(inline.train(plan, rank, 2, 2), loader.train(plan, rank, 2, 2), strict=True):
                for mine, others in zip(one, other, strict=True):
                    assert_equal(mine, others)
            for mine, others in zip(inline.evaluate(valid, rank, 2), loader.evaluate(valid, rank, 2), strict=True):
                assert_equal(mine, others)


@pytest.mark.parametrize("readers", [0, 2])
def test_starting_anywhere_gives_the_tail(index: Index, readers: int) -> None:
    plan = training_plan(index, "train", seed=1, epoch=0, global_batch=7)
    with make_loader(index, readers) as loader:
        whole = list(loader.train(plan, 0, 1, 2))
        for start in (0, 1, plan.num_steps - 1, plan.num_steps):
            tail = list(loader.train(plan, 0, 1, 2, start))
            assert len(tail) == plan.num_steps - start
            for mine, others in zip(tail, whole[start:], strict=True):
                for one, other in zip(mine, others, strict=True):
                    assert_equal(one, other)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_sees_each_sample_once_whatever_the_ranks(index: Index, world: int) -> None:
    plan = evaluation_plan(index, "valid", 4)
    with make_loader(index, 2) as loader:
        ranks = [list(loader.evaluate(plan, rank, world)) for rank in range(world)]
        alone = list(loader.evaluate(plan, 0, 1))
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    for mine, others in zip(in_order, alone, strict=False):  # a batch does not depend on the ranks
        assert_equal(mine, others)
    for filler in in_order[len(alone) :]:
        assert not filler.weight.any() and filler.norm == 1
    numbers = torch.cat([batch.numbers[batch.weight > 0] for batch in in_order])
    assert numbers.tolist() == list(index.numbers("valid"))


def spoiled(index: Index, folder: Path, shard_no: int) -> Index:
    """The data set with one shard that cannot be read."""
    copy = Index.load(shutil.copytree(index.folder, folder))
    overwrite(copy.tar_path(shard_no), 2000, b"\xde\xad")
    return copy


@pytest.mark.parametrize("readers", [0, 1, 4])
def test_an_error_comes_at_its_batch_and_nothing_hangs(index: Index, tmp_path: Path, readers: int) -> None:
    plan = training_plan(index, "train", seed=0, epoch=0, global_batch=4, window=1)
    shard_no, _ = index.locate(int(plan.step(plan.num_steps - 1)[-1]))
    bad = spoiled(index, tmp_path / "bad", shard_no)
    numbers = set(range(bad.first(shard_no), bad.first(shard_no + 1)))
    good = 0  # steps before the first that needs the bad shard
    while not numbers & set(plan.step(good).tolist()):
        good += 1
    assert good > 3
    with make_loader(bad, readers) as loader:
        batches = loader.train(plan, 0, 1)
        for _ in range(good):
            next(batches)
        with pytest.raises(DataError, match=f"{bad.tar_path(shard_no).name}: sha256 is"):
            next(batches)
        assert next(batches, None) is None
        # the loader itself still works: another split is whole
        assert len(list(loader.evaluate(evaluation_plan(bad, "valid", 4), 0, 1))) == 4
    assert reader_threads() == []


def test_a_bug_in_a_callback_is_not_swallowed(index: Index) -> None:
    def broken(samples: list[Utterance]) -> list[np.ndarray]:
        raise TypeError("ours")

    with make_loader(index, 2, BatchSpec.of(index, text_ids=broken)) as loader, pytest.raises(TypeError, match="ours"):
        next(loader.train(training_plan(index, "train", 0, 0, 8), 0, 1))
    assert reader_threads() == []


@pytest.mark.parametrize("readers", [1, 3])
def test_threads_are_bounded_persist_over_epochs_and_end_on_close(index: Index, readers: int) -> None:
    loader = make_loader(index, readers)
    assert reader_threads() == []
    known: set[int | None] = set()
    for epoch in range(3):
        for _ in loader.train(training_plan(index, "train", 0, epoch, 5), 0, 1):
            known |= {thread.ident for thread in reader_threads()}
    assert 1 <= len(known) <= readers
    loader.close()
    assert reader_threads() == []
    loader.close()


@pytest.mark.parametrize("readers", [0, 2])
def test_reading_begins_before_a_batch_is_asked_for(index: Index, readers: int) -> None:
    """So an epoch's first batches are read while the one before is evaluated, and its samples are chosen meanwhile."""
    plan = training_plan(index, "train", 0, 0, 4)
    by: set[str] = set()

    class Telling(ShardReader):
        def samples(self, numbers: "np.ndarray", with_text: bool = False) -> list[Utterance]:  # type: ignore[override]
            by.add(threading.current_thread().name)
            return super().samples(numbers, with_text)

    with Loader(Telling(index), BatchSpec.of(index), readers) as loader:
        ahead = loader.train(plan, 0, 1)
        deadline = time.monotonic() + 10
        while readers and not by and time.monotonic() < deadline:
            time.sleep(0.01)
        assert bool(by) == bool(readers)
        assert len(list(loader.evaluate(evaluation_plan(index, "valid", 4), 0, 1)))  # meanwhile
        assert [b.numbers.tolist() for (b,) in ahead] == [plan.step(s).tolist() for s in range(plan.num_steps)]
        unused = loader.train(plan, 0, 1)
        unused.close()
        assert next(unused, None) is None
    assert all(name.startswith("mmsa-reader" if readers else "MainThread") for name in by)


def test_evaluation_does_not_wait_for_the_next_epoch(index: Index) -> None:
    """Whose shards may be slow to come from a server that is in trouble."""
    train, there = set(index.numbers("train")), threading.Event()

    class Slow(ShardReader):
        def samples(self, numbers: "np.ndarray", with_text: bool = False) -> list[Utterance]:  # type: ignore[override]
            assert not train & set(numbers.tolist()) or there.wait(30)
            return super().samples(numbers, with_text)

    with Loader(Slow(index), BatchSpec.of(index), 1) as loader:
        ahead = loader.train(training_plan(index, "train", 0, 0, 4), 0, 1)
        assert len(list(loader.evaluate(evaluation_plan(index, "valid", 4), 0, 1))) > 1
        assert not there.is_set()
        there.set()
        assert len(next(ahead)) == 1
        ahead.close()


def test_an_iterator_left_in_the_middle_leaves_no_work(index: Index) -> None:
    loader = make_loader(index, 2)
    batches = loader.train(training_plan(index, "train", 0, 0, 3), 0, 1)
    next(batches)
    batches.close()
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 5 and reader_threads() == []


def test_so_many_batches_ahead_and_no_more(index: Index) -> None:
    """Memory is bounded: a consumer that does not come stops the readers."""
    asked: list[int] = []

    class Counting(ShardReader):
        def samples(self, numbers: "np.ndarray", with_text: bool = False) -> list[Utterance]:  # type: ignore[override]
            asked.append(len(numbers))
            return super().samples(numbers, with_text)

    readers = 2
    with Loader(Counting(index), BatchSpec.of(index), readers) as loader:
        batches = loader.train(training_plan(index, "train", 0, 0, 2), 0, 1)
        next(batches)
        deadline = time.monotonic() + 10
        while len(asked) < 2 * readers + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(asked) == 2 * readers + 1  # the one in use and those ahead


def test_text_reaches_the_tokenizer_one_thread_at_a_time(index: Index) -> None:
    texts: list[str] = []
    inside = threading.Semaphore(1)

    def ids(samples: list[Utterance]) -> list[np.ndarray]:
        assert inside.acquire(blocking=False), "two threads in a tokenizer"
        time.sleep(0.001)
        texts.extend(str(u.raw_text) for u in samples)
        inside.release()
        return [np.arange(1, 1 + len(str(u.raw_text)) % 7 + 1) for u in samples]

    plan = training_plan(index, "train", 0, 0, 4)
    with make_loader(index, 4, BatchSpec.of(index, ("text", "audio"), ids)) as loader:
        batches = [batch for step in loader.train(plan, 0, 1) for batch in step]
    assert sorted(set(texts)) == sorted(f"words of {key}" for batch in batches for key in set(batch.keys))
    assert all(batch.values["text"].dtype == torch.int64 for batch in batches)
