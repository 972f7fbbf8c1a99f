"""`mmsa-dist verify`: every byte that differs from what was packed is found and its file named; exit code 3."""

import json
from pathlib import Path

import pytest

from mmsa_dist.__main__ import main
from shards.files import sha256_of
from shards.index import Index
from shards.verify import check_shard
from tests.shards.made import overwrite, packed, utterances

pytestmark = pytest.mark.fault


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return packed(tmp_path / "set", utterances({"train": 40, "valid": 9, "test": 11}))


def verified(index: Index, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["verify", str(index.folder)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def flip(path: Path, at: int) -> None:
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 0x10]))


def truncate(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:size])


def test_a_whole_data_set(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = verified(index, capsys)
    assert code == 0
    assert f"{len(index.shards)} shards, 60 samples, every checksum as packed" in said


def test_one_flipped_bit_in_a_payload(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    offset = index.table(1).to_pylist()[0]["offset"]
    flip(index.tar_path(1), offset + 400)
    code, said = verified(index, capsys)
    assert code == 3
    assert f"{index.shards[1].url}: sha256 is " in said
    assert f"the index says {index.shards[1].sha256[:12]}" in said
    assert index.shards[0].url not in said


def test_one_flipped_bit_in_a_table(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    flip(index.table_path(0), 1000)
    code, said = verified(index, capsys)
    assert code == 3
    assert f"{index.shards[0].table}: sha256 is " in said


@pytest.mark.parametrize("inside", [False, True])
def test_a_truncated_shard(index: Index, capsys: pytest.CaptureFixture[str], inside: bool) -> None:
    row = index.table(0).to_pylist()[-1]
    # at a block boundary WebDataset reads the rest and raises nothing
    size = row["offset"] + 100 if inside else row["json_offset"] - 512
    truncate(index.tar_path(0), size)
    code, said = verified(index, capsys)
    assert code == 3
    assert f"{index.shards[0].url}: is {size:,} bytes, the index says {index.shards[0].bytes:,}" in said
    assert "copy them again, or pack again" in said


def test_a_missing_file(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    index.tar_path(2).unlink()
    code, said = verified(index, capsys)
    assert code == 3
    assert f"{index.shards[2].url}: is missing" in said


def test_all_that_is_wrong_is_told_at_once(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    flip(index.tar_path(0), 600)
    truncate(index.table_path(1), 100)
    index.tar_path(3).unlink()
    code, said = verified(index, capsys)
    assert code == 3
    assert f"3 of {2 * len(index.shards)} files are not what was packed" in said
    for name in (index.shards[0].url, index.shards[1].table, index.shards[3].url):
        assert f"\n  {name}: " in said


def exchanged(index: Index, one: Path, other: Path, **fields: str) -> Index:
    """The index of a folder where `one` has the content of `other`, checksums and all."""
    one.chmod(0o644)
    one.write_bytes(other.read_bytes())
    content = json.loads((index.folder / "index.json").read_text())
    del content["fingerprint"], content["schema"]
    prefix = "table_" if one.suffix == ".arrow" else ""
    name = "table" if prefix else "url"
    for shard in content["shards"]:
        if shard[name] == one.name:
            shard |= {f"{prefix}bytes": one.stat().st_size, f"{prefix}sha256": sha256_of(one)}
    Index(**content, folder=index.folder).save()
    return Index.load(index.folder)


def test_a_tar_that_is_not_its_tables(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    other = exchanged(index, index.tar_path(0), index.tar_path(1))
    assert check_shard(index, 2) == []
    wrong = check_shard(other, 0)
    assert len(wrong) == 1 and f"{index.shards[0].url}: member 0 is ('train%20" in wrong[0]
    assert verified(other, capsys)[0] == 3


def test_a_tar_that_is_no_tar(index: Index, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"not a tar at all" * 100)
    wrong = check_shard(exchanged(index, index.tar_path(0), foreign), 0)
    assert len(wrong) == 1 and "is not a readable tar" in wrong[0]


def test_a_tar_that_ends_early(index: Index, tmp_path: Path) -> None:
    short = tmp_path / "short"
    last = index.table(0).to_pylist()[-1]
    short.write_bytes(index.tar_path(0).read_bytes()[: last["json_offset"] - 512] + bytes(1024))
    samples = index.shards[0].samples
    wrong = check_shard(exchanged(index, index.tar_path(0), short), 0)
    assert wrong == [f"{index.shards[0].url}: holds {2 * samples - 2} members, its table says {2 * samples}"]


def test_the_first_shards_alone(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage behind them is not looked at, and it is said how many were."""
    flip(index.tar_path(len(index.shards) - 1), 700)
    assert main(["verify", str(index.folder), "--shards", "1"]) == 0
    said = f"1 shard of {len(index.shards)}, {index.shards[0].samples} samples, every checksum as packed"
    assert said in capsys.readouterr().out
    assert main(["verify", str(index.folder)]) == 3
    assert main(["verify", str(index.folder), "--shards", "0"]) == 2
