"""The pickles of MulT: padded in front, ids of three kinds or none, intensities or emotions."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmsa_dist.__main__ import main
from shards.batch import BatchSpec, collate
from shards.errors import DataError
from shards.index import Index
from shards.inspect import summary
from shards.read import ShardReader
from shards.sources.mmsa import MmsaSource
from shards.sources.mult import MultSource
from shards.utterance import EMOTIONS, SPLITS, Utterance
from shards.write import pack
from tests.shards.pickles import WIDTHS, mult_split, written
from tests.shards.pickles import content as mmsa_content

COUNTS = {"train": 12, "valid": 4, "test": 5}


def made(**options: Any) -> tuple[dict[str, Any], dict[str, dict[str, list[np.ndarray]]]]:
    """The content of a pickle, and its samples without padding."""
    parts = {name: mult_split(name, count, **options) for name, count in COUNTS.items()}
    return {name: content for name, (content, _) in parts.items()}, {name: real for name, (_, real) in parts.items()}


def read(path: Path, **options: Any) -> dict[str, list[Utterance]]:
    source = MultSource(path, **options)
    return {split: [source.read(split, n) for n in range(count)] for split, count in source.counts.items()}


def assert_features(found: dict[str, list[Utterance]], real: dict[str, dict[str, list[np.ndarray]]]) -> None:
    for split, samples in found.items():
        for n, utterance in enumerate(samples):
            assert list(utterance.modalities) == list(WIDTHS)
            for name, values in utterance.modalities.items():
                np.testing.assert_array_equal(values, real[split][name][n])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("emotions", [False, True])
def test_what_is_read(tmp_path: Path, aligned: bool, emotions: bool) -> None:
    data, real = made(aligned=aligned, emotions=emotions)
    path = written(tmp_path, data)
    found = read(path)
    assert_features(found, real)
    source = MultSource(path)
    assert source.counts == COUNTS
    assert source.provenance["aligned"] == aligned
    assert source.provenance["padded"] == dict.fromkeys(WIDTHS, "in front")
    for split, samples in found.items():
        for n, utterance in enumerate(samples):
            labels = data[split]["labels"][n]
            if emotions:
                assert utterance.key == f"{split}-{n:05d}"
                assert utterance.labels == {name: float(labels[k, 1]) for k, name in enumerate(EMOTIONS)}
            else:
                assert utterance.key == f"{split}_{n}"
                assert utterance.labels == {"M": pytest.approx(labels.item())}


def test_silence_inside_a_sequence_is_kept(tmp_path: Path) -> None:
    data, real = made()
    audio = data["test"]["audio"][0]
    audio[:] = 1
    audio[:2] = 0
    audio[5] = 0
    audio[-1] = 0  # padding is in front: this is silence
    real["test"]["audio"][0] = audio[2:]
    assert_features(read(written(tmp_path, data)), real)


def test_aligned_modalities_stay_in_step(tmp_path: Path) -> None:
    data, real = made(aligned=True)
    for split, content in data.items():
        for n, words in enumerate(real[split]["text"]):
            if len(words) > 1:
                content["audio"][n, -len(words)] = 0  # silence under the first word
                real[split]["audio"][n][0] = 0
            content["vision"][n] = 0  # no face at all
            real[split]["vision"][n][:] = 0
    assert_features(read(written(tmp_path, data)), real)


def test_padding_at_the_end_is_noticed(tmp_path: Path) -> None:
    data, real = made()
    for split, content in data.items():
        for name in WIDTHS:
            for row, values in zip(content[name], real[split][name], strict=True):
                row[:] = 0
                row[: len(values)] = values
    path = written(tmp_path, data)
    assert_features(read(path), real)
    assert MultSource(path).provenance["padded"] == dict.fromkeys(WIDTHS, "at the end")


def test_infinities_are_zeroed_and_counted(tmp_path: Path) -> None:
    data, _ = made()
    data["train"]["audio"][3, -1] = -np.inf
    index, notes = pack(MultSource(written(tmp_path, data)), tmp_path / "set")
    assert index.non_finite["audio"] == WIDTHS["audio"]
    assert f"audio: {WIDTHS['audio']} values were NaN or infinite; zeroed" in notes


# --- ids


def mosei(content: dict[str, Any], split: str) -> Any:
    """Strings; the first is the video's."""
    return np.array([[f"{split}-{n // 3}", f"{n}.5", f"{n}.75"] for n in range(len(content["labels"]))])


KINDS: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "bytes, the first is the utterance's": (lambda content, split: content["id"], "valid_1"),
    "strings, the first is the video's": (mosei, "valid-0[1.5,1.75]"),
    "an object array": (lambda content, split: mosei(content, split).astype(object), "valid-0[1.5,1.75]"),
    "numbers among them": (
        lambda content, split: [[f"{split}-{n // 3}", n + 0.5, n + 0.75] for n in range(len(content["labels"]))],
        "valid-0[1.5,1.75]",
    ),
    "one string each": (lambda content, split: [f"{split}[{n}]" for n in range(len(content["labels"]))], "valid[1]"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind(tmp_path: Path, kind: str) -> None:
    data, _ = made()
    make, expected = KINDS[kind]
    for split, content in data.items():
        content["id"] = make(content, split)
    source = MultSource(written(tmp_path, data))
    assert list(source.keys("valid"))[1] == expected
    every = [key for split in SPLITS for key in source.keys(split)]
    assert len(set(every)) == len(every) == sum(COUNTS.values())
    assert source.notes() == []


def test_ids_that_occur_twice_are_told_apart_the_same_way_every_time(tmp_path: Path) -> None:
    data, _ = made()
    for content in data.values():
        content["id"][:] = content["id"][0]
    path = written(tmp_path, data)
    source = MultSource(path)
    assert list(source.keys("train"))[:2] == ["train_0[0.5,1.25]", "train_0[0.5,1.25]-2"]
    assert source.notes() == ["21 samples share their ids with others; told apart by -2, -3, …"]
    assert [*source.keys("test")] == [*MultSource(path).keys("test")]
    pack(source, tmp_path / "set")  # which refuses an id that is there twice


def test_a_file_without_ids_says_so(tmp_path: Path) -> None:
    data, _ = made(emotions=True)
    assert MultSource(written(tmp_path, data)).notes() == [
        "train, valid, test: the file has no ids; named by split and number, as train-00000"
    ]


# --- emotions, all the way


def test_a_classification_set_is_packed_read_and_batched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = made(emotions=True)
    path, folder = written(tmp_path, data), tmp_path / "iemocap"
    assert main(["pack", "mult", str(path), "--out", str(folder), "--workers", "1"]) == 0
    assert main(["verify", str(folder)]) == 0
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert all(emotion in said for emotion in EMOTIONS)
    index = Index.load(folder)
    assert (index.tasks, index.classes, index.label_range) == (EMOTIONS, dict.fromkeys(EMOTIONS, 2), (0, 1))
    wanted = np.concatenate([content["labels"][..., 1] for content in data.values()])
    counts = summary(index)["labels"]["sad"]["counts"]
    assert np.sum(list(counts.values()), axis=0).tolist() == [(wanted[:, 2] == 0).sum(), (wanted[:, 2] == 1).sum()]
    with ShardReader(index) as reader:
        samples = reader.samples(index.numbers("valid"))
    batch = collate(samples, BatchSpec.of(index))
    for n, sample in enumerate(samples):
        labels = data["valid"]["labels"][int(sample.key.removeprefix("valid-"))]
        assert [float(batch.labels[emotion][n]) for emotion in EMOTIONS] == labels[:, 1].tolist()


def test_a_system_of_intensities_refuses_classes_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = made(emotions=True)
    pack(MultSource(written(tmp_path, data)), tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "self_mm", "--data", str(tmp_path / "set")]) == 2
    said = capsys.readouterr().err
    assert "predicts a sentiment intensity, but the labels of features are classes (neutral, happy, sad, angry)" in said
    assert not (tmp_path / "runs").exists()


# --- what is refused


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("labels", None, "valid.labels is a NoneType, expected a list or an array"),
        ("labels", np.zeros((4, 6)), "expected (N, 1, 1) intensities or (N, 4, 2) emotions"),
        ("labels", np.zeros((4, 8)), "expected (N, 4, 2): for each of neutral, happy, sad, angry one-hot"),
        ("labels", np.ones((4, 4, 2)), "expected (N, 4, 2): for each of neutral, happy, sad, angry one-hot"),
        ("labels", np.full((4, 1, 1), 4.0), "label M is 4, expected -3..3"),
        ("labels", np.zeros((0, 1, 1)), "valid is empty: it has no samples"),
        ("labels", np.stack([np.zeros((4, 4)), np.ones((4, 4))], -1), "labels a sample are {'train': 1, 'valid': 4"),
        ("audio", np.zeros((3, 2, 4)), "valid.audio has 3 rows, expected 4, one for each label"),
        (
            "audio",
            np.zeros((4, 2, 2, 2)),
            "valid.audio is an array (4, 2, 2, 2) of float64, expected numbers (N, T, D)",
        ),
        ("audio", None, "the splits have modalities"),
        ("id", [None] * 4, "valid.id[0] is a NoneType, expected a string, or (video, start, end)"),
        ("id", np.array([["a", "b", "c"]] * 3), "valid.id has 3 rows, expected 4"),
    ],
)
def test_a_value_of_the_wrong_kind(tmp_path: Path, key: str, value: Any, said: str) -> None:
    data, _ = made()
    data["valid"][key] = value
    path = written(tmp_path, data)
    with pytest.raises(DataError) as caught:
        pack(MultSource(path), tmp_path / "set")
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_mmsa_pickle_is_sent_to_its_own_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is one of the MMSA toolkit: pack mmsa"):
        MultSource(written(tmp_path, mmsa_content()))
    with pytest.raises(DataError, match="train has no key 'regression_labels'; it is one of MulT: pack mult"):
        MmsaSource(written(tmp_path, made()[0]))


def test_a_copy_elsewhere_opens_the_file_again(tmp_path: Path) -> None:
    data, real = made()
    source = MultSource(written(tmp_path, data), modalities=["audio"])
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    copy = pickle.loads(sent)
    assert copy.provenance == source.provenance
    np.testing.assert_array_equal(copy.read("test", 1).modalities["audio"], real["test"]["audio"][1])
