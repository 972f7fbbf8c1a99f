"""Addresses: which are taken, and that none with a secret in it is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.remote.url import SCHEMES, child_url, folder_url, is_url


@pytest.mark.parametrize("scheme", [*SCHEMES, "ftp", "S3"])
def test_an_address_has_a_scheme(scheme: str) -> None:
    assert is_url(f"{scheme}://bucket/mosi")


@pytest.mark.parametrize("place", ["data/mosi", "/data/mosi", "C:\\data", "a:b", "", Path("s3:/b"), "://", "x://y"])
def test_a_path_is_none(place: str | Path) -> None:
    assert not is_url(place)


@pytest.mark.parametrize(
    ("given_as", "folder"),
    [
        ("s3://bucket/mosi", "s3://bucket/mosi"),
        ("S3://bucket/a b/mosi/", "s3://bucket/a b/mosi"),
        ("s3://bucket", "s3://bucket"),
        ("gs://bucket/mosi/index.json", "gs://bucket/mosi"),
        ("http://host:8080/my data/é", "http://host:8080/my%20data/%C3%A9"),
        ("https://[::1]:8443/a%20b", "https://[::1]:8443/a%20b"),
        ("file:///data/mosi/", "file:///data/mosi"),
    ],
)
def test_the_folder_of_an_address(given_as: str, folder: str) -> None:
    assert folder_url(given_as) == folder


def test_names_are_quoted_where_the_web_wants_them_quoted() -> None:
    assert child_url("http://host/d", "a b/#1?.tar") == "http://host/d/a%20b/%231%3F.tar"
    assert child_url("s3://bucket/d", "a b/#1.tar") == "s3://bucket/d/a b/#1.tar"


SECRET = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=9, max_size=20)


@given(SECRET, SECRET, st.sampled_from(["s3", "gs", "http", "https"]))
def test_a_secret_is_refused_and_not_repeated(user: str, password: str, scheme: str) -> None:
    for url in (
        f"{scheme}://{user}:{password}@host/mosi",
        f"{scheme}://{user}:{password}/x@host/mosi",
        f"{scheme}://{user}:x{password}",
        f"{scheme}://host/mosi?X-Amz-Signature={password}",
        f"{scheme}://host/mosi#{password}",
        f"{scheme}s://{user}:{password}@host/mosi",
    ):
        with pytest.raises(ConfigError) as refused:
            folder_url(url)
        assert user not in str(refused.value) and password not in str(refused.value)


@pytest.mark.parametrize("url", ["ftp://host/mosi", "s3://", "http:///mosi", "file://data/mosi", "pipe://cat x"])
def test_what_is_no_address_of_data(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^data "):
        folder_url(url)
