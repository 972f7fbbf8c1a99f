"""FAULTS.md 1-8, 20 and 25, each injected for real. What is tested elsewhere is listed here, so that none is missed.

==== ============================================= ==========================================================
   #  in shards that this tool wrote                in tars that somebody else wrote (`mmsa-dist index`)
==== ============================================= ==========================================================
   1  here; test_read, test_verify                  here
   2  test_read, test_verify                        here
   3  test_read, test_verify, test_trust; left out  here
      when asked: here
   4  test_write, test_sources_*                    test_foreign: test_a_missing_modality_…
   5  test_write (any key), test_sources_*          here (any key); test_foreign_place: test_a_key_…_twice
   6  test_clean, test_bad_*                        test_foreign: test_values_…, test_what_cannot_…, test_a_label_…
   7  test_loader: test_law_2_…                     test_foreign: test_one_tar_for_many_readers_and_ranks
   8  test_loader: test_evaluation_sees_…           the same
  20  test_bad_input: test_a_full_disk…             here
  25  test_read: test_a_payload_…, test_bad_input   test_hostile
==== ============================================= ==========================================================

A shard that shrinks *while* it is mapped ends the rank with SIGBUS, as every memory map does: not caught.
"""

import errno
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmsa_dist.__main__ import main
from shards.errors import ConfigError, DataError, MmsaError
from shards.foreign import place
from shards.quarantine import address, damaged, without
from shards.read import ShardReader
from tests.shards.foreign import arrays, described, indexed, members, write_set, write_tar
from tests.shards.made import overwrite, packed, utterances

pytestmark = pytest.mark.fault

MEGABYTE = 1 << 20


def with_webdataset(path: Path) -> int:
    """How many samples plain webdataset finds."""
    return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


def cut(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:size])


# --- 1, 2, 3: truncated, and flipped


def test_1_half_a_shard_that_webdataset_takes_for_a_whole_one(tmp_path: Path) -> None:
    index = packed(tmp_path / "own", utterances({"train": 100}), shard_bytes=MEGABYTE)
    row = index.table(0).to_pylist()[50]
    cut(index.tar_path(0), row["json_offset"] - 512)
    assert with_webdataset(index.tar_path(0)) == 50  # and it raises nothing
    with pytest.raises(DataError, match=r"train-00000\.tar: has \d+ bytes, expected \d+: it is truncated"):
        ShardReader(index).sample(0)
    assert main(["verify", str(index.folder)]) == 3


def test_1_a_foreign_tar_cut_between_two_samples(tmp_path: Path) -> None:
    write_set(tmp_path, {"train": 10})
    path = tmp_path / "train-0.tar"
    with tarfile.open(path) as tar:
        size = tar.getmember("train/v5.text.npy").offset
    cut(path, size)
    assert with_webdataset(path) == 5
    with pytest.raises(DataError, match=rf"train-0\.tar: ends at byte {size:,}, in the header .* it is truncated"):
        indexed(tmp_path)


@pytest.mark.parametrize("at", [0, 100, 512, 600, 5000, 9999])
def test_2_a_foreign_tar_cut_anywhere_else(tmp_path: Path, at: int) -> None:
    write_set(tmp_path, {"train": 3})
    cut(tmp_path / "train-0.tar", at)
    with pytest.raises(DataError, match=r"train-0\.tar: .*(truncated|no member's header)"):
        indexed(tmp_path)


def test_3_a_foreign_tar_changed_after_it_was_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path, {"train": 3})
    index = indexed(tmp_path)
    at = index.table(0).to_pylist()[1]["offset_audio"]
    overwrite(index.tar_path(0), at, bytes([index.tar_path(0).read_bytes()[at] ^ 1]))
    with pytest.raises(DataError, match="sha256 is"):
        ShardReader(index).sample(0)
    assert main(["verify", str(tmp_path)]) == 3
    assert "train-0.tar: sha256 is" in capsys.readouterr().err


def test_3_quarantine_leaves_damaged_shards_out(tmp_path: Path) -> None:
    index = packed(tmp_path / "own", utterances({"train": 30, "valid": 4, "test": 4}))
    overwrite(index.tar_path(1), 700, b"\x99")
    index.table_path(2).unlink()
    found = damaged(index)
    assert [shard.address for shard in found] == [address(index, 1), address(index, 2)]
    assert "sha256 is" in found[0].why and "cannot be read" in found[1].why
    (left,) = without([index], [shard.address for shard in found])
    lost = {key for n in (1, 2) if n == 1 for key in index.table(n)["key"].to_pylist()}
    assert left.num_samples == index.num_samples - sum(shard.samples for shard in found)
    assert left.splits["train"] == index.splits["train"] - sum(shard.samples for shard in found)
    assert left.fingerprint != index.fingerprint
    with ShardReader(left) as reader:
        keys = [sample.key for sample in reader.samples(range(left.num_samples))]
    assert len(keys) == len(set(keys)) == left.num_samples and not lost & set(keys)
    assert damaged(left) == []
    assert without([index], [shard.address for shard in found])[0] == left  # the same for whoever is told the same
    with pytest.raises(ConfigError, match=r"data\.without: elsewhere/train-00000\.tar is no shard of"):
        without([index], ["elsewhere/train-00000.tar"])


# --- 5: keys


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40))
@example(key="vid$_$1.5_2.0")
@example(key="日本 語%2E")
@example(key="n" * 90)
def test_5_any_key_of_webdatasets_rule(tmp_path: Path, key: str) -> None:
    """A file's name is cut at its first dot: what is left of it is the key."""
    name = f"a.b/k{key.partition('.')[0]}"
    sample = members(arrays(np.random.default_rng(0)), "npy") | described(0, "x", key="not this")
    folder = tmp_path / "set"
    write_tar(folder / "train.tar", [(name, sample)])
    assert ShardReader(indexed(folder, overwrite=True)).sample(0).key == name
    assert next(iter(webdataset.WebDataset(str(folder / "train.tar"), shardshuffle=False)))["__key__"] == name


# --- 20: no room


def test_20_a_full_disk_leaves_the_tars_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, {"train": 3, "valid": 3})
    write, written = place.write_atomic, list[Path]()

    def full(path: Path, data: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, data)

    monkeypatch.setattr(place, "write_atomic", full)
    with pytest.raises(MmsaError, match="No space left on device; what was written is removed again") as error:
        indexed(tmp_path)
    assert error.value.exit_code == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-0.tar", "valid-0.tar"]
