"""Real ragged sequences, all the way: packed, read, batched; against the file itself and against committed figures.

`valid_word_aligned.npz` has the 229 utterances of CMU-MOSI's valid split (2 to 44 words) as the SDK aligns them. Its
ids count clips from 0, `utterances.csv` from 1; so the csv is made anew. The ten videos become three splits.
"""

import csv
import hashlib
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.batch import BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.plan import evaluation_plan, training_plan
from shards.read import ShardReader
from shards.sources.columns import Columns
from shards.sources.table import TableSource
from shards.utterance import SPLITS, Utterance
from shards.write import pack
from tests.shards.test_sources_table import write_csv

MOSI = Path(os.environ.get("MMSA_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data") / "mosi"
pytestmark = pytest.mark.skipif(
    not (MOSI / "valid_word_aligned.npz").is_file(), reason=f"CMU-MOSI is not at {MOSI} (it may not be redistributed)"
)

COUNTS = {"train": 134, "valid": 55, "test": 40}
STEPS, LONGEST, NON_FINITE = 2524, 44, {"audio": 0, "vision": 0}
STORED_ORDER = "5f3d17edda86991e"
"""Of the keys, as the shards hold them."""
CONTENT = "5c1047d3ea2245bd"
"""Of every key, transcript, label and array, sorted by key."""
BATCHES = "8484fd647f9eaf45"
"""Of every tensor of the evaluation of all splits."""
DEVIATIONS = {"audio": (0.9234046283, 0.9999846258), "vision": (0.9981438919, 1.0000169346)}
"""Of the train split: the mean over all columns, and the first column's."""


def digest(parts: Iterable[bytes]) -> str:
    """The beginning of a sha256."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def content(samples: Iterable[Utterance]) -> str:
    """Of the samples whole, the arrays as float32."""
    return digest(
        part
        for u in sorted(samples, key=lambda u: u.key)
        for part in (
            f"{u.key}\n{u.raw_text}\n{u.labels['M']:.4f}".encode(),
            *(f"{m}\n".encode() + values.astype("<f4").tobytes() for m, values in sorted(u.modalities.items())),
        )
    )


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """The csv's columns: ids as the npz has them, every clip of the valid split in order of its start."""
    with (MOSI / "utterances.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split_official"] == "valid"]
    rows.sort(key=lambda row: (row["video_id"], float(row["start"])))
    videos = sorted({row["video_id"] for row in rows})
    split = {video: ("test" if n > 7 else "valid" if n > 5 else "train") for n, video in enumerate(videos)}
    assert all(row["clip_id"].isdigit() for row in rows)
    return {
        "id": [f"{row['video_id']}[{int(row['clip_id']) - 1}]" for row in rows],
        "text": [row["text"] for row in rows],
        "label": [row["label"] for row in rows],
        "split": [split[row["video_id"]] for row in rows],
    }


@pytest.fixture(scope="module")
def npz() -> dict[str, np.ndarray]:
    with np.load(MOSI / "valid_word_aligned.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def index(table: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("golden")
    columns = Columns(audio="audio_covarep:length", vision="vision_facet:length")
    of = TableSource(write_csv(folder, table), MOSI / "valid_word_aligned.npz", columns)
    made, notes = pack(of, folder / "set", shard_bytes=100_000)
    (note,) = notes
    assert note.startswith("label, word of valid_word_aligned.npz were not taken")
    return made


@pytest.fixture(scope="module")
def samples(index: Index) -> list[Utterance]:
    with ShardReader(index) as reader:
        return [reader.sample(n, with_text=True) for n in range(index.num_samples)]


def test_every_step_comes_back(
    table: dict[str, list[str]], npz: dict[str, np.ndarray], samples: list[Utterance]
) -> None:
    """The npz has float16, and so have the shards: bit for bit. Labels and transcripts are the csv's."""
    begin = np.cumsum(npz["length"]) - npz["length"]
    rows = {str(key): slice(b, b + n) for key, b, n in zip(npz["id"], begin, npz["length"], strict=True)}
    labels = dict(zip(npz["id"].tolist(), npz["label"].tolist(), strict=True))
    told = {key: n for n, key in enumerate(table["id"])}
    assert {u.key for u in samples} == set(rows) == set(told)
    for u in samples:
        np.testing.assert_array_equal(u.modalities["audio"], npz["audio_covarep"][rows[u.key]])
        np.testing.assert_array_equal(u.modalities["vision"], npz["vision_facet"][rows[u.key]])
        assert u.modalities["audio"].dtype == u.modalities["vision"].dtype == np.float16
        row = told[u.key]
        assert u.labels == {"M": pytest.approx(labels[u.key], abs=1e-6)}
        assert (u.raw_text, u.split, u.labels["M"]) == (
            table["text"][row],
            table["split"][row],
            np.float32(table["label"][row]),
        )


def test_the_figures_are_those_of_before(index: Index, samples: list[Utterance]) -> None:
    assert index.splits == COUNTS
    assert index.non_finite == NON_FINITE
    assert {name: (part.width, part.max_length) for name, part in index.modalities.items()} == {
        "audio": (74, LONGEST),
        "vision": (47, LONGEST),
    }
    assert sum(len(u.modalities["audio"]) for u in samples) == STEPS
    assert digest(u.key.encode() for u in samples) == STORED_ORDER
    assert content(samples) == CONTENT
    for modality, wanted in DEVIATIONS.items():
        deviations = index.statistics[modality]["std"]
        assert (np.mean(deviations), deviations[0]) == pytest.approx(wanted, rel=1e-6)


def test_the_batches_are_those_of_before(index: Index, samples: list[Utterance]) -> None:
    """Each row is its sample, then zeros up to the batch's longest; of each split every sample once."""
    by_key = {u.key: u for u in samples}
    with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), readers=2) as loader:
        trained = [
            batch
            for batches in loader.train(training_plan(index, "train", seed=7, epoch=1, global_batch=32), 0, 1)
            for batch in batches
        ]
        evaluated = [[*loader.evaluate(evaluation_plan(index, split, 32), 0, 1)] for split in SPLITS]
    for batch in [*trained, *chain(*evaluated)]:
        for modality, values in batch.values.items():
            lengths = batch.lengths[modality].tolist()
            assert values.shape[1] == max(lengths)
            for key, row, length in zip(batch.keys, values, lengths, strict=True):
                assert torch.equal(row[:length], torch.from_numpy(by_key[key].modalities[modality].astype("f4")))
                assert not row[length:].any()
    for split, batches in zip(SPLITS, [trained, *evaluated[1:]], strict=True):
        keys = [key for b in batches for key, weight in zip(b.keys, b.weight.tolist(), strict=True) if weight]
        assert sorted(keys) == sorted(u.key for u in samples if u.split == split)
    hashed: list[bytes] = []
    for batch in chain(*evaluated):
        hashed += ["\n".join(batch.keys).encode(), batch.labels["M"].numpy().astype("<f4").tobytes()]
        for modality, values in batch.values.items():
            hashed += [values.numpy().astype("<f4").tobytes(), batch.lengths[modality].numpy().astype("<i8").tobytes()]
    assert digest(hashed) == BATCHES
