"""Law 9 for a csv and its npz: arrays and columns that are not what the options say."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ConfigError, DataError
from shards.sources.columns import Columns
from shards.sources.folds import read_folds
from shards.sources.sequence import ComputationalSequence
from shards.sources.table import TableSource
from tests.shards.test_sources_table import ROWS, arrays, everything, refused, source, table, write_csv, write_npz

pytestmark = pytest.mark.fault

EVEN = np.full(ROWS, 2)


def with_first(value: float) -> np.ndarray:
    """Lengths of 2 but for the first."""
    return np.array([value, *EVEN[1:]])


@pytest.mark.parametrize(
    ("changed", "told", "said"),
    [
        ({"sound": np.zeros((9, 5))}, "sound", "sound has 9 rows, expected 24, one an id; if these are steps of all"),
        ({"sound": np.zeros(ROWS)}, "sound", "sound is float64 (24,), expected numbers (N, D) or (N, T, D)"),
        ({"n": EVEN}, "sound:n", "n sums to 48, but sound has 24 steps"),
        ({"n": np.ones(3, int)}, "sound:n", "n is an array (3,) of int64, expected (24,) lengths, one an id"),
        ({"n": np.array(["2"] * ROWS)}, "sound:n", "n is an array (24,) of <U1, expected (24,) lengths"),
        ({"n": with_first(2.9)}, "sound:n", "n[0] is 2.9, expected a whole number of steps, 0 or more"),
        ({"n": with_first(np.nan)}, "sound:n", "n[0] is nan, expected a whole number of steps, 0 or more"),
        ({"n": with_first(-1)}, "sound:n", "n[0] is -1, expected a whole number of steps, 0 or more"),
        ({"n": EVEN * 0 + 2**62}, "sound:n", "n goes up to 9,007,199,254,740,992, but sound has 24 steps"),
        ({"sound": np.zeros((ROWS, 2, 5)), "n": EVEN + 1}, "sound:n", "n goes up to 3, but sound has 2 steps"),
        ({"id": np.array(["v0_0"] * ROWS)}, "sound", "id names 23 ids more than once"),
        ({"id": np.array("v0_0")}, "sound", "id is an array () of <U4, expected ids (N,), one an utterance"),
        ({"id": np.arange(ROWS)}, "sound", "has no row for id 'v0_0' of"),
    ],
)
def test_arrays_of_the_wrong_shape(tmp_path: Path, changed: dict[str, np.ndarray], told: str, said: str) -> None:
    assert said in refused(tmp_path, DataError, None, arrays(**changed), audio=told)


def test_ids_may_be_bytes(tmp_path: Path) -> None:
    given = arrays()
    plain = everything(source(tmp_path, None, given, audio="sound"))
    given["id"] = given["id"].astype(np.bytes_)
    for key, utterance in everything(source(tmp_path, None, given, audio="sound")).items():
        np.testing.assert_array_equal(utterance.modalities["audio"], plain[key].modalities["audio"])


def test_an_npz_of_which_nothing_is_named(tmp_path: Path) -> None:
    said = refused(tmp_path, ConfigError, None, arrays(face=np.zeros((ROWS, 2))))
    assert "features.npz is given, but no array of it is named; add --audio, --vision or --text-features" in said
    assert "(it has face, sound)" in said


@pytest.mark.parametrize("name", ["label", "unused"])
def test_a_column_that_is_there_twice(tmp_path: Path, name: str) -> None:
    path = write_csv(tmp_path, table(unused=[0] * ROWS, again=[0] * ROWS))
    path.write_text(path.read_text().replace("again", name, 1))
    if name == "unused":
        assert TableSource(path).counts["train"] == 12
    else:
        with pytest.raises(DataError, match=r"column 'label' \(--label\) is there 2 times; rename all but one"):
            TableSource(path)


def test_fewer_videos_than_none(tmp_path: Path) -> None:
    columns = table(split=["train" if s == "valid" else s for s in table()["split"]])
    said = refused(tmp_path, ConfigError, columns, hold_out_valid=-1)
    assert "--hold-out-valid -1: expected a number of videos, 0 or more" in said


@pytest.mark.parametrize("content", ["split: 2020-13-45", "id: 0b_", "[" * 9999])
def test_a_yaml_of_columns_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "columns.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"--columns .*columns\.yaml: cannot be read: "):
        Columns.from_yaml(path, overrides={})


@pytest.mark.parametrize("name", ["id", "sound"])
def test_what_else_lies_in_a_zip_file(tmp_path: Path, name: str) -> None:
    npz, csv = write_npz(tmp_path, {k: v for k, v in arrays().items() if k != name}), write_csv(tmp_path, table())
    with zipfile.ZipFile(npz, "a") as archive:
        archive.writestr(name, "no array")
    with pytest.raises(DataError, match=rf"features\.npz: {name} \(--.*\) is no array; write the file anew"):
        TableSource(csv, npz, Columns(audio="sound"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Nor read once, and its checksum of what is left in it."""
    os.mkfifo(tmp_path / "pipe")
    csv = write_csv(tmp_path, table())
    for given in ((tmp_path / "pipe",), (csv, tmp_path / "pipe", Columns(audio="sound"))):
        with pytest.raises(DataError, match="pipe: is a pipe or a device, expected a file; write it to the disk first"):
            TableSource(*given)
    with pytest.raises(DataError, match="is a pipe or a device"):
        ComputationalSequence(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe or a device"):
        read_folds((tmp_path / "pipe",))
