"""A data set in a bucket is read as one on this disk is: the same epochs, the same refusals, and no secret told."""

import base64
import errno
import logging
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.__main__ import main
from shards.ahead import THREADS, Ahead, InOrder, looking_ahead
from shards.batch import BatchSpec
from shards.errors import ConfigError, DataError, MmsaError, TransientError
from shards.index import Index
from shards.loader import Loader
from shards.mix import Mix
from shards.plan import training_plan
from shards.read import ShardReader
from shards.remote.cache import Cache
from shards.remote.file import RemoteFile
from shards.verify import check_shard
from tests.shards.made import packed, utterances
from tests.shards.remote import servers
from tests.shards.remote.conftest import COUNTS
from tests.shards.remote.epochs import assert_same, epoch
from tests.shards.remote.servers import KEY, SECRET, Bucket, status

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def address(endpoint: Bucket, local: Index) -> str:
    return endpoint.upload(local.folder, "sets/mosi")


@pytest.fixture
def remote(bucket: Bucket, address: str) -> Index:
    return Index.load(address)


@pytest.mark.parametrize("start", [0, 4])
def test_an_epoch_is_that_of_the_folder(remote: Index, local: Index, start: int) -> None:
    assert remote.fingerprint == local.fingerprint
    for rank in range(2):
        assert_same(epoch(remote, 3, rank, 2, start), epoch(local, 3, rank, 2, start))


@pytest.mark.parametrize("readers", [0, 3])
def test_a_cache_smaller_than_the_data(
    remote: Index, local: Index, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    largest = max(shard.bytes for shard in local.shards)
    limit = 3 * largest
    assert sum(shard.bytes for shard in local.shards) > 2 * limit
    monkeypatch.setenv("MMSA_CACHE_BYTES", str(limit))
    for seed in (1, 2):
        assert_same(epoch(remote, seed, readers=readers), epoch(local, seed, readers=readers))
    assert sum(path.stat().st_size for path in Cache().folder.glob("??/*")) <= limit


def test_each_file_is_downloaded_once_for_all_ranks_of_a_node(remote: Index, bucket: Bucket, address: str) -> None:
    command = [sys.executable, "-m", "tests.shards.remote.reading", address, "5"]
    ranks = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    asked = {key: count for key, count in bucket.gets.items() if not key.endswith("index.json")}
    used = [remote.shards[n] for n in remote.shards_of("train")]
    assert asked == {f"sets/mosi/{name}": 1 for shard in used for name in (shard.url, shard.table)}


def test_same_names_in_two_sets_are_not_the_same_files(bucket: Bucket, tmp_path: Path, local: Index) -> None:
    other = packed(tmp_path / "other", utterances(COUNTS, seed=9), 20_000, name="other")
    assert {s.url for s in other.shards} & {s.url for s in local.shards}
    for index, prefix in ((local, "a/mosi"), (other, "b/mosi")):
        remote = Index.load(bucket.upload(index.folder, prefix))
        assert_same(epoch(remote, 1), epoch(index, 1))
    mixed = Mix([Index.load("s3://owners-data/a/mosi"), other])
    assert_same(epoch(mixed, 1), epoch(Mix([local, other]), 1))


def test_an_object_damaged_in_the_bucket(bucket: Bucket, local: Index, capsys: pytest.CaptureFixture[str]) -> None:
    address = bucket.upload(local.folder, "damaged")
    key = f"damaged/{local.shards[0].url}"
    data = bytearray(bucket.get(key))
    data[len(data) // 2] ^= 4
    bucket.put(key, bytes(data))
    remote = Index.load(address)
    with ShardReader(remote) as reader, pytest.raises(DataError) as error:
        reader.sample(0)
    assert str(error.value).startswith(f"{address}/{local.shards[0].url}: sha256 is ")
    assert not remote.tar_path(0).exists()
    with ShardReader(remote) as reader:
        assert reader.sample(local.first(1)).key
    assert main(["verify", address]) == DataError.exit_code
    said = capsys.readouterr().err.replace("\n", " ")
    assert "files are not what was packed" in said and f"{address}/{local.shards[0].url}: sha256 is " in said


def test_the_error_comes_at_the_step_that_needs_the_file(tmp_path: Path, local: Index) -> None:
    with servers.web(local.folder) as server:
        index = Index.load(server.url)
        bad = index.shards_of("train")[-1]
        server.script[index.shards[bad].url] = [status(503)]
        plan = training_plan(index, "train", 1, 1, global_batch=4, window=1)
        needs = [s for s in range(plan.num_steps) if any(index.locate(int(n))[0] == bad for n in plan.step(s))]
        with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), 0) as loader:
            steps = loader.train(plan, 0, 1)
            for _ in range(needs[0]):
                next(steps)
            with pytest.raises(TransientError, match=f"{index.shards[bad].url}: the server answers HTTP 503; 5 tries"):
                next(steps)


def test_shards_are_fetched_before_they_are_needed(local: Index) -> None:
    with servers.web(local.folder) as server:
        index = Index.load(server.url)
        plan = training_plan(index, "train", 1, 1, global_batch=1, window=2)
        order = [index.locate(int(plan.step(s)[0]))[0] for s in range(plan.num_steps)]
        wanted = list(dict.fromkeys(order))

        def there() -> set[int]:
            return {n for n in wanted if index.tar_path(n).is_file()}

        with Ahead(index, plan.order, begin=0, depth=2) as ahead:
            settle(lambda: there() == set(wanted[:2]))
            ahead.reach(order.index(wanted[1]) + 1)  # both are due: the next two
            settle(lambda: there() == set(wanted[:4]))
            ahead.reach(plan.num_steps)
            settle(lambda: there() == set(wanted))
        assert set(server.gets.values()) == {1}


def test_no_more_are_downloaded_at_once_than_there_are_threads_for_it(local: Index) -> None:
    """However many are asked for; and no fewer, while there are so many left."""
    with servers.web(local.folder) as server:
        index = Index.load(server.url)
        plan = training_plan(index, "train", 1, 1, global_batch=8, window=3)
        shards = index.shards_of("train")
        assert len(shards) > 2 * THREADS
        server.peak, server.latency = 0, 0.2
        with looking_ahead(index, plan.order, 0, depth=len(index.shards)) as reach:
            for step in range(plan.num_steps):
                reach((step + 1) * plan.global_batch)
            settle(lambda: all(index.tar_path(n).is_file() for n in shards))
        assert server.peak == THREADS


def settle(reached: Any) -> None:
    """Waits until something is so, and sees that it stays so."""
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    assert reached()


def test_commands_take_an_address(bucket: Bucket, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", address]) == 0
    assert address in capsys.readouterr().out.replace("\n", "")
    assert main(["verify", f"{address}/index.json"]) == 0
    assert "every checksum as packed" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_package_that_is_missing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.remote import store

    store._filesystem.cache_clear()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    for package in ("google.auth", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)  # imported already
    said = rf"{scheme}:// needs a package that is not installed: pip install 'mmsa-dist\[{scheme}\]'"
    with pytest.raises(ConfigError, match=said):
        Index.load(f"{scheme}://bucket/mosi")


def test_packing_into_a_bucket_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "generated", "--like", "mosi", "--samples", "20", "--out", "s3://bucket/mosi"]) == 2
    assert "is an address; pack into a folder here" in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_on_another_disk_goes_through_the_cache(local: Index) -> None:
    index = Index.load(f"file://{local.folder}")
    assert_same(epoch(index, 2), epoch(local, 2))
    assert Cache().folder in index.tar_path(0).parents and index.tar_path(index.shards_of("train")[0]).is_file()
    with pytest.raises(DataError, match=r"file:///no/where/index\.json: is not there"):
        Index.load("file:///no/where")


# --- what must not be told


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """All that is logged but what a library has to say to those who debug it, and turn it on by its name.

    At that level botocore tells its requests, with the key's id, their signatures and the endpoint as it was given.
    """
    assert any(record.levelno == logging.DEBUG for record in caplog.records), "nobody was asked for so much"
    ours = ("root", "shards", "mmsa_dist")
    return "\n".join(
        caplog.handler.format(record)
        for record in caplog.records
        if record.levelno > logging.DEBUG or record.name.partition(".")[0] in ours
    )


@pytest.mark.parametrize("wrong", ["key", "bucket", "object", "endpoint"])
def test_no_secret_in_errors_and_logs(
    bucket: Bucket,
    address: str,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    if wrong == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET.replace('/', '')}@127.0.0.1:1")
        from shards.remote import store

        store._filesystem.cache_clear()
    place = {"bucket": "s3://no-such-bucket/mosi", "object": f"{address}/no"}.get(wrong, address)
    if wrong == "key":
        from shards.remote import store

        store._filesystem.cache_clear()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(MmsaError) as error:
        Index.load(place)
    said = told(error.value) + logged(caplog) + "".join(capfd.readouterr())
    for secret in (SECRET, SECRET.replace("/", ""), KEY):
        assert secret not in said
    assert SECRET not in caplog.text, "a library tells the key itself"
    chain = told(error.value)
    assert "botocore" not in chain and "aiohttp" not in chain, "another library's traceback"


def test_no_secret_in_what_is_logged_while_all_goes_well(
    bucket: Bucket, address: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from shards.remote import store

    store._filesystem.cache_clear()  # credentials are looked up anew
    caplog.set_level(logging.DEBUG)
    with ShardReader(Index.load(address)) as reader:
        assert reader.sample(0).key
    said = logged(caplog) + "".join(capfd.readouterr())
    assert SECRET not in said and KEY not in said
    assert SECRET not in caplog.text, "a library tells the key itself"


@pytest.mark.parametrize("given", [SECRET, "a wrong one"])
def test_a_password_in_netrc_is_used_and_not_told(
    tmp_path: Path,
    local: Index,
    given: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not by a library either, whatever it is asked for."""
    credentials = base64.b64encode(f"{KEY}:{SECRET}".encode()).decode()

    def asks(handler: servers.Handler, data: bytes) -> None:
        known = handler.headers["Authorization"] == f"Basic {credentials}"
        (servers.well if known else status(401))(handler, data)

    (tmp_path / "netrc").write_text(f'machine 127.0.0.1 login {KEY} password "{given}"\n')
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    caplog.set_level(logging.DEBUG)
    with servers.web(local.folder) as server:
        server.script["index.json"] = [asks]
        if given == SECRET:
            assert Index.load(server.url).fingerprint == local.fingerprint
            said = ""
        else:
            with pytest.raises(ConfigError, match="access is denied") as error:
                Index.load(server.url)
            said = told(error.value)
    said += caplog.text + "".join(capfd.readouterr())
    assert not [secret for secret in (given, KEY, credentials) if secret in said]


def test_no_signature_of_a_redirect_is_told(tmp_path: Path, local: Index) -> None:
    with servers.web(local.folder) as server, servers.web(tmp_path) as other:
        for code in (403, 503):
            target = f"{other.url}/x?X-Amz-Signature={SECRET}"
            (tmp_path / f"x?X-Amz-Signature={SECRET}".replace("/", "_")).write_text("")
            server.script["index.json"] = [status(302, Location=target)]
            other.script = {target.partition("/x")[2]: [status(code)]}
            with pytest.raises(MmsaError) as error:
                Index.load(server.url)
            assert SECRET not in told(error.value) and "Signature" not in told(error.value)


def test_a_process_ends_in_silence(bucket: Bucket, address: str) -> None:
    """No session that was left open, no coroutine that was never awaited, no thread that holds the end up."""
    code = (
        "from shards.index import Index; from shards.read import ShardReader\n"
        f"index = Index.load({address!r}); print(ShardReader(index).sample(0).key)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for noise in ("Unclosed", "never awaited", "Traceback", SECRET):
        assert noise not in done.stderr


def test_the_wrong_file_behind_an_address(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(b"\xff\xfe<html>")
    with servers.web(tmp_path) as server:
        with pytest.raises(DataError, match=r"index\.json: is not text"):
            Index.load(server.url)
        (tmp_path / "index.json").write_text("<html>sign in</html>")
        with pytest.raises(DataError, match=r"index\.json: not valid JSON"):
            Index.load(server.url)


def test_no_error_ends_looking_ahead(local: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refused(file: RemoteFile, wait: bool = True) -> None:
        tried.append(file.url)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(RemoteFile, "fetch", refused)
    index = Index.load(local.folder.as_uri())
    assert len(index.shards) > THREADS
    with Ahead(index, InOrder(0, index.num_samples), begin=0, depth=len(index.shards)):
        settle(lambda: len(tried) == 2 * len(index.shards))


def test_no_room_to_verify_names_the_folder_that_lacks_it(local: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(TransientError, match=r"cannot be fetched into a temporary folder .* set TMPDIR"):
        check_shard(Index.load(local.folder.as_uri()), 0)
