"""A csv and an npz: columns as told or as usual, every kind of array, and the real CMU-MOSI both ways."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import ConfigError, DataError, MmsaError
from shards.index import Index
from shards.read import ShardReader
from shards.sources.columns import Columns
from shards.sources.table import TableSource
from shards.utterance import SPLITS, Utterance
from shards.write import pack

ROWS = 24
MOSI = Path(os.environ.get("MMSA_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data") / "mosi"
needs_mosi = pytest.mark.skipif(
    not (MOSI / "utterances.csv").exists(), reason=f"CMU-MOSI is not at {MOSI} (it may not be redistributed)"
)


def table(**columns: Any) -> dict[str, list[Any]]:
    """24 utterances of 8 videos, 4 of them training videos."""
    rng = np.random.default_rng(0)
    videos = [n // 3 for n in range(ROWS)]
    return {
        "video_id": [f"v{video}" for video in videos],
        "clip_id": [str(n % 3) for n in range(ROWS)],
        "text": [f"said, {n}" for n in range(ROWS)],
        "label": [round(float(y), 1) for y in rng.uniform(-3, 3, ROWS)],
        "split": [("train", "train", "valid", "test")[video % 4] for video in videos],
        **columns,
    }


def arrays(**given: Any) -> dict[str, np.ndarray]:
    """Features in another order than the table."""
    order = np.random.default_rng(1).permutation(ROWS)
    ids = np.array([f"v{n // 3}_{n % 3}" for n in range(ROWS)])[order]
    values = np.random.default_rng(2).standard_normal((ROWS, 5)).astype(np.float32)[order]
    return {"id": ids, "sound": values, **given}


def write_csv(folder: Path, columns: Mapping[str, list[Any]]) -> Path:
    path = folder / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def write_npz(folder: Path, given: dict[str, Any]) -> Path:
    path = folder / "features.npz"
    np.savez(path, **given)
    return path


def source(folder: Path, columns: dict[str, Any] | None = None, features: Any = None, **options: Any) -> TableSource:
    told = {name: options.pop(name) for name in list(options) if name in Columns.model_fields}
    npz = write_npz(folder, features) if features else None
    return TableSource(write_csv(folder, columns or table()), npz, Columns(**told), **options)


def everything(of: TableSource) -> dict[str, Utterance]:
    return {(u := of.read(split, n)).key: u for split in SPLITS for n in range(of.counts[split])}


def refused(folder: Path, kind: type[MmsaError], *given: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        source(folder, *given, **options)
    return str(caught.value)


# --- what is read


def test_the_usual_names_need_no_options(tmp_path: Path) -> None:
    columns = table()
    found = everything(source(tmp_path, columns, arrays(), audio="sound"))
    values = np.random.default_rng(2).standard_normal((ROWS, 5)).astype(np.float32)
    assert list(found) == [
        key for split in SPLITS for key, s in zip(keys(columns), columns["split"], strict=True) if s == split
    ]
    for n, key in enumerate(keys(columns)):
        u = found[key]
        assert (u.raw_text, u.labels, u.split) == (columns["text"][n], {"M": columns["label"][n]}, columns["split"][n])
        np.testing.assert_array_equal(u.modalities["audio"], values[n : n + 1])
        assert list(u.modalities) == ["audio"]


def keys(columns: dict[str, list[Any]]) -> list[str]:
    return [f"{v}_{c}" for v, c in zip(columns["video_id"], columns["clip_id"], strict=True)]


def test_every_column_may_have_another_name(tmp_path: Path) -> None:
    columns = table()
    renamed = {
        "film": columns["video_id"],
        "part": columns["clip_id"],
        "words": columns["text"],
        "y": columns["label"],
        "y_t": [0.5] * ROWS,
        "fold": ["dev" if s == "valid" else s.upper() for s in columns["split"]],
    }
    features = {("names" if k == "id" else k): v for k, v in arrays().items()}
    told = {
        "id": ("film", "part"),
        "split": "fold",
        "label": "y",
        "label_text": "y_t",
        "text": "words",
        "id_array": "names",
    }
    found = everything(source(tmp_path, renamed, features, audio="sound", label_range=(-3, 3), **told))
    plain = everything(source(tmp_path, columns, arrays(), audio="sound"))
    assert found.keys() == plain.keys()
    for key, u in found.items():
        assert u.labels == {**plain[key].labels, "T": 0.5}
        assert (u.raw_text, u.split) == (plain[key].raw_text, plain[key].split)


def test_a_yaml_file_tells_the_same_and_options_win(tmp_path: Path) -> None:
    path = tmp_path / "columns.yaml"
    path.write_text("id: [film, part]\nlabel: y\naudio: sound\n")
    told = Columns.from_yaml(path, overrides={"label": "z"})
    assert told == Columns(id=("film", "part"), label="z", audio="sound")
    path.write_text("id: film\n")
    assert Columns.from_yaml(path, overrides={}).id == ("film",)


def test_an_id_may_be_a_pattern(tmp_path: Path) -> None:
    features = arrays()
    features["id"] = np.array([key.replace("_", "[") + "]" for key in features["id"]])
    found = everything(source(tmp_path, None, features, audio="sound", id=("{video_id}[{clip_id}]",)))
    assert "v3[1]" in found


def test_sequences_one_after_another(tmp_path: Path) -> None:
    features = arrays()
    lengths = np.random.default_rng(3).integers(1, 6, ROWS)
    steps = np.arange(lengths.sum() * 4, dtype=np.float16).reshape(-1, 4)
    features |= {"steps": steps, "length": lengths}
    of = source(tmp_path, None, features, vision="steps:length")
    found, starts = everything(of), np.cumsum(lengths) - lengths
    assert of.widths == {"vision": 4}
    for key, start, length in zip(features["id"], starts, lengths, strict=True):
        np.testing.assert_array_equal(found[key].modalities["vision"], steps[start : start + length])
        assert found[key].modalities["vision"].dtype == np.float32


@pytest.mark.parametrize("told", ["padded", "padded:length"])
def test_padded_sequences(tmp_path: Path, told: str) -> None:
    features = arrays()
    lengths = np.random.default_rng(3).integers(1, 6, ROWS)
    padded = np.random.default_rng(4).standard_normal((ROWS, 6, 3)) * (
        np.arange(6)[None, :, None] < lengths[:, None, None]
    )
    found = everything(source(tmp_path, None, {**features, "padded": padded, "length": lengths}, text_features=told))
    for key, values, length in zip(features["id"], padded, lengths, strict=True):
        np.testing.assert_array_equal(found[key].modalities["text"], values[:length].astype(np.float32))


def test_unimodal_labels_are_found_and_may_be_missing(tmp_path: Path) -> None:
    columns = table(label_T=["", *[0.2] * (ROWS - 1)], label_A=[0.4] * ROWS, label=[0.1] * ROWS)
    of = source(tmp_path, columns)
    assert of.tasks == ("M", "T", "A")
    assert of.label_range == (-1.0, 1.0)
    index, _ = pack(of, tmp_path / "set")
    labels = np.concatenate([index.table(n)["label_T"].to_numpy() for n in range(len(index.shards))])
    assert np.isnan(labels).sum() == 1


def test_transcripts_alone_are_a_data_set(tmp_path: Path) -> None:
    index, _ = pack(source(tmp_path), tmp_path / "set")
    assert (index.modalities, index.has_raw_text) == ({}, True)


def test_held_out_videos_are_whole_seeded_and_from_train_only(tmp_path: Path) -> None:
    columns = table(split=[("train", "train", "train", "test")[n // 3 % 4] for n in range(ROWS)])
    chosen = []
    for seed in (0, 0, 1, 2):
        of = source(tmp_path, columns, hold_out_valid=2, seed=seed)
        videos = {split: {key.split("_")[0] for key in of.keys(split)} for split in SPLITS}
        assert of.counts == {"train": 12, "valid": 6, "test": 6}
        assert not videos["valid"] & videos["train"]
        assert videos["test"] == {"v3", "v7"}
        assert of.provenance["held_out_videos"] == sorted(videos["valid"])
        chosen.append(frozenset(videos["valid"]))
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_rows_of_nan_are_absent(tmp_path: Path) -> None:
    features = arrays()
    features["sound"][3] = np.nan
    index, notes = pack(source(tmp_path, None, features, audio="sound"), tmp_path / "set")
    absent = [
        row["key"] for n in range(len(index.shards)) for row in index.table(n).to_pylist() if not row["length_audio"]
    ]
    assert absent == [features["id"][3]]
    assert "audio: 1 sample has none; marked absent" in notes


def test_ids_that_the_table_lacks_are_left_out_and_said(tmp_path: Path) -> None:
    columns = {name: values[:-2] for name, values in table().items()}
    of = source(tmp_path, columns, arrays(), audio="sound")
    assert of.notes() == ["2 of the 24 ids of features.npz are not in the table; left out"]


@pytest.mark.parametrize(("file", "name"), [("utterances", "mosi"), ("labels", "mosi"), ("mine", "mine")])
def test_a_csv_whose_name_says_nothing_has_its_folders(tmp_path: Path, file: str, name: str) -> None:
    folder = tmp_path / "MOSI"
    folder.mkdir()
    csv = write_csv(folder, table()).rename(folder / f"{file}.csv")
    assert TableSource(csv).name == name


@pytest.mark.parametrize("split", [None, "test", "train"])
def test_utterances_without_labels_can_be_packed(tmp_path: Path, split: str | None) -> None:
    """They are there to be predicted: any split will do, and no split column is none other than test."""
    columns = table()
    del columns["label"], columns["split"]
    told = columns | ({"split": [split] * ROWS} if split else {})
    index, _ = pack(source(tmp_path, told, arrays(), audio="sound", label="none"), tmp_path / "set")
    assert index.splits == dict.fromkeys(SPLITS, 0) | {split or "test": ROWS}
    assert index.tasks == ()
    with ShardReader(index) as reader:
        assert {reader.sample(n).key for n in range(ROWS)} == set(arrays()["id"])
        assert not reader.sample(0).labels


# --- law 9


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            {"text": "txt"},
            "there is no column 'txt' (--text); did you mean 'text'? (valid: clip_id, label, split, text, vid",
        ),
        ({"label": "lable"}, "there is no column 'lable' (--label); did you mean 'label'?"),
        ({"label_audio": "labels"}, "there is no column 'labels' (--label); did you mean 'label'?"),
        ({"split": "splits"}, "there is no column 'splits' (--split); did you mean 'split'?"),
        ({"id": ("video", "clip_id")}, "there is no column 'video' (--id); did you mean 'video_id'?"),
        ({"id": ("{vide_id}",)}, "there is no column 'vide_id' (--id); did you mean 'video_id'?"),
        ({"audio": "sounds"}, "there is no array 'sounds' (--audio); did you mean 'sound'? (valid: id, sound)"),
        ({"audio": "sound:len"}, "there is no array 'len' (--audio) (valid: id, sound)"),
        ({"id_array": "ids"}, "there is no array 'ids' (--id-array); did you mean 'id'?"),
    ],
)
def test_a_name_that_does_not_exist_names_the_nearest(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, DataError, None, arrays(), **told)


def test_two_split_columns_need_a_choice(tmp_path: Path) -> None:
    columns = table()
    columns["split_a"] = columns["split_b"] = columns.pop("split")
    said = refused(tmp_path, ConfigError, columns)
    assert "which column holds the split? it has split_a and split_b; name one with --split" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label": ["good", *[0] * 23]}, "table.csv line 2: label is 'good', expected a number"),
        ({"label": ["", *[0] * 23]}, "table.csv line 2: label is '', expected a number; --label none packs utterances"),
        ({"split": [*["train"] * 23, "tset"]}, "table.csv line 25: split is 'tset'; did you mean 'test'?"),
        (
            {"split": [*["train"] * 23, "test"]},
            "no row is of the valid split; hold training videos out with --hold-out-valid",
        ),
    ],
)
def test_a_value_that_cannot_be(tmp_path: Path, changed: dict[str, list[Any]], said: str) -> None:
    assert said in refused(tmp_path, DataError, table(**changed))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no rows"),
        (b"video_id,clip_id,text,label,split\n", "has no rows; expected a header and one row an utterance"),
        (
            b"video_id,clip_id,text,label,split\nv,1,so, it,0,train\n",
            "line 2: has 6 fields, the header has 5; quote texts",
        ),
        (b"video_id,clip_id,text,label,split\nv,1,caf\xe9,0,train\n", "cannot be read as csv in UTF-8"),
        (b'id,text,label,split\nv,"so,0,train\n', "cannot be read as csv in UTF-8"),
        (b"\x80\x04\x95\x00\x00", "cannot be read as csv in UTF-8"),
    ],
)
def test_a_damaged_csv(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        TableSource(path)
    assert said in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        TableSource(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        TableSource(write_csv(tmp_path, table()), tmp_path / "none.npz", Columns(audio="sound"))


def test_foreign_and_pickled_features(tmp_path: Path) -> None:
    path, told = write_csv(tmp_path, table()), Columns(audio="sound")
    features = tmp_path / "features.npz"
    features.write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"cannot be read as an \.npz without pickled objects"):
        TableSource(path, features, told)
    np.savez(features, **{**arrays(), "sound": np.array([{"a": 1}] * ROWS)})
    with pytest.raises(DataError, match="Object arrays cannot be loaded when allow_pickle=False"):
        TableSource(path, features, told)
    with features.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="a single array"):
        TableSource(path, features, told)


def test_contradictions(tmp_path: Path) -> None:
    assert "--audio names an array, but no .npz file is given" in refused(tmp_path, ConfigError, audio="sound")
    assert "neither a transcript nor features are named" in refused(tmp_path, ConfigError, text="none")
    assert "has 6 valid rows already" in refused(tmp_path, ConfigError, hold_out_valid=2)
    columns = table(split=["train" if s == "valid" else s for s in table()["split"]])
    assert "has 6 training videos; hold out fewer" in refused(tmp_path, ConfigError, columns, hold_out_valid=6)


def test_duplicate_ids(tmp_path: Path) -> None:
    columns = table(clip_id=["0", "0", *table()["clip_id"][2:]])
    with pytest.raises(DataError, match=r"line 3: id 'v0_0' is that of line 2 too; ids must be unique"):
        pack(source(tmp_path, columns), tmp_path / "set")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lable: y\n", "unknown key 'lable'; did you mean 'label'?"),
        ("label: [a, b]\n", "label: Input should be a valid string"),
        ("- label\n", "holds list, expected `name: column` lines"),
        ("label: {\n", "cannot be read"),
    ],
)
def test_a_wrong_yaml_file(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "columns.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        Columns.from_yaml(path, overrides={})
    assert said in str(caught.value)


# --- real data


def mosi(folder: Path, columns: Columns, **options: Any) -> Index:
    return pack(TableSource(MOSI / "utterances.csv", MOSI / "features.npz", columns, **options), folder / "set")[0]


@needs_mosi
def test_mosi_official_split(tmp_path: Path) -> None:
    index = mosi(tmp_path, Columns(split="split_official", audio="audio_opensmile"))
    assert index.splits == {"train": 1284, "valid": 229, "test": 686}
    assert {name: part.width for name, part in index.modalities.items()} == {"audio": 73}
    assert index.has_raw_text
    assert index.non_finite == {"audio": 0}


@needs_mosi
def test_mosi_poria_split_with_held_out_videos(tmp_path: Path) -> None:
    columns = Columns(split="split_poria", text_features="text_cnn", audio="audio_opensmile", vision="vision_cnn3d")
    index = mosi(tmp_path, columns, hold_out_valid=10)
    assert index.splits["test"] == 752
    assert index.splits["train"] + index.splits["valid"] == 1447
    assert len(index.source["held_out_videos"]) == 10
    videos = {
        split: {key.rsplit("_", 1)[0] for n in index.shards_of(split) for key in index.table(n)["key"].to_pylist()}
        for split in SPLITS
    }
    assert [len(videos[split]) for split in SPLITS] == [52, 10, 31]
    assert not videos["train"] & videos["valid"] and not videos["test"] & (videos["train"] | videos["valid"])
    assert {name: part.width for name, part in index.modalities.items()} == {"text": 100, "audio": 73, "vision": 100}
