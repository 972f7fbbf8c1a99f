"""Tars, arrays and indexes that are made to harm, or damaged anyhow (FAULTS.md 25): refused by name, type and size.

Nothing is decoded, extracted or run; memory stays bounded; no error but our own comes out.
"""

import io
import json
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.errors import DataError, MmsaError
from shards.foreign.tar import TarReader
from shards.index import Index
from shards.read import ShardReader
from tests.shards.foreign import indexed, npy, npz, write_set, write_tar

pytestmark = pytest.mark.fault

MEGABYTE = 1 << 20


def header(name: str | bytes, size: int | bytes = 0, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A tar header with any field as given, and the right checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[:100] = (name.encode() if isinstance(name, str) else name).ljust(100, b"\0")
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[157:257] = link.ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


GOOD = npy(np.ones((2, 5), np.float32))
END = bytes(1024)
CLS = header("b.cls", 1) + padded(b"0")

HOSTILE_TARS: dict[str, tuple[bytes, str]] = {
    "traversal": (header("../../etc/x.audio.npy", 3) + padded(b"abc"), "leads out of the shard"),
    "absolute": (header("/etc/x.audio.npy", 3) + padded(b"abc"), "leads out of the shard"),
    "symbolic link": (header("b.audio.npy", 0, b"2", link=b"/etc/passwd"), "is a symbolic link"),
    "hard link": (header("b.audio.npy", 0, b"1", link=b"/etc/passwd"), "is a hard link"),
    "character device": (header("b.audio.npy", 0, b"3"), "is a device"),
    "block device": (header("b.audio.npy", 0, b"4"), "is a device"),
    "pipe": (header("b.audio.npy", 0, b"6"), "is a pipe"),
    "sparse": (header("b.audio.npy", 0, b"S"), "is a sparse file"),
    "pax sparse": (header("x", 24, b"x") + padded(b"24 GNU.sparse.size=9999\n") + CLS, "GNU.sparse"),
    "unknown type": (header("b.audio.npy", 0, b"Z"), "of the unknown type b'Z'"),
    "pax header of 1 GB": (header("x", 1 << 30, b"x") + bytes(512), "at most 65,536 are read"),
    "long name of 1 GB": (header("x", 1 << 30, b"L") + bytes(512), "at most 65,536 are read"),
    "pax nonsense": (header("x", 9, b"x") + padded(b"99999 a=b"), "does not parse"),
    "pax negative size": (header("x", 11, b"x") + padded(b"11 size=-1\n") + CLS, "no valid size"),
    "pax size of a terabyte": (header("x", 22, b"x") + padded(b"22 size=1099511627776\n") + CLS, "is truncated"),
    "global path": (header("x", 9, b"g") + padded(b"9 path=a\n") + CLS, "says 'path'"),
    "octal size beyond the file": (header("b.audio.npy", 8**11 - 1), "is truncated"),
    "binary size beyond the file": (
        header("b.audio.npy", b"\x80" + (1 << 60).to_bytes(11, "big")), "is truncated",
    ),
    "negative size": (header("b.audio.npy", b"\xff" * 12), "no valid size"),
    "size in letters": (header("b.audio.npy", b"ten\0".ljust(12, b"\0")), "no valid size"),
    "wrong checksum": (b"b" + header("c.audio.npy")[1:], "its checksum is wrong"),
    "no UTF-8": (header(b"b\xff.audio.npy"), "no UTF-8"),
    "another tar behind the end": (END + header("b.cls", 1) + padded(b"1"), "joined with cat"),
    "many members": (b"".join(header(f"b.{i}") for i in range(1100)), "more than 1,000 members"),
}  # fmt: skip


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails where more than a few megabytes were taken."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * MEGABYTE, f"{peak:,} bytes"


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_25_a_hostile_tar(tmp_path: Path, name: str) -> None:
    data, said = HOSTILE_TARS[name]
    good = header("a.audio.npy", len(GOOD)) + padded(GOOD) + header("a.cls", 1) + padded(b"0")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.tar").write_bytes(good + data + END)
    with pytest.raises(DataError) as error:
        indexed(folder, audio="audio.npy", label="cls", text="none", vision="none")
    assert said in str(error.value) and str(folder / "train.tar") in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["train.tar"]  # nothing extracted, nothing left
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("audio.npy", bytes(64 * MEGABYTE))
    return file.getvalue()


def forged_zip(change: Callable[[bytearray], None]) -> bytes:
    data = bytearray(npz({"audio": np.ones((2, 5), np.float32)}))
    change(data)
    return bytes(data)


def huge_directory(data: bytearray) -> None:
    data[-10:-6] = (1 << 30).to_bytes(4, "little")


def another_byte(data: bytearray) -> None:
    data[data.index(b"\n", data.index(b"NUMPY")) + 1] ^= 1


def nested(data: bytearray) -> None:
    at = data.index(b"{'descr'")
    data[at : at + 60] = b"(" * 60


def npy_with(text: bytes, length: int | None = None) -> bytes:
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(text) if length is None else length) + text + bytes(40)


def tensors_with(told: Any, length: int | None = None) -> bytes:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)


ONE = {"dtype": "F32", "shape": [2, 5], "data_offsets": [0, 40]}

HOSTILE_MEMBERS: dict[str, tuple[str, bytes, str]] = {
    "npy header of 10 MB": ("audio.npy", npy_with(b" " * 10_000_000), "a header of 10,000,000 bytes, at most 10,000"),
    "npy header of 4 GB": ("audio.npy", npy_with(b"", (1 << 32) - 1), "a header of 4,294,967,295 bytes, at most"),
    "npy header that nests": ("audio.npy", npy_with(b"(" * 9000), "a header that does not parse"),
    "npy header that is code": ("audio.npy", npy_with(b"__import__('os').getpid()"), "a header that does not parse"),
    "npy of a terabyte": (
        "audio.npy", npy_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 5)}"), "but has 40",
    ),
    "npy of a number without end": (
        "audio.npy", npy_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 4000 + b",)}"),
        "has the shape",
    ),
    "npy of a negative shape": (
        "audio.npy", npy_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -5)}"), "has the shape (-2, -5)",
    ),
    "npz bomb": ("f.npz", zip_bomb(), "is compressed (np.savez_compressed)"),
    "npz of a huge directory": ("f.npz", forged_zip(huge_directory), "is no npz file"),
    "npz with a flipped bit": ("f.npz", forged_zip(another_byte), "its CRC is wrong"),
    "npz that is none": ("f.npz", b"PK\5\6" + bytes(18), "has no audio (f.npz:audio)"),
    "npz of a pickle": ("f.npz", npz({"audio": np.array([{}], dtype=object)}), "is of type '|O'"),
    "safetensors header of 2^60": ("f.safetensors", tensors_with(b"{}", 1 << 60), "1,152,921,504,606,846,976 bytes"),
    "safetensors header that nests": ("f.safetensors", tensors_with(b"[" * 100_000), "does not parse"),
    "safetensors list": ("f.safetensors", tensors_with([1]), "does not parse"),
    "safetensors outside": (
        "f.safetensors", tensors_with({"audio": {**ONE, "data_offsets": [1 << 40, (1 << 40) + 40]}}), "but has",
    ),
    "safetensors before": (
        "f.safetensors", tensors_with({"audio": {**ONE, "data_offsets": [-40, 0]}}), "does not parse",
    ),
    "safetensors overlapping": ("f.safetensors", tensors_with({"audio": {**ONE, "data_offsets": [0, 41]}}), "41 bytes"),
    "safetensors of a shape without end": (
        "f.safetensors", tensors_with({"audio": {**ONE, "shape": [1 << 40] * 5000}}), "has the shape",
    ),
    "safetensors of another type": ("f.safetensors", tensors_with({"audio": {**ONE, "dtype": "BF16"}}), "type 'BF16'"),
    "json that nests": ("meta.json", b"[" * 100_000, "does not parse"),
    "json of a huge number": ("meta.json", b'{"y": ' + b"9" * 5000 + b"}", "does not parse"),
    "gzip called npy": ("audio.npy", b"\x1f\x8b" + zlib.compress(bytes(10_000_000)), "is no npy file"),
    "text of 100 MB": ("meta.json", b" " * (17 * MEGABYTE), "has 17,825,792 bytes, at most 16,777,216 are read"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_MEMBERS)
def test_25_a_hostile_member(tmp_path: Path, name: str) -> None:
    suffix, data, said = HOSTILE_MEMBERS[name]
    good = {
        "audio.npy": GOOD, "f.npz": npz({"audio": np.ones((2, 5), np.float32)}),
        "f.safetensors": tensors_with({"audio": ONE}), "meta.json": b'{"y": 1}',
    }  # fmt: skip
    write_tar(tmp_path / "train.tar", [("a", good), ("b", good | {suffix: data})])
    audio = suffix if suffix == "audio.npy" else f"{suffix}:audio" if suffix != "meta.json" else "audio.npy"
    tracemalloc.start()
    with pytest.raises(DataError) as error:
        indexed(tmp_path, audio=audio, label="meta.json:y", text="none", vision="none")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said in str(error.value) and "'b" in str(error.value) and len(str(error.value)) < 500
    assert peak < 4 * len(data) + 4 * MEGABYTE


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\3\4"])
def test_25_a_tar_that_is_compressed_whole(tmp_path: Path, magic: bytes) -> None:
    (tmp_path / "train.tar").write_bytes(magic + bytes(2000))
    with pytest.raises(DataError, match=r"train\.tar: is compressed \(\w+\), so no sample in it can be found"):
        indexed(tmp_path)


@pytest.mark.parametrize("name", ["more/train-1.tar.gz", "valid.TGZ", "test.tar.zst"])
def test_25_a_compressed_tar_in_a_folder_is_not_passed_over(tmp_path: Path, name: str) -> None:
    """It would be samples that silently are not there."""
    packed = tmp_path / name
    packed.parent.mkdir(exist_ok=True)
    packed.touch()
    with pytest.raises(DataError, match=rf"{packed.name}: is a compressed tar, which"):
        indexed(tmp_path)


def test_names_and_sizes_are_those_of_tarfile(tmp_path: Path) -> None:
    """What is strict elsewhere reads every form that honest programs write."""
    files = {
        "a/" + "n" * 98 + ".x": b"1",
        "é" * 120 + "/b.y": b"22",
        "p" * 90 + "/" + "q" * 95 + ".z": b"",
        "c.u": b"333",
    }
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form, pax_headers={"comment": "made"}) as tar:
            tar.addfile(_folder("a"))
            for name, data in files.items():
                if form == tarfile.USTAR_FORMAT and "é" in name:
                    continue
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1.5
                tar.addfile(info, io.BytesIO(data))
        with TarReader(path) as reader, tarfile.open(path) as tar:
            found = [(m.name, m.offset, m.size, reader.payload()) for m in reader.members()]
            plain = [m for m in tar if m.isfile()]
        assert found == [(m.name, m.offset_data, m.size, files[m.name]) for m in plain] and len(found) > 2


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


# --- anything at all


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small tar of each kind."""
    found = {}
    for kind in ("npy", "npz", "safetensors"):
        folder = tmp_path_factory.mktemp(kind)
        write_set(folder, {"train": 2}, kind)
        found[kind] = (folder / "train-0.tar").read_bytes()
    return found


CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=12), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["npy", "npz", "safetensors"]), changes=CHANGES, end=st.floats(0.3, 1))
def test_a_tar_with_any_bytes_changed_is_indexed_or_refused(
    tmp_path: Path, seeds: dict[str, bytes], kind: str, changes: list[tuple[float, bytes, bool]], end: float
) -> None:
    data = bytearray(seeds[kind])
    for where, new, resum in changes:
        at = int(where * len(data))
        data[at : at + len(new)] = new
        if resum:  # a changed header is looked at only behind its checksum
            begin = at // 512 * 512
            data[begin + 148 : begin + 156] = b" " * 8
            data[begin + 148 : begin + 156] = b"%06o\0 " % sum(data[begin : begin + 512])
    folder = tmp_path / "set"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "train.tar").write_bytes(data[: int(len(data) * end)] if end < 0.9 else data)
    try:
        index = indexed(folder)
    except MmsaError as error:
        assert len(str(error)) < 2000
        assert [path.name for path in folder.iterdir()] == ["train.tar"]
        return
    with ShardReader(index) as reader:
        for sample in reader.samples(range(index.num_samples), with_text=True):
            assert all(np.isfinite(array).all() for array in sample.modalities.values())


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(["index.json", "arrow"]), changes=CHANGES)
def test_an_index_with_any_bytes_changed_is_refused(
    tmp_path: Path, seeds: dict[str, bytes], which: str, changes: list[tuple[float, bytes, bool]]
) -> None:
    folder = tmp_path / "set"
    if not folder.exists():
        folder.mkdir()
        (folder / "train.tar").write_bytes(seeds["npy"])
        indexed(folder)
    path = folder / which if which == "index.json" else next(folder.rglob("*.arrow"))
    original = path.read_bytes()
    data = bytearray(original)
    for where, new, _ in changes:
        at = int(where * len(data))
        data[at : at + len(new)] = new
    path.write_bytes(data)
    try:
        index = Index.load(folder)
        samples = ShardReader(index).samples(range(index.num_samples), with_text=True)
        assert len(samples) == 2 and (bytes(data) == original or which == "index.json")  # spaces, or provenance
    except MmsaError:
        assert bytes(data) != original
    finally:
        path.write_bytes(original)
