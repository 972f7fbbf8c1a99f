"""Small pickles that would take hours or all memory, strings that no program can read, and files that are not there.

Each of them ends in a sentence, at once.
"""

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError, TransientError
from shards.index import Index
from shards.read import ShardReader
from shards.sources.mmsa import MmsaSource
from shards.sources.mult import MultSource
from shards.sources.pickles import load
from shards.unpack import unpack
from shards.utterance import Utterance
from shards.write import pack
from tests.shards.made import Samples, utterances
from tests.shards.pickles import content, mult_split, written
from tests.shards.test_pickles import Python2

pytestmark = pytest.mark.fault

DAMAGED = "cannot be unpickled"


def doubled(times: int, leaf: Any, kind: Callable[[list[Any]], Any] = list) -> Any:
    for _ in range(times):
        leaf = kind([leaf, leaf])
    return leaf


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def plain(value: object) -> bytes:
    """A value within a pickle that is written by hand."""
    return pickle.dumps(value, 2)[2:-1]


def dtype(name: object) -> bytes:
    return named("numpy", "dtype") + plain((name, False, True)) + b"R"


def array(shape: tuple[int, ...], name: object, data: bytes = b"") -> bytes:
    """An array as numpy pickles it, of whatever shape and type."""
    begun = named("numpy.core.multiarray", "_reconstruct") + b"(" + named("numpy", "ndarray") + plain((0,)) + b"NtR"
    held = b"B" + struct.pack("<I", len(data)) + data
    return begun + b"(" + plain(1) + plain(shape) + dtype(name) + plain(False) + held + b"tb"


def rebuilt(shape: tuple[int, ...], name: str) -> bytes:
    """As protocol 5 pickles it."""
    return named("numpy.core.numeric", "_frombuffer") + b"(C\0" + dtype(name) + plain(shape) + plain("C") + b"tR"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "strings without letters": (array((10**9,), "S0"), DAMAGED),
    "strings without letters, along two axes": (array((2**20, 2**10), "U0"), DAMAGED),
    "no steps, but very many samples": (array((10**9, 0, 3), "f4"), DAMAGED),
    "the same of protocol 5": (rebuilt((10**9, 0, 3), "f4"), DAMAGED),
    "letters that are none": (array((2,), "U1", b"\xff" * 8), DAMAGED),
    "the same the other way round": (array((1,), ">U1", b"\x00\x11\x00\x00"), DAMAGED),
    "one such letter": (
        named("numpy.core.multiarray", "scalar") + b"(" + dtype("U1") + b"C\x04" + b"\xff" * 4 + b"tR",
        DAMAGED,
    ),
    "a type with fields": (
        array((2,), ("i8", [("a", "i4")]), bytes(16)),
        "refers to a type of numbers that has fields",
    ),
    "zeros by number": (named("builtins", "bytearray") + plain((2**40,)) + b"R", "refers to a bytearray of an int"),
}
DEEP = doubled(60, 0, tuple)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_few_bytes_that_announce_much(tmp_path: Path, name: str) -> None:
    path = tmp_path / "features.pkl"
    body, said = HOSTILE[name]
    path.write_bytes(b"\x80\x04" + body + b".")
    with pytest.raises(DataError, match=said):
        load(path)


@pytest.mark.parametrize("closing", [b"Ns", b"(@Nu", b"(@Nd", b"(@\x91", b"\x8f(@\x90"])
def test_keys_that_take_for_ever(tmp_path: Path, closing: bytes) -> None:
    """Each way to put something into a dict or set; @ is a tuple of tuples of tuples …"""
    path = tmp_path / "features.pkl"
    deep = plain(DEEP)
    body = b"}" + deep + closing if b"@" not in closing else b"}" + closing.replace(b"@", deep)
    path.write_bytes(b"\x80\x04" + body + b".")
    with pytest.raises(DataError, match="refers to a key of tuples in tuples"):
        load(path)


def test_usual_empty_arrays_and_letters(tmp_path: Path) -> None:
    held = [np.zeros((40, 0, 74), np.float32), np.zeros(0, "U5"), np.array(["ä", "\U0010ffff"], ">U1"), bytearray(5000)]
    for protocol in (2, 4, 5):
        (tmp_path / "features.pkl").write_bytes(pickle.dumps([*held, {(1, "a"): {2}}], protocol))
        *arrays, data, pairs = load(tmp_path / "features.pkl")
        for found, expected in zip(arrays, held[:3], strict=True):
            np.testing.assert_array_equal(found, expected)
        assert (bytes(data), pairs) == (bytes(5000), {(1, "a"): {2}})


@pytest.mark.parametrize("key", ["regression_labels", "text", "text_bert", "audio_lengths"])
@pytest.mark.parametrize("value", [doubled(28, [0.0]), doubled(70, [0.0]), ["a" * 10**6] + [""] * 11])
def test_lists_that_stand_for_more_than_the_memory(tmp_path: Path, key: str, value: Any) -> None:
    data = content()
    data["train"][key] = value if len(value) == 12 else [value] * 12
    path = written(tmp_path, data)
    with pytest.raises(DataError, match=rf"train\.{key}(\[0\])? is .*expected"):
        MmsaSource(path)


def test_one_row_of_zeros_for_all_padding(tmp_path: Path) -> None:
    data = content()
    zeros = [0.0] * 4
    data["train"]["audio"] = [[*row[:2].tolist(), *([zeros] * 9)] for row in data["train"]["audio"]]
    assert MmsaSource(written(tmp_path, data)).widths["audio"] == 4


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("id", [10**5000] * 12, "train.id holds an int, expected strings"),
        ("id", [(1, 10**5000)] * 12, "train.id holds a tuple, expected strings|train.id holds a tuple of 2"),
        ("raw_text", [10**5000] * 12, "train.raw_text of id .* is not a string"),
    ],
)
def test_numbers_too_long_to_spell_out(tmp_path: Path, key: str, value: Any, said: str) -> None:
    data: dict[Any, Any] = content()
    data["train"][key] = value
    with pytest.raises(DataError, match=said):
        MmsaSource(written(tmp_path, data))


def test_keys_too_long_to_spell_out(tmp_path: Path) -> None:
    data: dict[Any, Any] = content() | {10**5000: 1, "x" * 500: 2}
    assert MmsaSource(written(tmp_path, data)).notes() == [
        f"<an int>, {'x' * 80}…: is none of the splits train, valid, test; left out"
    ]
    del data["train"]["id"]
    data["train"][10**5000] = 1
    with pytest.raises(DataError, match=r"train has no key 'id'.*<an int>"):
        MmsaSource(written(tmp_path, data))
    with pytest.raises(DataError, match="holds a dict of 1 with keys <an int>"):
        MmsaSource(written(tmp_path, {10**5000: 1}))


def test_python_2_text_of_any_length(tmp_path: Path) -> None:
    """UTF-8 where it is that, else Latin-1; never the numbers of a short array."""
    data = content()
    said = [
        "naïve ça".encode(),
        "naïve ça".encode() * 900,
        "ça".encode("latin1"),
        "ça".encode("latin1") * 3000,
        b"plain",
    ]
    data["test"]["raw_text"] = list(said)
    data["test"]["regression_labels"] = np.frombuffer("äöüß".encode() * 5, np.float64)  # valid UTF-8, too
    path = tmp_path / "features.pkl"
    with path.open("wb") as file:
        Python2(file, protocol=2).dump(data)
    source = MmsaSource(path)
    texts = [source.read("test", n).raw_text for n in range(5)]
    assert texts == ["naïve ça", "naïve ça" * 900, "ça", "ça" * 3000, "plain"]
    labels = [source.read("test", n).labels["M"] for n in range(5)]
    assert labels == data["test"]["regression_labels"].astype(np.float32).tolist()


# --- the file


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"\0")


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("how", "said"), [(overwritten, "changed while"), (replaced, "changed while"), (Path.unlink, "no such")]
)
@pytest.mark.parametrize("read", [22, 42])
def test_an_input_that_changes_while_it_is_packed(
    tmp_path: Path, how: Callable[[Path], None], said: str, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MmsaSource(written(tmp_path, content()))
    reads, plainly = 0, source.read

    def reading(split: str, number: int) -> Utterance:
        nonlocal reads
        reads += 1
        found = plainly(split, number)
        if reads == read:  # the size of each of the 21 is measured first
            how(Path(source.where))
        return found

    monkeypatch.setattr(source, "read", reading)
    with pytest.raises(DataError, match=rf"features\.pkl: {said}"):
        pack(source, tmp_path / "set", shard_bytes=4096)
    assert [path.name for path in tmp_path.iterdir() if path.name != "features.pkl"] == []


def test_mult_is_watched_too(tmp_path: Path) -> None:
    path = written(tmp_path, {s: mult_split(s, n)[0] for s, n in (("train", 9), ("valid", 3), ("test", 4))})
    source = MultSource(path)
    source.unchanged()
    replaced(path)
    with pytest.raises(DataError, match="changed while it was packed; nothing of it is kept"):
        pack(source, tmp_path / "set")


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pkl")
    with pytest.raises(DataError, match=r"pipe\.pkl: is a pipe or a device, expected a file"):
        MmsaSource(tmp_path / "pipe.pkl")


# --- back again


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    index, _ = pack(Samples(utterances({"train": 40, "valid": 2, "test": 2})), tmp_path / "set", shard_bytes=1)
    assert len(index.shards) == 44
    code = (
        "import resource, sys\n"
        "from mmsa_dist.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (72, 72))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["unpack", str(index.folder), "--to", str(tmp_path / "back.pkl")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert MmsaSource(tmp_path / "back.pkl").counts == {"train": 40, "valid": 2, "test": 2}


def test_an_input_that_cannot_be_read_is_not_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = pack(Samples(utterances({"train": 4, "valid": 2, "test": 2})), tmp_path / "set")

    def failing(self: ShardReader, number: int, with_text: bool = False) -> Utterance:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ShardReader, "sample", failing)
    with pytest.raises(TransientError, match=r"set.* cannot be read: Input/output error; nothing was written"):
        unpack(Index.load(index.folder), tmp_path / "back.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
