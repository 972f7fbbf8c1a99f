"""Addresses of remote data sets, and what may stand in one.

A secret may not: the address of the data is shown, logged and saved with every run. So it is refused here, once, and
everything behind can print an address as it is.
"""

import re
from pathlib import Path
from urllib.parse import quote, urlsplit

from shards.errors import ConfigError

SCHEMES = ("s3", "gs", "http", "https", "file")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(place: str | Path) -> bool:
    """Whether `place` is an address rather than a path of this machine."""
    return isinstance(place, str) and _URL.match(place) is not None


def names_address(path: Path) -> bool:
    """Whether a path of this machine was meant as an address: of s3://bucket/mosi it makes s3:/bucket/mosi."""
    return bool(path.parts) and path.parts[0] in {f"{scheme}:" for scheme in SCHEMES}


def folder_url(url: str) -> str:
    """The address of a data set's folder, without a slash at its end; `url` may also name its ``index.json``.

    Raises:
        ConfigError: a scheme that is not taken, no host or bucket, or a secret in it.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ConfigError(f"data {scheme}://…: addresses begin with one of {', '.join(f'{s}://' for s in SCHEMES)}")
    rest = url.partition("://")[2].removesuffix("index.json").rstrip("/")
    if set(rest) & set("@?#"):  # anywhere: an unescaped secret may hold a slash
        raise ConfigError(
            f"data {scheme}://…: holds one of @ ? #, as an address with a user, a password or a signature does, and "
            f"the address is saved with the run; {_REMEDIES[scheme]}"
        )
    if scheme == "file" and not rest.startswith("/"):
        raise ConfigError(f"data {url}: a file address has three slashes: file:///folder/of/the/data")
    host = urlsplit(f"{scheme}://{rest}").netloc
    if scheme != "file" and (not host or (":" in host and not re.fullmatch(r"[^:]+:\d+|\[[^\]]*\](:\d+)?", host))):
        raise ConfigError(f"data {scheme}://…: has no host or bucket, or one with more than a port behind its colon")
    if scheme in ("http", "https"):
        rest = quote(rest, safe="/:[]%!$&'()*+,;=~")
    return f"{scheme}://{rest}"


def child_url(folder: str, name: str) -> str:
    """The address of the file `name`, a relative path, in a folder that `folder_url` gave."""
    return f"{folder}/{quote(name) if folder.startswith('http') else name}"


_NETRC = "leave it out, and give user and password in ~/.netrc"
_REMEDIES = {
    "s3": "leave it out, and give credentials as for any S3 tool: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE and ~/.aws",
    "gs": "leave it out, and give credentials as for any Google tool: GOOGLE_APPLICATION_CREDENTIALS",
    "http": _NETRC,
    "https": _NETRC,
    "file": "rename the folder",
}
