"""Packings that meet: none removes or replaces another's work, and none leaves its own behind."""

import fcntl
import os
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
from shards.workspace import workspace
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
    dead, working = tmp_path / f".{name}.packing-dead", tmp_path / f".{name}.packing-works"
    for folder in (dead, working):
        folder.mkdir()
        (folder / "train-00000.tar").write_bytes(b"half")
    lock = os.open(working, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    pack(GeneratedSource("mosi", 5), tmp_path / name)
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [working.name, name]


def test_a_stale_folder_that_is_gone_when_it_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / ".set.packing-gone").symlink_to(tmp_path / "nowhere")  # listed, but nothing to open
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
