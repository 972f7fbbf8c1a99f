"""Objects of Google Cloud Storage by its JSON API, over the connections that web servers are read with.

A client library of Google's would bring a dozen packages, and tries and time-outs of its own. Here an object is one
request, like any other of `store`, and only the credentials are google-auth's.
https://cloud.google.com/storage/docs/json_api
"""

import asyncio
import os
import re
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

from aiohttp import ClientResponse
from fsspec.asyn import AsyncFileSystem
from yarl import URL

from shards.errors import ConfigError, DataError
from shards.remote.faults import Fault, RefusedError
from shards.remote.store import SLOWEST

ENDPOINT = "https://storage.googleapis.com"
_SCOPE = "https://www.googleapis.com/auth/devstorage"
_SIGN_IN = "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login"
_RIGHTS = {
    "read_only": "lack storage.objects.get (role Storage Object Viewer) on the bucket, or there is no such object",
    "read_write": "lack storage.objects.create, delete or list (role Storage Object User) on the bucket",
}


class GoogleStorage(AsyncFileSystem):
    """The file system of ``gs://``: what `store` reads with, and `mmsa_dist.mirror` writes with.

    Args:
        web: the file system of ``https://``, whose connections and time-outs these are.
        silence: seconds without a byte after which a try has failed.

    Raises:
        ImportError: google-auth is not installed. An emulator (``STORAGE_EMULATOR_HOST``) is told no credentials.
    """

    protocol = "gs"
    cachable = False

    def __init__(self, web: Any, silence: float) -> None:
        super().__init__()
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        self._web, self._silence = web, silence
        self._base = (emulator if "://" in emulator else f"http://{emulator}") if emulator else ENDPOINT
        self._credentials = None if emulator else _Credentials(silence)

    # --- reading

    async def open_async(self, path: str, mode: str = "rb", size: int | None = None, **options: Any) -> "_Object":
        """The object at `path`. Nothing is asked for it before it is read, but a token may be."""
        return _Object(self, path, await self._headers("read_only"))

    async def begin(self, path: str, headers: dict[str, str]) -> ClientResponse:
        """The answer that an object is in."""
        return await self._asked("GET", f"{self._address(path)}?alt=media", path, headers, "read_only")

    async def _glob(self, path: str, maxdepth: int | None = None, **options: Any) -> list[str]:
        """Paths of the objects that a pattern describes, in which ``*`` stands for anything but a slash."""
        bucket, pattern = _split(path)
        known = re.compile("[^/]*".join(map(re.escape, pattern.split("*"))))
        prefix = _quoted(pattern.partition("*")[0])
        address = first = f"{self._objects(bucket)}?prefix={prefix}&fields=items(name),nextPageToken"
        names: list[str] = []
        while address:
            headers = await self._headers("read_write")
            async with await self._asked("GET", address, path, headers, "read_write") as response:
                page = await response.json(content_type=None)
            names += [item["name"] for item in page.get("items", [])]
            more = page.get("nextPageToken")
            address = f"{first}&pageToken={_quoted(more)}" if more else ""
        return [f"{bucket}/{name}" for name in names if known.fullmatch(name)]

    # --- writing

    async def _put_file(self, lpath: str, rpath: str, callback: Any = None, **options: Any) -> None:
        bucket, name = _split(rpath)
        address = f"{self._base}/upload/storage/v1/b/{_quoted(bucket)}/o?uploadType=media&name={_quoted(name)}"
        headers = {"Content-Type": "application/octet-stream", **await self._headers("read_write")}
        with Path(lpath).open("rb") as file:
            async with asyncio.timeout(4 * self._silence + os.fstat(file.fileno()).st_size / SLOWEST):
                (await self._asked("POST", address, rpath, headers, "read_write", data=file)).release()

    async def _rm_file(self, path: str, **options: Any) -> None:
        headers = await self._headers("read_write")
        (await self._asked("DELETE", self._address(path), path, headers, "read_write")).release()

    # --- requests

    def _objects(self, bucket: str) -> str:
        return f"{self._base}/storage/v1/b/{_quoted(bucket)}/o"

    def _address(self, path: str) -> str:
        bucket, name = _split(path)
        return f"{self._objects(bucket)}/{_quoted(name)}"

    async def _headers(self, right: str) -> dict[str, str]:
        """What says who asks; a token may have to be fetched for it, by a library that waits in its thread."""
        return await asyncio.to_thread(self._credentials.headers, right) if self._credentials else {}

    async def _asked(
        self, method: str, address: str, path: str, headers: dict[str, str], right: str, **more: Any
    ) -> ClientResponse:
        """The answer to a request.

        Raises:
            RefusedError, FileNotFoundError: it is no. ClientResponseError: it may be another at another time.
        """
        session = await self._web.set_session()
        response: ClientResponse = await session.request(
            method, URL(address, encoded=True), headers=headers, allow_redirects=False, **more
        )
        if 200 <= response.status < 300:
            return response
        response.close()
        if response.status in (401, 403):
            raise RefusedError(_denied(response.status, right, anonymous=not headers.get("authorization")))
        if response.status == 404:
            await self._missed(_split(path)[0], headers)
        if response.status < 400:
            raise RefusedError(Fault(f"the server refuses the request (HTTP {response.status})", ConfigError, tries=1))
        response.raise_for_status()
        raise AssertionError(response.status)

    async def _missed(self, bucket: str, headers: dict[str, str]) -> None:
        """Tells a bucket that is not there from an object that is not: the answers are alike, but not to a listing.

        Raises:
            RefusedError, FileNotFoundError: always.
        """
        session = await self._web.set_session()
        address = URL(f"{self._objects(bucket)}?maxResults=1&fields=kind", encoded=True)
        async with session.get(address, headers=headers, allow_redirects=False) as response:
            if response.status == 404:
                what = f"there is no bucket {bucket!r} (HTTP 404); see to the address"
                raise RefusedError(Fault(what, DataError, tries=1))
        raise FileNotFoundError


class _Object:
    """An object that is being read; as much of fsspec's files as `store` uses.

    Attributes:
        r: the answer, once there is one. size: unknown before. closed: by `store`.
    """

    def __init__(self, storage: GoogleStorage, path: str, headers: dict[str, str]) -> None:
        self._storage, self._path, self._headers = storage, path, headers
        self.r: ClientResponse | None = None
        self.size = None
        self.closed = False

    async def read(self, count: int) -> bytes:
        if self.r is None:
            self.r = await self._storage.begin(self._path, self._headers)
        return await self.r.content.read(count)


class _Credentials:
    """Tokens of whoever runs this, as google-auth finds them; none where it finds nobody.

    For a token, which lasts an hour, it may ask up to three times in each of our tries.
    """

    def __init__(self, silence: float) -> None:
        import google.auth
        from google.auth.transport import requests

        self._auth = google.auth
        self._transport = partial(requests.Request(), timeout=silence)
        self._found: dict[str, Any] = {}
        self._lock = Lock()

    def headers(self, right: str) -> dict[str, str]:
        """What a request for ``read_only`` or ``read_write`` says of who asks; empty for nobody.

        Raises:
            RefusedError: the credentials are damaged, or no token is given for them.
        """
        headers: dict[str, str] = {}
        with self._lock:  # one fetches a token, all use it
            if right not in self._found:
                self._found[right] = self._looked_up(right)
            if self._found[right] is not None:
                try:
                    self._found[right].before_request(self._transport, "GET", ENDPOINT, headers)
                except self._auth.exceptions.GoogleAuthError as error:
                    raise RefusedError(self._fault(error)) from None
        return headers

    def _looked_up(self, right: str) -> Any:
        try:
            return self._auth.default(scopes=[f"{_SCOPE}.{right}"])[0]
        except self._auth.exceptions.DefaultCredentialsError:
            if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
                what = "GOOGLE_APPLICATION_CREDENTIALS does not name a file with credentials; make it, or unset it"
                raise RefusedError(Fault(what, ConfigError, tries=1)) from None
        return None

    def _fault(self, error: Any) -> Fault:
        if error.retryable or isinstance(error, self._auth.exceptions.TransportError):
            return Fault("the server that gives tokens for its credentials does not answer")
        return Fault(f"its credentials are not accepted; renew them ({_SIGN_IN})", ConfigError, tries=1)


def _denied(status: int, right: str, anonymous: bool) -> Fault:
    if anonymous:
        what = f"is not public (HTTP {status}), and there are no credentials for it ({_SIGN_IN})"
    elif status == 401:
        what = f"its credentials are not accepted (HTTP 401); renew them ({_SIGN_IN})"
    else:
        what = f"access is denied (HTTP 403): the credentials {_RIGHTS[right]}"
    return Fault(what, ConfigError, tries=1)


def _split(path: str) -> tuple[str, str]:
    """Bucket and name of an object."""
    bucket, _, name = path.removeprefix("gs://").partition("/")
    return bucket, name


def _quoted(text: str) -> str:
    return quote(text, safe="")
