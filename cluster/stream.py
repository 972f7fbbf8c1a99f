"""A job's log as it grows. Ray's own stream waits for ever on a connection that died without a word: behind a NAT that
forgot it, after a laptop's sleep. So one that is silent for a while is looked after, and taken up anew."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from cluster.client import probe

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SILENT = 20.0
"""Seconds without a word after which the head is asked how the job is."""
LOOKS = 3
"""Times that it is asked before the stream is taken up anew, though the job runs."""


class SilentError(OSError):
    """The stream is to be taken up anew: its job has ended without a word of it, or it was silent for long."""


async def followed(client: "JobSubmissionClient", job: str, skip: int, take: Callable[[str], None]) -> None:
    """Gives `take` what a job's log has from character `skip` on, until its stream ends.

    Raises:
        SilentError: it came to no end. TransientError: the head does not answer. RuntimeError, OSError,
            aiohttp.ClientError: of Ray's client, when the connection breaks.
    """
    stream = client.tail_job_logs(job)
    try:
        while (text := await _next(client, job, stream)) is not None:
            take(text[skip:])
            skip = max(0, skip - len(text))
    finally:
        await stream.aclose()


async def _next(client: "JobSubmissionClient", job: str, stream: AsyncIterator[str]) -> str | None:
    piece = asyncio.ensure_future(anext(stream, None))
    piece.add_done_callback(lambda done: done.cancelled() or done.exception())  # a signal's is told by the loop
    try:
        for _ in range(LOOKS):
            if (await asyncio.wait({piece}, timeout=SILENT))[0]:
                return piece.result()
            await asyncio.to_thread(probe, client.get_address(), SILENT)
            if (await asyncio.to_thread(client.get_job_info, job)).status.is_terminal():
                break
        raise SilentError(f"the log of job {job} was silent")
    finally:
        if not piece.done():
            piece.cancel()
            await asyncio.wait({piece})
