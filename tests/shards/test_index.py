"""The index: whole or not there, refused where it is not what it says, and its arithmetic."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmsa_dist.__main__ import main
from shards.errors import DataError
from shards.files import sha256_of
from shards.index import SCHEMA, Index, Modality, Shard
from shards.tables import table_schema
from shards.utterance import SPLITS
from tests.shards.made import overwrite, packed, utterances


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return packed(tmp_path / "set", utterances({"train": 40, "valid": 9, "test": 11}))


def edited(index: Index, **changes: object) -> None:
    path = index.folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(index: Index) -> str:
    with pytest.raises(DataError) as caught:
        Index.load(index.folder)
    assert str(index.folder) in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_loaded(index: Index) -> None:
    assert Index.load(index.folder) == index
    assert Index.load(index.folder / "index.json") == index
    assert [path.name for path in index.folder.glob(".*")] == []


def counted(counts: list[tuple[str, int]]) -> Index:
    """An index of shards with these samples."""
    digest = "0" * 64
    shards = [
        Shard(
            url=f"{n}.tar",
            bytes=1,
            sha256=digest,
            samples=count,
            split=split,
            table=f"{n}.arrow",
            table_bytes=1,
            table_sha256=digest,
        )
        for n, (split, count) in enumerate(counts)
    ]
    return Index(
        folder=Path(),
        name="counted",
        synthetic=True,
        dtype="float16",
        modalities={"audio": Modality(width=1, max_length=1)},
        tasks=("M",),
        label_range=(-3, 3),
        has_raw_text=False,
        has_tokens=False,
        splits={s: sum(c for split, c in counts if split == s) for s in SPLITS},
        shards=tuple(shards),
        statistics={"audio": {"mean": [0.0], "std": [1.0]}},
        non_finite={"audio": 0},
        source={"format": "none", "file": "", "sha256": ""},
        tool_version="0",
        seed=0,
    )


@given(st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(1, 5)), min_size=1, max_size=12))
def test_samples_are_numbered_over_the_shards_in_order(counts: list[tuple[str, int]]) -> None:
    counts.sort(key=lambda item: SPLITS.index(item[0]))
    index = counted(counts)
    listed = [(shard, row) for shard, (_, count) in enumerate(counts) for row in range(count)]
    assert index.num_samples == len(listed)
    assert [index.locate(number) for number in range(len(listed))] == listed
    assert [index.first(shard) for shard in range(len(counts) + 1)] == np.cumsum([0] + [c for _, c in counts]).tolist()
    splits = [split for split, count in counts for _ in range(count)]
    for split in SPLITS:
        assert [splits[number] for number in index.numbers(split)] == [split] * splits.count(split)
        assert [counts[shard][0] for shard in index.shards_of(split)].count(split) == len(index.shards_of(split))


def test_an_unknown_split_names_the_nearest(index: Index) -> None:
    with pytest.raises(DataError, match="unknown split 'vaild'; did you mean 'valid'"):
        index.numbers("vaild")


def test_tables_tell_every_sample(index: Index) -> None:
    keys = []
    for number, shard in enumerate(index.shards):
        table = index.table(number)
        assert table.schema == table_schema(("M", "T", "A", "V"))
        assert set(table["split"].to_pylist()) == {shard.split}
        keys += table["key"].to_pylist()
    samples = {u.key: u for u in utterances({"train": 40, "valid": 9, "test": 11})}
    assert sorted(keys) == sorted(samples)
    row = index.table(0).slice(0, 1).to_pylist()[0]
    original = samples[row["key"]]
    assert [row[f"length_{m}"] for m in ("text", "audio", "vision")] == [len(v) for v in original.modalities.values()]
    assert row["n_tokens"] == len(original.tokens)
    assert row["label_M"] == np.float32(original.labels["M"])


def test_the_fingerprint_says_what_the_data_is(tmp_path: Path) -> None:
    samples = utterances({"train": 12})
    one, same = (packed(tmp_path / name, samples) for name in ("one", "same"))
    assert one.fingerprint == same.fingerprint
    others = [
        packed(tmp_path / "name", samples, name="other"),
        packed(tmp_path / "dtype", samples, dtype="float32"),
        packed(tmp_path / "order", samples, seed=1),
        packed(tmp_path / "samples", samples[:-1] + utterances({"train": 12}, seed=3)[-1:]),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5


# --- law 9


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index.json in .*: pack first .* or the packing did not finish"):
        Index.load(tmp_path)


def test_damaged_json(index: Index) -> None:
    path = index.folder / "index.json"
    path.write_text(path.read_text()[:-20])
    assert "not valid JSON" in refused(index)


def test_json_that_nests_without_end(index: Index) -> None:
    (index.folder / "index.json").write_text("[" * 200_000)
    assert "not valid JSON" in refused(index)


def test_not_an_index(index: Index) -> None:
    (index.folder / "index.json").write_text("[1, 2]")
    assert "not an index of this tool" in refused(index)


def test_a_folder_that_cannot_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        assert main([command, "a" * 300]) == 3
        assert "index.json: cannot be read: " in capsys.readouterr().err


def test_an_index_from_a_newer_version(index: Index) -> None:
    edited(index, schema=SCHEMA + 1, tool_version="9.9", something_new=1)
    said = refused(index)
    assert f"schema {SCHEMA + 1}, from version 9.9, is newer than schema {SCHEMA}" in said
    assert "upgrade mmsa-dist" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"surprise": 1}, "surprise"),
        ({"splits": {"train": 41, "valid": 9, "test": 11}}, "the shards hold"),
        ({"statistics": {}}, "statistics"),
        ({"label_range": [-1, 1]}, "it was edited"),
        ({"tasks": ["V", "M"]}, "tasks are"),
        ({"fingerprint": "", "label_range": [-1, 1]}, "has no fingerprint: it was edited"),
        ({"fingerprint": "0" * 64}, "fingerprint is 000000000000…, its fields give"),
    ],
)
def test_an_edited_index(index: Index, changes: dict[str, object], said: str) -> None:
    edited(index, **changes)
    assert said in refused(index)


@pytest.mark.parametrize("url", ["/etc/passwd", "../other/train-00000.tar", "a/../../b.tar"])
def test_a_shard_outside_the_folder_is_refused(index: Index, url: str) -> None:
    shards = json.loads((index.folder / "index.json").read_text())["shards"]
    edited(index, shards=[{**shards[0], "url": url}, *shards[1:]])
    assert "must be a path inside the index's folder" in refused(index)


def test_a_missing_damaged_or_foreign_table(index: Index) -> None:
    path = index.table_path(0)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.arrow: cannot be read .* copy the folder whole or pack again"):
        index.table(0)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"has {len(whole) // 2} bytes, expected {len(whole)}: it is truncated"):
        index.table(0)
    with pytest.raises(DataError, match="not a readable Arrow file"):
        trusting(index).table(0)
    with pa.ipc.new_file(str(path), pa.schema([("key", pa.string())])) as writer:
        writer.write_table(pa.table({"key": ["a"]}))
    with pytest.raises(DataError, match=r"has 1 rows with columns \['key'\], expected"):
        trusting(index).table(0)


def trusting(index: Index) -> Index:
    """An index for which the first table is right as it stands."""
    path, (first, *others) = index.table_path(0), index.shards
    told = first.model_copy(update={"table_bytes": path.stat().st_size, "table_sha256": sha256_of(path)})
    return index.model_copy(update={"shards": (told, *others)})


def test_a_table_is_not_used_without_its_checksum(index: Index) -> None:
    """A label of another value makes no unreadable file: only the checksum tells."""
    label = index.table(0)["label_M"].chunk(0).buffers()[1].to_pybytes()[:16]
    at = index.table_path(0).read_bytes().index(label)
    overwrite(index.table_path(0), at, np.float32(2.5).tobytes())
    with pytest.raises(DataError, match="sha256 is"):
        index.table(0)
    assert index.table(0, verify=False)["label_M"][0].as_py() == 2.5


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_inspect_misses_a_tar(index: Index, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    tar = index.tar_path(1)
    tar.chmod(0o644)
    if damage == "missing":
        tar.unlink()
    else:
        os.truncate(tar, index.shards[1].bytes - 512)
    assert main(["inspect", str(index.folder)]) == 3
    assert f"error: {tar}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda made: made["shards"][1].update(url=made["shards"][0]["url"]), "'0.tar' more than once"),
        (lambda made: made["shards"][1].update(table=made["shards"][0]["url"]), "'0.tar' more than once"),
        (lambda made: made["shards"][0].update(url="a\0.tar"), "has control characters"),
        (lambda made: made["shards"][0].update(table="a\n.arrow"), "has control characters"),
        (lambda made: made["statistics"]["audio"].update(std=[1.0, 1.0]), "statistics of audio have"),
        (lambda made: made["statistics"]["audio"].pop("mean"), "statistics of audio have"),
    ],
)
def test_what_no_packing_says(forge: Callable[[dict[str, Any]], None], said: str) -> None:
    """Refused before any fingerprint is looked at."""
    made = counted([("train", 2), ("test", 1)]).model_dump() | {"folder": Path(), "fingerprint": ""}
    made["shards"] = list(made["shards"])
    assert Index.model_validate(made)
    forge(made)
    with pytest.raises(ValidationError, match=said):
        Index.model_validate(made)
