"""A cache and short pauses for each test; one S3 endpoint, or one of Google's, for all of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.index import Index
from tests.shards.made import packed, utterances
from tests.shards.remote.servers import Bucket, GoogleBucket, google, s3

COUNTS = {"train": 60, "valid": 12, "test": 5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test starts as a node that has fetched nothing; its pauses are short."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMSA_CACHE", str(folder))
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "20")  # a busy machine is not a silent server
    monkeypatch.setenv("MMSA_REMOTE_BACKOFF", "0.02")
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A data set in a folder, some shards large."""
    return packed(tmp_path_factory.mktemp("packed") / "made", utterances(COUNTS, absent=0.2), shard_bytes=20_000)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Bucket]:
    with s3() as bucket:
        yield bucket


@pytest.fixture
def bucket(endpoint: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The endpoint's bucket, with the environment of somebody who may read it."""
    from shards.remote import store

    store._filesystem.cache_clear()  # another file's endpoint
    endpoint.tell(monkeypatch)
    endpoint.gets.clear()
    return endpoint


@pytest.fixture(scope="module")
def emulator() -> Iterator[GoogleBucket]:
    with google() as bucket:
        yield bucket
