"""Where the index of foreign tars goes: whole or not at all; which tar is of which split; every key once."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmsa_dist.__main__ import main
from shards.errors import ConfigError, DataError
from shards.foreign.scan import TABLES
from shards.index import Index
from shards.verify import check_shard
from tests.shards.foreign import arrays, described, indexed, members, names, read, write_set, write_tar
from tests.shards.made import packed, utterances

COUNTS = {"train": 12, "valid": 3, "test": 2}


def test_where_the_split_stands(tmp_path: Path) -> None:
    sample = members(arrays(np.random.default_rng(0)), "npy")
    for name in ("train/0.tar", "mosi_val_000.tar", "dev/1.tar", "TEST.tar"):
        write_tar(tmp_path / "good" / name, [(name, sample | described(0, "x"))])
    index = indexed(tmp_path / "good")
    assert [(s.url, s.split) for s in index.shards] == [
        ("train/0.tar", "train"), ("dev/1.tar", "valid"), ("mosi_val_000.tar", "valid"), ("TEST.tar", "test"),
    ]  # fmt: skip
    write_tar(tmp_path / "bad" / "part-0.tar", [("a", sample | described(0, "x"))])
    with pytest.raises(ConfigError, match=r"part-0\.tar: its name does not say train, valid or test"):
        indexed(tmp_path / "bad")
    assert indexed(tmp_path / "bad", train=("part-*",)).splits["train"] == 1
    with pytest.raises(ConfigError, match="is matched by --train and --test"):
        indexed(tmp_path / "bad", train=("part-*",), test=("*-0.tar",), overwrite=True)
    both = [(key, sample | described(0, "x", split=split)) for key, split in (("a", "train"), ("b", "test"))]
    write_tar(tmp_path / "bad" / "part-0.tar", both)
    with pytest.raises(DataError, match="sample 'b' is of split test, the ones before it are of train"):
        indexed(tmp_path / "bad", overwrite=True)
    with pytest.raises(DataError, match=r"sample 'a' has no split \(json:part\), expected train, valid or test"):
        indexed(tmp_path / "bad", overwrite=True, split="json:part")
    write_tar(tmp_path / "odd" / "train_test.tar", [("a", sample | described(0, "x"))])
    with pytest.raises(ConfigError, match="its name says test and train"):
        indexed(tmp_path / "odd")


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    """FAULTS 5."""
    sample = members(arrays(np.random.default_rng(0)), "npy") | described(0, "x")
    write_tar(tmp_path / "train.tar", [("a$_$1", sample), ("bé", sample)])
    write_tar(tmp_path / "test.tar", [("bé", sample)])
    with pytest.raises(DataError, match=r"sample 'bé' is there more than once: in .*test\.tar and .*train\.tar"):
        indexed(tmp_path)
    assert names(tmp_path) == ["test.tar", "train.tar"]
    write_tar(tmp_path / "test.tar", [("c", sample), ("c", sample)])
    with pytest.raises(DataError, match=r"member 'c\.text\.npy' is there twice"):
        indexed(tmp_path)
    write_tar(tmp_path / "test.tar", [("c", sample), ("d", sample), ("c", sample)])
    with pytest.raises(DataError, match="sample 'c' is there more than once"):
        indexed(tmp_path)


def test_another_folder_links_to_the_tars(tmp_path: Path) -> None:
    write_set(tmp_path / "tars", COUNTS)
    index = indexed(tmp_path / "tars", tmp_path / "out")
    assert names(tmp_path / "tars") == ["test-0.tar", "train-0.tar", "valid-0.tar"]
    assert (tmp_path / "out" / "train-0.tar").readlink() == tmp_path / "tars" / "train-0.tar"
    assert len(read(index)) == 17
    assert main(["verify", str(tmp_path / "out")]) == 0
    again = indexed(tmp_path / "tars", tmp_path / "out", overwrite=True)
    assert again.fingerprint == index.fingerprint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    write_set(tmp_path, COUNTS)
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match="--out FOLDER puts the index elsewhere"):
        indexed(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    write_set(tmp_path / "tars", COUNTS)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        indexed(tmp_path / "tars", tmp_path / "file" / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "train-0.tar").write_text("mine")
    with pytest.raises(ConfigError, match=r"train-0\.tar is there already, and is not the tar to be indexed"):
        indexed(tmp_path / "tars", tmp_path / "taken")
    assert names(tmp_path / "taken") == ["train-0.tar"]


def test_places_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "tars", COUNTS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--out .* cannot be written \(File name too long\)"):
        indexed(tmp_path / "tars", tmp_path / ("a" * 300))
    with pytest.raises(ConfigError, match="--out s3:/bucket/set is an address; put the index into a folder here"):
        indexed(tmp_path / "tars", Path("s3://bucket/set"))
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        indexed(tmp_path / ("a" * 300))
    (tmp_path / "tars" / "valid-1.tar").symlink_to(tmp_path / "annexed")
    with pytest.raises(DataError, match=r"valid-1\.tar: is a folder, or a link that leads nowhere"):
        indexed(tmp_path / "tars")
    assert names(tmp_path) == ["tars"]

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)  # `rglob` would find nothing, and say nothing
    with pytest.raises(DataError, match="tars: cannot be read: Permission denied"):
        indexed(tmp_path / "tars")


def test_an_index_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_set(tmp_path, COUNTS)
    old = indexed(tmp_path)
    with pytest.raises(ConfigError, match="is there already; --overwrite replaces it"):
        indexed(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"expected 5\.\.6"):
        indexed(tmp_path, overwrite=True, label_range=(5.0, 6.0))
    assert sorted(tmp_path.rglob("*")) == files and Index.load(tmp_path) == old
    shutil.rmtree(tmp_path / "index.tables")
    new = indexed(tmp_path, overwrite=True, raw_text="none")
    assert len(list(tmp_path.rglob("*.arrow"))) == 3 and not new.has_raw_text
    assert len(read(new)) == 17
    own = packed(tmp_path / "own", utterances({"train": 3}))
    with pytest.raises(ConfigError, match="was packed by mmsa-dist"):
        indexed(own.folder, overwrite=True, label_range=(-3.0, 3.0))


KILLED = """
import os, signal, sys
from pathlib import Path
from shards.foreign.place import Place
from tests.shards.foreign import indexed

Place.save = lambda place, index: os.kill(os.getpid(), signal.SIGKILL)
indexed(Path(sys.argv[1]), overwrite=True, raw_text="none")
"""


def test_what_a_killed_one_left_goes_with_the_next(tmp_path: Path) -> None:
    write_set(tmp_path, COUNTS)
    write_set(tmp_path / "valid", {"more": 1})
    indexed(tmp_path, label="none")
    others = [tmp_path / TABLES / name for name in ("mine.arrow", "notes.txt")]
    for path in others:
        path.write_text("not a table of ours")
    (tmp_path / TABLES / ".a.tar.0123456789ab.arrow.77.tmp").write_text("half a table")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*-0.tar.*.arrow"))) == 8
    assert read(Index.load(tmp_path))  # the old one is whole
    (tmp_path / "valid-0.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"valid-0\.tar"):
        indexed(tmp_path, overwrite=True)
    left = {path for path in (tmp_path / TABLES).rglob("*") if path.is_file()}
    assert left == {Index.load(tmp_path).table_path(n) for n in range(4)} | set(others)


def test_processes_make_no_difference(tmp_path: Path) -> None:
    write_set(tmp_path, COUNTS, tars=2)
    one = indexed(tmp_path)
    tables = {path.name: path.read_bytes() for path in tmp_path.rglob("*.arrow")}
    two = indexed(tmp_path, overwrite=True, workers=2)
    assert two == one and tables == {path.name: path.read_bytes() for path in tmp_path.rglob("*.arrow")}
    with pytest.raises(DataError, match=r"expected 5\.\.6"):
        indexed(tmp_path, overwrite=True, workers=2, label_range=(5.0, 6.0))


def test_from_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE", str(tmp_path / "cache"))
    write_set(tmp_path / "bucket", COUNTS)
    here = indexed(tmp_path / "bucket")
    there = Index.load((tmp_path / "bucket").as_uri())
    assert there.remote and there.fingerprint == here.fingerprint
    assert read(there).keys() == read(here).keys()
    assert check_shard(there, 0) == []


@pytest.mark.parametrize("late", [False, True])
def test_links_of_an_index_that_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    write_set(tmp_path / "a", COUNTS)
    write_set(tmp_path / "b", COUNTS | {"train": 13})
    old = indexed(tmp_path / "a", tmp_path / "out")
    before = {path: path.readlink() for path in (tmp_path / "out").glob("*.tar")}
    last = tmp_path / "b" / "test-0.tar"
    good = last.read_bytes()
    if late:
        monkeypatch.setattr(Index, "save", lambda index: (tmp_path / "none" / "x").write_text(""))
    else:
        last.write_bytes(b"no tar")
    with pytest.raises(ConfigError if late else DataError):
        indexed(tmp_path / "b", tmp_path / "out", overwrite=True)
    last.write_bytes(good)
    monkeypatch.undo()
    assert {path: path.readlink() for path in (tmp_path / "out").glob("*.tar")} == before
    assert Index.load(tmp_path / "out") == old and len(read(old)) == 17
    assert len(read(indexed(tmp_path / "b", tmp_path / "out", overwrite=True))) == 18
    assert names(tmp_path / "out") == ["index.json", TABLES, "test-0.tar", "train-0.tar", "valid-0.tar"]


def test_names_that_an_index_cannot_hold(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    write_set(tmp_path / latin, COUNTS)
    with pytest.raises(ConfigError, match=r"its name has bytes that are no UTF-8; rename it"):
        indexed(tmp_path / latin)
    with pytest.raises(ConfigError, match=r"its name has bytes that are no UTF-8; choose another"):
        indexed(tmp_path / latin, tmp_path / latin / "out")
    (tmp_path / latin).rename(tmp_path / "good")
    (tmp_path / "good" / "test-0.tar").rename(tmp_path / "good" / "test-\n.tar")
    with pytest.raises(ConfigError, match="its name has control characters, which an index cannot hold"):
        indexed(tmp_path / "good")
