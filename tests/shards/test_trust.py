"""Each file's checksum is verified before its first use, once per node, and again whenever it may have changed."""

import errno
import os
import resource
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

import shards.trust
from shards.errors import ConfigError, DataError, TransientError
from shards.files import open_lock, sha256_of
from shards.index import Index
from shards.read import ShardReader
from shards.trust import cache_folder
from tests.shards.made import overwrite, packed, settle, utterances


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test starts as a node that has verified nothing."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMSA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("packed") / "made", utterances({"train": 20})).folder


@pytest.fixture
def index(tmp_path: Path, template: Path) -> Index:
    """A data set of the test's own, to change."""
    return Index.load(shutil.copytree(template, tmp_path / "made"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read for their checksum."""
    seen: list[Path] = []

    def counting(path: Path) -> str:
        seen.append(path)
        return sha256_of(path)

    monkeypatch.setattr(shards.trust, "sha256_of", counting)
    return seen


def read_all(index: Index) -> None:
    with ShardReader(index, open_shards=2) as reader:
        reader.samples(range(index.num_samples))


def test_each_file_is_verified_once_per_node(index: Index, hashed: list[Path]) -> None:
    settle(index)
    read_all(index)
    files = [path for n in range(len(index.shards)) for path in (index.table_path(n), index.tar_path(n))]
    assert sorted(hashed) == sorted(files)
    read_all(index)
    read_all(Index.load(index.folder))
    assert len(hashed) == len(files)


def test_a_changed_file_is_verified_again(index: Index, hashed: list[Path]) -> None:
    settle(index)
    read_all(index)
    hashed.clear()
    os.utime(index.tar_path(2))
    read_all(index)
    assert hashed == [index.tar_path(2)]
    # a change that keeps size and modification time, as some copying tools do
    status = index.tar_path(1).stat()
    overwrite(index.tar_path(1), 3000, b"\xff\xff\xff")
    os.utime(index.tar_path(1), ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="sha256 is"):
        read_all(index)


def test_another_checksum_for_the_same_file_is_not_taken_on_trust(index: Index) -> None:
    settle(index)
    read_all(index)
    wrong = index.shards[0].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(DataError, match="sha256 is"):
        ShardReader(index.model_copy(update={"shards": (wrong, *index.shards[1:])})).sample(0)


def test_a_file_that_has_just_changed_is_not_remembered(index: Index, hashed: list[Path]) -> None:
    os.utime(index.tar_path(0))
    index.tar_path(0).chmod(0o644)
    ShardReader(index).sample(0)
    ShardReader(index).sample(0)
    assert hashed.count(index.tar_path(0)) == 2


def test_processes_and_threads_that_meet_a_new_file_take_turns(index: Index, hashed: list[Path]) -> None:
    settle(index)
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        ShardReader(index).sample(0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hashed) == sorted([index.tar_path(0), index.table_path(0)])


def test_without_a_folder_to_remember_in(index: Index, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that cannot be written costs that each process reads the files; nothing else."""
    settle(index)
    monkeypatch.setenv("MMSA_CACHE", "/proc/none")
    ShardReader(index).sample(0)
    ShardReader(index).sample(0)
    assert hashed.count(index.tar_path(0)) == 1
    overwrite(index.tar_path(0), 3000, b"\xff\xff\xff")
    with pytest.raises(DataError, match="sha256 is"):
        ShardReader(index).sample(0)


def test_unverified_on_request(index: Index, hashed: list[Path]) -> None:
    with ShardReader(index, verify=False) as reader:
        reader.samples(range(index.num_samples))
    assert hashed == []


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.EACCES, DataError, "let this user read it"),
        (errno.EMFILE, TransientError, "raise the limit"),
        (errno.EIO, TransientError, "just now"),
    ],
)
def test_a_file_that_cannot_be_read(
    index: Index, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], said: str
) -> None:
    def refused(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=rf"{index.table_path(0).name}: cannot be read .*{said}"):
        index.expected_table(0).use(refused, verify=False)
    monkeypatch.setattr(shards.trust, "sha256_of", refused)
    with pytest.raises(kind, match=rf"{index.tar_path(0).name}: cannot be read .*{said}"):
        index.expected_tar(0).check()
    with pytest.raises(kind, match=said):
        index.table(0)


def test_a_shard_that_this_user_may_not_read(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no checksum is asked for, the mapping is the first to meet it. Trying again would not help."""
    usual = Path.open

    def refused(path: Path, *how: Any, **options: Any) -> Any:
        if path == index.tar_path(0):
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(path, *how, **options)

    monkeypatch.setattr(Path, "open", refused)
    with ShardReader(index, verify=False) as reader, pytest.raises(DataError, match=r"\.tar: .*let this user read it"):
        reader.sample(0)


def test_no_more_open_files(index: Index) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    index.table(0)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(TransientError, match="Too many open files"):
            index.table(0, verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cache_where_nobody_may_look(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE", f"/{'long' * 100}")  # as a folder of another user, an error that is no "no"
    read_all(index)


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MMSA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700 and cache_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="is not a folder of this user alone; set MMSA_CACHE"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder of this user alone"):
        cache_folder()


def test_a_relative_cache_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE", "relative-to-the-first")
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / "relative-to-the-first"
    monkeypatch.chdir("/")
    assert cache_folder() == tmp_path / "relative-to-the-first"


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("three years")
    (tmp_path / "lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(tmp_path / "lock")
    os.close(open_lock(tmp_path / "thesis"))
    assert (tmp_path / "thesis").read_text() == "three years"
