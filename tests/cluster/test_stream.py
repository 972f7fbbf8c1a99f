"""A job's log whose connection dies without a word, as behind a NAT that forgets it."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web

from cluster import stream
from cluster.errors import TransientError
from cluster.follow import Log


class Head:
    """Sends a log's beginning whenever it is asked, the whole of it from the third time on, and ends it then. Until
    then it is silent, and the job runs."""

    def __init__(self, *, ended: bool = False, answers: bool = True) -> None:
        self.asked, self.ended, self.answers = 0, ended, answers
        self.address, self.over = "", asyncio.Event()

    async def version(self, request: web.Request) -> web.Response:
        import ray

        if not self.answers and self.asked:
            await self.over.wait()
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})

    async def job(self, request: web.Request) -> web.Response:
        status = "SUCCEEDED" if self.ended or self.asked > 2 else "RUNNING"
        return web.json_response({"type": "SUBMISSION", "status": status, "entrypoint": "x", "driver_exit_code": 0})

    async def log(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.asked += 1
        for piece in ("one\n", "two\n", "three\n")[: self.asked]:
            await socket.send_str(piece)
        if self.asked < 3:
            await self.over.wait()
        await socket.close()
        return socket


@contextmanager
def serving(head: Head) -> Iterator[Head]:
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/api/version", head.version)
    app.router.add_get("/api/jobs/a", head.job)
    app.router.add_get("/api/jobs/a/logs/tail", head.log)
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    head.address = f"http://127.0.0.1:{loop.run_until_complete(start())}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield head
    finally:
        loop.call_soon_threadsafe(head.over.set)
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENT", 0.2)


def client_of(head: Head) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(head.address)


def test_a_silent_log_is_taken_up_anew_and_nothing_is_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Head()) as head:
        details = asyncio.run(Log(client_of(head), "a").follow())
    assert details.status.value == "SUCCEEDED" and head.asked == 3
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_the_end_of_a_job_whose_log_is_silent_is_seen() -> None:
    taken: list[str] = []
    with serving(Head(ended=True)) as head:
        began = time.monotonic()
        with pytest.raises(stream.SilentError):
            asyncio.run(stream.followed(client_of(head), "a", 0, taken.append))
        assert time.monotonic() - began < 30 and taken == ["one\n"]


def test_a_head_that_is_gone_is_not_waited_for() -> None:
    with serving(Head(answers=False)) as head, pytest.raises(TransientError):
        asyncio.run(stream.followed(client_of(head), "a", 0, lambda _: None))


def test_a_log_is_taken_up_in_the_middle_of_a_piece() -> None:
    taken: list[str] = []
    head = Head()
    head.asked = 2
    with serving(head):
        asyncio.run(stream.followed(client_of(head), "a", 6, taken.append))
    assert "".join(taken) == "o\nthree\n"
