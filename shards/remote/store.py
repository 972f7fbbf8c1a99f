"""Reads objects of a bucket or a web server through fsspec, and does not give up at the first fault.

All patience is here: the libraries below are told not to retry, so that the tries are the ones that are documented.
"""

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, TypeVar

from shards.errors import ConfigError, DataError, MmsaError
from shards.remote.faults import BUGS, BadBytesError, CutShortError, Fault, LocalError, fault_of

_dice = random.Random()
"""Our own: the numbers that training draws must not depend on a network."""

PIECE = 1 << 20
"""Bytes handed on at a time."""

SLOWEST = 64 << 10
"""Bytes a second, over a whole object: below that a server counts as silent, however steadily it drips."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Patience:
    """How long a server may take.

    Attributes:
        tries: of each object.
        first: seconds; the pause after the first failed try is random up to this, and the bound doubles with each.
        longest: the bound's own bound, also for a server that asks to wait.
        silence: seconds without a byte after which a try has failed.
    """

    tries: int = 5
    first: float = 0.5
    longest: float = 30.0
    silence: float = 30.0

    @classmethod
    def of_environment(cls) -> "Patience":
        """``MMSA_REMOTE_TIMEOUT`` is the silence, ``MMSA_REMOTE_BACKOFF`` the first pause, in seconds.

        Raises:
            ConfigError: one of them is no positive number.
        """
        return cls(
            silence=_seconds("MMSA_REMOTE_TIMEOUT", cls.silence), first=_seconds("MMSA_REMOTE_BACKOFF", cls.first)
        )

    def pause(self, turn: int, asked: float) -> float:
        """Seconds to wait after failed try `turn` (from 0): full jitter, and at least what the server asked for.

        https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        return max(_dice.uniform(0, min(self.longest, self.first * 2**turn)), min(asked, self.longest))


def download(url: str, size: int, sha256: str, begin: Callable[[], None], write: Callable[[bytes], object]) -> None:
    """Hands the bytes of an object to `write`, hashing them on their way.

    Args:
        begin: called before the first byte of each try.

    Raises:
        DataError: the object is not there, or is not the one with this size and checksum.
        ConfigError: access is denied. TransientError: it did not come in as many tries as there are.
    """
    silence = Patience.of_environment().silence

    def attempt() -> None:
        begin()
        digest, received = hashlib.sha256(), 0
        stream = Stream(url, silence)
        deadline = time.monotonic() + 4 * silence + size / SLOWEST
        for piece in stream.pieces(lambda came: deadline):
            received += len(piece)
            if received > size:
                raise BadBytesError(
                    f"has more than the {size} bytes that the index says: it is not the file that was packed"
                )
            digest.update(piece)
            write(piece)
        if received < size and stream.declared != received:
            raise CutShortError(f"the body ends after {received} of {size} bytes")
        if received != size:
            raise BadBytesError(f"has {received} of {size} bytes: it is truncated or not the file that was packed")
        if digest.hexdigest() != sha256:
            raise BadBytesError(
                f"sha256 is {digest.hexdigest()}, expected {sha256}: its bytes are damaged or not the ones that were "
                "packed"
            )

    with_patience(url, attempt)


def read(url: str, limit: int) -> bytes:
    """A small object whole.

    Raises:
        DataError: it is not there, or larger than `limit` bytes. ConfigError, TransientError: as for `download`.
    """
    silence = Patience.of_environment().silence

    def attempt() -> bytes:
        parts, received = [], 0
        patient = time.monotonic() + 4 * silence  # its size is not known: what came earns it time
        for piece in Stream(url, silence).pieces(lambda came: patient + came / SLOWEST):
            received += len(piece)
            if received > limit:
                raise DataError(f"{url}: is larger than {limit:,} bytes; it is not what it is taken for")
            parts.append(piece)
        return b"".join(parts)

    return with_patience(url, attempt)


def with_patience(url: str, attempt: Callable[[], _Result]) -> _Result:
    """The result of `attempt`, tried again after faults that may pass; what it raises of ours is final."""
    patience, began = Patience.of_environment(), time.monotonic()
    for turn in range(patience.tries):
        try:
            return attempt()
        except (MmsaError, LocalError, *BUGS):
            raise
        except Exception as error:
            fault = fault_of(error)
        # outside of the handler: the error that is raised carries no chain with a library's words in it
        if turn + 1 >= min(patience.tries, fault.tries or patience.tries):
            break
        time.sleep(patience.pause(turn, fault.wait))
    raise _final(url, fault, turn + 1, time.monotonic() - began)


def _final(url: str, fault: Fault, tries: int, seconds: float) -> MmsaError:
    if fault.tries is None:
        return fault.kind(f"{url}: {fault.what}; {tries} tries in {seconds:.0f} s failed: see to the server, run again")
    return fault.kind(f"{url}: {fault.what}")


class Stream:
    """The bytes of an object, in one request where the library below can stream.

    Attributes:
        declared: bytes that the server announced; None while it has not.
    """

    def __init__(self, url: str, silence: float) -> None:
        self._url = url
        self._silence = silence
        self._came = 0
        self.declared: int | None = None

    def pieces(self, deadline: Callable[[int], float]) -> Iterator[bytes]:
        """The object from its beginning.

        Args:
            deadline: of so many bytes that came: when there must be more.

        Raises:
            TimeoutError: no byte came for as long as a server may be silent, or it takes beyond `deadline`.
            Exception: whatever fsspec and the library below raise.
        """
        fs = filesystem(self._url.partition("://")[0], self._silence)
        yield from self._streamed(fs, deadline) if _can_stream(fs) else self._in_blocks(fs, deadline)

    def _streamed(self, fs: Any, deadline: Callable[[int], float]) -> Generator[bytes]:
        from fsspec.asyn import sync

        file = sync(fs.loop, fs.open_async, self._url, size=0)  # 0: do not ask for the size, the answer tells it
        try:
            while piece := sync(fs.loop, self._piece, file, deadline):
                yield piece
        finally:
            sync(fs.loop, _close, file)

    async def _piece(self, file: Any, deadline: Callable[[int], float]) -> bytes:
        parts, size = [], 0
        while size < PIECE:
            async with asyncio.timeout(min(self._silence, deadline(self._came) - time.monotonic())):
                part = await file.read(PIECE - size)
            if self.declared is None:
                self.declared = _declared(file)
            if not part:
                break
            parts.append(part)
            size += len(part)
            self._came += len(part)
        return b"".join(parts)

    def _in_blocks(self, fs: Any, deadline: Callable[[int], float]) -> Generator[bytes]:
        with fs.open(self._url, "rb", block_size=4 * PIECE) as file:
            self.declared = getattr(file, "size", None)
            while piece := file.read(PIECE):
                if time.monotonic() > deadline(self._came):
                    raise TimeoutError
                self._came += len(piece)
                yield piece


async def _close(file: Any) -> None:
    """Gives up the connection: what was not read to its end cannot be used again."""
    response = getattr(file, "r", None)
    if response is not None:
        response.close()
    file.closed = True  # or it would try to close itself, as it cannot, when it is collected


def _declared(file: Any) -> int | None:
    """The length that the answer announces."""
    headers = getattr(getattr(file, "r", None), "headers", {})
    with suppress(KeyError, ValueError):
        return int(headers["Content-Length"])
    return file.size or None


def _can_stream(fs: Any) -> bool:
    from fsspec.asyn import AsyncFileSystem

    return isinstance(fs, AsyncFileSystem) and type(fs).open_async is not AsyncFileSystem.open_async


def filesystem(scheme: str, silence: float) -> Any:
    """The file system of a scheme, one for all threads of a process (a fork must not use its parent's connections).

    Raises:
        ConfigError: the package that speaks to it is not installed.
    """
    with _making:
        return _filesystem(scheme, os.getpid(), silence)


_making = Lock()


@lru_cache(maxsize=8)
def _filesystem(scheme: str, process: int, silence: float) -> Any:
    try:
        if scheme == "gs":
            from shards.remote.google import GoogleStorage

            return GoogleStorage(_filesystem("https", process, silence), silence)
        import fsspec

        fs = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **_options(scheme, silence))
    except ImportError:
        package = {"s3": "'mmsa-dist[s3]'", "gs": "'mmsa-dist[gs]'"}.get(scheme, "'fsspec[http]'")
        raise ConfigError(f"{scheme}:// needs a package that is not installed: pip install {package}") from None
    if scheme == "s3":
        fs.retries = 1
    if fs.async_impl and hasattr(fs, "set_session"):
        from fsspec.asyn import sync

        sync(fs.loop, fs.set_session)  # now: threads that meet without one would each make their own
    return fs


def _options(scheme: str, silence: float) -> dict[str, Any]:
    """What a file system is told: to notice silence, and to leave retrying to us."""
    if scheme == "s3":
        once = {"connect_timeout": min(10.0, silence), "read_timeout": silence, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": {**once, "max_pool_connections": 32}}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=min(10.0, silence), sock_read=silence)
        # trust_env: proxies, and passwords from ~/.netrc. identity: a length that is that of the file
        client = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
        return {"encoded": True, "client_kwargs": client}
    return {}


def _seconds(name: str, default: float) -> float:
    given = os.environ.get(name)
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{name}: {given!r} is not a number of seconds above 0")
    return seconds
