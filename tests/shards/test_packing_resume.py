"""A packing that is killed, stopped or interrupted: the same command goes on with the shards that are finished."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from shards.errors import DataError, TransientError
from shards.index import Index
from shards.packing.shard import Record
from shards.sources.generated import GeneratedSource
from shards.utterance import Utterance
from shards.workspace import DONE, JOB
from shards.write import pack
from tests.processes import lives, wait_until

pytestmark = pytest.mark.fault

SAMPLES, SHARD = 800, 500_000
OPTIONS = ["--samples", str(SAMPLES), "--shard-size", str(SHARD / 2**20), "--dtype", "float32"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def started(out: Path, *crew: object) -> subprocess.Popen[str]:
    """`mmsa-dist pack`, with the options that say who writes."""
    command = [sys.executable, "-m", "mmsa_dist", "pack", "generated", *OPTIONS, "--out", out, *crew]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_of(out: Path) -> Path:
    """The only workspace beside `out`."""
    (left,) = out.parent.glob(f".{out.name}.packing-*")
    return left


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "set"
    pack(GeneratedSource("mosi", SAMPLES), out, shard_bytes=SHARD, dtype="float32")
    return contents(out)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGKILL, 2), (signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_the_same_command_goes_on(
    tmp_path: Path, undisturbed: dict[str, bytes], number: signal.Signals, workers: int
) -> None:
    out = tmp_path / "set"
    process = started(out, "--workers", workers)
    wait_until(lambda: len(list(tmp_path.glob(f".set.packing-*/*{DONE}"))) >= 6)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    wait_until(lambda: not any(map(lives, family)), 10)
    assert not out.exists()
    left = left_of(out)
    before = {path.name: path.stat() for path in left.iterdir()}
    there = sum(name.endswith(DONE) for name in before)
    total = sum(name.endswith(".tar") for name in undisturbed)
    assert 6 <= there < total
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert f"{there} of {total} shards are finished and kept beside {out}: the same command goes on" in said
        assert not any(name.endswith(".part") for name in before)
    assert "Traceback" not in said

    process = started(
        out, "--workers", 3 - workers
    )  # one process goes on where two were killed, and the other way round
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert f"packing: going on: {there} of {total} shards are there" in said
    assert contents(out) == undisturbed
    for name in (name.removesuffix(DONE) + ".tar" for name in before if name.endswith(DONE)):
        now = (out / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns), name
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.ray
def test_the_same_command_goes_on_after_the_driver_of_ray_was_killed(
    tmp_path: Path, undisturbed: dict[str, bytes], own_ray_for_one_test: str
) -> None:
    """At once, while tasks of the driver that is dead may still write."""
    out = tmp_path / "set"
    process = started(out, "--ray", "--address", own_ray_for_one_test)
    wait_until(lambda: process.poll() is not None or bool(list(tmp_path.glob(f".set.packing-*/*{DONE}"))))
    process.kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGKILL, said
    assert not out.exists()
    before = {path.name: path.stat() for path in left_of(out).iterdir()}
    there = [name.removesuffix(DONE) + ".tar" for name in before if name.endswith(DONE)]
    total = sum(name.endswith(".tar") for name in undisturbed)
    assert 1 <= len(there) < total

    process = started(out, "--ray", "--address", own_ray_for_one_test)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    told = re.search(rf"packing: going on: (\d+) of {total} shards are there", said)
    assert told and len(there) <= int(told[1]) < total
    assert contents(out) == undisturbed
    for name in there:
        now = (out / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns), name
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    wait_until(lambda: not [p for p in psutil.Process().children(recursive=True) if lives(p) and is_at_work(p)])


def is_at_work(process: psutil.Process) -> bool:
    """Whether it is one of Ray's that runs a task."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()[:1] == ["ray::_task"]
    return False


def test_what_a_lost_writer_leaves_is_no_part_of_the_data(tmp_path: Path) -> None:
    """A task of a driver that is dead may begin a shard after its folder was taken over, and then be ended itself."""

    class Haunted(GeneratedSource):
        def read(self, split: str, number: int) -> Utterance:
            for left in tmp_path.glob(".set.packing-*"):
                (left / "train-00000.tar.another-node-1.part").write_bytes(b"half")
                (left / ".train-00000.done.json.part").write_bytes(b"{")
            return super().read(split, number)

    pack(Haunted("mosi", 9), tmp_path / "set")
    pack(GeneratedSource("mosi", 9), tmp_path / "again")
    assert contents(tmp_path / "set") == contents(tmp_path / "again")


class Stopped(GeneratedSource):
    """Generated data; the packing is interrupted at the first test sample."""

    def read(self, split: str, number: int) -> Utterance:
        if split == "test" and list(self.beside.glob(f".set.packing-*/valid-*{DONE}")):
            raise KeyboardInterrupt
        return super().read(split, number)

    beside: Path


def stopped(folder: Path, samples: int = 60) -> Path:
    """What is left of a packing that was interrupted when train and valid were finished."""
    source = Stopped("mosi", samples)
    source.beside = folder
    with pytest.raises(KeyboardInterrupt) as caught:
        pack(source, folder / "set", shard_bytes=1_000_000)
    assert any("are finished and kept" in note for note in caught.value.__notes__)
    return left_of(folder / "set")


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda left: damaged(left / "train-00000.tar"),
        lambda left: damaged(left / "train-00000.arrow"),
        lambda left: (left / "train-00000.tar").write_bytes(b""),
        lambda left: (left / "train-00000.arrow").unlink(),
        lambda left: (left / f"train-00000{DONE}").write_text("{"),
        lambda left: (left / f"train-00000{DONE}").write_text("[1]"),
        lambda left: (left / f"valid-00000{DONE}").replace(left / f"train-00000{DONE}"),
        lambda left: (left / "train-00000.tar.node-1.part").write_bytes(b"half"),
        lambda left: (left / JOB).write_text("{"),
        lambda left: (left / JOB).unlink(),
    ],
)
def test_what_is_damaged_is_done_again(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """As a power cut may leave it: files cut short, empty or lost, whatever their record says."""
    damage(stopped(tmp_path))
    pack(GeneratedSource("mosi", 60), tmp_path / "set", shard_bytes=1_000_000)
    pack(GeneratedSource("mosi", 60), tmp_path / "again", shard_bytes=1_000_000)
    assert contents(tmp_path / "set") == contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "set"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"dtype": "float32"}, {"shard_bytes": 900_000}])
def test_another_job_does_not_go_on(tmp_path: Path, other: dict[str, Any]) -> None:
    left = stopped(tmp_path)
    options = {"shard_bytes": 1_000_000, **other}
    pack(GeneratedSource("mosi", 60), tmp_path / "set", **options)
    pack(GeneratedSource("mosi", 60), tmp_path / "again", **options)
    assert not left.exists()
    assert contents(tmp_path / "set") == contents(tmp_path / "again")


def test_other_data_does_not_go_on(tmp_path: Path) -> None:
    stopped(tmp_path)
    assert pack(GeneratedSource("mosi", 61), tmp_path / "set", shard_bytes=1_000_000)[0].num_samples == 61


def test_an_error_in_what_goes_on_leaves_nothing(tmp_path: Path) -> None:
    class Wrong(GeneratedSource):
        def read(self, split: str, number: int) -> Utterance:
            if split == "test" and list(tmp_path.glob(f".set.packing-*/valid-*{DONE}")):
                raise DataError("the last sample is wrong")
            return super().read(split, number)

    stopped(tmp_path)
    with pytest.raises(DataError):
        pack(Wrong("mosi", 60), tmp_path / "set", shard_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_does_not_answer_costs_nothing(tmp_path: Path) -> None:
    left = stopped(tmp_path)
    before = {path.name for path in left.iterdir()}
    with pytest.raises(TransientError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: Connection refused;"):
        pack(GeneratedSource("mosi", 60), tmp_path / "set", shard_bytes=1_000_000, ray="127.0.0.1:1")
    assert {path.name for path in left.iterdir()} == before


def test_two_at_once_of_the_same_job(tmp_path: Path) -> None:
    """One takes up what is left, the other begins anew; neither touches the other's."""
    left = stopped(tmp_path)

    class Meanwhile(GeneratedSource):
        second: Index | None = None

        def read(self, split: str, number: int) -> Utterance:
            if split == "test" and self.second is None and (left / f"valid-00000{DONE}").exists():
                self.second, _ = pack(GeneratedSource("mosi", 60), tmp_path / "set", shard_bytes=1_000_000)
                assert (left / f"valid-00000{DONE}").exists()
            return super().read(split, number)

    pack(GeneratedSource("mosi", 60), tmp_path / "again", shard_bytes=1_000_000)
    source = Meanwhile("mosi", 60)
    pack(source, tmp_path / "set", shard_bytes=1_000_000, overwrite=True)
    assert source.second is not None
    assert contents(tmp_path / "set") == contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "set"]


def test_a_record_says_all_there_is(tmp_path: Path) -> None:
    left = stopped(tmp_path)
    record = Record.found(left, "train-00000")
    assert record and record.model_dump(mode="json") == json.loads((left / f"train-00000{DONE}").read_text())
    assert Record.found(left, "test-00000") is None


def test_the_fullest_of_several_is_taken_and_no_link(tmp_path: Path) -> None:
    full = stopped(tmp_path)
    poor, link = tmp_path / ".set.packing-00000000", tmp_path / ".set.packing-00000001"
    poor.mkdir()
    (poor / JOB).write_bytes((full / JOB).read_bytes())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(full, elsewhere)
    link.symlink_to(elsewhere)
    inode = (full / "train-00000.tar").stat().st_ino
    pack(GeneratedSource("mosi", 60), tmp_path / "set", shard_bytes=1_000_000)
    assert (tmp_path / "set" / "train-00000.tar").stat().st_ino == inode
    assert not poor.exists() and len(list(elsewhere.iterdir())) > 3
