"""The restricted unpickler: every way in which arrays were ever pickled, and none of them held twice."""

import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from shards.errors import DataError
from shards.sources.mmsa import MmsaSource
from shards.sources.pickles import load
from tests.shards.pickles import content, written


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("numpy_modules", [b"numpy._core", b"numpy.core"])
def test_pickles_of_every_protocol_and_numpy(tmp_path: Path, protocol: int, numpy_modules: bytes) -> None:
    data = content()
    path = written(tmp_path, data, protocol=protocol)
    plain = path.read_bytes()
    if protocol < 4:  # names are not length-prefixed, so they can be replaced
        assert b"numpy._core" in plain
        path.write_bytes(plain.replace(b"numpy._core", numpy_modules))
    elif numpy_modules == b"numpy.core":
        length, other = len(b"numpy._core.multiarray"), len(b"numpy.core.multiarray")
        named = bytes([0x8C, length]) + b"numpy._core.multiarray"
        path.write_bytes(unframed(plain).replace(named, bytes([0x8C, other]) + b"numpy.core.multiarray"))
    assert list(MmsaSource(path).keys("test")) == data["test"]["id"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_large_arrays_stay_in_the_file(tmp_path: Path, protocol: int) -> None:
    data = content()
    large = np.random.default_rng(0).standard_normal((12, 11, 300)).astype(np.float32)
    data["train"]["audio"] = large
    for split in ("valid", "test"):
        data[split]["audio"] = np.ones((len(data[split]["id"]), 11, 300), np.float64)
    data["train"]["raw_text"] = [text.encode() * 700 for text in data["train"]["raw_text"]]  # long bytes that are text
    path = written(tmp_path, data, protocol)
    source = MmsaSource(path)
    held = source._splits["train"].features["audio"]
    assert isinstance(held, np.ndarray) and not held.flags.owndata and not held.flags.writeable
    for n, length in enumerate(data["train"]["audio_lengths"]):
        utterance = source.read("train", n)
        np.testing.assert_array_equal(utterance.modalities["audio"], large[n, :length])
        assert utterance.modalities["audio"].flags.aligned and utterance.modalities["audio"].flags.writeable
        assert utterance.raw_text == f"words of train {n}" * 700
    np.testing.assert_array_equal(source.read("test", 0).modalities["audio"], 1)


def test_arrays_within_frames_stay_in_the_file_too(tmp_path: Path) -> None:
    """As Python 3.4 to 3.6 wrote them: one frame around everything."""
    data = content()
    data["train"]["audio"] = np.ones((12, 11, 300), np.float32)
    for split in ("valid", "test"):
        data[split]["audio"] = np.ones((len(data[split]["id"]), 11, 300), np.float32)
    path = written(tmp_path, data)
    body = unframed(path.read_bytes())
    path.write_bytes(body[:2] + b"\x95" + (len(body) - 2).to_bytes(8, "little") + body[2:])
    source = MmsaSource(path)
    assert not source._splits["train"].features["audio"].flags.owndata  # type: ignore[attr-defined]
    np.testing.assert_array_equal(source.read("train", 3).modalities["audio"], 1)


def test_pickles_of_python_2(tmp_path: Path) -> None:
    """Their strings are bytes, and so are the numbers of an array."""
    data = content()
    for raw in data.values():
        raw["audio"] = np.repeat(raw["audio"], 300, axis=2)
        raw["raw_text"] = [text.encode() * 700 for text in raw["raw_text"]]
    path = tmp_path / "features.pkl"
    with path.open("wb") as file:
        Python2(file, protocol=2).dump(data)
    source = MmsaSource(path)
    for n in range(source.counts["test"]):
        utterance = source.read("test", n)
        assert (utterance.key, utterance.raw_text) == (data["test"]["id"][n], f"words of test {n}" * 700)
        for name, values in utterance.modalities.items():
            np.testing.assert_array_equal(values, data["test"][name][n, : len(values)])


class Python2(pickle._Pickler):
    """Writes bytes as the strings that they were."""

    def save_bytes(self, data: bytes) -> None:
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[type, Callable[..., None]]] = {**pickle._Pickler.dispatch, bytes: save_bytes}


def unframed(data: bytes) -> bytes:
    """A protocol 4 or 5 pickle without frames, whose lengths a changed name would make wrong."""
    out, positions = bytearray(), [(op.name, pos) for op, _, pos in pickletools.genops(data)]
    for (name, start), (_, end) in zip(positions, [*positions[1:], ("", len(data))], strict=True):
        if name != "FRAME":
            out += data[start:end]
    return bytes(out)


@pytest.mark.parametrize("opcode", [pickle.READONLY_BUFFER, pickle.NEXT_BUFFER])
def test_nothing_out_of_the_file_is_taken_for_bytes(tmp_path: Path, opcode: bytes) -> None:
    path = tmp_path / "features.pkl"
    path.write_bytes(pickle.PROTO + b"\x05" + pickle.SHORT_BINBYTES + b"\x01a" + opcode + pickle.STOP)
    with pytest.raises(DataError, match="refers to an object outside the file, which is not data; refused"):
        load(path)


def test_an_array_that_is_announced_twice_is_one_array(tmp_path: Path) -> None:
    """References to it come from the memo, where its first half was kept."""
    array = np.arange(6000.0)
    path = tmp_path / "features.pkl"
    path.write_bytes(pickle.dumps({"one": array, "two": [array, array]}, protocol=4))
    found = load(path)
    np.testing.assert_array_equal(found["one"], array)
    assert found["one"] is found["two"][0] is found["two"][1]
