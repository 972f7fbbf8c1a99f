"""Packing by several processes, or on Ray: the same bytes as by one, the same errors, and nobody left behind."""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError, DataError, TransientError
from shards.packing.job import Job
from shards.packing.processes import chosen
from shards.sources.generated import GeneratedSource
from shards.sources.mmsa import MmsaSource
from shards.utterance import SPLITS, Utterance
from shards.write import pack
from tests.shards import pickles
from tests.shards.made import WIDTHS, Samples, packed, utterances

COUNTS = {"train": 40, "valid": 9, "test": 11}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))  # servers of other tests
    yield
    now = set(psutil.Process().children(recursive=True)) - before
    left = [p for p in now if p.status() != psutil.STATUS_ZOMBIE]
    assert not [p for p in left if "ray" not in " ".join(p.cmdline())]


@given(
    counts=st.fixed_dictionaries({split: st.integers(1, 25) for split in SPLITS}),
    seed=st.integers(0, 2**32),
    shard_bytes=st.sampled_from([5_000, 20_000, 50_000, 1 << 20]),
    workers=st.sampled_from([2, 3, 5]),
    dtype=st.sampled_from(["float16", "float32"]),
)
@settings(max_examples=10)
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory,
    counts: dict[str, int],
    seed: int,
    shard_bytes: int,
    workers: int,
    dtype: str,
) -> None:
    folder = tmp_path_factory.mktemp("parallel")
    samples = utterances(counts, seed=seed, absent=0.3)
    for modality, width in WIDTHS.items():  # none is absent from all of train
        samples[0].modalities.setdefault(modality, np.ones((1, width), np.float32))
    options: dict[str, Any] = {"seed": seed, "shard_bytes": shard_bytes, "dtype": dtype}
    packed(folder / "one", samples, **options)
    packed(folder / "many", samples, workers=workers, **options)
    assert contents(folder / "one") == contents(folder / "many")


def features(folder: Path, aligned: bool) -> Path:
    """A feature pickle as it is published, with a label beyond the usual range and a value that is none."""
    data = {name: pickles.split(name, count, aligned=aligned, unimodal=True) for name, count in COUNTS.items()}
    data["train"]["text"][3, 0, 0] = np.nan
    data["test"]["regression_labels"][-1] = 4.0
    return pickles.written(folder, data)


CHOSEN: dict[str, Any] = {"label_range": (-5.0, 5.0), "modalities": ("text", "vision")}
"""Not the defaults: a copy of the source that forgot one of them would read something else."""


@pytest.mark.parametrize("aligned", [False, True])
def test_a_feature_pickle_gives_the_same_bytes_by_one_process_and_by_three(tmp_path: Path, aligned: bool) -> None:
    source = MmsaSource(features(tmp_path, aligned), **CHOSEN)
    index, one = pack(source, tmp_path / "one", shard_bytes=5_000, workers=1)
    _, three = pack(source, tmp_path / "three", shard_bytes=5_000, workers=3)
    assert all(len(index.shards_of(split)) > 3 for split in SPLITS) and index.num_samples == sum(COUNTS.values())
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert one == three and any("NaN or infinite; zeroed" in note for note in one)


def test_notes_are_complete_whoever_packs(tmp_path: Path) -> None:
    """What is counted in other processes arrives: values that were mended, modalities that are absent, remarks."""
    samples = utterances(COUNTS, absent=0.3)
    for number, sample in enumerate(samples):
        sample.modalities["text"][0, 0] = np.nan if number % 3 else 1
    samples = [
        Utterance(u.key, u.split, u.modalities, u.labels, u.raw_text, u.tokens, remarks=("{:,} samples are odd",))
        for u in samples
    ]
    told = [
        pack(Samples(samples), tmp_path / str(workers), shard_bytes=8192, workers=workers)[1] for workers in (1, 2, 4)
    ]
    assert told[0] == told[1] == told[2]
    assert f"{len(samples):,} samples are odd" in told[0]
    assert any(note.startswith("text: ") and "NaN or infinite; zeroed" in note for note in told[0])
    assert any(note.startswith("audio: ") and "marked absent" in note for note in told[0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_first_error_in_order_is_told_whoever_meets_it_first(tmp_path: Path, split: str) -> None:
    """Samples of many shards are wrong, the later ones at once, the first after a while."""
    samples = utterances(COUNTS)
    wrong = [u for u in samples if u.split == split]
    for sample in wrong:
        sample.labels["M"] = 99.0
    division = Job(Samples(samples), "float16", 0, 8192).divide()
    first = next(piece for piece in division.pieces if piece.split == split)
    expected = wrong[int(first.samples[0])].key

    class Slow(Samples):
        def read(self, split: str, number: int) -> Utterance:
            if parent_process() and self._split[split][number].key == expected:
                time.sleep(0.3)
            return super().read(split, number)

    for workers in (1, 4):
        with pytest.raises(DataError, match="label M is 99") as caught:
            pack(Slow(samples), tmp_path / "set", shard_bytes=8192, workers=workers)
        assert repr(expected) in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_what_is_ours_to_mend_comes_with_its_traceback(tmp_path: Path) -> None:
    class Broken(GeneratedSource):
        def read(self, split: str, number: int) -> Utterance:
            if parent_process():
                raise ZeroDivisionError("a mistake of ours")
            return super().read(split, number)

    with pytest.raises(RuntimeError, match=r"(?s)train-00000: ZeroDivisionError.*in read"):
        pack(Broken("mosi", 30), tmp_path / "set", shard_bytes=100_000, workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """What the others have finished stays, and the same packing goes on with it."""

    class Murdered(GeneratedSource):
        def read(self, split: str, number: int) -> Utterance:
            if parent_process() and split == "test" and list(tmp_path.glob(".set.packing-*/valid-*.done.json")):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(split, number)

    with pytest.raises(TransientError, match=r"killed by SIGKILL \(out of memory\?.* shards are finished and kept"):
        pack(Murdered("mosi", 60), tmp_path / "set", shard_bytes=200_000, workers=2)
    (left,) = tmp_path.iterdir()
    assert not list(left.glob("*.part")) and list(left.glob("train-*.tar"))
    source = GeneratedSource("mosi", 60)
    pack(source, tmp_path / "set", shard_bytes=200_000, workers=2)
    pack(source, tmp_path / "again", shard_bytes=200_000)
    assert contents(tmp_path / "set") == contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "set"]


def test_odd_sizes(tmp_path: Path) -> None:
    """One sample a split; a shard smaller than any sample; more processes than shards."""
    index = packed(tmp_path / "few", utterances({}), shard_bytes=1, workers=8)
    assert [shard.samples for shard in index.shards] == [1, 1, 1]
    index = packed(tmp_path / "tiny", utterances({"train": 5}), shard_bytes=0, workers=3)
    assert [shard.samples for shard in index.shards] == [1] * 7


@given(st.integers(1, 500), st.integers(1, 200_000))
def test_shards_of_a_split_are_alike(count: int, shard_bytes: int) -> None:
    pieces = Job(GeneratedLike(count), "float16", 0, shard_bytes).divide().pieces
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    for split in SPLITS:
        sizes = [len(piece.samples) for piece in pieces if piece.split == split]
        assert max(sizes) - min(sizes) <= 1 <= min(sizes)
        order = np.concatenate([piece.samples for piece in pieces if piece.split == split])
        assert sorted(order.tolist()) == list(range(count))


class GeneratedLike(Samples):
    """As many samples a split as wanted, all of them the same."""

    def __init__(self, count: int) -> None:
        super().__init__(utterances({}))
        self.counts = dict.fromkeys(SPLITS, count)

    def read(self, split: str, number: int) -> Utterance:
        return self._split[split][0]


def test_how_many_processes_there_are() -> None:
    assert chosen(None, 100, 10 * 2**20) == 1  # not worth it
    assert 1 <= chosen(None, 100, 2**40) <= 16
    assert chosen(0, 5, 2**40) == chosen(1, 5, 2**40) == 1
    assert chosen(8, 3, 0) == 3


# --- Ray


@pytest.mark.ray
def test_the_bytes_are_the_same_on_ray(tmp_path: Path, own_ray: str) -> None:
    source = GeneratedSource("mosi", 60)
    _, here = pack(source, tmp_path / "here", shard_bytes=300_000)
    _, there = pack(source, tmp_path / "there", shard_bytes=300_000, ray=own_ray)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert here == there
    samples = utterances(COUNTS)
    samples[-1].labels["M"] = 99.0
    with pytest.raises(DataError, match="label M is 99"):
        packed(tmp_path / "wrong", samples, ray=own_ray)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


@pytest.mark.ray
@pytest.mark.parametrize("aligned", [False, True])
def test_a_feature_pickle_gives_the_same_bytes_on_ray(
    tmp_path: Path, own_ray: str, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of Ray's processes opens the file anew, at the place where it is, wherever the process itself was begun."""
    features(tmp_path, aligned)
    monkeypatch.chdir(tmp_path)
    source = MmsaSource(Path("features.pkl"), **CHOSEN)
    index, here = pack(source, tmp_path / "here", shard_bytes=5_000)
    _, there = pack(source, tmp_path / "there", shard_bytes=5_000, ray=own_ray)
    assert all(len(index.shards_of(split)) > 3 for split in SPLITS)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert here == there


@pytest.mark.ray
def test_a_node_that_does_not_see_the_folder(tmp_path: Path, own_ray: str) -> None:
    from shards.packing import on_ray

    job = Job(GeneratedSource("mosi", 9), "float16", 0, 1 << 20)
    elsewhere = on_ray.OnRay(job, tmp_path / "nowhere", own_ray, 0)
    with elsewhere, pytest.raises(ConfigError, match=r"does not see .*nowhere: --ray packs into a folder that all no"):
        list(elsewhere.work(job.divide().pieces, lambda samples, written: None))


@pytest.mark.ray
def test_a_node_that_does_not_see_the_input(tmp_path: Path, own_ray: str) -> None:
    class Elsewhere(GeneratedSource):
        def __reduce__(self) -> Any:
            return open, ("/nowhere/unaligned_50.pkl",)

    with pytest.raises(ConfigError, match=r"cannot read generated like mosi: .*No such file.*at the same path on all"):
        pack(Elsewhere("mosi", 9), tmp_path / "set", ray=own_ray)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_a_source_that_cannot_be_sent(tmp_path: Path, own_ray: str) -> None:
    class Open(GeneratedSource):
        def __reduce__(self) -> Any:
            raise TypeError("an open file cannot be pickled")

    with pytest.raises(ConfigError, match=r"generated like mosi cannot be sent to other machines .*leave --ray out"):
        pack(Open("mosi", 9), tmp_path / "set", ray=own_ray)
    assert list(tmp_path.iterdir()) == []
