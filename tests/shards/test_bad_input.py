"""Law 9 through the front door: a sentence, the right exit code, nothing run, nothing half-written left behind."""

import errno
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmsa_dist.__main__ import main
from shards.errors import DataError, TransientError
from shards.sources.generated import GeneratedSource
from shards.sources.pickles import load
from shards.write import pack
from tests.disk import disk_of
from tests.shards.pickles import content, written

pytestmark = pytest.mark.fault


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """What `mmsa-dist` says on standard error: one sentence, no traceback."""
    assert main(list(argv)) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


# --- pickles


class Evil:
    """Unpickles by calling what it was given."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._call, self._args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call, self._args


def hidden(evil: object, where: str) -> object:
    """`evil` in a place of an otherwise good feature pickle."""
    data = content()
    if where == "top":
        return evil
    if where == "key":
        data["train"]["audio"] = evil
    if where == "element":
        objects = np.empty(12, dtype=object)
        objects[:] = list(data["train"]["audio"])
        objects[3] = evil
        data["train"]["audio"] = objects
    if where == "unread":
        data["train"]["something else"] = [evil]
    return data


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("where", ["top", "key", "element", "unread"])
def test_a_pickle_that_calls_a_function_never_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int, where: str
) -> None:
    sign = tmp_path / "it ran"
    path = written(tmp_path, hidden(Evil(os.mkdir, str(sign)), where), protocol)
    said = refused(capsys, 3, "pack", "mmsa", str(path), "--out", str(tmp_path / "set"))
    assert "the pickle refers to posix.mkdir, which is not data; refused, and nothing of it was run" in said
    assert not sign.exists()
    pickle.loads(path.read_bytes())
    assert sign.exists(), "the pickle was harmless: the test proves nothing"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.pkl", "it ran"]


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (Evil(eval, "1"), "builtins.eval"),
        (Evil(getattr, "a", "b"), "builtins.getattr"),
        (Evil(np.load, "x"), "numpy.load"),
        (Evil(np.fromfile, "x"), "numpy.fromfile"),
        (Evil(subprocess.Popen, ["true"]), "subprocess.Popen"),
        (Evil(bytes, 10), "builtins.bytes"),
        (Path("x"), "pathlib.PosixPath"),
        (np.random.default_rng(0), "numpy.random"),
        (np.ma.masked_array([1.0]), "numpy.ma"),
        (np.array(["a"], dtype=np.dtypes.StringDType()), "numpy"),
        (np.zeros(2, dtype=[("a", "f4")]), "an array of"),
        (np.zeros(2, dtype="M8[s]"), "an array of"),
    ],
)
def test_nothing_but_data_is_known(tmp_path: Path, evil: object, named: str) -> None:
    with pytest.raises(DataError) as caught:
        load(written(tmp_path, {"train": evil}))
    assert f"the pickle refers to {named}" in str(caught.value)


def test_an_array_whose_bytes_would_be_pointers(tmp_path: Path) -> None:
    """numpy's own `__setstate__` takes a dtype whose flags lie, and then raw bytes as object pointers."""

    class Forged:
        def __reduce__(self) -> tuple[Any, ...]:
            dtype = np.dtype("O")
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, b"\x41" * 8)

    with pytest.raises(DataError, match="cannot be unpickled"):
        load(written(tmp_path, [Forged()]))


class State:
    """Unpickles as an array of objects with this state."""

    def __init__(self, shape: Any, data: list[Any]) -> None:
        self._state = (1, shape, np.dtype("O"), False, data)

    def __reduce__(self) -> tuple[Any, ...]:
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self._state


def opcodes(value: object) -> bytes:
    """What leaves `value` on the stack of an unpickler; writes its memo from 0 on."""
    return pickle.dumps(value, protocol=2)[2:-1]


BYTE, VIEW = np.dtype("u1"), np._core.numeric._frombuffer
FORGED = {
    "fewer objects than its shape has": opcodes(State((2_000_000,), [1])),
    "a shape below zero": opcodes(State((-5,), [1])),
    "a shape of truths": opcodes(State((True,), [1])),
    "a second state": opcodes(np.zeros(4, BYTE)) + opcodes((1, (2,), BYTE, False, b"AA")) + b"b",
    "a view of an array": opcodes(Evil(VIEW, np.zeros(4, BYTE), BYTE, (4,), "C")),
    "a number out of an array": opcodes(Evil(np._core.multiarray.scalar, BYTE, np.zeros(1, BYTE))),
    "bytes that grow under a view": b"".join(
        [
            *(opcodes(bytearray(b"AAAA")), b"q\xc8"),  # kept as number 200
            *(opcodes(VIEW), b"(h\xc8", opcodes(BYTE), opcodes((4,)), opcodes("C"), b"tR"),
            b"h\xc8K\1a",  # 1 is appended to it
        ]
    ),
}


@pytest.mark.parametrize("forged", FORGED)
def test_an_array_forged_to_reach_foreign_memory(tmp_path: Path, forged: str) -> None:
    """In a process of its own: what reaches foreign memory ends it."""
    path = tmp_path / "features.pkl"
    path.write_bytes(b"\x80\2" + FORGED[forged] + b".")
    argv = [sys.executable, "-m", "mmsa_dist", "pack", "mmsa", str(path), "--out", str(tmp_path / "set")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(f"error: {path}: cannot be unpickled")


def test_a_few_bytes_that_ask_for_gigabytes(tmp_path: Path) -> None:
    """Memo number 2^31: the unpickler in C makes room for all the numbers before it."""
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    assert load(path) == {}


def test_a_state_for_what_has_none(tmp_path: Path) -> None:
    """BUILD would set attributes of our own functions."""
    path = tmp_path / "build.pkl"
    path.write_bytes(b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n}X\x04\x00\x00\x00evilK\x01sb.")
    with pytest.raises(DataError, match="cannot be unpickled"):
        load(path)


def test_another_codec_is_refused(tmp_path: Path) -> None:
    import codecs

    path = tmp_path / "codec.pkl"
    path.write_bytes(pickle.dumps(Evil(codecs.encode, "abc", "rot13"), protocol=2))
    with pytest.raises(DataError, match="the codec 'rot13'"):
        load(path)


def test_objects_outside_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "persistent.pkl"
    path.write_bytes(b"\x80\x02X\x01\x00\x00\x00aQ.")
    with pytest.raises(DataError, match="an object outside the file"):
        load(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04 and so on", "is a zip archive (.npz, or torch.save)"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (.csd, .h5)"),
        (b"\x1f\x8b\x08\x00", "is a gzip file; decompress it first"),
        (b"\x93NUMPY\x01\x00", "is a .npy file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file itself"),
        (b"video_id,clip_id\n", "is another kind of file, or cut short"),
        (b"", "is another kind of file, or cut short"),
        (bytes(range(256)), "is another kind of file, or cut short"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x", ""),  # a string of 4 exabytes
        (b"\x80\x04)\x81.", "is another kind of file, or cut short"),
    ],
)
def test_a_foreign_file_that_is_not_a_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, said: str
) -> None:
    path = tmp_path / "features.pkl"
    path.write_bytes(data)
    assert said in refused(capsys, 3, "pack", "mmsa", str(path), "--out", str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_missing_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, 3, "pack", "mmsa", str(tmp_path / "none.pkl"), "--out", str(tmp_path / "set"))
    assert "none.pkl: no such file; expected a feature pickle" in said
    refused(capsys, 3, "pack", "mmsa", str(tmp_path), "--out", str(tmp_path / "set"))  # a folder


def test_a_pickle_cut_short_anywhere(tmp_path: Path) -> None:
    path = written(tmp_path, content())
    whole = path.read_bytes()
    for size in np.random.default_rng(0).integers(0, len(whole), 60):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"features\.pkl"):
            load(path)


def test_a_damaged_pickle_never_ends_in_a_traceback(tmp_path: Path) -> None:
    path = written(tmp_path, {"train": {"id": ["a", "b"], "audio": np.ones((2, 3, 4), np.float32)}})
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load(path)  # a changed value may still be a pickle
        except DataError as error:
            assert "features.pkl" in str(error)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk_of(tmp_path / "disk", "3m") as disk:
        yield disk


@pytest.mark.parametrize(
    ("shard_megabytes", "workers"), [("0.5", "1"), ("64", "1"), ("0.5", "2")]
)  # full between shards, or while one is written
def test_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str], shard_megabytes: str, workers: str) -> None:
    out = small_disk / "set"
    argv = ["pack", "generated", "--samples", "200", "--out", str(out), "--shard-size", shard_megabytes]
    said = refused(capsys, 75, *argv, "--workers", workers)
    assert f"no space left for {out}: about " in said
    needed = float(said.split("about ")[1].split(" MB")[0])
    assert 8 < needed < 16  # 200 samples of about 60 kB
    assert f"3.0 MB are free in {small_disk}" in said
    assert "what was written is removed again: make room or choose another --out" in said
    assert list(small_disk.iterdir()) == []
    assert shutil.disk_usage(small_disk).used == 0


def test_a_full_disk_keeps_the_data_set_that_was_there(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(small_disk / "set")
    assert main(["pack", "generated", "--samples", "10", "--out", out]) == 0
    capsys.readouterr()
    refused(capsys, 75, "pack", "generated", "--samples", "200", "--out", out, "--overwrite")
    assert main(["verify", out]) == 0
    assert [path.name for path in small_disk.iterdir()] == ["set"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The same without root: a limit on the size of a file, in a process of its own."""
    program = f"""
import resource, sys
from mmsa_dist.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(main(["pack", "generated", "--samples", "100", "--out", {str(tmp_path / "set")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    assert f"({os.strerror(errno.EFBIG)} after " in done.stderr
    assert "no space left" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_limit_of_this_process_is_untouched() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_disk_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(TransientError, match="Input/output error; what was written is removed again"):
        pack(GeneratedSource("mosi", 5), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("letters", [250, 300])  # the workspace's name is longer than the folder's
def test_a_name_that_no_file_system_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str], letters: int) -> None:
    out = tmp_path / ("x" * letters)
    assert f"--out {out} cannot be written: File name too long; choose another folder" in refused(
        capsys, 2, "pack", "generated", "--samples", "5", "--out", str(out)
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "set"
    assert f"cannot be made: {tmp_path / 'file'} is a file" in refused(
        capsys, 2, "pack", "generated", "--samples", "5", "--out", str(out)
    )


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(GeneratedSource):
        def read(self, split: str, number: int) -> Any:
            if split == "valid":
                raise KeyboardInterrupt
            return super().read(split, number)

    with pytest.raises(KeyboardInterrupt):
        pack(Interrupted("mosi", 40), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
