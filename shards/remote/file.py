"""A file of a remote data set, as the rest of the package sees it: fetched when it is used."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards.errors import DataError, TransientError
from shards.remote.cache import Cache, Wanted
from shards.trust import Expected, remember

_Result = TypeVar("_Result")

_TIMES = 3
"""An object may be evicted between being there and being opened; not again and again."""


@dataclass(frozen=True)
class RemoteFile(Expected):
    """What the index says of a file that is elsewhere; `path` is where its copy is, once it is here."""

    url: str

    @classmethod
    def of(cls, url: str, size: int, sha256: str) -> "RemoteFile":
        return cls(Cache().path(sha256), size, sha256, url)

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.url, self.bytes, self.sha256)

    def check(self) -> None:
        """Fetches the file where it is not here, and checks it as one of this machine.

        Raises:
            DataError, ConfigError, TransientError: see `Cache.fetch`.
        """
        for turn in range(_TIMES):
            self.fetch()
            try:
                return super().check()
            except DataError:  # damaged since it was fetched, or evicted at this moment
                if turn + 1 == _TIMES:
                    raise
                Cache().drop(self.sha256)
        return None

    def fetch(self, wait: bool = True) -> None:
        """Fetches the file where it is not here; see `Cache.fetch`."""
        if Cache().fetch(self.wanted, wait):
            with suppress(FileNotFoundError):  # evicted already
                remember(self._marker(self.path.stat()))  # its bytes were hashed as they came

    def use(self, opener: Callable[[Path], _Result], verify: bool = True) -> _Result:
        """See `Expected.use`; a file that comes over a network is always verified."""
        for _ in range(_TIMES):
            self.check()
            try:
                return self._opened(opener)
            except FileNotFoundError:  # evicted in between
                continue
        raise TransientError(
            f"{self.url}: is evicted from the cache faster than it is opened; raise MMSA_CACHE_BYTES, which all "
            "processes of this machine share"
        )

    def _changed_ns(self, status: os.stat_result) -> int:
        """Each use sets the time of the last access, which moves the time that the base class looks at."""
        return status.st_mtime_ns
