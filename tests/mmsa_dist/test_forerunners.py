"""Processes that import before there is a run: told which rank they are, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from mmsa_dist import places, run_folder
from mmsa_dist.diagnosis import diagnose
from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.forerunners import Forerunners, Place, ahead
from mmsa_dist.recipe import Recipe, load_recipe
from tests.end_to_end.started import PATIENCE, gone, two_cpus


def recipe(launcher: str = "local", workers: int = 1) -> Recipe:
    return load_recipe("self_mm", None, ["--launcher", launcher, "--workers", str(workers)])


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "mmsa_dist.worker" in child.cmdline()]


@pytest.fixture
def none_before() -> None:
    assert children() == []


@two_cpus
def test_none_is_left_by_a_driver_that_finds_something_wrong(none_before: None) -> None:
    with pytest.raises(ConfigError), ahead(recipe(workers=2), None):
        assert len(children()) == 2
        raise ConfigError("there is no such data")
    assert children() == []


def test_there_are_none_where_no_local_rank_will_start(none_before: None, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    for launcher, folder in (("ray", None), ("torchrun", None), ("local", tmp_path)):
        with ahead(recipe(launcher), folder):
            assert children() == []


def test_no_more_are_sent_than_there_is_room_for(none_before: None) -> None:
    with ahead(recipe(workers=10_000), None):  # which is refused a moment later
        assert 1 <= len(children()) <= places.own_cpus()


DRIVER = """
import dataclasses, json, socket, sys, time
from pathlib import Path
from mmsa_dist import run_folder
from mmsa_dist.forerunners import Forerunner, Forerunners, Place

folder = Path(sys.argv[1])
place = Place(str(folder), 0, 2, str(folder / "rendezvous"))
with run_folder.locked(folder):
    if sys.argv[2] == "untold":
        sent = Forerunners()
        sent.send(1, 1)
        print(sent._waiting[0].process.pid, flush=True)
    else:  # as the message lies there before it is read
        rank = Forerunner(1)
        message = json.dumps(dataclasses.asdict(place)).encode()
        socket.send_fds(rank._socket, [message], [1, *run_folder.lock_of(folder)])
        print(rank.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.fault
@pytest.mark.parametrize("what", ["untold", "told"])
def test_they_end_with_a_driver_that_is_killed(what: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though their imports take an hour; and the run is free."""
    deepspeed_is("import time; time.sleep(3600)", run, monkeypatch)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(run), what], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    assert gone(pid, PATIENCE)
    with run_folder.locked(run, patience=0):
        pass


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, with what a rank reads first."""
    (tmp_path / "recipe.yaml").write_text("system: self_mm\n")
    (tmp_path / "failures").mkdir()
    return tmp_path


def deepspeed_is(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes import under that name from now on."""
    package = folder / "instead" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    path = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@contextmanager
def started(sent: Forerunners, run: Path, world: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Rank 0 of so many; the others never come."""
    where = [Place(str(run), 0, world, str(run / "rendezvous"))]
    (rank,) = sent.start(where, 1, run, run_folder.lock_of(run), PATIENCE)
    try:
        yield rank
    finally:
        rank.kill()
        rank.wait()


@pytest.mark.fault
@pytest.mark.parametrize("died", [False, True])
def test_a_rank_says_in_its_log_what_is_wrong(died: bool, run: Path, none_before: None) -> None:
    """One that had run ahead, and the one in the place of one that was killed meanwhile."""
    sent = Forerunners()
    sent.send(2, 1)
    first, second = (each.process for each in sent._waiting)
    if died:
        for process in (first, second):
            process.kill()
    (run / "recipe.yaml").write_text("no recipe")
    with started(sent, run, 1) as rank:
        assert (rank is first) is not died
        assert second.poll() is not None, "nobody needs it"
        assert rank.wait(PATIENCE) != 0
    assert "recipe.yaml" in (run / "rank-0.log").read_text()


@pytest.mark.fault
@pytest.mark.parametrize("ahead_of", [0, 1])
def test_an_import_that_fails_is_the_runs_failure(
    ahead_of: int, run: Path, none_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that ran ahead, whose output nobody read then, and of one that did not."""
    deepspeed_is("raise ImportError('libnvrtc is not there')", run, monkeypatch)
    sent = Forerunners()
    sent.send(ahead_of, 1)
    with started(sent, run, 1) as rank:
        assert rank.wait(PATIENCE) == 1
    failure = diagnose(run, "rank 0 ended with exit code 1", printed="the log")
    assert not isinstance(failure, TransientError), "it would be tried again"
    assert "rank 0 failed: ImportError: libnvrtc is not there" in str(failure)
    assert "libnvrtc is not there" in (run / "rank-0.log").read_text()


@pytest.mark.fault
def test_a_rank_whose_imports_take_too_long_is_no_rank_that_ended_well(
    run: Path, none_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed_is("import time; time.sleep(3)", run, monkeypatch)
    where = [Place(str(run), 0, 1, str(run / "rendezvous"))]
    (rank,) = Forerunners().start(where, 1, run, [], patience=0.5)
    assert rank.wait(PATIENCE) == TransientError.exit_code
    assert "waits no longer for these imports (--launch.timeout)" in (run / "rank-0.log").read_text()


@pytest.mark.fault
def test_a_rank_that_is_asked_to_end_while_it_imports_lives(run: Path, none_before: None) -> None:
    """It takes the request as one once it is a rank, and no failure is counted."""
    sent = Forerunners()
    sent.send(1, 1)
    (early,) = (each.process for each in sent._waiting)
    while blocked(early.pid) != {signal.SIGTERM, signal.SIGHUP}:  # before it is Python it keeps all
        assert early.poll() is None
        time.sleep(0.01)
    early.terminate()
    with started(sent, run, 2) as rank:
        assert rank is early
        while signal.SIGTERM in blocked(rank.pid):
            assert rank.poll() is None
            time.sleep(0.01)
        time.sleep(1)
        assert rank.poll() is None, "its peer has not come yet"


def blocked(pid: int) -> set[int]:
    """Signals that a process keeps for later."""
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk:"))
    return {number for number in range(1, 32) if int(mask.split()[1], 16) >> (number - 1) & 1}


@pytest.mark.fault
def test_a_rank_holds_the_run_when_its_driver_is_gone(run: Path, none_before: None) -> None:
    """The lock goes with the message: a run whose ranks live is nobody else's."""
    sent = Forerunners()
    sent.send(1, 1)
    with ExitStack() as held:
        held.enter_context(run_folder.locked(run))
        with started(sent, run, 2):  # its peer never comes: it waits
            held.close()
            assert run_folder.lock_of(run) == []
            with pytest.raises(ConfigError, match="the run is being trained by"), run_folder.locked(run, patience=0.2):
                pass
    with run_folder.locked(run, patience=0.2):
        pass
