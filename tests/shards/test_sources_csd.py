"""Computational sequences: segments, words, folds; by hand, and the labels of the real CMU-MOSI."""

import csv
import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import ConfigError
from shards.read import ShardReader
from shards.sources.csd import CsdSource
from shards.utterance import SPLITS, Utterance
from shards.write import pack
from tests.shards.sequences import Entries, regular, write_csd

MOSI = Path(os.environ.get("MMSA_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data") / "mosi"
needs_mosi = pytest.mark.skipif(
    not (MOSI / "utterances.csv").exists(), reason=f"CMU-MOSI is not at {MOSI} (it may not be redistributed)"
)

FOLDS = {"train": ["a"], "valid": ["b"], "test": ["c"]}
LABELS: Entries = {
    "a": ([[1.5, 9], [-2, 8]], [[0, 2], [2, 4]]),
    "b": ([[0.5, 7]], [[1, 2]]),
    "c": ([[3, 6]], [[0, 3]]),
}
FRAMES = regular(0, 4, 0.5)
AUDIO: Entries = {
    video: (np.arange(16, dtype=np.float32).reshape(8, 2) + 100 * n, FRAMES) for n, video in enumerate("abc")
}
WORDS: Entries = {
    "a": ([["so"], ["sp"], ["it"], ["wäs"]], [[0, 1], [1, 1.5], [1.5, 2], [2, 3.9]]),
    "b": ([["fine"]], [[1, 2]]),
    "c": ([["sp"], ["no"]], [[0, 1], [1, 2]]),
}


def source(folder: Path, labels: Entries = LABELS, folds: Any = None, **given: Any) -> CsdSource:
    """A source of what is given, each sequence written to a file of its own."""
    path = folder / "folds.json"
    path.write_text(json.dumps(folds or FOLDS))
    words = given.pop("words", None)
    features = {m: given.pop(m) for m in ("text", "audio", "vision") if m in given}
    return CsdSource(
        write_csd(folder / "CMU_MOSI_Labels.csd", labels, "Opinion Segment Labels"),
        {m: write_csd(folder / f"{m}.csd", entries) for m, entries in features.items()},
        (path,),
        words=write_csd(folder / "words.csd", words) if words else None,
        **given,
    )


def everything(of: CsdSource) -> dict[str, Utterance]:
    return {(u := of.read(split, n)).key: u for split in SPLITS for n in range(of.counts[split])}


def test_a_modality_keeps_its_own_steps_of_each_segment(tmp_path: Path) -> None:
    of = source(tmp_path, audio=AUDIO, words=WORDS)
    found = everything(of)
    assert of.name == "cmu_mosi_labels"
    assert [list(of.keys(split)) for split in SPLITS] == [["a[0]", "a[1]"], ["b[0]"], ["c[0]"]]
    assert {key: u.labels["M"] for key, u in found.items()} == {"a[0]": 1.5, "a[1]": -2, "b[0]": 0.5, "c[0]": 3}
    assert [u.raw_text for u in found.values()] == ["so it", "wäs", "fine", "no"]
    values = {video: features for video, (features, _) in AUDIO.items()}
    for key, wanted in (
        ("a[0]", values["a"][:4]),
        ("a[1]", values["a"][4:]),
        ("b[0]", values["b"][2:4]),
        ("c[0]", values["c"][:6]),
    ):
        np.testing.assert_array_equal(found[key].modalities["audio"], wanted)
        assert found[key].modalities["audio"].dtype == np.float32


def test_word_alignment_by_hand(tmp_path: Path) -> None:
    """Frames of half a second; frame n of video a is (2n, 2n + 1).

    a[0] is 0 to 2 s. "so" (0-1 s) has frames 0, 1: (0 + 2) / 2 = 1 and 2. The pause is left out. "it" (1.5-2 s) has
    frame 3: 6, 7. a[1] is 2 to 4 s: "wäs" (2-3.9 s) has frames 4 to 7: (8 + 10 + 12 + 14) / 4 = 11, and 12.
    c[0] is 0 to 3 s: "no" (1-2 s) has frames 2 and 3, + 200: 205 and 206. Vision ends after one second.
    """
    vision: Entries = {"a": ([[4], [8]], [[0, 0.8], [0.8, 1]]), "b": ([[1]], [[1, 1.2]]), "c": ([[1]], [[0, 1]])}
    of = source(tmp_path, audio=AUDIO, vision=vision, words=WORDS, align="words")
    found = everything(of)
    assert found["a[0]"].modalities["audio"].tolist() == [[1, 2], [6, 7]]
    assert found["a[0]"].modalities["vision"].tolist() == [[6], [0]]
    assert found["a[0]"].remarks == ("vision: {:,} samples have words during which it has no step; zeros there",)
    assert found["a[1]"].modalities["audio"].tolist() == [[11, 12]]
    assert list(found["a[1]"].modalities) == ["audio"]
    assert found["c[0]"].modalities["audio"].tolist() == [[205, 206]]
    _, notes = pack(of, tmp_path / "set")
    assert "vision: 1 samples have words during which it has no step; zeros there" in notes
    assert "vision: 2 samples have none; marked absent" in notes


def test_words_may_be_the_steps_of_the_text(tmp_path: Path) -> None:
    text: Entries = {video: (np.eye(len(times), 4), times) for video, (_, times) in WORDS.items()}
    found = everything(source(tmp_path, audio=AUDIO, text=text, align="words"))
    assert found["a[0]"].modalities["text"].tolist() == np.eye(4)[:3].tolist()
    assert found["a[0]"].modalities["audio"].tolist() == [[1, 2], [4, 5], [6, 7]]
    assert found["a[0]"].raw_text is None


def test_pieces_of_a_video_are_put_together(tmp_path: Path) -> None:
    """Word-aligned by the SDK: an entry a word, numbered from 0 in each video, whose times are those of the video."""
    pieces = {
        f"{video}[{n}]": (features[n : n + 1], times[n : n + 1])
        for video, (features, times) in AUDIO.items()
        for n in reversed(range(len(times)))
    }
    whole, cut = everything(source(tmp_path, audio=AUDIO)), everything(source(tmp_path, audio=pieces))
    assert whole.keys() == cut.keys()
    for key, utterance in whole.items():
        np.testing.assert_array_equal(cut[key].modalities["audio"], utterance.modalities["audio"])


@pytest.mark.parametrize("moved", [0.0, -2.0])
def test_sequences_cut_to_the_labels_are_taken_whole(tmp_path: Path, moved: float) -> None:
    """Written after the SDK's alignment to labels; or cut by somebody who counts time from the segment's start."""
    pieces: Entries = {
        "a[0]": (np.ones((3, 2)), regular(0, 3, 1)),  # the last word reaches into the next segment
        "a[1]": (np.full((2, 2), 2), regular(2 + moved, 4 + moved, 1)),
        "b[0]": (np.full((1, 2), 3), [[1 + moved, 2 + moved]]),
        "c[0]": (np.full((3, 2), 4), regular(moved, 3 + moved, 1)),
    }
    labels = {f"{v}[{n}]": (y[n : n + 1], t[n : n + 1]) for v, (y, t) in LABELS.items() for n in range(len(t))}
    for given in (LABELS, labels):
        found = everything(source(tmp_path, given, audio=pieces))
        assert {key: u.modalities["audio"][:, 0].tolist() for key, u in found.items()} == {
            "a[0]": [1, 1, 1],
            "a[1]": [2, 2],
            "b[0]": [3],
            "c[0]": [4, 4, 4],
        }


def test_steps_in_any_order_of_any_dtype(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(8)
    shuffled = {video: (features[order].astype(np.float64), times[order]) for video, (features, times) in AUDIO.items()}
    found = everything(source(tmp_path, audio=shuffled))
    for key, utterance in everything(source(tmp_path, audio=AUDIO)).items():
        np.testing.assert_array_equal(found[key].modalities["audio"], utterance.modalities["audio"])


def test_another_column_of_the_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--label-column 2: .*Labels\.csd has 2 columns, the first is 0"):
        source(tmp_path, audio=AUDIO, label_column=2)
    of = source(tmp_path, audio=AUDIO, label_column=1, label_range=(0, 9))
    assert [u.labels["M"] for u in everything(of).values()] == [9, 8, 7, 6]


def test_not_finite_values_are_counted(tmp_path: Path) -> None:
    broken = {video: (features.copy(), times) for video, (features, times) in AUDIO.items()}
    broken["a"][0][0, 1] = -np.inf
    for align, values in (("segments", 1), ("words", 1)):
        index, notes = pack(source(tmp_path, audio=broken, words=WORDS, align=align), tmp_path / align)
        assert index.non_finite == {"audio": values}
        assert f"audio: {values} value was NaN or infinite; zeroed" in notes


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    labels = dict(LABELS) | {
        "a": ([[1.5], [-2], [0], [1]], [[0, 2], [2, 4], [3, 3], [8, 9]]),
        "d": ([[1], [2]], [[0, 1], [1, 2]]),
    }
    labels = {video: (np.asarray(values)[:, :1], times) for video, (values, times) in labels.items()}
    audio = dict(AUDIO) | {"d": AUDIO["a"]}
    of = source(tmp_path, labels, {**FOLDS, "train": ["a", "e"]}, audio=audio)
    assert list(of.keys("train")) == ["a[0]", "a[1]"]
    assert of.notes() == [
        "2 segments without a step left out, e.g. 'a[2]' (3 to 3 s)",
        "2 segments of 1 video in no fold, e.g. 'd'; left out",
        "1 video of the folds without labels, e.g. 'e'",
    ]


def test_provenance_has_every_file(tmp_path: Path) -> None:
    index, _ = pack(source(tmp_path, audio=AUDIO, words=WORDS), tmp_path / "set")
    assert index.source["format"] == "csd"
    assert {"file", "sha256", "audio_file", "audio_sha256", "words_file", "words_sha256"} <= index.source.keys()
    assert list(index.source["folds"]) == ["folds.json"]


@pytest.mark.parametrize("text", [False, True])
def test_folds_as_yaml_or_text(tmp_path: Path, text: bool) -> None:
    """Ids that YAML would take for numbers or truth values stay ids."""
    ids = {"train": ["100178", "1_0"], "valid": ["no"], "test": ["1:30"]}
    entries = {video: ([[1.0]], [[0, 1]]) for videos in ids.values() for video in videos}
    if text:
        folds = tuple(tmp_path / f"{split}.txt" for split in SPLITS)
        for path, split in zip(folds, SPLITS, strict=True):
            path.write_text("\n".join(ids[split]) + "\n\n")
    else:
        folds = (tmp_path / "folds.yaml",)
        folds[0].write_text("".join(f"{split}: [{', '.join(videos)}]\n" for split, videos in ids.items()))
    labels = write_csd(tmp_path / "labels.csd", entries)
    of = CsdSource(labels, {"audio": write_csd(tmp_path / "audio.csd", entries)}, folds)
    assert {split: {key.split("[")[0] for key in of.keys(split)} for split in SPLITS} == {
        split: set(videos) for split, videos in ids.items()
    }


# --- reading from elsewhere


_shared: CsdSource


def _sum(number: int) -> float:
    return float(_shared.read("train", number).modalities["audio"].sum())


def test_processes_read_at_the_same_time(tmp_path: Path) -> None:
    """Forked while the file is open, several read the same file; and a copy that was sent reads as well."""
    global _shared
    many = {"a": (np.ones((200, 1)), regular(0, 200, 1)), "b": LABELS["b"], "c": LABELS["c"]}
    audio = {
        "a": (np.random.default_rng(0).standard_normal((20_000, 8)), regular(0, 200, 0.01)),
        "b": (np.ones((1, 8)), [[1, 2]]),
        "c": (np.ones((1, 8)), [[1, 2]]),
    }
    labels = {video: (np.asarray(values)[:, :1], times) for video, (values, times) in many.items()}
    _shared = source(tmp_path, labels, audio=audio)
    wanted = [_sum(n) for n in range(200)]
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_sum, range(200), chunksize=5)) == wanted
    assert [_sum(n) for n in range(200)] == wanted
    sent = pickle.loads(pickle.dumps(_shared))
    np.testing.assert_array_equal(
        sent.read("train", 7).modalities["audio"], _shared.read("train", 7).modalities["audio"]
    )


def test_packed_by_processes_it_is_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = {v: (np.zeros((40, 1)), regular(0, 40, 1)) for v in "abc"}
    audio = {v: (rng.standard_normal((4000, 3)), regular(0, 40, 0.01)) for v in "abc"}
    sums = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        index, _ = pack(source(folder, labels, audio=audio), folder / "set", shard_bytes=20_000, workers=workers)
        sums.append([shard.sha256 for shard in index.shards])
    assert len(sums[0]) > 6
    assert sums[0] == sums[1]


# --- real data


def during(start: float, end: float, values: Any, intervals: Any) -> Iterator[Any]:
    """The values of all steps that share time with the interval, in order of time."""
    steps = zip(map(tuple, intervals), values.tolist(), strict=True)
    for (begin, stop), (value,) in sorted(steps, key=lambda step: step[0][0]):
        if min(end, stop) - max(start, begin) > 1e-5:
            yield value


@needs_mosi
@pytest.mark.parametrize("align", ["segments", "words"])
def test_mosi_labels_and_transcripts(tmp_path: Path, align: str) -> None:
    """The real segments, labels and splits as sequences; the words evenly in their segment, two frames a second.

    One segment (2WGyTLYerpo, clip 44) has no duration: it holds nothing, so it is left out, as the SDK does.
    """
    with (MOSI / "utterances.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    videos: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: (row["video_id"], float(row["start"]))):
        videos.setdefault(row["video_id"], []).append(row)
    folds: dict[str, list[str]] = {}
    labels, words, audio = {}, {}, {}
    expected: dict[str, dict[str, str]] = {}
    for video, its in videos.items():
        folds.setdefault(its[0]["split_official"], []).append(video)
        times = np.array([[float(row["start"]), float(row["end"])] for row in its])
        labels[video] = (np.array([[float(row["label"])] for row in its]), times)
        said, spoken = [], []
        for number, (row, (start, end)) in enumerate(zip(its, times.tolist(), strict=True)):
            expected[f"{video}[{number}]"] = row
            parts = row["text"].split()
            edges = np.linspace(start, end, len(parts) + 1)
            said += [[part] for part in parts]
            spoken += [*pairwise(edges)]
        words[video] = (np.array(said), spoken)
        frames = regular(0, times.max() + 1, 0.5)
        audio[video] = (frames[:, :1].astype(np.float32), frames)
    of = source(tmp_path, labels, folds, audio=audio, words=words, align=align)
    assert of.notes()[0].endswith("e.g. '2WGyTLYerpo[43]' (127.213 to 127.213 s)")
    timeless = expected.pop("2WGyTLYerpo[43]")
    index, _ = pack(of, tmp_path / "set")
    assert Counter(row["split_official"] for row in [*expected.values(), timeless]) == {
        "train": 1284,
        "valid": 229,
        "test": 686,
    }
    assert index.splits == {"train": 1283, "valid": 229, "test": 686}
    with ShardReader(index) as reader:
        found = {u.key: u for u in reader.samples(range(index.num_samples), with_text=True)}
    assert found.keys() == expected.keys()
    exact = 0
    for key, utterance in found.items():
        row = expected[key]
        assert (utterance.labels["M"], utterance.split) == (np.float32(row["label"]), row["split_official"])
        start, end = float(row["start"]), float(row["end"])
        said = [*during(start, end, *words[row["video_id"]])]
        assert utterance.raw_text == " ".join(said)
        exact += said == row["text"].split()
        steps = utterance.modalities["audio"][:, 0].tolist()
        if align == "words":
            assert len(steps) == len(said)
        else:
            assert steps == [*during(start, end, *audio[row["video_id"]])]
    assert exact == 2019  # in the others words are heard of a neighbour, with whose time theirs overlaps
