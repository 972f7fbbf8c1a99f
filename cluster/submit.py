"""`mmsa-dist submit -- COMMAND …`: runs a command of ours on a Ray cluster, follows it, returns its own exit code.

Ray's own `ray job submit` knows the exit codes 0 and 1 only; here the job's 2 (wrong recipe), 3 (wrong data) or 75 (try
again) reaches the shell that submitted it.
"""

import asyncio
import http.client
import json
import logging
import os
import re
import secrets
import shlex
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import tyro

from cluster.command_line import parsed
from cluster.errors import ClusterError, ConfigError, TransientError
from cluster.working_dir import files_to_send, measure, write_archive

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CONNECT_SECONDS = 20.0
"""How long the head may take to answer before it counts as unreachable; a busy one takes its time."""
START_SECONDS = 60.0
"""How long a head that answers may take until it can run jobs."""
NOT_YET = ("No available agent", "Cannot connect to host")
"""What a head says while the process that runs its jobs is on its way."""
RECONNECTS = 30
"""How often in a row a broken log stream is taken up again, a second or two apart, before giving up."""
STOPPED = 143
"""Exit code of a job that somebody stopped: 128 + SIGTERM."""


@dataclass(frozen=True)
class Submit:
    """Run a command on a Ray cluster: mmsa-dist submit [options] -- train ufen_mtfn --data …

    The command's paths are those of the cluster's nodes. A relative one starts in the job's copy of the working dir,
    which the cluster removes: name an absolute folder for what shall stay.
    """

    address: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    working_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path()
    """Folder sent along, in which the command runs; what git ignores stays here."""
    detach: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Return as soon as the job is accepted."""
    name: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """The job's id, unique on its cluster. Unset: one is made up."""
    python: str = "python"
    """Python on the cluster's nodes that has the dependencies."""


def main(argv: list[str]) -> int:
    """The command line; gives the job's own exit code.

    Raises:
        ConfigError: a misspelt option, no command, an address that is none, a refused token, a working dir that is too
            big, a used name.
        TransientError: nothing answers, or the cluster lost the job.
    """
    own, command = split(argv)
    options = parsed(Submit, own, "mmsa-dist submit")
    if not command:
        raise ConfigError(
            'nothing to run: put the command after "--", as in mmsa-dist submit -- train ufen_mtfn --data …'
        )
    return submit(options, command)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first ``--``."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def submit(options: Submit, command: list[str]) -> int:
    """Sends ``python -m mmsa_dist COMMAND`` to the cluster. Gives the job's exit code, or 0 when detached."""
    files = files_to_send(options.working_dir)
    size = measure(options.working_dir, files)
    for note in unsent(options.working_dir, files, command):
        print(f"note: {note}", file=sys.stderr)
    address = resolve_address(options.address)
    probe(address)
    with _addressed(address), _sentences(address):
        client = _client(address)
        print(f"sending {len(files)} files, {size / 2**20:.1f} MiB, of {options.working_dir.resolve()} to {address}")
        with tempfile.TemporaryDirectory() as temporary:
            archive = Path(temporary) / "working_dir.zip"
            write_archive(options.working_dir, files, archive)
            entrypoint = shlex.join([options.python, "-m", "mmsa_dist", *command])
            job = _submit_job(client, entrypoint, archive, options.name)
        print(f"job {job}: {entrypoint}", flush=True)
        if options.detach:
            print(_later(address, job))
            return 0
        try:
            details = asyncio.run(follow(client, job))
        except KeyboardInterrupt as stop:
            print(f"\nno longer following; job {job} goes on\n{_later(address, job)}", file=sys.stderr)
            return int(getattr(stop, "exit_code", 130))  # the front door makes one of SIGTERM too, with its own code
    return exit_code(details)


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


def unsent(folder: Path, files: list[Path], command: list[str]) -> Iterator[str]:
    """One sentence for every word of `command` that names something of this folder which is not sent along."""
    sent = {part for name in files for part in (name, *name.parents)}
    for word in command:
        value = Path(word.partition("=")[2] if word.startswith("--") and "=" in word else word)
        if value.is_absolute() or value in sent or value == Path():
            continue
        if (folder / value).exists():
            yield f"{value} exists here but is not sent along; the job looks for it on the cluster's nodes"


async def follow(client: "JobSubmissionClient", job: str) -> "JobDetails":
    """Prints the job's log as it grows until the job ends; a broken connection is taken up again.

    Raises:
        TransientError: the connection could not be taken up again.
    """
    import aiohttp

    printed, failures = 0, 0
    while True:
        skip = printed  # a new stream starts from the log's beginning
        try:
            async for text in client.tail_job_logs(job):
                new = text[skip:]
                skip -= len(text) - len(new)
                printed += len(new)
                print(new, end="", flush=True)
            details = await asyncio.to_thread(client.get_job_info, job)
            if details.status.is_terminal():
                return details
            failures = 0  # the head answers: only the stream was cut
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            failures += 1
            if failures > RECONNECTS:
                raise TransientError(
                    f"lost the cluster while following job {job}: {_first_line(error)}; the job may still run, see "
                    f"`ray job status {job}`"
                ) from error
        await asyncio.sleep(1.0)


def exit_code(details: "JobDetails") -> int:
    """The exit code of the job's own process, as a shell would say it.

    Raises:
        TransientError: the job ended without one: its process could not be started, or its node died.
    """
    status = str(details.status.value)
    code = details.driver_exit_code
    if status == "STOPPED":
        print(f"job {details.submission_id} was stopped", file=sys.stderr)
        return STOPPED
    if code is not None:
        return code if code >= 0 else 128 - code
    if status == "SUCCEEDED":
        return 0
    raise TransientError(f"job {details.submission_id} failed before its command could end: {details.message}")


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


def _submit_job(client: "JobSubmissionClient", entrypoint: str, archive: Path, name: str | None) -> str:
    """Gives the job's id. A head that has just been started answers before it can take a job: it gets its time."""
    # unbuffered: a log that is followed live must not wait in the job's own buffer
    environment = {"working_dir": str(archive), "env_vars": {"PYTHONUNBUFFERED": "1"}}
    job = name or f"mmsa-dist-{secrets.token_hex(6)}"
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return str(client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment))
        except RuntimeError as error:
            if "already exists" in str(error):
                if tries > 1:
                    return job  # a try before this one was heard
                raise ConfigError(
                    f"job {job} exists on this cluster already; choose another --name, or leave it out"
                ) from error
            if not any(sign in str(error) for sign in NOT_YET) or time.monotonic() - began > START_SECONDS:
                raise
        if tries == 1:
            print("the head is still starting; asking again until it takes the job", file=sys.stderr)
        time.sleep(1.0)


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
    except ClusterError:
        raise
    except AuthenticationError as error:
        raise ConfigError(
            f"{address} refuses this client: {_first_line(error).split('. ')[0]}; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's token (`ray get-auth-token` prints it on the head), or "
            "RAY_AUTH_MODE=disabled on both sides of a loopback cluster"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise TransientError(f"the Ray head at {address} did not take the job: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _later(address: str, job: str) -> str:
    return (
        f"  follow: ray job logs {job} --follow --address {address}\n"
        f"  status: ray job status {job} --address {address}\n"
        f"  stop:   ray job stop {job} --address {address}"
    )
