"""Packings that meet: none removes or replaces another's work, and none leaves its own behind."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from shards.errors import ConfigError
from shards.index import Index
from shards.sources.generated import GeneratedSource
from shards.utterance import Utterance
from shards.workspace import check_target, finished, workspace
from shards.write import pack

pytestmark = pytest.mark.fault


class Meanwhile(GeneratedSource):
    """Generated data; something happens before the first test sample is read."""

    def __init__(self, event: Callable[[], Any]) -> None:
        super().__init__("mosi", 12)
        self._event = event

    def read(self, split: str, number: int) -> Utterance:
        if split == "test" and self._event:
            event, self._event = self._event, None
            event()
        return super().read(split, number)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_packings_into_one_folder(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "set"
    source = Meanwhile(lambda: pack(GeneratedSource("mosi", 9), out, name="first"))
    if overwrite:
        pack(source, out, name="second", overwrite=True)
    else:
        with pytest.raises(ConfigError, match="another packing finished there meanwhile; choose another folder, or --"):
            pack(source, out, name="second")
    assert Index.load(out).name == ("synthetic-second" if overwrite else "synthetic-first")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_overwrite_looks_again_before_it_replaces(tmp_path: Path) -> None:
    out = tmp_path / "set"
    pack(GeneratedSource("mosi", 9), out, name="first")
    source = Meanwhile(lambda: (out / "thesis.txt").write_text("three years"))
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt', which no packing wrote"):
        pack(source, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "three years"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["set", "a[1]", "s*t?"])
def test_what_a_killed_packing_left_is_removed_and_a_working_one_is_not(tmp_path: Path, name: str) -> None:
    dead, working = tmp_path / f".{name}.packing-deceased", tmp_path / f".{name}.packing-at_work_"
    for folder in (dead, working):
        folder.mkdir()
        (folder / "train-00000.tar").write_bytes(b"half")
    lock = os.open(working, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    pack(GeneratedSource("mosi", 5), tmp_path / name)
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [working.name, name]


def test_a_stale_folder_that_is_gone_when_it_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / ".set.packing-gone_now").symlink_to(tmp_path / "nowhere")  # listed, but nothing to open
    pack(GeneratedSource("mosi", 5), tmp_path / "set")


def test_a_workspace_just_made_is_not_taken_for_a_stale_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its locking, a second packing begins."""
    make, others = tempfile.mkdtemp, []

    def begin() -> None:
        with workspace(tmp_path / "set", {}):
            pass

    def slow(**options: Any) -> str:
        folder = make(**options)
        if not others:
            others.append(Thread(target=begin))
            others[0].start()
            others[0].join(timeout=0.3)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", slow)
    with workspace(tmp_path / "set", {}) as folder:
        others[0].join(timeout=60)
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_another_target_whose_name_goes_on_like_a_workspace(tmp_path: Path) -> None:
    other = tmp_path / ".set.packing-b.packing-abcdefgh"
    other.mkdir()
    pack(GeneratedSource("mosi", 5), tmp_path / "set")
    assert other.is_dir()


def test_old_data_that_a_killed_exchange_left_goes_with_the_next(tmp_path: Path) -> None:
    out = tmp_path / "set"
    pack(GeneratedSource("mosi", 5), out)
    shutil.copytree(out, tmp_path / ".set.123.old")
    (tmp_path / ".set.124.old").mkdir()  # no data set: somebody's own
    pack(GeneratedSource("mosi", 6), out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.124.old", "set"]


def test_a_target_that_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--out /proc is where a disk is mounted; .* e\.g\. /proc/mosi"):
        check_target(Path("/proc"), True)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for out in (Path(), Path("..")):
        with pytest.raises(ConfigError, match="is the folder you are in, or one above it"):
            pack(GeneratedSource("mosi", 5), out)
    assert list(tmp_path.rglob("*")) == [tmp_path / "below"]


def test_names_that_nothing_can_hold(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="its links lead nowhere"):
        pack(GeneratedSource("mosi", 5), tmp_path / "loop")
    latin = os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match="its name has bytes that are no UTF-8"):
        pack(GeneratedSource("mosi", 5), tmp_path / latin)
    with pytest.raises(ConfigError, match="give another with --name"):
        pack(GeneratedSource("mosi", 5), tmp_path / "set", name=latin)
    source = GeneratedSource("mosi", 5)
    source.provenance |= {"file": f"{latin}.csv"}
    with pytest.raises(ConfigError, match=r"its file, .* which an index cannot hold; rename it"):
        pack(source, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from shards.workspace import workspace

with workspace(Path(sys.argv[1]), {}) as folder:
    (folder / "train-00000.done.json").write_text("{}")
    if pid := os.fork():
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(1)
    time.sleep(600)
"""


def test_a_writer_that_outlives_its_driver_does_not_keep_what_that_left(tmp_path: Path) -> None:
    """It may be in the middle of something slow when the same command comes again."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "set")]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, check=False)
    assert ended.returncode == -signal.SIGKILL
    try:
        with workspace(tmp_path / "set", {}) as folder:
            assert finished(folder) == ["train-00000"]
    finally:
        os.kill(int(ended.stdout), signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
