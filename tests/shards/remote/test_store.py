"""Faults of a server, each for real: how often it is asked again, and what is said in the end."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.errors import ConfigError, DataError, MmsaError, TransientError
from shards.remote.store import Patience, download, read
from tests.shards.remote import servers
from tests.shards.remote.servers import Answer, Web, status, well

DATA = bytes(range(256)) * 1200
"""Three hundred kilobytes: more than sockets hold."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "o.tar").write_bytes(DATA)
    with servers.web(tmp_path) as running:
        yield running


def fetched(server: Web) -> bytes:
    """The object, through `download`."""
    got = bytearray()
    download(f"{server.url}/o.tar", len(DATA), hashlib.sha256(DATA).hexdigest(), got.clear, got.extend)
    return bytes(got)


PASSING: dict[str, tuple[Answer, int]] = {
    "truncates": (servers.truncates, 2),
    "cuts unannounced": (servers.cuts_unannounced, 2),
    "resets": (servers.resets, 2),
    "hangs up": (servers.hangs_up, 4),
    "stalls": (servers.stalls, 1),
    "says too much": (servers.says_too_much, 2),
    "says too little": (servers.says_too_little, 1),
    "flips a bit": (servers.flips_a_bit, 1),
    "500": (status(500), 2),
    "503": (status(503), 4),
    "throttles": (status(429, Retry_After="0.1"), 2),
    "408": (status(408), 1),
}
"""Fault -> the answer, and how often it comes before all is well."""


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes(server: Web, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stalls":
        monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "1")
    answer, times = PASSING[fault]
    server.script["o.tar"] = [*[answer] * times, well]
    assert fetched(server) == DATA
    assert server.gets["o.tar"] == times + 1


LASTING: dict[str, tuple[Answer, int, type[MmsaError], str]] = {
    "truncates": (servers.truncates, 5, TransientError, "the body ends early; 5 tries"),
    "cuts unannounced": (servers.cuts_unannounced, 5, TransientError, "the body ends after 153600 of 307200 bytes; 5"),
    "resets": (servers.resets, 5, TransientError, "5 tries"),
    "hangs up": (servers.hangs_up, 10, TransientError, "5 tries"),  # aiohttp asks again where nothing was answered
    "stalls": (servers.stalls, 5, TransientError, "the server is silent; 5 tries"),
    "says too much": (servers.says_too_much, 5, TransientError, "the body ends early; 5 tries"),
    "says too little": (servers.says_too_little, 2, DataError, "has 153600 of 307200 bytes"),
    "sends more": (servers.sends_more, 2, DataError, "has more than the 307200 bytes"),
    "flips a bit": (servers.flips_a_bit, 2, DataError, f"expected {hashlib.sha256(DATA).hexdigest()}"),
    "500": (status(500), 5, TransientError, "answers HTTP 500; 5 tries"),
    "503": (status(503), 5, TransientError, "answers HTTP 503; 5 tries"),
    "429": (status(429), 5, TransientError, "answers HTTP 429; 5 tries"),
    "404": (status(404), 1, DataError, "is not there"),
    "410": (status(410), 1, DataError, "is not there (HTTP 410)"),
    "401": (status(401), 1, ConfigError, "access is denied (HTTP 401)"),
    "403": (status(403), 1, ConfigError, "access is denied (HTTP 403)"),
    "400": (status(400), 1, ConfigError, "refuses the request (HTTP 400)"),
}
"""Fault -> the answer, how often it is asked for, and the end."""


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts(server: Web, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stalls":
        monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "0.5")
    answer, tries, kind, sentence = LASTING[fault]
    server.script["o.tar"] = [answer]
    began = time.monotonic()
    with pytest.raises(MmsaError) as error:
        fetched(server)
    assert type(error.value) is kind
    assert sentence in str(error.value) and str(error.value).startswith(f"{server.url}/o.tar: ")
    # on a busy machine a try may time out before its request is read
    assert server.gets["o.tar"] == tries or (fault == "stalls" and 0 < server.gets["o.tar"] < tries)
    assert time.monotonic() - began < 15, "pauses and silences are bounded"
    assert error.value.__context__ is None, "no library's words in the chain"


S3: dict[str, tuple[Answer, int, type[MmsaError], str]] = {
    **{fault: LASTING[fault] for fault in ("truncates", "stalls", "500", "503", "429", "sends more", "flips a bit")},
    "hangs up": LASTING["hangs up"],
    "resets": (servers.resets, 5, TransientError, "5 tries"),
    "404": (status(404), 1, DataError, "is not there (HTTP 404)"),
    "403": (status(403), 1, ConfigError, "access is denied (HTTP 403)"),
    "400": (status(400), 1, ConfigError, "refuses the request (HTTP 400)"),
}


@pytest.mark.parametrize("fault", S3)
def test_an_s3_endpoint_with_a_fault(server: Web, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries below it have patience of their own: it must be ours that counts."""
    from shards.remote import store

    (server.folder / "bucket").mkdir()
    (server.folder / "bucket" / "o.tar").write_bytes(DATA)
    store._filesystem.cache_clear()
    if fault == "stalls":
        monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "0.5")
    for name, value in (("ENDPOINT_URL", server.url), ("ACCESS_KEY_ID", "AKIA1"), ("SECRET_ACCESS_KEY", "hush")):
        monkeypatch.setenv(f"AWS_{name}", value)
    answer, tries, kind, sentence = S3[fault]
    server.script["bucket/o.tar"] = [answer]
    checksum = hashlib.sha256(DATA).hexdigest()
    with pytest.raises(MmsaError) as error:
        download("s3://bucket/o.tar", len(DATA), checksum, lambda: None, lambda piece: None)
    assert type(error.value) is kind and sentence in str(error.value) and error.value.__context__ is None
    # on a busy machine a try may time out before its request is read; there must be none beside ours
    asked = server.gets["bucket/o.tar"]
    assert asked == tries or (fault == "stalls" and 0 < asked < tries)
    server.script["bucket/o.tar"] = [answer, well]
    if kind is TransientError:
        download("s3://bucket/o.tar", len(DATA), checksum, lambda: None, lambda piece: None)


@pytest.mark.parametrize(
    "get",
    [lambda url: download(url, 1000, "0" * 64, lambda: None, lambda piece: None), lambda url: read(url, 1 << 29)],
    ids=["a shard", "an index, whatever the size that it might have"],
)
def test_a_server_that_drips_is_a_silent_one(
    get: Callable[[str], object], server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "0.1")
    (server.folder / "o.tar").write_bytes(b"x" * 1000)
    server.script["o.tar"] = [servers.drips]
    began = time.monotonic()
    with pytest.raises(TransientError, match="the server is silent; 5 tries"):
        get(f"{server.url}/o.tar")
    assert time.monotonic() - began < 15


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/index.json"
        with pytest.raises(TransientError, match=r"index\.json: the connection is refused; 5 tries"):
            read(url, 100)


def test_no_such_host() -> None:
    with pytest.raises(TransientError, match=r"(the host is not found|the server is silent); 5 tries"):
        read("http://no-such-host.invalid/index.json", 100)


def test_a_server_may_ask_for_a_pause(server: Web) -> None:
    server.script["o.tar"] = [status(503, Retry_After="0.3"), status(429, Retry_After="0.3"), well]
    began = time.monotonic()
    assert fetched(server) == DATA
    assert time.monotonic() - began > 0.6


def test_pauses_grow_at_random_within_bounds() -> None:
    patience = Patience(first=1, longest=3)
    for turn, bound in enumerate((1, 2, 3, 3)):
        pauses = [patience.pause(turn, 0) for _ in range(200)]
        assert 0 <= min(pauses) < 0.3 * bound and 0.7 * bound < max(pauses) <= bound
    assert patience.pause(0, asked=2) >= 2 and patience.pause(0, asked=1000) == 3


def test_a_small_object_has_a_limit(server: Web) -> None:
    assert read(f"{server.url}/o.tar", len(DATA)) == DATA
    with pytest.raises(DataError, match="is larger than 307,199 bytes"):
        read(f"{server.url}/o.tar", len(DATA) - 1)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_a_patience_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", value)
    with pytest.raises(ConfigError, match=f"MMSA_REMOTE_TIMEOUT: '{value}' is not a number of seconds"):
        Patience.of_environment()
