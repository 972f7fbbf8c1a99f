"""Law 9 for the MMSA feature pickle: a sentence that names file, split and key, whatever stands where it should not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.sources.mmsa import MmsaSource
from shards.utterance import SPLITS
from shards.write import pack
from tests.shards.pickles import content, written

ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


def refused(folder: Path, data: Any, **options: Any) -> str:
    path = written(folder, data)
    with pytest.raises(DataError) as caught:
        pack(MmsaSource(path, **options), folder / "set")
    assert str(path) in str(caught.value)
    assert [p.name for p in folder.iterdir()] == [path.name]
    return str(caught.value)


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_split(tmp_path: Path, split: str) -> None:
    data = content()
    del data[split]
    assert f"{split} is missing; a training set needs train, valid, test" in refused(tmp_path, data)


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_split(tmp_path: Path, split: str) -> None:
    data = content()
    data[split] = {key: value[:0] for key, value in data[split].items()}
    assert f"{split} is empty: it has no samples" in refused(tmp_path, data)


@pytest.mark.parametrize("key", ["id", "regression_labels"])
def test_a_missing_key_names_the_nearest(tmp_path: Path, key: str) -> None:
    data = content()
    data["valid"][f"{key}s"] = data["valid"].pop(key)
    said = refused(tmp_path, data)
    assert f"valid has no key '{key}'" in said
    assert f"did you mean '{key}s'?" in said


@pytest.mark.parametrize("key", ["audio", "raw_text", "text_bert", "regression_labels", "vision_lengths"])
def test_a_key_of_the_wrong_length(tmp_path: Path, key: str) -> None:
    data = content()
    data["test"][key] = data["test"][key][:3]
    assert f"test.{key} has 3 rows, expected 5, one for each id" in refused(tmp_path, data)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "audio",
            np.zeros((4, 2, 2, 2)),
            "valid.audio is an array (4, 2, 2, 2) of float64, expected numbers (N, T, D)",
        ),
        ("audio", np.array(["a"] * 4), "expected numbers (N, T, D)"),
        (
            "audio",
            [np.zeros((1, 4)), np.zeros((2, 4)), np.zeros(4), np.zeros((1, 4))],
            "valid.audio[2] is an array (4,)",
        ),
        ("text_bert", np.zeros((4, 7), int), "expected numbers (N, 3, T): ids, mask, segment"),
        ("regression_labels", ["good"] * 4, "valid.regression_labels is an array (4,) of <U4, expected one number"),
        ("raw_text", [None] * 4, "valid.raw_text of id 'valid0$_$0' is not a string"),
        ("id", [None, "a", "b", "c"], "valid.id holds a NoneType, expected strings"),
        ("audio_lengths", [1, 2.5, 1, 1], "valid.audio_lengths[1] is 2.5, expected a whole number of steps, 0 or more"),
        ("audio_lengths", [1, -2, 1, 1], "valid.audio_lengths[1] is -2, expected a whole number of steps"),
        ("audio_lengths", [1, np.nan, 1, 1], "valid.audio_lengths[1] is nan, expected a whole number of steps"),
        ("audio_lengths", [1, 10**400, 1, 1], "valid.audio_lengths is an array (4,) of object, expected one number"),
        ("audio_lengths", None, "valid.audio_lengths is None; leave the key out or fill it"),
        ("regression_labels", None, "valid.regression_labels is None; leave the key out or fill it"),
        ("regression_labels", np.array(5.0), "valid.regression_labels is an array () of float64, expected a list or"),
        ("regression_labels", [1e300, 0, 0, 0], "label M is inf, expected -3..3"),
        ("id", 5, "valid.id is an int, expected a list or an array with one entry a sample"),
        ("id", None, "valid.id is a NoneType, expected a list or an array"),
        ("id", "abcd", "valid.id is a str, expected a list or an array"),
        ("id", np.array("a"), "valid.id is an array () of <U1, expected a list or an array"),
        ("id", ["a", "", "b", "c"], "the id at valid[1] is empty; every sample needs one of its own"),
        ("text", np.array(1.0), "valid.text is an array () of float64, expected a list or an array"),
        ("text", dict.fromkeys(range(4)), "valid.text is a dict of 4, expected a list or an array"),
        ("text", [[[1, 2], [3]]] * 4, "valid.text[0] is a list of 2 whose entries differ in length or depth"),
        ("text", [ENDLESS] * 4, "valid.text is a list of 4 whose entries differ in length or depth"),
        ("text_bert", [[[1, 2], [1]]] * 4, "valid.text_bert is a list of 4 whose entries differ in length or depth"),
    ],
)
def test_a_value_of_the_wrong_kind(tmp_path: Path, key: str, value: Any, said: str) -> None:
    data = content()
    data["valid"][key] = value
    assert said in refused(tmp_path, data)


def test_another_width_in_another_split(tmp_path: Path) -> None:
    data = content()
    data["test"]["audio"] = data["test"]["audio"][:, :, :3]
    said = refused(tmp_path, data)
    assert "test, id 'test" in said
    assert "expected (steps, 4)" in said


def test_a_modality_that_one_split_lacks(tmp_path: Path) -> None:
    data = content()
    del data["valid"]["audio"], data["valid"]["audio_lengths"]
    assert "valid has modalities ['text', 'vision'], train has ['text', 'audio', 'vision']" in refused(tmp_path, data)


@pytest.mark.parametrize("unimodal", [False, True])
def test_a_label_outside_its_range(tmp_path: Path, unimodal: bool) -> None:
    data = content(unimodal=unimodal)
    data["test"]["regression_labels"][2] = 3.5
    top = 1 if unimodal else 3
    said = refused(tmp_path, data)
    assert f"test, id 'test0$_$2': label M is 3.5, expected -{top}..{top}" in said
    pack(MmsaSource(written(tmp_path, data), label_range=(-4, 4)), tmp_path / "set")


def test_a_label_that_is_not_a_number(tmp_path: Path) -> None:
    data = content()
    data["train"]["regression_labels"][0] = np.nan
    assert "train, id 'train0$_$0': label M is nan, expected -3..3" in refused(tmp_path, data)


def test_a_modality_that_is_nan_everywhere(tmp_path: Path) -> None:
    data = content()
    for raw in data.values():
        raw["vision"][:] = np.nan
    assert "vision has not one finite value in 12 train samples" in refused(tmp_path, data)


def test_a_modality_of_length_zero_everywhere(tmp_path: Path) -> None:
    data = content()
    for raw in data.values():
        raw["audio_lengths"] = [0] * len(raw["id"])
    assert "audio has not one finite value in 12 train samples" in refused(tmp_path, data)


def test_a_sample_of_length_zero_in_everything(tmp_path: Path) -> None:
    data = content()
    raw = data["test"]
    raw["audio_lengths"][3] = raw["vision_lengths"][3] = 0
    raw["text_bert"][3] = 0
    raw["raw_text"][3] = ""
    said = refused(tmp_path, data)
    assert "test, id 'test1$_$0': every modality has length zero and there is no text" in said


def test_an_id_that_occurs_twice(tmp_path: Path) -> None:
    data = content()
    data["test"]["id"][1] = data["train"]["id"][7]
    assert "id 'train2$_$1' occurs at train[7] and test[1]; ids must be unique" in refused(tmp_path, data)


def test_a_text_bert_that_is_no_token_ids(tmp_path: Path) -> None:
    data = content()
    data["train"]["text_bert"] = data["train"]["text_bert"] + 0.5
    assert "text_bert has ids that are not whole numbers" in refused(tmp_path, data)


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    assert "holds a dict of 1 with keys weights, expected a dict with the splits" in refused(tmp_path, {"weights": [1]})
    assert "holds a list of 2, expected a dict with the splits train, valid, test" in refused(tmp_path, [1, 2])
    assert "train is a list of 0, expected a dict" in refused(tmp_path, {**content(), "train": []})
