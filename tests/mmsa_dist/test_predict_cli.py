"""`mmsa-dist predict`, from the command line's words to the file."""

import csv
import json
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsa_dist.__main__ import main as front_door
from mmsa_dist.errors import ConfigError, DataError, TransientError
from mmsa_dist.predict import main
from mmsa_dist.prediction.inputs import open_input
from mmsa_dist.predictions import Writer
from mmsa_dist.recipe import Recipe
from shards.index import Index
from shards.read import ShardReader
from shards.utterance import Utterance
from shards.write import pack
from tests.data import WIDTHS, TinySource
from tests.mmsa_dist import runs
from tests.mmsa_dist.conftest import Tracked, free_port

COLUMNS = ["key", "split", "y", "prediction", "prediction_text", "prediction_audio", "prediction_vision"]


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a predictions file, numbers as numbers."""
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [{k: v if k in ("key", "split") else (float(v) if v else None) for k, v in row.items()} for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_every_sample_has_its_row(suffix: str, trained: tuple[Path, Recipe], index: Index, tmp_path: Path) -> None:
    out = tmp_path / "inside" / f"predictions{suffix}"
    assert main([str(trained[0]), "--data", str(index.folder), "--out", str(out), "--batch-size", "7"]) == 0
    rows = read(out)
    assert list(rows[0]) == COLUMNS
    samples = ShardReader(index).samples(range(index.num_samples))
    assert [(row["key"], row["split"]) for row in rows] == [(sample.key, sample.split) for sample in samples]
    np.testing.assert_allclose([row["y"] for row in rows], [sample.labels["M"] for sample in samples], rtol=1e-6)
    with np.load(trained[0] / "predictions" / "test.npz") as saved:
        found = [row["prediction"] for row in rows if row["split"] == "test"]
        np.testing.assert_allclose(found, saved["p"], atol=1e-5)
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def test_a_registered_model_predicts_by_alias_version_and_run(tracked: Tracked, index: Index, tmp_path: Path) -> None:
    written = []
    for model in (
        "models:/tiny@champion",
        "models:/tiny/1",
        f"runs:/{tracked.run_id}",
        f"runs:/{tracked.run_id}/model",
    ):
        out = tmp_path / f"{len(written)}.csv"
        words = [model, "--data", str(index.folder), "--split", "test", "--out", str(out)]
        assert main([*words, "--runs-dir", str(tracked.runs_dir)]) == 0
        written.append(out.read_text())
    assert len(set(written)) == 1
    with np.load(tracked.folder / "predictions" / "test.npz") as saved:
        np.testing.assert_allclose([row["prediction"] for row in read(out)], saved["p"], atol=1e-5)


def test_metrics_are_those_of_the_run(
    trained: tuple[Path, Recipe], index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained[0]), "--data", str(index.folder), "--out", str(tmp_path / "p.csv")]
    main([*words, "--json"])
    told = json.loads(capsys.readouterr().out)
    result = json.loads((trained[0] / "result.json").read_text())
    assert told["synthetic"] is True
    assert list(told["metrics"]) == ["train", "valid", "test"]
    for split in ("valid", "test"):
        assert told["metrics"][split].pop("samples") == index.splits[split]
        assert told["metrics"][split] == pytest.approx(result[split], abs=1e-5)
    main([*words, "--split", "test"])
    table = capsys.readouterr().out
    assert (
        "synthetic" in table and f"{result['test']['mae']:.4f}" in table and f"test ({index.splits['test']})" in table
    )


def mmsa_pickle(file: Path, labels: bool = True, **changed: Any) -> Path:
    """An MMSA pickle of the tiny data set's test split, padded as its format asks."""
    source = TinySource(50, absent=0.0)
    samples = [source.read("test", number) for number in range(source.counts["test"])]
    split: dict[str, Any] = {"id": [sample.key for sample in samples], "raw_text": [s.raw_text for s in samples]}
    for name, width in WIDTHS.items():
        split[name] = np.zeros((len(samples), 12, width), np.float32)
        for row, sample in enumerate(samples):
            split[name][row, : len(sample.modalities[name])] = sample.modalities[name]
        split[f"{name}_lengths"] = [len(sample.modalities[name]) for sample in samples]
    if labels:
        split["regression_labels"] = np.array([sample.labels["M"] for sample in samples], np.float32)
    file.write_bytes(
        pickle.dumps({"test": {k: v for k, v in {**split, **changed}.items() if v is not None}}, protocol=4)
    )
    return file


def test_a_pickle_gives_what_its_packed_data_gives(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    pack(TinySource(50, absent=0.0), tmp_path / "packed", dtype="float32")
    main([str(trained[0]), "--data", str(mmsa_pickle(tmp_path / "new.pkl")), "--out", str(tmp_path / "a.csv")])
    main([str(trained[0]), "--data", str(tmp_path / "packed"), "--split", "test", "--out", str(tmp_path / "b.csv")])
    from_pickle, from_shards = ({row.pop("key"): row for row in read(tmp_path / name)} for name in ("a.csv", "b.csv"))
    assert from_pickle.keys() == from_shards.keys()
    for key, row in from_pickle.items():
        assert row.pop("split") == from_shards[key].pop("split") == "test"
        assert row == pytest.approx(from_shards[key], abs=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_without_labels_there_are_predictions_and_no_metrics(
    suffix: str, trained: tuple[Path, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = mmsa_pickle(tmp_path / "new.pkl", labels=False)
    main([str(trained[0]), "--data", str(data), "--out", str(tmp_path / f"p{suffix}")])
    rows = read(tmp_path / f"p{suffix}")
    assert len(rows) == 10
    assert all(row["y"] is None and abs(row["prediction"]) < 10 for row in rows)
    printed = capsys.readouterr()
    assert "no labels here" in printed.err and "MAE" not in printed.out


def test_what_is_not_finite_is_zeroed_as_in_packing(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    with np.errstate(invalid="ignore"):
        audio = np.zeros((10, 12, 5), np.float32)
    audio[:, 0, 0] = np.inf
    audio[:, 1, 1] = 1
    main(
        [str(trained[0]), "--data", str(mmsa_pickle(tmp_path / "a.pkl", audio=audio)), "--out", str(tmp_path / "a.csv")]
    )
    audio[:, 0, 0] = 0
    main(
        [str(trained[0]), "--data", str(mmsa_pickle(tmp_path / "b.pkl", audio=audio)), "--out", str(tmp_path / "b.csv")]
    )
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_samples_that_lack_all_that_is_read_are_answered_alike_and_counted(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training takes such samples, so predicting does too."""
    run, _ = runs.trained(tmp_path, index, data={"modalities": ["audio"]}, epochs=1)
    lacking = {s.key for s in ShardReader(index).samples(range(index.num_samples)) if "audio" not in s.modalities}
    out = tmp_path / "p.csv"
    for size in ("1", "64"):
        assert main([str(run), "--data", str(index.folder), "--out", str(out), "--batch-size", size]) == 0
        rows = read(out)
        assert len(rows) == index.num_samples and len(lacking) > 1
        assert len({round(row["prediction"], 5) for row in rows if row["key"] in lacking}) == 1
        assert f"note: {len(lacking)} of {len(rows)} samples have none of audio" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["[/x]/p.csv", "a[bold]:smile:.jsonl", "P.CSV"])
def test_a_name_is_taken_as_it_stands(
    name: str, trained: tuple[Path, Recipe], index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert main([str(trained[0]), "--data", str(index.folder), "--split", "test", "--out", str(out)]) == 0
    assert f"{index.splits['test']} predictions in {out}\n" in capsys.readouterr().err
    assert out.stat().st_size > 100


# --- what is said


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("place", ["file.csv/p", "x" * 300], ids=["below a file", "too long"])
def test_a_place_where_no_file_can_be_is_not_tried_again(
    place: str, suffix: str, trained: tuple[Path, Recipe], index: Index, tmp_path: Path
) -> None:
    (tmp_path / "file.csv").touch()
    out = tmp_path / f"{place}{suffix}"
    text = said(ConfigError, str(trained[0]), "--data", str(index.folder), "--split", "test", "--out", str(out))
    assert str(out) in text and "choose another --out" in text
    assert [file.name for file in tmp_path.iterdir()] == ["file.csv"]


def said(error: type[Exception], *words: str) -> str:
    with pytest.raises(error) as raised:
        main(list(words))
    return str(raised.value)


@pytest.mark.parametrize("name", ["p.xlsx", "p", "p.csv.gz"])
def test_an_unknown_format_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    text = said(ConfigError, "no-model", "--data", "no-data", "--out", str(tmp_path / name))
    assert ".csv, .parquet, .jsonl" in text


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "p.csv").mkdir()
    assert "is a folder" in said(ConfigError, "no-model", "--data", "no-data", "--out", str(tmp_path / "p.csv"))


def test_data_that_is_not_there_or_is_no_data(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "p.csv")]
    assert "does not exist" in said(ConfigError, str(trained[0]), "--data", str(tmp_path / "none"), *out)
    (tmp_path / "text.txt").write_text("x")
    text = said(ConfigError, str(trained[0]), "--data", str(tmp_path / "text.txt"), *out)
    assert "neither a folder nor a .pkl" in text
    assert "no index.json" in said(DataError, str(trained[0]), "--data", str(tmp_path), *out)


def test_a_split_that_the_data_lacks(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    data = mmsa_pickle(tmp_path / "new.pkl")
    text = said(ConfigError, str(trained[0]), "--data", str(data), "--split", "train", "--out", str(tmp_path / "p.csv"))
    assert "--split train" in text and "it has test" in text


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("models:/tinny@champion", "no model 'tinny'; did you mean 'tiny'?"),
        ("models:/tiny@champ", "no alias 'champ'; did you mean 'champion'?"),
        ("models:/tiny/9", "no version 9 (versions: 1)"),
        ("models:/tiny", "is not a model's name; give models:/NAME@alias"),
        ("runs:/" + "0" * 32, "no run '0000"),
        ("models:/m-" + "0" * 32, "no logged model 'm-0000"),
        ("nowhere", "neither a folder nor a name in the registry"),
    ],
)
def test_a_model_that_is_not_there(model: str, says: str, tracked: Tracked, index: Index, tmp_path: Path) -> None:
    words = ["--data", str(index.folder), "--out", str(tmp_path / "p.csv"), "--runs-dir", str(tracked.runs_dir)]
    text = said(ConfigError, model, *words)
    assert says in text and ("did you mean" in text or "give models:/NAME@alias" in text or "versions: 1" in text)
    assert list(tmp_path.iterdir()) == []


def test_no_database_yet(index: Index, tmp_path: Path) -> None:
    words = ["--data", str(index.folder), "--out", str(tmp_path / "p.csv"), "--runs-dir", str(tmp_path)]
    assert "there is no MLflow database" in said(ConfigError, "models:/tiny@champion", *words)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_has_exit_code_75(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    words = ["predict", "models:/tiny@champion", "--data", str(index.folder), "--out", str(tmp_path / "p.csv")]
    assert front_door([*words, "--tracking-uri", uri]) == 75
    assert uri in capsys.readouterr().err


def test_a_run_that_logged_no_model(tracked: Tracked, index: Index, tmp_path: Path) -> None:
    run = tracked.client.create_run("0")
    words = ["--data", str(index.folder), "--out", str(tmp_path / "p.csv"), "--runs-dir", str(tracked.runs_dir)]
    assert "logged no model (running)" in said(ConfigError, f"runs:/{run.info.run_id}", *words)


def test_another_width_is_said_before_the_first_sample(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    data = mmsa_pickle(tmp_path / "new.pkl", vision=np.ones((10, 12, 35), np.float32))
    text = said(DataError, str(trained[0]), "--data", str(data), "--out", str(tmp_path / "p.csv"))
    assert "new.pkl: vision has 35 features a step, the model was trained on 7" in text
    assert not (tmp_path / "p.csv").exists()


def test_a_missing_modality_is_said(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    data = mmsa_pickle(tmp_path / "new.pkl", vision=None, vision_lengths=None)
    text = said(DataError, str(trained[0]), "--data", str(data), "--out", str(tmp_path / "p.csv"))
    assert "has no vision, which the model reads; it holds text, audio, raw_text" in text


def test_labels_on_another_scale_are_noted(
    trained: tuple[Path, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {f"regression_labels{task}": np.zeros(10, np.float32) for task in ("", "_T", "_A", "_V")}
    data = mmsa_pickle(tmp_path / "sims.pkl", **small)
    main([str(trained[0]), "--data", str(data), "--out", str(tmp_path / "p.csv")])
    assert "on the scale -3..3, labels here are on -1..1" in capsys.readouterr().err


def test_a_pickle_that_calls_a_function_is_refused(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "called",))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"test": Evil()}, protocol=4))
    said(DataError, str(trained[0]), "--data", str(tmp_path / "evil.pkl"), "--out", str(tmp_path / "p.csv"))
    assert not (tmp_path / "called").exists()


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_full_disk_leaves_the_old_file(
    suffix: str, trained: tuple[Path, Recipe], index: Index, tmp_path: Path
) -> None:
    out = tmp_path / f"p{suffix}"
    out.write_text("old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        text = said(TransientError, str(trained[0]), "--data", str(index.folder), "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert f"p{suffix}: predictions cannot be written" in text
    assert out.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.fault
def test_a_damaged_shard_leaves_no_predictions(trained: tuple[Path, Recipe], index: Index, tmp_path: Path) -> None:
    shutil.copytree(index.folder, tmp_path / "data")
    shard = tmp_path / "data" / index.shards[-1].url
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    text = said(DataError, str(trained[0]), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "p.csv"))
    assert index.shards[-1].url in text
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_samples_are_read_as_they_are_needed(
    trained: tuple[Path, Recipe], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than a batch is held, whatever the size of the data set."""
    data, write, written = open_input(str(index.folder)), Writer.write, []

    def counted(self: Writer, keys: list[str], *rest: Any) -> None:
        written.extend(keys)
        write(self, keys, *rest)

    def watched(split: str, with_text: bool) -> Iterator[Utterance]:
        begin = len(written)
        for number, utterance in enumerate(data.source(split, with_text)):
            assert number - (len(written) - begin) < 8
            yield utterance

    monkeypatch.setattr(Writer, "write", counted)
    monkeypatch.setattr("mmsa_dist.predict.open_input", lambda *asked: replace(data, source=watched))
    main([str(trained[0]), "--data", "x", "--out", str(tmp_path / "p.csv"), "--batch-size", "8"])
    assert len(written) == index.num_samples
