"""What went wrong on the way to a server, in our own words.

The words of a library are not passed on: they may hold a signed address or a header. Nor is the exception, which would
be printed with the chain it stands in.
"""

import os
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shards.errors import ConfigError, DataError, MmsaError, TransientError

BUGS = (TypeError, AttributeError, NameError, AssertionError, MemoryError)
"""Never a server's fault."""

_WORTH_ANOTHER_TRY = {408, 425, 429}
"""Of the statuses from 400 to 499."""


@dataclass(frozen=True)
class Fault:
    """One failed try.

    Attributes:
        what: happened, a clause.
        kind: the error that it becomes when it is the last.
        tries: that it is worth at most; None for as many as there are.
        wait: seconds that the server asked to wait.
    """

    what: str
    kind: type[MmsaError] = TransientError
    tries: int | None = None
    wait: float = 0.0


class LocalError(Exception):
    """What the own disk said while bytes came in, told apart from what the network said."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class BadBytesError(Exception):
    """The bytes came, and are not the ones that were packed. Its text is the clause."""


class CutShortError(Exception):
    """The bytes ended early, and nothing says that this is all there is. Its text is the clause."""


class RefusedError(Exception):
    """What a server said, told by whoever knows its words."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.what)
        self.fault = fault


def fault_of(error: BaseException) -> Fault:
    """What `error`, from fsspec or a library below it, says about the server."""
    if isinstance(error, BadBytesError):  # perhaps on the way: once more, but no more than that
        return Fault(f"{error}; copy it there again or pack again", DataError, tries=2)
    if isinstance(error, CutShortError):
        return Fault(str(error))
    if isinstance(error, RefusedError):
        return error.fault
    chain = list(_chain(error))
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    status = next((status for link in chain if (status := _status(link))), None)
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in chain):
        return Fault(
            "the server's certificate is not trusted; see SSL_CERT_FILE, for S3 AWS_CA_BUNDLE", ConfigError, tries=1
        )
    if names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}:
        return Fault("there are no credentials for it (AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws)", ConfigError, tries=1)
    if status in (404, 410) or isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        said = f" (HTTP {status})" if status else ""
        return Fault(
            f"is not there{said}; see to the address, and copy the packed folder there whole", DataError, tries=1
        )
    if status in (401, 403) or isinstance(error, PermissionError):
        said = f" (HTTP {status})" if status else ""
        return Fault(f"access is denied{said}; check the credentials and what they may read", ConfigError, tries=1)
    timed_out = any(isinstance(link, TimeoutError) for link in chain) or "ReadTimeoutError" in names
    if status and 300 <= status < 500 and status not in _WORTH_ANOTHER_TRY and not timed_out:
        return Fault(f"the server refuses the request (HTTP {status})", ConfigError, tries=1)
    if status and status >= 400:
        return Fault(f"the server answers HTTP {status}", wait=max(map(_retry_after, chain)))
    if timed_out:
        return Fault("the server is silent")
    if names & {"ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError"}:
        return Fault("the body ends early")
    if names & {"gaierror", "ClientConnectorDNSError"}:
        return Fault("the host is not found")
    if any(isinstance(link, ConnectionRefusedError) for link in chain):
        return Fault("the connection is refused")
    return Fault(f"the connection is broken ({type(error).__name__})")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _status(error: Any) -> int | None:
    """The HTTP status that aiohttp or botocore tell."""
    status = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if status is None and isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) and status >= 300 else None


def _retry_after(error: Any) -> float:
    """Seconds that the server asks to wait, 0 where it does not."""
    headers = getattr(error, "headers", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    with suppress(AttributeError, TypeError, ValueError):
        given = headers.get("Retry-After") or headers.get("retry-after")  # type: ignore[union-attr]
        return max(0.0, float(given))
    return 0.0
