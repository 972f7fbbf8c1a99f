"""Data sets at gs://, on a real emulator: read as a folder is, by tries of our own, and every refusal a sentence."""

import hashlib
import json
import logging
import subprocess
import sys
import traceback
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from mmsa_dist.__main__ import main
from shards.errors import ConfigError, DataError, MmsaError, TransientError
from shards.index import Index
from shards.remote import google, store
from shards.remote.store import download, read
from tests.shards.remote import servers, test_store
from tests.shards.remote.epochs import assert_same, epoch
from tests.shards.remote.servers import BUCKET, Answer, GoogleBucket, Handler, Web, status, well

ROOT = Path(__file__).parents[3]
DATA = bytes(range(256)) * 1200
"""Three hundred kilobytes: more than sockets hold."""
OBJECT = "storage/v1/b/bucket/o/sets%2Fo.tar?alt=media"
LISTING = "storage/v1/b/bucket/o?maxResults=1&fields=kind"
TOKEN = "ya29.of-the-owner"


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of somebody without credentials; whoever looks for some asks no other machine."""
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    store._filesystem.cache_clear()
    yield
    store._filesystem.cache_clear()


@pytest.fixture(scope="module")
def address(emulator: GoogleBucket, local: Index) -> str:
    return emulator.upload(local.folder, "sets/mosi of 2016")


@pytest.fixture
def bucket(emulator: GoogleBucket, address: str, monkeypatch: pytest.MonkeyPatch) -> GoogleBucket:
    emulator.tell(monkeypatch)
    emulator.gets.clear()
    return emulator


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Web]:
    """A server with one bucket and one object, which misbehaves when told to."""
    folder = tmp_path / "web"
    (folder / OBJECT).parent.mkdir(parents=True)
    (folder / OBJECT).write_bytes(DATA)
    (folder / LISTING).write_text("{}")
    with servers.web(folder) as running:
        yield running


@pytest.fixture
def theirs(server: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """The same, in the place of Google's own."""
    monkeypatch.setattr(google, "ENDPOINT", server.url)
    return server


def fetched(name: str = "gs://bucket/sets/o.tar") -> bytes:
    """The object, through `download`."""
    got = bytearray()
    download(name, len(DATA), hashlib.sha256(DATA).hexdigest(), got.clear, got.extend)
    return bytes(got)


def refused(name: str = "gs://bucket/sets/o.tar") -> MmsaError:
    """The error that fetching the object ends in; no library's words are in its chain."""
    with pytest.raises(MmsaError) as error:
        fetched(name)
    assert str(error.value).startswith(f"{name}: ")
    assert error.value.__context__ is None
    return error.value


def sign_in(folder: Path, tokens: str, environment: pytest.MonkeyPatch) -> None:
    """A service account, whose tokens are given at the address `tokens`."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    account = {
        "type": "service_account",
        "project_id": "owners",
        "private_key_id": "1",
        "private_key": key.private_bytes(*form).decode(),
        "client_email": "reader@owners.iam.gserviceaccount.com",
        "token_uri": tokens,
    }
    (folder / "account.json").write_text(json.dumps(account))
    environment.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "account.json"))


def signed_in(server: Web, folder: Path, environment: pytest.MonkeyPatch) -> None:
    """The server gives tokens, and answers to who has one."""
    told = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
    (server.folder / "token").write_text(json.dumps(told))
    sign_in(folder, f"{server.url}/token", environment)


def asks(handler: Handler, data: bytes) -> None:
    known = handler.headers["Authorization"] == f"Bearer {TOKEN}"
    (well if known else status(401))(handler, data)


# --- a data set


@pytest.mark.parametrize("readers", [0, 2])
def test_an_epoch_is_that_of_the_folder(bucket: GoogleBucket, address: str, local: Index, readers: int) -> None:
    remote = Index.load(address)
    assert remote.fingerprint == local.fingerprint
    for rank in range(2):
        assert_same(epoch(remote, 3, rank, 2, readers=readers), epoch(local, 3, rank, 2, readers=readers))
    read = (local.shards[n] for split in ("train", "valid") for n in local.shards_of(split))
    once = {f"sets/mosi of 2016/{name}": 1 for shard in read for name in (shard.url, shard.table)}
    assert bucket.gets == once | {"sets/mosi of 2016/index.json": 1}


def test_commands_take_an_address(bucket: GoogleBucket, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", address]) == 0
    assert "every checksum as packed" in capsys.readouterr().out


def test_an_emulator_is_told_without_a_scheme_too(
    bucket: GoogleBucket, address: str, local: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.endpoint.removeprefix("http://") + "/")
    assert Index.load(address).fingerprint == local.fingerprint


def test_an_object_damaged_in_the_bucket(bucket: GoogleBucket, local: Index) -> None:
    damaged = bucket.upload(local.folder, "damaged")
    data = bytearray(bucket.get(f"damaged/{local.shards[0].url}"))
    data[len(data) // 2] ^= 4
    bucket.put(f"damaged/{local.shards[0].url}", bytes(data))
    with pytest.raises(DataError, match=f"{damaged}/{local.shards[0].url}: sha256 is "):
        epoch(Index.load(damaged), 1)


def test_what_is_not_there(bucket: GoogleBucket, address: str) -> None:
    with pytest.raises(DataError) as error:
        Index.load(f"gs://{BUCKET}/sets/mosei")
    assert str(error.value).startswith(f"gs://{BUCKET}/sets/mosei/index.json: is not there; see to the address")
    with pytest.raises(DataError) as error:
        Index.load("gs://no-such-bucket/sets/mosi")
    said = "gs://no-such-bucket/sets/mosi/index.json: there is no bucket 'no-such-bucket' (HTTP 404)"
    assert str(error.value).startswith(said)


def test_a_process_ends_in_silence(bucket: GoogleBucket, address: str) -> None:
    code = (
        "from shards.index import Index; from shards.read import ShardReader\n"
        f"index = Index.load({address!r}); print(ShardReader(index).sample(0).key)\n"
        "import sys; assert 'google.auth' not in sys.modules"
    )
    command = [sys.executable, "-X", "dev", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not [noise for noise in ("Unclosed", "never awaited", "Traceback") if noise in done.stderr]


# --- faults


@pytest.mark.parametrize("fault", test_store.PASSING)
def test_a_fault_that_passes(server: Web, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    if fault == "stalls":
        monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "1")
    answer, times = test_store.PASSING[fault]
    server.script[OBJECT] = [*[answer] * times, well]
    assert fetched() == DATA
    assert server.gets[OBJECT] == times + 1


LASTING: dict[str, tuple[Answer, int, type[MmsaError], str]] = {
    **test_store.LASTING,
    "404": (status(404), 1, DataError, "is not there; see to the address"),
    "302": (status(302, Location="/"), 1, ConfigError, "refuses the request (HTTP 302)"),
    "401": (status(401), 1, ConfigError, "is not public (HTTP 401), and there are no credentials for it (GOOGLE_APP"),
    "403": (status(403), 1, ConfigError, "is not public (HTTP 403), and there are no credentials for it (GOOGLE_APP"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts(theirs: Web, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stalls":
        monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "0.5")
    answer, tries, kind, sentence = LASTING[fault]
    theirs.script[OBJECT] = [answer]
    error = refused()
    assert type(error) is kind and sentence in str(error)
    # on a busy machine a try may time out before its request is read
    assert theirs.gets[OBJECT] == tries or (fault == "stalls" and 0 < theirs.gets[OBJECT] < tries)


# --- credentials


def test_a_token_is_used_renewed_once_and_not_told(
    theirs: Web,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    signed_in(theirs, tmp_path, monkeypatch)
    theirs.script[OBJECT] = [asks]
    assert fetched() == DATA == fetched()
    assert theirs.gets == {"token": 1, OBJECT: 2}
    (asked,) = theirs.posted
    assertion = parse_qs(asked.decode())["assertion"][0]
    assert claims(assertion)["scope"] == "https://www.googleapis.com/auth/devstorage.read_only"
    theirs.script[OBJECT] = [status(503)]
    said = "".join(traceback.format_exception(refused())) + caplog.text + "".join(capfd.readouterr())
    assert not [secret for secret in (TOKEN, assertion, "PRIVATE KEY") if secret in said]


def claims(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    told: dict[str, Any] = json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return told


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "its credentials are not accepted (HTTP 401); renew them (GOOGLE_APPLICATION_CREDENTIALS, gcloud auth"),
        (403, "access is denied (HTTP 403): the credentials lack storage.objects.get (role Storage Object Viewer)"),
    ],
)
def test_credentials_that_may_not(
    theirs: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    signed_in(theirs, tmp_path, monkeypatch)
    theirs.script[OBJECT] = [status(code)]
    error = refused()
    assert type(error) is ConfigError and said in str(error)
    assert theirs.gets == {"token": 1, OBJECT: 1}


def test_credentials_that_get_no_token(theirs: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed_in(theirs, tmp_path, monkeypatch)
    theirs.script["token"] = [status(400)]
    error = refused()
    assert type(error) is ConfigError and "its credentials are not accepted; renew them (" in str(error)
    assert theirs.gets == {"token": 1}


@pytest.mark.parametrize("port", ["nobody listens", "it is silent"])
def test_nobody_gives_tokens(theirs: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    signed_in(theirs, tmp_path, monkeypatch)
    theirs.script["token"] = [servers.stalls]
    if port == "nobody listens":
        sign_in(tmp_path, "http://127.0.0.1:1/token", monkeypatch)
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "0.3")
    error = refused()
    assert type(error) is TransientError
    assert "the server that gives tokens for its credentials does not answer; 5 tries" in str(error)
    assert not theirs.gets[OBJECT]


@pytest.mark.parametrize("content", [None, "no json", '{"type": "service_account"}', "{}"])
def test_a_file_that_holds_no_credentials(
    theirs: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    if content is not None:
        (tmp_path / "account.json").write_text(content)
    error = refused()
    assert type(error) is ConfigError
    assert "GOOGLE_APPLICATION_CREDENTIALS does not name a file with credentials" in str(error)
    assert not theirs.gets


def test_a_listing_has_pages(theirs: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For writers, who have tokens that may write."""
    signed_in(theirs, tmp_path, monkeypatch)
    names = ["runs/a/step-1/x", "runs/a/step-1/y/x", "runs/a/step-20/x", "runs/a/step-3/xx", "runs/a.step-4/x"]
    asked = "storage/v1/b/bucket/o?prefix=runs%2Fa%2Fstep-&fields=items(name),nextPageToken"
    pages = [{"items": [{"name": name} for name in names[:2]], "nextPageToken": "a/b"}, {"nextPageToken": "c"}]
    pages += [{"items": [{"name": name} for name in names[2:]]}]
    for token, page in zip(("", "&pageToken=a%2Fb", "&pageToken=c"), pages, strict=True):
        (theirs.folder / f"{asked}{token}").write_text(json.dumps(page))
        theirs.script[f"{asked}{token}"] = [asks]
    found = store.filesystem("gs", 20).glob("gs://bucket/runs/a/step-*/x")
    assert found == ["bucket/runs/a/step-1/x", "bucket/runs/a/step-20/x"]
    scope = claims(parse_qs(theirs.posted[0].decode())["assertion"][0])["scope"]
    assert scope == "https://www.googleapis.com/auth/devstorage.read_write"


def test_an_emulator_is_told_no_token(server: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed_in(server, tmp_path, monkeypatch)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)

    def sees_nothing(handler: Handler, data: bytes) -> None:
        (status(500) if "Authorization" in handler.headers else well)(handler, data)

    server.script[OBJECT] = [sees_nothing]
    assert read("gs://bucket/sets/o.tar", len(DATA)) == DATA
    assert server.gets == {OBJECT: 1}
