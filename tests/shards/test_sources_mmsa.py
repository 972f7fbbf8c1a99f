"""The MMSA feature pickle in all its variants: the same samples whatever the container."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.index import Index
from shards.sources.clean import Cleaner
from shards.sources.mmsa import MmsaSource
from shards.utterance import SPLITS, Utterance
from shards.write import pack
from tests.shards.pickles import WIDTHS, content, written


def read(path: Path, **options: Any) -> dict[str, list[Utterance]]:
    source = MmsaSource(path, **options)
    return {split: [source.read(split, n) for n in range(count)] for split, count in source.counts.items()}


# --- what is read


def test_unaligned(tmp_path: Path) -> None:
    data = content()
    found = read(written(tmp_path, data))
    for split, samples in found.items():
        raw = data[split]
        assert [u.key for u in samples] == raw["id"]
        for n, u in enumerate(samples):
            steps = {
                "text": int(raw["text_bert"][n, 1].sum()),
                "audio": raw["audio_lengths"][n],
                "vision": raw["vision_lengths"][n],
            }
            assert list(u.modalities) == ["text", "audio", "vision"]
            for name, length in steps.items():
                np.testing.assert_array_equal(u.modalities[name], raw[name][n, :length])
                assert u.modalities[name].dtype == np.float32
            np.testing.assert_array_equal(u.tokens, raw["text_bert"][n, 0, : steps["text"]])
            assert u.tokens is not None and u.tokens.dtype == np.int32
            assert u.raw_text == f"words of {split} {n}"
            assert u.labels == {"M": pytest.approx(raw["regression_labels"][n])}


def test_aligned_modalities_have_one_length_though_their_edges_are_silent(tmp_path: Path) -> None:
    data = content(aligned=True)
    for split, samples in read(written(tmp_path, data)).items():
        for n, u in enumerate(samples):
            length = int(data[split]["text_bert"][n, 1].sum())
            assert {len(values) for values in u.modalities.values()} == {length}
            for name, values in u.modalities.items():
                np.testing.assert_array_equal(values, data[split][name][n, :length])
            assert not u.modalities["audio"][-1].any()  # [SEP]: a real step


def test_without_mask_or_lengths_trailing_zeros_are_padding(tmp_path: Path) -> None:
    data = content()
    before = read(written(tmp_path, data))
    for raw in data.values():
        for key in ("text_bert", "audio_lengths", "vision_lengths"):
            del raw[key]
    found = read(written(tmp_path, data))
    for split, samples in found.items():
        for u, original in zip(samples, before[split], strict=True):
            assert u.tokens is None
            for name, values in u.modalities.items():
                np.testing.assert_array_equal(values, original.modalities[name])


def test_aligned_without_a_mask_takes_the_longest_modality(tmp_path: Path) -> None:
    data = content(aligned=True)
    for raw in data.values():
        lengths = raw.pop("text_bert")[:, 1].sum(-1)
        raw["text"][np.arange(len(lengths)), lengths - 1] = 0  # text's last step is silent too
        raw["audio"][np.arange(len(lengths)), lengths - 1] = 1
    for split, samples in read(written(tmp_path, data)).items():
        for u, row in zip(samples, data[split]["audio"], strict=True):
            length = int(np.flatnonzero(row.any(-1))[-1]) + 1
            assert {len(values) for values in u.modalities.values()} == {length}


def as_lists(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) and k not in WIDTHS else v for k, v in raw.items()} | {
        name: [np.array(sample) for sample in raw[name]] for name in WIDTHS
    }


def as_objects(raw: dict[str, Any]) -> dict[str, Any]:
    def objects(values: Any) -> np.ndarray:
        out = np.empty(len(values), dtype=object)
        out[:] = list(values)
        return out

    return {**raw, **{name: objects(raw[name]) for name in (*WIDTHS, "raw_text", "id", "regression_labels")}}


VARIANTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "float64": lambda raw: {**raw, **{name: raw[name].astype(np.float64) for name in WIDTHS}},
    "big endian": lambda raw: {**raw, **{name: raw[name].astype(">f4") for name in WIDTHS}},
    "fortran order": lambda raw: {**raw, **{name: np.asfortranarray(raw[name]) for name in WIDTHS}},
    "lists": as_lists,
    "object arrays": as_objects,
    "float text_bert": lambda raw: {**raw, "text_bert": raw["text_bert"].astype(np.float32)},
    "length arrays": lambda raw: {**raw, "audio_lengths": np.array(raw["audio_lengths"])},
    "id array": lambda raw: {**raw, "id": np.array(raw["id"])},
    "ids as bytes": lambda raw: {**raw, "id": np.array(raw["id"], dtype="S")},
    "ids in two parts": lambda raw: {**raw, "id": np.array([key.split("$_$") for key in raw["id"]])},
    "text lengths": lambda raw: {**raw, "text_lengths": raw["text_bert"][:, 1].sum(-1)},
    "float64 object arrays": lambda raw: as_objects({**raw, **{m: raw[m].astype(np.float64) for m in WIDTHS}}),
    "byte strings": lambda raw: {**raw, "id": [key.encode() for key in raw["id"]]},
    "column labels": lambda raw: {**raw, "regression_labels": raw["regression_labels"].astype(np.float64)[:, None]},
    "numpy scalars": lambda raw: {**raw, "regression_labels": list(raw["regression_labels"])},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_container_gives_the_same_samples(tmp_path: Path, variant: str) -> None:
    data = content(unimodal=True)
    plain = read(written(tmp_path, data))
    same = read(written(tmp_path, {split: VARIANTS[variant](raw) for split, raw in data.items()}))
    for split in SPLITS:
        for one, other in zip(plain[split], same[split], strict=True):
            assert (one.key, one.raw_text) == (other.key, other.raw_text)
            assert one.labels == other.labels
            np.testing.assert_array_equal(one.tokens, other.tokens)
            for name, values in one.modalities.items():
                np.testing.assert_array_equal(values, other.modalities[name])


def test_ragged_lists_have_no_padding_to_strip(tmp_path: Path) -> None:
    data = content()
    for raw in data.values():
        raw["audio"] = [values[:n].copy() for values, n in zip(raw["audio"], raw.pop("audio_lengths"), strict=True)]
        raw["audio"][0] = np.zeros((3, WIDTHS["audio"]), np.float32)  # silence, but three real steps of it
    found = read(written(tmp_path, data))
    assert found["train"][0].modalities["audio"].shape == (3, WIDTHS["audio"])
    np.testing.assert_array_equal(found["test"][2].modalities["audio"], data["test"]["audio"][2])


def test_sims_has_unimodal_labels_and_its_range(tmp_path: Path) -> None:
    data = content(unimodal=True)
    source = MmsaSource(written(tmp_path, data))
    assert source.tasks == ("M", "T", "A", "V")
    assert source.label_range == (-1.0, 1.0)
    labels = source.read("valid", 3).labels
    assert labels["A"] == pytest.approx(data["valid"]["regression_labels_A"][3])


def test_a_modality_may_be_absent_from_the_whole_file(tmp_path: Path) -> None:
    data = content()
    for raw in data.values():
        del raw["vision"], raw["vision_lengths"]
    index, _ = pack(MmsaSource(written(tmp_path, data)), tmp_path / "set")
    assert list(index.modalities) == ["text", "audio"]
    without, _ = pack(MmsaSource(written(tmp_path, content()), modalities=["audio"]), tmp_path / "audio")
    assert list(without.modalities) == ["audio"]


def packed(folder: Path, data: Any) -> tuple[Index, list[str]]:
    return pack(MmsaSource(written(folder, data)), folder / "set")


def test_non_finite_values_are_zeroed_counted_and_reported(tmp_path: Path) -> None:
    data = content()
    data["train"]["audio"][2, 0, :3] = [np.nan, np.inf, -np.inf]
    data["test"]["audio"] = data["test"]["audio"].astype(np.float64)
    data["test"]["audio"][0, 0, 0] = 1e300  # infinite in float32
    source = MmsaSource(written(tmp_path, data))
    index, notes = pack(source, tmp_path / "set")
    assert index.non_finite == {"text": 0, "audio": 4, "vision": 0}
    assert "audio: 4 values were NaN or infinite; zeroed" in notes
    clean = Cleaner(source).clean(source.read("train", 2)).modalities["audio"]
    np.testing.assert_array_equal(clean[0, :3], 0)
    np.testing.assert_array_equal(clean[0, 3:], data["train"]["audio"][2, 0, 3:])


def test_a_sample_without_a_step_or_a_finite_value_lacks_the_modality(tmp_path: Path) -> None:
    data = content()
    data["train"]["audio_lengths"][1] = 0
    data["train"]["vision"][5] = np.nan
    index, notes = packed(tmp_path, data)
    rows = {row["key"]: row for n in index.shards_of("train") for row in index.table(n).to_pylist()}
    assert rows[data["train"]["id"][1]]["length_audio"] == 0
    assert rows[data["train"]["id"][1]]["length_text"] > 0
    assert rows[data["train"]["id"][5]]["length_vision"] == 0
    assert "audio: 1 sample has none; marked absent" in notes
    assert "vision: 1 sample has none; marked absent" in notes


def test_lengths_beyond_the_padding_are_cut_and_reported(tmp_path: Path) -> None:
    data = content()
    data["train"]["audio_lengths"][0] = 900
    index, notes = packed(tmp_path, data)
    assert index.modalities["audio"].max_length == data["train"]["audio"].shape[1]
    assert "audio: 1 samples say they are longer than the steps that are there; taken as they are" in notes


def test_its_name_is_the_sets_and_its_origin_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "MOSI" / "Processed"
    folder.mkdir(parents=True)
    path = written(folder, content()).rename(folder / "unaligned_50.pkl")
    index, _ = pack(MmsaSource(path), tmp_path / "set")
    assert index.name == "mosi-unaligned_50"
    assert index.source["file"] == "unaligned_50.pkl"
    assert not index.synthetic


def test_to_predict_one_split_without_labels_will_do(tmp_path: Path) -> None:
    data = {"test": content()["test"]}
    del data["test"]["regression_labels"]
    source = MmsaSource(written(tmp_path, data), strict=False)
    assert (source.counts, source.tasks) == ({"test": 5}, ())
    assert source.read("test", 4).labels == {}


# --- the published sets


def published(split: str, samples: int, widths: dict[str, int], steps: dict[str, int], **more: Any) -> dict[str, Any]:
    """A split in the layout of MMSA's files: their keys, types, widths and steps, with few samples."""
    rng = np.random.default_rng(samples)
    raw: dict[str, Any] = {"id": [f"{split}_video_{n // 2:04d}$_${n:04d}" for n in range(samples)]}
    raw["raw_text"] = np.array([f"说 {n}" for n in range(samples)])
    raw["text_bert"] = np.zeros((samples, 3, steps["text"]), np.int64)
    for n in range(samples):
        raw["text_bert"][n, :2, : 3 + n] = [[101, *range(200, 201 + n), 102], [1] * (3 + n)]
    for name, width in widths.items():
        raw[name] = rng.standard_normal((samples, steps[name], width)).astype(np.float32)
        lengths = raw["text_bert"][:, 1].sum(-1) if name == "text" else rng.integers(1, steps[name] + 1, samples)
        raw[name] *= (np.arange(steps[name]) < lengths[:, None])[..., None]
        if name != "text":
            raw[f"{name}_lengths"] = lengths.tolist()
    labels = np.linspace(-1, 1, samples)
    raw["regression_labels"] = labels.astype(np.float32)
    raw["classification_labels"] = np.sign(labels) + 1
    raw["annotations"] = ["Negative", "Neutral", "Positive"][:samples]
    return {**raw, **more}


PUBLISHED: dict[str, tuple[dict[str, int], dict[str, int], bool]] = {
    "MOSI": ({"text": 768, "audio": 5, "vision": 20}, {"text": 50, "audio": 375, "vision": 500}, False),
    "MOSEI": ({"text": 768, "audio": 74, "vision": 35}, {"text": 50, "audio": 500, "vision": 500}, False),
    "SIMS": ({"text": 768, "audio": 33, "vision": 709}, {"text": 39, "audio": 400, "vision": 55}, True),
    "SIMSv2": ({"text": 768, "audio": 25, "vision": 177}, {"text": 50, "audio": 925, "vision": 232}, True),
}
"""Set -> widths, padded steps, whether there are unimodal labels."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layouts(tmp_path: Path, name: str) -> None:
    widths, steps, unimodal = PUBLISHED[name]
    data = {split: published(split, 3, widths, steps) for split in SPLITS}
    if unimodal:
        for raw in data.values():
            for task in "TAV":
                raw[f"regression_labels_{task}"] = -raw["regression_labels"]
                raw[f"classification_labels_{task}"] = np.zeros(3)
    if name == "SIMSv2":  # its semi-supervised file adds the samples without labels, and says which those are
        data["train_mix"] = published("mix", 6, widths, steps, mask=np.array([1, 1, 1, 0, 0, 0]))
    source = MmsaSource(written(tmp_path, data))
    assert source.widths == widths
    assert source.provenance["padded_to"] == {**steps, "text_bert": steps["text"]}
    assert source.tasks == (("M", "T", "A", "V") if unimodal else ("M",))
    assert source.label_range == ((-1, 1) if unimodal else (-3, 3))
    left_out = ["train_mix: is none of the splits train, valid, test; left out"] if name == "SIMSv2" else []
    index, notes = pack(source, tmp_path / "set")
    assert notes == left_out
    assert index.splits == dict.fromkeys(SPLITS, 3)
    utterance = source.read("valid", 2)
    assert utterance.tokens is not None and utterance.tokens.tolist() == [101, 200, 201, 202, 102]
    assert utterance.raw_text == "说 2"
    for modality in ("audio", "vision"):
        assert len(utterance.modalities[modality]) == data["valid"][f"{modality}_lengths"][2]


def test_empty_transcripts_are_none(tmp_path: Path) -> None:
    data = content()
    for raw in data.values():
        raw["raw_text"] = [""] * len(raw["id"])
    source = MmsaSource(written(tmp_path, data))
    assert not source.has_raw_text
    assert source.read("train", 0).raw_text is None


def test_a_copy_elsewhere_opens_the_file_again(tmp_path: Path) -> None:
    source = MmsaSource(written(tmp_path, content()), modalities=["audio"], label_range=(-4, 4))
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    copy = pickle.loads(sent)
    assert (copy.provenance, copy.label_range) == (source.provenance, source.label_range)
    np.testing.assert_array_equal(copy.read("test", 1).modalities["audio"], source.read("test", 1).modalities["audio"])
