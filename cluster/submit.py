"""`mmsa-dist submit -- COMMAND …`: runs a command of ours on a Ray cluster, follows it, returns its own exit code.

Ray's own `ray job submit` knows the exit codes 0 and 1 only; here the job's 2 (wrong recipe), 3 (wrong data) or 75 (try
again) reaches the shell that submitted it. What can be known to go wrong is said before anything is sent.
"""

import errno
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cluster import secret_words, shape
from cluster.client import READER, connected, later
from cluster.command_line import parsed, value_of
from cluster.errors import ConfigError, TransientError
from cluster.follow import Log, followed
from cluster.job import STOP
from cluster.wheel import PROGRAM, packages, wheel_of
from cluster.working_dir import MUCH, bulk, files_to_send, measure, mib, write_archive

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
"""What a job may be called: it stands in the addresses of Ray's interface, and in tables."""
START_SECONDS = 60.0
"""How long a head that answers may take until it can run jobs."""
NOT_YET = ("No available agent", "Cannot connect to host")
"""What a head says while the process that runs its jobs is on its way."""
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",  # a log that is followed live must not wait in the job's own buffer
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP),  # Ray kills a job 3 s after it was told to stop, before a run has saved
}
"""What a job has in its environment; everybody who sees the dashboard sees it."""


@dataclass(frozen=True)
class Submit:
    """Run a command on a Ray cluster: mmsa-dist submit [options] -- train ufen_mtfn --data …

    The command's paths are those of the cluster's nodes. A relative one starts in the job's copy of the working dir,
    which the cluster removes: name an absolute folder for what shall stay. The code that runs is that of the working
    dir where this is a checkout, that of --wheel, or else what is installed on the nodes. Ctrl-C on a terminal asks
    whether to stop the job or only to stop looking; `mmsa-dist jobs` finds it again.
    """

    address: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    working_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder sent along, in which the command runs; what git ignores stays here. Unset: this one, or none with --wheel.
    """
    wheel: Annotated[Path | None, tyro.conf.arg(metavar="FILE|DIR")] = None
    """A built wheel of mmsa-dist, or a folder with some (the newest), whose code runs instead of a checkout's; nodes
    need its dependencies only."""
    detach: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Return as soon as the job is accepted."""
    name: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """The job's id, unique on its cluster. Unset: one is made up."""
    python: str = "python"
    """Python on the cluster's nodes that has the dependencies."""


def main(argv: list[str]) -> int:
    """The command line; gives the job's own exit code.

    Raises:
        ConfigError: a misspelt option, no command or one with a secret in it, an address that is none, a refused token,
            a working dir that is too big, a wheel that is none, a used name, a cluster that cannot hold it.
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
    secret_words.refuse(command)
    _check(options)
    parcel = packed(options)
    for note in (*parcel.notes(), *unsent(parcel.folder, parcel.files, command), *removed(command)):
        print(f"note: {note}", file=sys.stderr)
    need = shape.needed(command)
    with tempfile.TemporaryDirectory() as folder, connected(options.address) as (address, client):
        if short := shape.check(need, shape.nodes_of(client)):
            print(f"note: {short}", file=sys.stderr)
        print(f"sending {parcel} to {address}")
        entrypoint = shlex.join([options.python, "-m", "mmsa_dist", *command])
        archive = _written(parcel, Path(folder))
        job = _submit_job(client, entrypoint, archive, options.name)
        archive.unlink()
        print(f"job {job}: {entrypoint}", flush=True)
        if options.detach:
            print(later(address, job))
            return 0
        return followed(client, address, Log(client, job), job)


def _check(options: Submit) -> None:
    """What can be known of the options alone.

    Raises:
        ConfigError: one of them is none.
    """
    if options.name is not None and (not NAME.fullmatch(options.name) or options.name.startswith(READER)):
        raise ConfigError(
            f"--name {options.name!r}: a job's id is 1 to 100 letters, digits, dots, dashes and underscores, the first "
            f"a letter or digit, and does not begin with {READER}"
        )
    for name in ("address", "python"):
        if getattr(options, name) == "":
            raise ConfigError(f"--{name} is empty; leave it out, or give it a value (a variable that is not set?)")


def _written(parcel: "Parcel", folder: Path) -> Path:
    """The archive of what is sent, in `folder`.

    Raises:
        ConfigError: a file cannot be read, or has a name that is no UTF-8. TransientError: there is no room for it.
    """
    archive = folder / "working_dir.zip"
    try:
        write_archive(parcel.folder, parcel.files, archive, parcel.wheel)
    except UnicodeError as error:
        raise ConfigError(f"working dir {parcel.folder}: a file's name is no UTF-8: {error}; rename it") from error
    except OSError as error:
        where = error.filename or archive
        kind = TransientError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(f"{where}: {error.strerror or error}; it cannot be sent along") from error
    return archive


@dataclass(frozen=True)
class Parcel:
    """What is sent along with a job: files of a folder, the contents of a wheel, or both."""

    folder: Path
    files: list[Path]
    wheel: Path | None
    size: int

    def __str__(self) -> str:
        parts = [f"{len(self.files)} files, {mib(self.size)}, of {self.folder.resolve()}"] if self.files else []
        parts += [f"{self.wheel.name}, {mib(self.wheel.stat().st_size)}"] if self.wheel else []
        sent = " and ".join(parts) or f"no files, as {self.folder.resolve()} has none"
        if not self.wheel and Path(PROGRAM) not in self.files:
            return f"{sent} (no mmsa_dist among them: the job runs the one that its node has installed)"
        return sent

    def notes(self) -> Iterator[str]:
        """What a person would want to know of it beforehand."""
        if self.size > MUCH:
            yield f"{mib(self.size)} are sent, which every node fetches; {bulk(self.folder, self.files)}"


def packed(options: Submit) -> Parcel:
    """What is to be sent; a wheel's code counts where a folder has some of the same name.

    Raises:
        ConfigError: the folder is none, or holds too much; or the wheel is none.
    """
    wheel = wheel_of(options.wheel) if options.wheel else None
    folder = options.working_dir or Path()
    files = files_to_send(folder) if options.working_dir or not wheel else []
    of_wheel = packages(wheel) if wheel else set()
    files = [name for name in files if name.parts[0] not in of_wheel]
    return Parcel(folder, files, wheel, measure(folder, files))


def unsent(folder: Path, files: list[Path], command: list[str]) -> Iterator[str]:
    """One sentence for every word of `command` that names something of this folder which is not sent along."""
    sent = {part for name in files for part in (name, *name.parents)}
    for word in command[1:]:
        value = Path(word.partition("=")[2] if word.startswith("--") and "=" in word else word)
        if value.is_absolute() or value in sent or value == Path():
            continue
        with suppress(OSError, ValueError):  # too long for a name, or below what may not be entered
            if not (folder / value).exists():
                continue
            yield f"{value} exists here but is not sent along; the job looks for it on the cluster's nodes"


RESULTS = {
    "train": "--runs-dir",
    "sweep": "--runs-dir",
    "reproduce": "--runs-dir",
    "predict": "--out",
    "export": "--to",
}
"""Command -> the option that says where its results go; a relative folder where it is left out."""


def removed(command: list[str]) -> Iterator[str]:
    """One sentence where a command's results would be removed with the job, or looked for in a folder that is new."""
    if command[0] == "cluster" and "--" in command:
        command = command[command.index("--") + 1 :]
    option = RESULTS.get(command[0] if command else "")
    if option is None or "--resume" in command or any(word in ("-h", "--help", "--print-config") for word in command):
        return
    told = value_of(command, option)
    if told is None or not (told.startswith("/") or "://" in told):
        what = f"{option} {told}" if told else f"{option} is not given, so that it"
        yield (
            f"{what} is within the job's copy of the working dir, which the cluster removes with the job: give "
            f"{option} an absolute folder that stays"
        )
    stores = (value_of(command, name) for name in ("--tracking-uri", "--runs-dir"))
    if command[0] == "predict" and any(word.startswith("models:/") for word in command) and not any(stores):
        yield (
            "models:/… is looked up where the job's node has MLFLOW_TRACKING_URI, else in the job's copy of the "
            "working dir, which has no models: give --tracking-uri or --runs-dir"
        )


def _submit_job(client: "JobSubmissionClient", entrypoint: str, archive: Path, name: str | None) -> str:
    """Gives the job's id. A head that has just been started answers before it can take a job: it gets its time."""
    environment = {"working_dir": str(archive), "env_vars": ENVIRONMENT}
    job = name or f"mmsa-dist-{secrets.token_hex(6)}"
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return str(client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment))
        except RuntimeError as error:
            if "already exists" in str(error):
                if tries > 1 and client.get_job_info(job).entrypoint == entrypoint:
                    return job  # a try before this one was heard
                raise ConfigError(
                    f"job {job} exists on this cluster already; choose another --name, or leave it out"
                ) from error
            if not any(sign in str(error) for sign in NOT_YET) or time.monotonic() - began > START_SECONDS:
                raise
        if tries == 1:
            print("the head is still starting; asking again until it takes the job", file=sys.stderr)
        time.sleep(1.0)
