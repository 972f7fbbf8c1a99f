"""Looking on while a job runs: its log as it grows, through dropped connections, and what a Ctrl-C means."""

import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Literal

from cluster import stream
from cluster.client import exit_code, first_line, later
from cluster.errors import TransientError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RECONNECTS = 30
"""How often in a row a broken log stream is taken up again, a second or two apart, before giving up."""

Answer = Literal["stop", "leave", "go on"]


class Log:
    """A job's log, printed as it grows.

    Args:
        printed: characters from its beginning that are not to be printed any more.
    """

    def __init__(self, client: "JobSubmissionClient", job: str, printed: int = 0) -> None:
        self._client, self._job, self._printed = client, job, printed

    async def follow(self) -> "JobDetails":
        """Prints until the job ends; a broken connection is taken up again. Called anew it goes on where it was.

        Raises:
            TransientError: the connection could not be taken up again.
        """
        import aiohttp

        failures = 0
        while True:
            try:
                await stream.followed(self._client, self._job, self._printed, self._print)
                details = await asyncio.to_thread(self._client.get_job_info, self._job)
                if details.status.is_terminal():
                    return details
                failures = 0  # the head answers: only the stream was cut
            except BrokenPipeError:
                raise
            except stream.SilentError:
                continue
            except (TransientError, RuntimeError, OSError, aiohttp.ClientError) as error:
                failures += 1
                if failures > RECONNECTS:
                    raise TransientError(
                        f"lost the cluster while following job {self._job}: {first_line(error)}; the job may still "
                        f"run, see `mmsa-dist jobs status {self._job}`"
                    ) from error
            await asyncio.sleep(1.0)

    def _print(self, new: str) -> None:
        self._printed += len(new)
        print(new, end="", flush=True)


def followed(client: "JobSubmissionClient", address: str, log: Log, job: str, *, stopping: bool = False) -> int:
    """Follows a job to its end; gives its own exit code, or that of the signal after which nobody follows any more.

    A Ctrl-C on a terminal asks whether to stop the job or only to stop looking; elsewhere it does the latter, as every
    other signal does.

    Args:
        stopping: the caller has told the job to stop, so that there is nothing to ask, and says how it ended.
    """
    told = stopping
    while True:
        try:
            code = exit_code(details := asyncio.run(log.follow()))
        except KeyboardInterrupt as stop:
            number = int(stop.args[0]) if stop.args else int(signal.SIGINT)  # the front door says which of its own
            answer = asked(job) if number == signal.SIGINT and not stopping and on_terminal() else "leave"
            if answer == "leave":
                goes_on = "is being stopped" if stopping else "goes on"
                print(f"\nno longer following; job {job} {goes_on}\n{later(address, job)}", file=sys.stderr)
                return 128 + number
            if answer == "stop":
                stopping = True
                client.stop_job(job)
                print(
                    f"job {job} is told to stop; a training run saves first (Ctrl-C leaves it to it)", file=sys.stderr
                )
            continue
        if details.status.value == "STOPPED" and not told:
            print(f"job {job} was stopped", file=sys.stderr)
        return code


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def asked(job: str) -> Answer:
    """What a Ctrl-C was meant for; a second one, or the end of the input, leaves."""
    question = f"\njob {job} is still running: [s]top it, [l]eave it running and stop looking, or Enter to go on? "
    answers: dict[str, Answer] = {"s": "stop", "stop": "stop", "l": "leave", "leave": "leave", "": "go on"}
    try:
        while True:
            print(question, end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                return "leave"
            if answer := answers.get(line.strip().lower()):
                return answer
    except KeyboardInterrupt:
        return "leave"
