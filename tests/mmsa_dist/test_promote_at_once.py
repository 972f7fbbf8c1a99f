"""Promotions that happen at the same moment, or are stopped in the middle."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmsa_dist.tracking.aliases import move, promote_better
from tests.mmsa_dist.conftest import Tracked, wait_for
from tests.mmsa_dist.registered import fresh, holder, register
from tests.mmsa_dist.test_promote import answered, promote, quick, told

__all__ = ["answered", "quick"]  # fixtures


class Interrupted:
    """A client in which somebody else promotes another version just before this one moves the alias, or just after."""

    def __init__(self, client: Any, other: Callable[[], None], after: bool) -> None:
        self._client, self._other, self._after, self._came = client, other, after, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def set_registered_model_alias(self, *words: str) -> None:
        for turn in (False, True):
            if turn is self._after and not self._came:
                self._came = True
                self._other()
            if not turn:
                self._client.set_registered_model_alias(*words)


@pytest.mark.fault
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("mine", ["0.3", "0.5"], ids=["better", "worse"])
def test_of_two_promotions_in_the_same_moment_the_better_version_is_left(
    mine: str, after: bool, tracked: Tracked, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Both have passed their checks against the old champion, and look no more before they move the alias."""
    from mmsa_dist.tracking import fetch

    name = fresh(tracked)
    old, its, own = (register(tracked, name, tmp_path, valid__mae=mae)[0] for mae in ("0.9", "0.4", mine))
    move(tracked.client, name, old.number, "champion", None)

    def other() -> None:
        move(tracked.client, name, its.number, "champion", old.number)

    opened = fetch.opened
    uri, client = opened(None, tracked.runs_dir, "a model")
    monkeypatch.setattr(fetch, "opened", lambda *words: (uri, Interrupted(client, other, after)))
    code = promote(tracked, own)
    said = capsys.readouterr().err
    if mine == "0.3":
        assert code == 0
        assert holder(tracked, name) == (its.number if after else own.number)
    else:
        assert code == 75 and holder(tracked, name) == its.number
        assert f"version {its.number} of {name} was promoted to champion in the same moment, and keeps it" in said


def test_a_run_that_ends_beside_a_promotion_leaves_the_better(tracked: Tracked, tmp_path: Path) -> None:
    name = fresh(tracked)
    better, worse = (register(tracked, name, tmp_path, valid__mae=mae)[0] for mae in ("0.4", "0.5"))

    def other() -> None:
        move(tracked.client, name, better.number, "champion", None)

    client: Any = Interrupted(tracked.client, other, after=False)
    note = promote_better(client, name, worse.number, "champion", "mae")
    assert note is not None and f"champion stays with version {better.number}" in note
    assert holder(tracked, name) == better.number


class Paced:
    """A client each of whose calls waits until it is its turn."""

    def __init__(self, client: Any) -> None:
        self._client, self.turn, self.arrived, self.ended = client, Semaphore(0), Semaphore(0), False

    def __getattr__(self, name: str) -> Any:
        def call(*words: Any, **named: Any) -> Any:
            self.arrived.release()
            assert self.turn.acquire(timeout=60)
            return getattr(self._client, name)(*words, **named)

        return call


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    maes=st.permutations(["0.3", "0.4", "0.5"]),
    order=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), min_size=3, max_size=20),
)
def test_whatever_the_order_of_their_calls_three_promotions_leave_the_best(
    maes: list[str], order: list[tuple[int, int]], tracked: Tracked
) -> None:
    """Three runs end together; each talks to the registry a few calls at a time, in any order."""
    name = fresh(tracked)
    tags = {"data.fingerprint": "one"}
    versions = [
        str(tracked.client.create_model_version(name, "file:///nowhere", tags={**tags, "valid.mae": mae}).version)
        for mae in maes
    ]
    clients = [Paced(tracked.client) for _ in maes]
    notes: dict[str, str | None] = {}

    def run(client: Any, number: str) -> None:
        try:
            notes[number] = promote_better(client, name, number, "champion", "mae")
        finally:
            client.ended = True
            client.arrived.release()

    threads = [Thread(target=run, args=each) for each in zip(clients, versions, strict=True)]
    for thread in threads:
        thread.start()
    for client in clients:
        assert client.arrived.acquire(timeout=60)
    for which, calls in [*order, *((n, 1_000) for n in range(3))]:
        for _ in range(calls):
            if not clients[which].ended:
                clients[which].turn.release()
                assert clients[which].arrived.acquire(timeout=60)
    for thread in threads:
        thread.join(60)
    best = versions[maes.index("0.3")]
    assert holder(tracked, name) == best and notes[best] is None
    assert len(notes) == 3


@pytest.mark.fault
def test_two_commands_at_once(tracked: Tracked, tmp_path: Path) -> None:
    """Real ones: whichever is first, the alias is with the better version in the end."""
    name = fresh(tracked)
    versions = [register(tracked, name, tmp_path, valid__mae=mae)[0] for mae in ("0.5", "0.3", "0.4")]
    words = [sys.executable, "-m", "mmsa_dist", "promote", name, "--alias", "champion"]
    processes = [
        subprocess.Popen(
            [*words, "--version", version.number, "--runs-dir", str(tracked.runs_dir)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for version in versions
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert all("Traceback" not in each for each in said), said
    assert holder(tracked, name) in {v.number for v, p in zip(versions, processes, strict=True) if p.returncode == 0}
    assert {process.returncode for process in processes} <= {0, 2, 75}, said
    if processes[1].returncode == 0:
        assert holder(tracked, name) == versions[1].number


@pytest.mark.fault
def test_ctrl_c_in_the_load_test_moves_nothing_and_leaves_nobody(tracked: Tracked, tmp_path: Path) -> None:
    version, _ = register(tracked, fresh(tracked), tmp_path)
    words = ["promote", version.name, "--version", version.number, "--alias", "champion"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmsa_dist", *words, "--runs-dir", str(tracked.runs_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip

    def loading() -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            return [each for each in children if any("load_alone" in word for word in each.cmdline())]
        return []

    wait_for(lambda: process.poll() is not None or loading(), 300)
    (child,) = loading()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.splitlines()[-1] == "stopped" and "Traceback" not in said
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 30)
    assert holder(tracked, version.name) is None and told(tracked, version) == {}
    assert not list(tmp_path.glob("mmsa-*"))
