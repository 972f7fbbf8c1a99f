"""The reader: every sample as it was packed; whatever is wrong with a file ends in a sentence, never in a crash."""

import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.files import sha256_of
from shards.index import Index
from shards.read import ShardReader
from shards.utterance import Utterance
from tests.shards.made import WIDTHS, overwrite, packed, utterance, utterances


@pytest.fixture(scope="module")
def given_samples() -> list[Utterance]:
    return utterances({"train": 40, "valid": 7, "test": 5}, absent=0.2)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, given_samples: list[Utterance]) -> Path:
    return packed(tmp_path_factory.mktemp("packed") / "made", given_samples).folder


@pytest.fixture
def index(tmp_path: Path, template: Path) -> Index:
    """A data set of the test's own, to damage."""
    return Index.load(shutil.copytree(template, tmp_path / "made"))


def assert_same(found: Utterance, expected: Utterance) -> None:
    assert (found.key, found.split) == (expected.key, expected.split)
    assert found.modalities.keys() == expected.modalities.keys()
    for name, array in expected.modalities.items():
        np.testing.assert_array_equal(found.modalities[name].astype(np.float32), array)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert found.labels == {task: float(np.float32(label)) for task, label in expected.labels.items()}


def test_a_small_set_is_described_once_and_a_large_one_anew(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way the same; its transcript is not kept."""
    with ShardReader(index, open_shards=len(index.shards)) as reader:
        kept = [reader.samples(range(index.num_samples), with_text) for with_text in (False, True)]
        assert reader.sample(3) is kept[0][3] and reader.sample(3, with_text=True) is not kept[1][3]
    assert kept[0][3].raw_text is None and kept[1][3].raw_text
    monkeypatch.setattr("shards.read._KEPT", index.num_samples - 1)
    with ShardReader(index, open_shards=len(index.shards)) as reader:
        assert reader.sample(3) is not reader.sample(3)
        for number, sample in enumerate(kept[1]):
            assert_same(reader.sample(number, with_text=True), sample)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_sample_as_it_was_packed(
    tmp_path: Path, given_samples: list[Utterance], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = packed(tmp_path / "made", given_samples, dtype=dtype)
    assert len(index.shards) > 5
    monkeypatch.setattr("shards.read._Shard._told", None)  # no header of ours is parsed
    by_key = {u.key: u for u in given_samples}
    with ShardReader(index, open_shards=2) as reader:
        found = reader.samples(range(index.num_samples), with_text=True)
    assert sorted(u.key for u in found) == sorted(by_key)
    for number, sample in enumerate(found):
        assert_same(sample, by_key[sample.key])
        assert sample.raw_text == by_key[sample.key].raw_text
        assert number in index.numbers(sample.split)
        assert {array.dtype for array in sample.modalities.values()} == {np.dtype(dtype)}


def test_text_only_when_asked_for(index: Index) -> None:
    reader = ShardReader(index)
    assert reader.sample(0).raw_text is None
    assert reader.sample(0, with_text=True).raw_text == f"words of {reader.sample(0).key}"


def test_arrays_are_views_and_writing_to_them_leaves_the_file_alone(index: Index) -> None:
    before = sha256_of(index.tar_path(0))
    sample = ShardReader(index).sample(0)
    array = sample.modalities["text"]
    assert not array.flags.owndata
    array[:] = 9
    assert sha256_of(index.tar_path(0)) == before


def test_at_most_so_many_files_are_open(index: Index) -> None:
    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split()[-1] for line in lines if line.endswith(".tar") and str(index.folder) in line})

    reader = ShardReader(index, open_shards=3)
    for number in range(index.num_samples):
        reader.sample(number)
        assert mapped() <= 3
    held = reader.sample(0).modalities["text"]
    before = held.copy()
    reader.close()
    assert mapped() == 1  # an array that somebody holds keeps its shard alive
    np.testing.assert_array_equal(held, before)
    del held
    assert mapped() == 0


def test_threads_share_a_reader(index: Index, given_samples: list[Utterance]) -> None:
    by_key = {u.key: u for u in given_samples}
    reader = ShardReader(index, open_shards=2)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in np.random.default_rng(seed).integers(0, index.num_samples, size=150):
                sample = reader.sample(number, with_text=True)
                assert_same(sample, by_key[sample.key])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- damaged files


def truncate(path: Path, size: int) -> None:
    path.chmod(0o644)
    os.truncate(path, size)


def test_a_shard_truncated_between_members(index: Index) -> None:
    """FAULTS 1: a whole number of blocks is left, which plain webdataset takes for a shorter shard."""
    path = index.tar_path(1)
    size = path.stat().st_size
    truncate(path, size // 1024 * 512)
    reader = ShardReader(index)
    reader.sample(0)
    with pytest.raises(DataError) as error:
        reader.sample(index.first(1))
    assert f"{path}: has {size // 1024 * 512} bytes, expected {size}" in str(error.value)
    assert "copy it again or pack again" in str(error.value)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("which", ["tar", "table"])
@pytest.mark.parametrize("left", [0, 1, 700])
def test_a_truncated_file_is_never_mapped(index: Index, verify: bool, which: str, left: int) -> None:
    """FAULTS 2; touching a mapping behind the end of its file would kill the process (SIGBUS)."""
    path = index.tar_path(0) if which == "tar" else index.table_path(0)
    truncate(path, left)
    with pytest.raises(DataError, match=rf"{path.name}: has {left} bytes, expected \d+"):
        ShardReader(index, verify=verify).sample(0)


@pytest.mark.parametrize("which", ["tar", "table"])
def test_a_flipped_bit(index: Index, which: str) -> None:
    """FAULTS 3."""
    path = index.tar_path(0) if which == "tar" else index.table_path(0)
    at = path.stat().st_size // 2
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 1]))
    with pytest.raises(DataError) as error:
        ShardReader(index).sample(0)
    shard = index.shards[0]
    assert (
        f"{path}: sha256 is {sha256_of(path)}, expected {shard.sha256 if which == 'tar' else shard.table_sha256}"
        in str(error.value)
    )


@pytest.mark.parametrize("which", ["tar", "table"])
def test_a_missing_file(index: Index, which: str) -> None:
    path = index.tar_path(0) if which == "tar" else index.table_path(0)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file.*copy the folder whole or pack again"):
        ShardReader(index).sample(0)


def forged(index: Index, shard_no: int) -> Index:
    """The index as it would be if the shard's present bytes were the right ones: checksums no longer protect."""
    shard = index.shards[shard_no]
    tar, table = index.tar_path(shard_no), index.table_path(shard_no)
    changed = shard.model_copy(
        update={
            "bytes": tar.stat().st_size,
            "sha256": sha256_of(tar),
            "table_bytes": table.stat().st_size,
            "table_sha256": sha256_of(table),
        }
    )
    shards_ = (*index.shards[:shard_no], changed, *index.shards[shard_no + 1 :])
    return index.model_copy(update={"shards": shards_})


def with_table(index: Index, change: Callable[[dict[str, list[Any]]], None]) -> Index:
    """The index with shard 0's table changed and forged."""
    table = index.table(0)
    rows = table.to_pydict()
    change(rows)
    new = pa.table(
        [pa.array(rows[f.name]).cast(f.type) if f.name != "split" else table.column("split") for f in table.schema],
        schema=table.schema,
    )
    index.table_path(0).unlink()
    with pa.OSFile(str(index.table_path(0)), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(new)
    return forged(index, 0)


def set_(column: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    return lambda rows: rows[column].__setitem__(row, value)


def swap(rows: dict[str, list[Any]]) -> None:
    for column in ("offset", "size"):
        rows[column][0], rows[column][1] = rows[column][1], rows[column][0]
    for column in [name for name in rows if name.startswith("length_")] + ["n_tokens"]:
        rows[column][0], rows[column][1] = rows[column][1], rows[column][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_("length_text", 0, 77), r"text is F16 of shape \[\d+, 6\], expected F16 of shape \[77, 6\]"),
        (set_("length_text", 0, 0), r"text is F16 of shape \[\d+, 6\], expected F16 of shape \[0, 6\]"),
        (set_("n_tokens", 0, 1), r"tokens is I32 of shape \[\d+\], expected I32 of shape \[1\]"),
        (set_("offset", 0, 1 << 40), r"bytes 1099511627776 to \d+ in the table, expected some of 512 to \d+"),
        (set_("offset", 0, -1), r"bytes -1 to \d+ in the table"),
        (set_("offset", 0, 0), r"bytes 0 to \d+ in the table"),
        (set_("size", 0, 1 << 62), r"in the table, expected some of 512 to"),
        (set_("size", 0, -1), r"in the table, expected some of 512 to"),
        (set_("json_size", 0, 1 << 62), r"in the table, expected some of 512 to"),
        (set_("size", 0, 7), r"header of \d+ bytes, expected at most -1"),
        (set_("size", 0, 0), r"header of \d+ bytes, expected at most -8"),
        (set_("offset", 0, 1024), "belongs to member"),
        (swap, "belongs to member"),
        (set_("key", 0, "another"), "belongs to member"),
        (set_("length_text", 0, -4), r"-4.* steps in the table, expected none below zero"),
    ],
)
def test_a_table_that_disagrees_with_its_shard(index: Index, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        ShardReader(with_table(index, change)).sample(0)
    assert str(index.tar_path(0)) in str(error.value) and "mmsa-dist verify" in str(error.value)


def test_a_table_with_text_of_another_sample(index: Index) -> None:
    def change(rows: dict[str, list[Any]]) -> None:
        for column in ("json_offset", "json_size"):
            rows[column][0] = rows[column][1]

    reader = ShardReader(with_table(index, change))
    reader.sample(0)
    with pytest.raises(DataError, match=r"its JSON member is of .* expected the same key"):
        reader.sample(0, with_text=True)


def test_a_table_of_another_shard(index: Index) -> None:
    other, mine = index.table_path(1).read_bytes(), index.table_path(0)
    mine.unlink()
    mine.write_bytes(other)
    with pytest.raises(DataError):
        ShardReader(forged(index, 0)).sample(0)


def payload(header: Any, size: int = 400) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def with_payload(index: Index, data: bytes) -> Index:
    """The index with the first sample's tensors replaced by `data`, cut to their size, and forged."""
    row = index.table(0).slice(0, 1).to_pylist()[0]
    overwrite(index.tar_path(0), row["offset"], data[: row["size"]])
    return forged(index, 0)


TEXT = {"dtype": "F16", "shape": [2, 6], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 1 << 63) + b"{}", "a header of 9223372036854775808 bytes, expected at most"),
        (struct.pack("<Q", 20000) + b"{}", "a header of 20000 bytes, expected at most"),
        (payload(b"{not json"), "header does not parse"),
        (payload(b"\xff\xfe"), "header does not parse"),
        (payload(b"[" * 150), "header does not parse"),
        (payload([1, 2]), "header is a list, expected a JSON object"),
        (payload({"text": 3}), "text described as 3, expected dtype"),
        (payload({"text": {"dtype": "F16"}}), "text described as {'dtype': 'F16'}"),
        (payload({"text": {**TEXT, "data_offsets": [0]}}), "text described as .* expected dtype"),
        (payload({"text": {**TEXT, "data_offsets": [0, 1, 2]}}), "text described as .* expected dtype"),
        (payload({"smell": TEXT}), r"text described as None, expected dtype"),
        (payload({"text": {**TEXT, "dtype": []}}), r"text is \[\] of shape \[2, 6\], expected F16 of shape"),
        (payload({"text": {**TEXT, "dtype": "F64"}}), r"text is F64 of shape \[2, 6\], expected F16"),
        (payload({"text": {**TEXT, "dtype": "I32"}}), r"text is I32"),
        (payload({"text": {**TEXT, "shape": [12]}}), r"text is F16 of shape \[12\]"),
        (payload({"text": {**TEXT, "shape": [2, -6]}}), r"text is F16 of shape \[2, -6\]"),
        (payload({"text": {**TEXT, "shape": [1 << 30, 1 << 30]}}), "text is F16 of shape"),
        (payload({"text": {**TEXT, "shape": None}}), "text is F16 of shape None"),
        (payload({}), "text described as None"),
    ],
)
def test_a_payload_that_is_not_what_it_should_be(index: Index, data: bytes, message: str) -> None:
    """FAULTS 25: refused by name, type and size before anything is decoded."""
    with pytest.raises(DataError, match=message):
        ShardReader(with_payload(index, data)).sample(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0, 1 << 50]}, r"text is in bytes 0 to 1125899906842624, expected \d+ bytes within"),
        ({"data_offsets": [1 << 50, (1 << 50) + 240]}, "text is in bytes 1125899906842624 to"),
        ({"data_offsets": [-240, 0]}, "text is in bytes -240 to 0"),
        ({"data_offsets": [240, 0]}, "text is in bytes 240 to 0"),
        ({"data_offsets": [0.0, 240.0]}, r"text is in bytes 0.0 to 240.0"),
        ({"data_offsets": [False, 240]}, "text is in bytes False to 240"),
        ({"data_offsets": [0, "240"]}, "text is in bytes 0 to 240"),
        ({}, r"it has tensors called 'smell', expected at most text, audio, vision, tokens"),
    ],
)
def test_numbers_outside_the_payload(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lengths = {"text": 20, "audio": 20, "vision": 20}
    one = utterance("one", "train", np.random.default_rng(0), lengths, tokens=False)
    index = packed(tmp_path / "made", [one, *utterances({"train": 0})])
    specs = {}  # all at the beginning of the numbers, which leaves room for longer headers
    for name, steps in lengths.items():
        shape = [steps, WIDTHS[name]]
        specs[name] = {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 * math.prod(shape)]}
    index = with_payload(index, payload(specs))
    assert ShardReader(index).sample(0).modalities["audio"].shape == (20, 5)  # the forgery itself is in order
    specs["text"] |= change
    if not change:
        specs["smell"] = specs["text"]
    with pytest.raises(DataError, match=message):
        ShardReader(with_payload(index, payload(specs))).sample(0)


def test_a_header_nested_too_deep(tmp_path: Path) -> None:
    long = utterance("long", "train", np.random.default_rng(0), {"text": 900, "audio": 1, "vision": 1})
    index = packed(tmp_path / "made", [long, *utterances({"train": 0})])
    with pytest.raises(DataError, match="header does not parse"):
        ShardReader(with_payload(index, payload(b"[" * 9000))).sample(0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_is_read_or_refused_but_never_crashes(index: Index, data: st.DataObject) -> None:
    """Behind the checksums: any bytes of the first payload's head changed."""
    path = index.tar_path(0)
    original = path.read_bytes()
    row = index.table(0).slice(0, 1).to_pylist()[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = row["offset"] + data.draw(st.integers(0, min(row["size"], 400) - 1))
        overwrite(path, at, data.draw(st.binary(min_size=1, max_size=3)))
    try:
        sample = ShardReader(index, verify=False).sample(0)
        assert sum(float(array.astype(np.float64).size) for array in sample.modalities.values()) >= 0
    except DataError as error:
        assert str(path) in str(error)
    finally:
        overwrite(path, 0, original)


def test_a_foreign_member_text(index: Index) -> None:
    row = index.table(0).slice(0, 1).to_pylist()[0]
    overwrite(index.tar_path(0), row["json_offset"], b"[]" + b" " * (row["json_size"] - 2))
    reader = ShardReader(forged(index, 0))
    with pytest.raises(DataError, match="its JSON member does not parse"):
        reader.sample(0, with_text=True)
