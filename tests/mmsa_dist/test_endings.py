"""How ranks and their launcher end: in good order, and with the error that helps."""

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import hangup, launch, places, stopping, torchrun, watch, worker
from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError, DataError, StoppedError, TransientError
from mmsa_dist.forerunners import Place
from mmsa_dist.recipe import from_dict
from mmsa_dist.run_folder import read_events
from mmsa_dist.tracking import Link


def test_a_rank_that_was_asked_to_end_is_no_failure_to_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed rank's peers are killed after two seconds; rank 0 may still be sending its checkpoint to the mirror."""

    def asked(*args: Any, **more: Any) -> None:
        raise StoppedError("SIGTERM to the driver; saved after step 3")

    (tmp_path / "recipe.yaml").write_text("system: self_mm\n")
    monkeypatch.setenv("MMSA_LAUNCHER", "1")
    monkeypatch.setattr(worker.forerunners, "told", lambda: Place(str(tmp_path), 1, 2, ""))
    for module, name in ((worker, "join_group"), (worker, "end_with"), (worker.Requests, "listen")):
        monkeypatch.setattr(module, name, lambda *args, **more: None)
    monkeypatch.setattr(worker, "run_rank", asked)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert worker.main() == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("disk", ["full", "silent"])
def test_a_rank_that_stands_still_ends_though_it_cannot_write(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, told, codes = threading.Event(), list[str](), list[int]()

    def cannot(*args: Any) -> Path:
        if disk == "silent":
            over.wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    def ended(code: int) -> None:
        codes.append(code)
        over.set()

    for name, value in {"write_stacks": cannot, "GRACE": 0.0, "PATIENCE": 0.2}.items():
        monkeypatch.setattr(watch, name, value)
    monkeypatch.setattr("os._exit", ended)
    with watch.Watch(tmp_path, 0, 0.2, 0.2, lambda error: told.append(str(error))):
        assert over.wait(20) and codes[0] == 75
    if disk == "full":
        assert "where each of its threads stood could not be written (No space left on device)" in told[0]


@pytest.mark.parametrize("waits", ["for room", "before another attempt"])
def test_a_signal_is_heard_where_no_rank_runs(waits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events").mkdir()
    least = {"workers": 2, "min_workers": 2, "launcher": "local", "timeout": 600.0}
    recipe = from_dict({"system": "self_mm", "launch": least})
    monkeypatch.setattr(launch, "PAUSE", 600)
    if waits == "for room":
        monkeypatch.setattr(places, "own_cpus", lambda: 1)
    else:
        worker.record_failure(tmp_path, 0, TransientError("the server is silent"))
        monkeypatch.setattr(launch, "make_ready", lambda folder: None)
        monkeypatch.setattr(launch, "run_local", lambda *args, **more: "rank 0 ended with exit code 75")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(StoppedError, match="SIGTERM; it goes on from its last checkpoint") as stopped:
        launch.run(recipe, tmp_path)
    assert stopped.value.exit_code == 143 and time.monotonic() - began < 60


def test_a_signal_ends_at_once_where_ranks_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), stopping.Signals(tmp_path / "full"):  # a folder that cannot be written to
        signal.raise_signal(signal.SIGINT)
    assert "the ranks cannot be asked to end (No such file or directory): ending at once" in capsys.readouterr().err


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes_asks_the_ranks_to_end_unless_that_is_ignored(
    nohup: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hangup, "leave_terminal", lambda: None)  # which is that of the tests
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with stopping.Signals(tmp_path) as signals:
            for _ in range(2):  # the kernel sends one, and the shell another
                signal.raise_signal(signal.SIGHUP)
            assert stopping.requested(tmp_path) is not nohup
        assert signals.number == (0 if nohup else signal.SIGHUP)
        assert nohup or signals.stopped().exit_code == 129
    finally:
        signal.signal(signal.SIGHUP, before)


def test_each_command_that_goes_on_with_a_run_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only a later one resumes it; an attempt after a failure is neither."""
    (tmp_path / "events").mkdir()
    for command, first in (("began", True), ("began", False), ("went on", True)):
        monkeypatch.setattr(sys, "argv", [command])
        with launch.attempted(tmp_path, first=first):
            pass
    attempts = [event for event in read_events(tmp_path, None) if event["event"] == "attempt"]
    assert [event["resumed"] for event in attempts] == [False, False, True]
    assert [event.get("environment", {}).get("command") for event in attempts] == [["began"], None, ["went on"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_rank_of_torchrun_ends_with_the_code_of_its_signal(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hangup, "leave_terminal", lambda: None)
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.getsignal(each) for each in heard}
    requests = stopping.Requests(tmp_path, 1)
    try:
        requests.listen(driven=False)
        signal.raise_signal(number)
        assert requests.come() and requests.stopped(3).exit_code == 128 + number
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_what_torchrun_decides_itself_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(resumed: bool = False, **values: Any) -> str:
        return "; ".join(torchrun.without_effect(LaunchConfig(**values), 2, resumed=resumed))

    assert said() == said(workers=2) == said(workers=4, resumed=True) == ""
    assert said(workers=4) == said(workers=4, min_workers=1)
    assert said(workers=4).startswith("--workers is without effect: torchrun has started 2")
    assert said(max_failures=5).startswith("launch.max_failures is without effect")


def test_ranks_that_torchrun_starts_again_find_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "other"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        (tmp_path / name).mkdir()
        torchrun.mark(tmp_path / name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert torchrun.begun_before(tmp_path) is None, "the first start of a job is a new run"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert torchrun.begun_before(tmp_path) == tmp_path / "mine"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert torchrun.begun_before(tmp_path) is None


def test_a_node_with_other_versions_than_the_driver_is_named() -> None:
    launch.check_versions(launch.versions())
    with pytest.raises(ConfigError, match=r"node .*: torch \S+, the driver has 1\.0; .* same versions there"):
        launch.check_versions({**launch.versions(), "torch": "1.0"})
    assert "+" not in (launch.versions()["torch"] or ""), "a head without GPUs has another build of the same version"


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_link_to_mlflow_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text(content)
    with pytest.raises(DataError, match=r"mlflow\.json: cannot be read, .* remove it to go on untracked"):
        Link.load(tmp_path)
