"""The cache: one download per node, whoever asks, dies, sleeps or has no locks; never a half file; bounded."""

import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards.errors import ConfigError, DataError, TransientError
from shards.remote import cache as cache_module
from shards.remote.cache import DEFAULT_LIMIT, Cache, Wanted
from shards.remote.file import RemoteFile
from shards.trust import marker_folder
from tests.disk import disk_of
from tests.shards.made import overwrite
from tests.shards.remote import servers
from tests.shards.remote.servers import Web, well

SIZE = 200_000


def content(number: int) -> bytes:
    return hashlib.shake_128(bytes([number])).digest(SIZE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Web]:
    folder = tmp_path / "web"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.tar").write_bytes(content(number))
    with servers.web(folder) as running:
        yield running


def wanted(server: Web, number: int) -> Wanted:
    return Wanted(f"{server.url}/{number}.tar", SIZE, hashlib.sha256(content(number)).hexdigest())


def files() -> list[str]:
    """Everything below the cache's objects but its lock."""
    return sorted(path.name for path in Cache().folder.glob("??/*"))


def held(server: Web) -> list[int]:
    """Which of the server's objects are in the cache."""
    return [number for number in range(8) if Cache().path(wanted(server, number).sha256).is_file()]


def is_whole(one: Wanted) -> bool:
    return hashlib.sha256(Cache().path(one.sha256).read_bytes()).hexdigest() == one.sha256


def fetch_all(url: str, numbers: list[int]) -> None:
    """What a process of a node does."""
    for number in numbers:
        Cache().fetch(Wanted(f"{url}/{number}.tar", SIZE, hashlib.sha256(content(number)).hexdigest()))


def process(server: Web, *numbers: int) -> "subprocess.Popen[bytes]":
    """A process of its own that fetches."""
    code = f"from tests.shards.remote.test_cache import fetch_all; fetch_all({server.url!r}, {list(numbers)})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])


def until(server: Web, name: str, requests: int = 1) -> None:
    deadline = time.monotonic() + 60
    while server.gets[name] < requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_object_is_downloaded_once(server: Web) -> None:
    one = wanted(server, 0)
    assert Cache().fetch(one) and not Cache().fetch(one)
    assert files() == [one.sha256] and is_whole(one)
    assert server.gets == {"0.tar": 1}


def test_threads_that_want_the_same_wait_for_one_of_them(server: Web) -> None:
    server.latency = 0.1
    with ThreadPoolExecutor(8) as pool:
        came = list(pool.map(lambda n: Cache().fetch(wanted(server, n % 2)), range(8)))
    assert sum(came) == 2 and server.gets == {"0.tar": 1, "1.tar": 1}


def test_processes_of_a_node_download_once_between_them(server: Web) -> None:
    server.latency = 0.3
    processes = [process(server, *range(4)) for _ in range(3)]
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    assert server.gets == {f"{n}.tar": 1 for n in range(4)}
    assert held(server) == [0, 1, 2, 3]


def test_who_does_not_wait_goes_on(server: Web) -> None:
    server.latency = 0.3
    first = threading.Thread(target=Cache().fetch, args=[wanted(server, 0)])
    first.start()
    until(server, "0.tar")
    began = time.monotonic()
    assert not Cache().fetch(wanted(server, 0), wait=False)
    assert time.monotonic() - began < 0.2 and held(server) == []
    first.join()
    assert held(server) == [0]


def test_a_kill_in_mid_download_leaves_nothing_that_is_seen(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "20")
    server.script["0.tar"] = [servers.stalls, well]
    victim = process(server, 0)
    until(server, "0.tar")
    deadline = time.monotonic() + 30
    while not files() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held(server) == [], "half a file has the name of the whole"
    victim.kill()
    victim.wait()
    assert [name for name in files() if name.startswith(".")], "it did not die in the middle"
    assert Cache().fetch(wanted(server, 0)), "the lock died with its holder"
    assert files() == [wanted(server, 0).sha256] and is_whole(wanted(server, 0))


def test_nobody_waits_for_a_process_that_is_stopped(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script["0.tar"] = [servers.stalls, well]
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "20")
    sleeper = process(server, 0)
    until(server, "0.tar")
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "0.2")
    os.kill(sleeper.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert Cache().fetch(wanted(server, 0))
        assert time.monotonic() - began < 10
    finally:
        sleeper.kill()
        sleeper.wait()
    assert is_whole(wanted(server, 0))


def test_without_locks_both_download_and_neither_harms(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    server.latency = 0.1
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Cache().fetch(wanted(server, 0)), range(4)))
    assert is_whole(wanted(server, 0)) and files() == [wanted(server, 0).sha256]


def test_a_part_is_to_be_written_until_it_is_the_object(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for it opens it to write, and whoever but root may not open so what is read-only."""
    modes: list[int] = []
    make_room = Cache._make_room

    def looking(cache: Cache, needed: int) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in cache.folder.glob("??/.*"))
        make_room(cache, needed)

    monkeypatch.setattr(Cache, "_make_room", looking)
    fetch_all(server.url, [0])
    assert modes == [0o600, 0o600]
    assert Cache().path(wanted(server, 0).sha256).stat().st_mode & 0o777 == 0o444


def test_a_part_that_died_long_ago_is_taken_over(server: Web) -> None:
    """And not cleared away by who has it now."""
    one = wanted(server, 0)
    part = Cache().path(one.sha256).with_name(f".{one.sha256}.{cache_module._kernel()}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half of it")
    os.utime(part, (time.time() - 7200,) * 2)
    assert Cache().fetch(one)
    assert files() == [one.sha256] and is_whole(one) and server.gets == {"0.tar": 1}


def test_another_node_was_faster(server: Web) -> None:
    """What it has put there stays, for it may be mapped; and is not taken for verified by who has not read it."""
    file, inodes = remote_file(server, 0), []

    def meanwhile(handler: servers.Handler, data: bytes) -> None:
        file.path.write_bytes(data)
        inodes.append(file.path.stat().st_ino)
        well(handler, data)

    server.script["0.tar"] = [meanwhile]
    file.fetch()
    assert [file.path.stat().st_ino] == inodes and files() == [file.sha256]
    assert not marker_folder().exists()
    assert file.use(Path.read_bytes) == content(0)


def as_node(server_url: str, name: str) -> None:
    """A process of another node on the same file system."""
    cache_module._kernel = lambda: name  # type: ignore[assignment]
    fetch_all(server_url, [0, 1])


def test_two_nodes_on_one_file_system(server: Web) -> None:
    server.latency = 0.2
    context = multiprocessing.get_context("spawn")
    nodes = [context.Process(target=as_node, args=(server.url, name)) for name in ("one", "two")]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(60)
    assert [node.exitcode for node in nodes] == [0, 0]
    assert all(1 <= count <= 2 for count in server.gets.values())
    assert files() == sorted(wanted(server, n).sha256 for n in (0, 1))
    assert all(is_whole(wanted(server, n)) for n in (0, 1))


def test_a_fault_leaves_nothing(server: Web) -> None:
    for name, fault in (("0.tar", servers.truncates), ("1.tar", servers.flips_a_bit)):
        server.script[name] = [fault]
    with pytest.raises(TransientError, match=r"0\.tar: the body ends early"):
        Cache().fetch(wanted(server, 0))
    with pytest.raises(DataError, match=r"1\.tar: sha256 is"):
        Cache().fetch(wanted(server, 1))
    assert files() == []


# --- room


def test_the_least_recently_used_makes_room(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE_BYTES", str(3 * SIZE))
    fetch_all(server.url, [0, 1, 2])
    time.sleep(0.02)
    Cache().fetch(wanted(server, 0))  # used again: 1 is the oldest now
    fetch_all(server.url, [3])
    assert held(server) == [0, 2, 3]
    fetch_all(server.url, [4, 5])
    assert held(server) == [3, 4, 5]
    fetch_all(server.url, [3, 4, 5])
    assert max(server.gets.values()) == 1


def test_many_at_once_stay_within_the_bound(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE_BYTES", str(3 * SIZE))
    server.latency = 0.05
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: Cache().fetch(wanted(server, n)), range(8)))
    assert len(held(server)) == 3


def test_what_is_larger_than_the_cache_is_said(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE_BYTES", "100K")
    with pytest.raises(ConfigError, match=r"has 200,000 bytes, but the cache may hold 100,000; raise MMSA_CACHE_BYTES"):
        Cache().fetch(wanted(server, 0))
    assert not server.gets


def test_parts_that_died_elsewhere_are_cleared_away(server: Web) -> None:
    fetch_all(server.url, [0])
    old = Cache().path(wanted(server, 0).sha256).with_name(".abc.another-node.part")
    young = old.with_name(".def.another-node.part")
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    fetch_all(server.url, [1])
    assert not old.exists() and young.exists()


def test_an_evicted_file_lives_as_long_as_it_is_open(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE_BYTES", str(SIZE))
    fetch_all(server.url, [0])
    with Cache().path(wanted(server, 0).sha256).open("rb") as file:
        fetch_all(server.url, [1])
        assert held(server) == [1] and file.read() == content(0)


@pytest.mark.fault
def test_a_full_disk(server: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_of(tmp_path / "small", "640k") as small:
        monkeypatch.setenv("MMSA_CACHE", str(small))
        fetch_all(server.url, range(6))  # type: ignore[arg-type]  # the disk holds three
        assert 5 in held(server) and 1 <= len(held(server)) <= 3
        (small / "other").write_bytes(bytes(400_000 if len(held(server)) < 2 else 0))
        for number in held(server):
            Cache().drop(wanted(server, number).sha256)
        with (small / "other").open("wb") as other, pytest.raises(OSError, match="No space"):
            while True:
                other.write(bytes(50_000))
                other.flush()
        with pytest.raises(TransientError, match=r"no room on this disk for .*set MMSA_CACHE to a folder on another"):
            fetch_all(server.url, [7])
        assert files() == []
        assert (small / "other").stat().st_size > 400_000, "what is not ours stays"


@pytest.mark.parametrize("given", ["x", "0", "-5", "5X", "1e9"])
def test_a_bound_that_is_none(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("MMSA_CACHE_BYTES", given)
    with pytest.raises(ConfigError, match="MMSA_CACHE_BYTES"):
        Cache()


@pytest.mark.parametrize(
    ("given", "limit"), [("", DEFAULT_LIMIT), ("123", 123), ("1.5G", 1_500_000_000), ("2 tb", 2 * 10**12)]
)
def test_a_bound(monkeypatch: pytest.MonkeyPatch, given: str, limit: int) -> None:
    monkeypatch.setenv("MMSA_CACHE_BYTES", given)
    assert Cache().limit == limit


def test_a_cache_that_cannot_be_written(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_CACHE", "/proc/none")
    with pytest.raises(ConfigError, match=r"/proc/none/objects: cannot be used as cache .* set MMSA_CACHE"):
        Cache().fetch(wanted(server, 0))


# --- as the rest of the package sees it


def remote_file(server: Web, number: int) -> RemoteFile:
    one = wanted(server, number)
    return RemoteFile.of(one.url, one.bytes, one.sha256)


def test_a_file_damaged_in_the_cache_is_fetched_again(server: Web) -> None:
    file = remote_file(server, 0)
    file.check()
    time.sleep(0.02)
    overwrite(file.path, 1000, b"\x00\x01\x02")
    assert file.use(Path.read_bytes) == content(0)
    file.path.chmod(0o644)
    with file.path.open("r+b") as cut:
        cut.truncate(1000)
    assert file.use(Path.read_bytes) == content(0)
    assert server.gets == {"0.tar": 3}


def test_a_file_is_not_hashed_again(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remote_file(server, 0)
    file.check()
    monkeypatch.setattr("shards.trust.sha256_of", lambda path: pytest.fail(f"{path} is read again"))
    for _ in range(3):
        remote_file(server, 0).check()


def test_a_file_evicted_between_check_and_use(server: Web) -> None:
    file, seen = remote_file(server, 0), []

    def opener(path: Path) -> bytes:
        seen.append(path)
        if len(seen) == 1:
            Cache().drop(file.sha256)
        return path.read_bytes()

    assert file.use(opener) == content(0) and len(seen) == 2

    def never(path: Path) -> bytes:
        Cache().drop(file.sha256)
        return path.read_bytes()

    with pytest.raises(TransientError, match="evicted from the cache faster than it is opened"):
        file.use(never)


def test_an_object_that_is_a_folder(server: Web) -> None:
    file = remote_file(server, 0)
    file.path.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot be used as cache of remote shards \(Is a directory\)"):
        file.check()
    fetch_all(server.url, [1])


def test_a_lock_that_is_a_link(server: Web, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("three years")
    Cache().folder.mkdir(parents=True)
    (Cache().folder / ".room").symlink_to(tmp_path / "thesis")
    with pytest.raises(ConfigError, match="cannot be used as cache of remote shards"):
        fetch_all(server.url, [0])
    assert (tmp_path / "thesis").read_text() == "three years" and files() == []


def test_another_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set TMPDIR to a folder"):
        Cache(Path("/proc/none"), 10, setting="TMPDIR").fetch(Wanted("http://127.0.0.1:9/x", 1, "0" * 64))
