"""Of every format: each file that is read while it is packed is watched, and a set is refused that is of two states."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.sources import Source, Watched
from shards.write import pack
from tests.shards import test_sources_csd as csd
from tests.shards import test_sources_folder as folder
from tests.shards import test_sources_table as table
from tests.shards.test_hostile_pickles import replaced

SOURCES: dict[str, Callable[[Path], Source]] = {
    "table": lambda path: table.source(path, features=table.arrays(), audio="sound"),
    "folder": folder.source,
    "files together": lambda path: folder.source(path, together=True),
    "csd": lambda path: csd.source(path, audio=csd.AUDIO, words=csd.WORDS),
}


def files(where: Path) -> list[Path]:
    return sorted(path for path in where.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", SOURCES)
def test_every_file_is_watched(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = SOURCES[kind](tmp_path / "in")
    assert isinstance(source, Watched)
    source.unchanged()
    some = files(tmp_path / "in")
    for path in np.random.default_rng(0).permutation(np.array(some, object))[:6]:
        replaced(path)
        with pytest.raises(DataError, match=f"{path.name}: changed while it was packed; nothing of it is kept"):
            source.unchanged()
        source = SOURCES[kind](tmp_path / "in")
        assert isinstance(source, Watched)


@pytest.mark.parametrize("kind", SOURCES)
def test_what_changes_while_it_is_packed_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    source = SOURCES[kind](tmp_path / "in")
    plainly, left = source.read, [1]

    def reading(split: str, number: int) -> object:
        found = plainly(split, number)
        if left and split == "test":
            replaced(files(tmp_path / "in")[left.pop()])
        return found

    monkeypatch.setattr(source, "read", reading)
    with pytest.raises(DataError, match="changed while it was packed"):
        pack(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()
