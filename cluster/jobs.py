"""`mmsa-dist jobs`: what was sent to a cluster. Its state, its log, its end, and what it has reached."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cluster import results
from cluster.client import connected, exit_code, find, first_line, submitted
from cluster.command_line import parsed, value_of
from cluster.errors import ConfigError, TransientError
from cluster.follow import Log, followed
from cluster.suggest import nearest
from cluster.watch import main as watch

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

USAGE = """usage: mmsa-dist jobs list [--json]
       mmsa-dist jobs status ID
       mmsa-dist jobs logs ID [--follow]
       mmsa-dist jobs watch ID
       mmsa-dist jobs stop ID
       mmsa-dist jobs result ID [--runs-dir DIR] [--json]

What `mmsa-dist submit` has sent to a Ray cluster. All take --address URL (unset: RAY_API_SERVER_ADDRESS, else
http://127.0.0.1:8265); a cluster with a token is told it by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH.

commands:
{commands}

First steps:
  mmsa-dist submit --detach --name mosi-1 -- train ufen_mtfn --data /data/mosi --runs-dir /data/runs
  mmsa-dist jobs list
  mmsa-dist jobs logs mosi-1 --follow
  mmsa-dist jobs result mosi-1

`mmsa-dist jobs COMMAND --help` explains a command."""

Address = Annotated[str | None, tyro.conf.arg(metavar="URL")]
Id = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class List:
    """List the jobs that were sent to a cluster, the newest first: mmsa-dist jobs list

    Shows those that were submitted, not programs that joined the cluster by themselves.
    """

    address: Address = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    json: Flag = False
    """Print a list of JSON objects instead."""


@dataclass(frozen=True)
class Status:
    """Show one job: mmsa-dist jobs status ID

    Its state and exit code, its command, when it began and ended, what Ray says of it, and where its run folder is.
    """

    id: Id
    """The job, as `submit` and `jobs list` name it."""
    address: Address = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    json: Flag = False
    """Print a JSON object instead."""


@dataclass(frozen=True)
class Logs:
    """Print a job's log: mmsa-dist jobs logs ID [--follow]"""

    id: Id
    """The job, as `submit` and `jobs list` name it."""
    follow: Flag = False
    """Print it as it grows until the job ends, through dropped connections; gives the job's own exit code. Ctrl-C on a
    terminal asks whether to stop the job or only to stop looking."""
    address: Address = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""


@dataclass(frozen=True)
class Stop:
    """Stop a job and wait until it has: mmsa-dist jobs stop ID

    A training run finishes its step and saves first; what it says meanwhile is shown. It has 100 seconds, after which
    Ray kills it.
    """

    id: Id
    """The job, as `submit` and `jobs list` name it."""
    address: Address = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""


@dataclass(frozen=True)
class Result:
    """Show what a job has reached: mmsa-dist jobs result ID

    The metrics in its run's result.json (of a reproduction its table), which is read here where this machine sees the
    run folder, else on the cluster, by a small job of a second or two.
    """

    id: Id
    """The job, as `submit` and `jobs list` name it."""
    address: Address = None
    """The head's dashboard address. Unset: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    runs_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """The --runs-dir of the job's command, where the cluster has forgotten the job: its head was started anew."""
    json: Flag = False
    """Print the whole result.json instead."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist jobs`.

    Raises:
        ConfigError: an unknown command, or what the command itself raises.
    """
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "list": (list_, "all jobs, the newest first"),
        "status": (status, "one job: state, exit code, command, times, run folder"),
        "logs": (logs, "what a job has printed, or prints"),
        "watch": (watch, "one live screen: progress, ranks, checkpoint, last error; of any run with --run RUN_DIR"),
        "stop": (stop, "stop a job, once it has saved"),
        "result": (result, "the metrics that a job has reached"),
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, commands))
        print(USAGE.format(commands="\n".join(f"  {name:{width}}  {about}" for name, (_, about) in commands.items())))
        return 0 if argv else 2
    if argv[0] not in commands:
        raise ConfigError(f"unknown command {argv[0]!r} of mmsa-dist jobs{nearest(argv[0], commands)}")
    return commands[argv[0]][0](argv[1:])


def list_(argv: list[str]) -> int:
    """Entry of `mmsa-dist jobs list`."""
    options = parsed(List, argv, "mmsa-dist jobs list")
    with connected(options.address) as (address, client):
        jobs = submitted(client)
        if options.json:
            print(json.dumps([described(job) for job in jobs], indent=1))
            return 0
        if not jobs:
            print(f"no job was sent to {address} yet")
            return 0
        rows = [["id", "state", "started", "took", "command"]]
        rows += [[str(job.submission_id), state(job), *times(job), shown(job.entrypoint)] for job in jobs]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(line[:width] for line in results.columns(rows, right=False)))
    return 0


def status(argv: list[str]) -> int:
    """Entry of `mmsa-dist jobs status`.

    Raises:
        ConfigError: there is no such job.
    """
    options = parsed(Status, argv, "mmsa-dist jobs status")
    with connected(options.address) as (_, client):
        job = find(client, options.id)
        folder = run_folder(client, job)
        if options.json:
            print(json.dumps({**described(job), "run": folder and str(folder)}, indent=1))
            return 0
        started, took = times(job)
        rows = [["job", str(job.submission_id)], ["state", state(job)], ["command", job.entrypoint]]
        rows += [["started", started], ["took", took]]
        rows += [["says", said]] if (said := _says(job)) else []
        rows += [["run", str(folder)]] if folder else []
        print("\n".join(results.columns(rows, right=False)))
    return 0


def _unfinished(job: "JobDetails", command: list[str], folder: Any) -> str:
    """Of a job that ended before its run did, and how that goes on."""
    further = {
        "train": f"`mmsa-dist submit -- train --resume {folder}` goes on from its last checkpoint",
        "sweep": "the same command with --resume goes on with it",
        "reproduce": "the same command goes on with it",
    }.get(command[0])
    said = f"job {job.submission_id} {state(job)} before its run had a result ({folder})"
    return f"{said}; {further}" if further else said


def _says(job: "JobDetails") -> str:
    """Why a job ended, in a line: our own last sentence, which Ray's message has of one that failed; else its first."""
    lines = str(job.message or "").splitlines() or [""]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join((errors or lines[:1])[-1].split()[:60])


def logs(argv: list[str]) -> int:
    """Entry of `mmsa-dist jobs logs`; followed, it gives the job's own exit code.

    Raises:
        ConfigError: there is no such job. TransientError: the cluster was lost.
    """
    options = parsed(Logs, argv, "mmsa-dist jobs logs")
    with connected(options.address) as (address, client):
        find(client, options.id)
        if options.follow:
            return followed(client, address, Log(client, options.id), options.id)
        print(client.get_job_logs(options.id), end="")
    return 0


def stop(argv: list[str]) -> int:
    """Entry of `mmsa-dist jobs stop`; 0 where the job runs no longer, however it ended.

    Raises:
        ConfigError: there is no such job. TransientError: the cluster was lost.
    """
    options = parsed(Stop, argv, "mmsa-dist jobs stop")
    with connected(options.address) as (address, client):
        job = find(client, options.id)
        if job.status.is_terminal():
            print(f"job {options.id} has ended already: {state(job)}")
            return 0
        printed = len(_log(client, options.id))
        began = time.monotonic()
        client.stop_job(options.id)
        print(f"job {options.id} is told to stop; a training run saves first", flush=True)
        try:
            code = followed(client, address, Log(client, options.id, printed), options.id, stopping=True)
        except TransientError:  # its node died meanwhile, which stops it too
            if not client.get_job_info(options.id).status.is_terminal():
                raise
            code = 0
        job = client.get_job_info(options.id)
        if not job.status.is_terminal():
            return code  # nobody waits any more
        print(f"job {options.id}: {state(job)} after {duration(time.monotonic() - began)}")
    return 0


def result(argv: list[str]) -> int:
    """Entry of `mmsa-dist jobs result`.

    Raises:
        ConfigError: there is no such job, or one that leaves no result. TransientError: it has none yet.
    """
    options = parsed(Result, argv, "mmsa-dist jobs result")
    with connected(options.address) as (_, client):
        command, folder, job = list[str](), None, None
        if options.runs_dir is None:
            job = find(client, options.id)
            command = results.command_of(job.entrypoint)
            _may_have_result(job, command)
            folder = run_folder(client, job, search=True)
        elif (folder := results.folder_by_id(client, options.id, options.runs_dir)) is None:
            raise ConfigError(f"no run in {options.runs_dir} was begun by job {options.id}; is that its --runs-dir?")
        if job is not None and job.status.value != "SUCCEEDED" and folder is None:
            raise ConfigError(f"job {options.id} {state(job)} before it had a run: {_says(job)}")
        if folder is None:
            raise ConfigError(
                f"job {options.id} names no run folder in its log, and none was found by its id; name the folder of "
                "its runs with --runs-dir"
            )
        names = [results.FILES[command[0]]] if command else dict.fromkeys(results.FILES.values())
        for path in (folder / name for name in names):
            if (text := results.read(client, path)) is not None:
                break
        else:
            there = " or ".join(str(folder / name) for name in names)
            if job is not None and job.status.value != "SUCCEEDED":
                raise ConfigError(_unfinished(job, command, folder))
            raise ConfigError(
                f"{there} is not there: the run did not end, or its folder was on a disk that the cluster's head does "
                f"not see or has removed (a relative --runs-dir); `mmsa-dist jobs logs {options.id}` shows its table"
            )
        if path.suffix != ".json" or options.json:
            print(text.rstrip())
        else:
            print(f"{results.table(results.parsed(text, path))}\nrun {folder}")
    return 0


def run_folder(client: "JobSubmissionClient", job: "JobDetails", *, search: bool = False) -> Any:
    """Where a job keeps its run, a path on the cluster; None where nothing says so.

    Args:
        search: by the job's id too, where its log does not name it.
    """
    command = results.command_of(job.entrypoint)
    if not command or command[0] not in results.SAID:
        return None
    found = results.folder_in(_log(client, str(job.submission_id)), command)
    runs = value_of(command, "--runs-dir")
    if found is None and search and runs and runs.startswith("/"):
        return results.folder_by_id(client, str(job.submission_id), runs)
    return found


def _may_have_result(job: "JobDetails", command: list[str]) -> None:
    """
    Raises:
        ConfigError: it never will have. TransientError: it may, later.
    """
    name = job.submission_id
    if not command or command[0] not in results.FILES:
        raise ConfigError(
            f"job {name} runs {shown(job.entrypoint)!r}, which leaves no result.json: {', '.join(results.FILES)} do; "
            f"see `mmsa-dist jobs logs {name}`"
        )
    if not job.status.is_terminal():
        raise TransientError(
            f"job {name} is {state(job)}: it has its result at its end; follow it with `mmsa-dist jobs logs {name} "
            "--follow`"
        )


def _log(client: "JobSubmissionClient", job: str) -> str:
    """What a job has printed; nothing where its log is gone, as the node that had it is."""
    try:
        return str(client.get_job_logs(job))
    except (RuntimeError, OSError) as error:
        print(f"note: the log of job {job} is not to be had: {first_line(error)}", file=sys.stderr)
        return ""


# --- a job in words ---------------------------------------------------------------------------------------------------


def described(job: "JobDetails") -> dict[str, Any]:
    """A job as a JSON object: times in ISO 8601, UTC; seconds to its end, or until now."""
    return {
        "id": job.submission_id,
        "state": job.status.value,
        "exit_code": job.driver_exit_code,
        "started": moment(job.start_time),
        "ended": moment(job.end_time),
        "seconds": seconds(job),
        "command": job.entrypoint,
        "message": job.message,
    }


def state(job: "JobDetails") -> str:
    """``running``, ``succeeded``, … and the exit code of one that failed."""
    if job.status.value != "FAILED":
        return str(job.status.value).lower()
    return f"failed ({exit_code(job)})" if job.driver_exit_code is not None else "failed"


def times(job: "JobDetails") -> tuple[str, str]:
    """When a job began, and how long it took so far."""
    began, took = moment(job.start_time), seconds(job)
    started = "-" if began is None else began.replace("T", " ").removesuffix("+00:00")
    return started, "-" if took is None else duration(took)


def seconds(job: "JobDetails") -> float | None:
    """From a job's begin to its end, or until now."""
    if not job.start_time:
        return None
    return float(max(0.0, (job.end_time / 1000 if job.end_time else time.time()) - job.start_time / 1000))


def moment(milliseconds: int | None) -> str | None:
    """A time of Ray's, in milliseconds since 1970, to the second in UTC."""
    return datetime.fromtimestamp(milliseconds // 1000, UTC).isoformat() if milliseconds else None


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole % 60:02} s"


def shown(entrypoint: str) -> str:
    """A job's command without what starts it; of somebody else's job all of it."""
    _, ours, command = entrypoint.partition(" -m mmsa_dist ")
    return command if ours else entrypoint
