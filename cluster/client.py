"""The way to a cluster: its address, Ray's client of its jobs, and a sentence for each way in which that can fail.

The token of a cluster is told by path (RAY_AUTH_TOKEN_PATH) and read by Ray's client; no word of ours ever holds it.
"""

import http.client
import json
import logging
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.errors import ClusterError, ConfigError, TransientError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CONNECT_SECONDS = 20.0
"""How long the head may take to answer before it counts as unreachable; a busy one takes its time."""
STOPPED = 143
"""Exit code of a job that somebody stopped: 128 + SIGTERM."""

READER = "mmsa-dist-read-"
"""How the ids of jobs begin that only read a file for `mmsa-dist jobs result`."""


@contextmanager
def connected(given: str | None) -> Iterator[tuple[str, "JobSubmissionClient"]]:
    """The address of a cluster's dashboard and the client of its jobs; what Ray raises inside becomes our errors.

    Args:
        given: as of `resolve_address`.

    Raises:
        ConfigError: no address, something else behind it, or a refused token. TransientError: nothing answers.
    """
    address = resolve_address(given)
    probe(address)
    with _addressed(address), _sentences(address):
        yield address, _client(address)


def resolve_address(given: str | None) -> str:
    """The dashboard's URL: `given`, else RAY_API_SERVER_ADDRESS, else the default port of this machine.

    Raises:
        ConfigError: not the address of a dashboard, or one with a password in it.
    """
    address = given or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    if "@" in address:
        raise ConfigError(
            f"--address …@{address.rpartition('@')[2]} holds a user or a password, which Ray does not take; "
            "leave it out, and name a file with the cluster's token in RAY_AUTH_TOKEN_PATH"
        )
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or re.search(r"\s", address):
        raise ConfigError(
            f"--address {address.partition('?')[0]} is no dashboard's address; "
            "expected http://HOST:PORT (port 8265 by default)"
        )
    return address.rstrip("/")


def probe(address: str, timeout: float = CONNECT_SECONDS) -> None:
    """Sees that something answers at `address`, in seconds; Ray's own client would wait for minutes.

    Raises:
        TransientError: nothing does. ConfigError: something that does not speak HTTP.
    """
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=timeout):
            return
    except urllib.error.HTTPError:
        return  # it answers; what it means is the client's to say
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        why = f"no answer in {timeout:.0f} s" if isinstance(reason, socket.timeout | TimeoutError) else str(reason)
        raise TransientError(
            f"no Ray head answers at {address} ({why}); start one with `ray start --head --dashboard-host=127.0.0.1`, "
            "or name its dashboard with --address http://HOST:8265"
        ) from error
    except http.client.HTTPException as error:
        raise _stranger(address) from error


def submitted(client: "JobSubmissionClient") -> list["JobDetails"]:
    """The jobs that were submitted to this cluster, the newest first; not programs that joined it by themselves, nor
    those that only read a file for us."""
    jobs = [job for job in client.list_jobs() if job.submission_id and not job.submission_id.startswith(READER)]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def find(client: "JobSubmissionClient", job: str) -> "JobDetails":
    """What the cluster knows of a job.

    Raises:
        ConfigError: it knows none of that name; names the nearest.
    """
    try:
        if not re.search(r"[/?#%\s]", job or " "):
            details = client.get_job_info(job)
            if details.submission_id == job:
                return details
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    ids = [str(each.submission_id) for each in submitted(client)]
    close = get_close_matches(job, ids, n=1, cutoff=0.4) or [name for name in ids if job and name.startswith(job)][:1]
    instead = f"did you mean {close[0]}?" if close else f"the newest is {ids[0]}" if ids else "it has had none"
    raise ConfigError(f"no job {job!r} on this cluster; {instead} (`mmsa-dist jobs list` shows all)")


def exit_code(details: "JobDetails") -> int:
    """The exit code of the job's own process, as a shell would say it; 143 of one that somebody stopped.

    Raises:
        TransientError: the job ended without one: its process could not be started, or its node died.
    """
    code = details.driver_exit_code
    if details.status.value == "STOPPED":
        return STOPPED
    if code is not None:
        return int(code) if code >= 0 else 128 - int(code)
    if details.status.value == "SUCCEEDED":
        return 0
    raise TransientError(f"job {details.submission_id} failed before its command could end: {details.message}")


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def later(address: str, job: str) -> str:
    """What can be done with a job that nobody follows."""
    return (
        f"  follow: mmsa-dist jobs logs {job} --follow --address {address}\n"
        f"  status: mmsa-dist jobs status {job} --address {address}\n"
        f"  stop:   mmsa-dist jobs stop {job} --address {address}\n"
        f"  result: mmsa-dist jobs result {job} --address {address}"
    )


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    for noisy in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # uploads and closed sockets are told by us, or no news
    try:
        return JobSubmissionClient(address)
    except (KeyError, TypeError, json.JSONDecodeError) as error:  # of what it took for the head's version
        raise _stranger(address) from error


def _stranger(address: str) -> ConfigError:
    return ConfigError(
        f"what answers at {address} is not a Ray head; name its dashboard with --address http://HOST:8265"
    )


@contextmanager
def _addressed(address: str) -> Iterator[None]:
    """Ray's client lets the environment overrule the address it is given; inside, the environment says the same."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


@contextmanager
def _sentences(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into our errors."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (ClusterError, BrokenPipeError):  # the latter is of whoever reads what we print
        raise
    except AuthenticationError as error:
        raise ConfigError(
            f"{address} refuses this client: {first_line(error).split('. ')[0]}; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's token (`ray get-auth-token` prints it on the head), or "
            "RAY_AUTH_MODE=disabled on both sides of a loopback cluster"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise TransientError(f"the Ray head at {address} does not do what it is asked: {first_line(error)}") from error
