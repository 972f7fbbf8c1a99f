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

from mmsa_dist import forerunners, places, run_folder
from mmsa_dist.diagnosis import diagnose
from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.forerunners import Forerunners, Place, Rank, ahead
from mmsa_dist.recipe import Recipe, load_recipe
from tests.end_to_end.started import PATIENCE, gone, two_cpus


def recipe(launcher: str = "local", workers: int = 1) -> Recipe:
    return load_recipe("self_mm", None, ["--launcher", launcher, "--workers", str(workers)])


def children() -> list[psutil.Process]:
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "mmsa_dist.worker" in child.cmdline()]


@pytest.fixture
def none_before() -> None:
    assert children() == []


@pytest.fixture(params=[1, 2], ids=["each imports", "forked"])
def of_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many ranks a forerunner becomes: one where there is a GPU or no Linux."""
    may = forerunners.ranks_of_one()
    if may < request.param:
        pytest.skip("this machine has a GPU, or is no Linux: each rank imports for itself")
    monkeypatch.setattr(forerunners, "ranks_of_one", lambda: request.param)
    return int(request.param)


@two_cpus
def test_none_is_left_by_a_driver_that_finds_something_wrong(none_before: None, of_one: int) -> None:
    with pytest.raises(ConfigError), ahead() as sent:
        sent.meant_for(recipe(workers=2), None)
        assert len(children()) == 2 / of_one
        raise ConfigError("there is no such data")
    assert children() == []


RANK = """
import os, sys, time
from mmsa_dist import forerunners
place = forerunners.told()
print(f"rank {place.rank} of {place.world}, {os.environ['RANK']}, child of {os.getppid()}", flush=True)
time.sleep(600 if place.rank == 2 else 0)
sys.exit(place.rank)
"""
"""A forerunner that imports nothing and ends with its rank's number; rank 2 does not end."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    monkeypatch.setattr(forerunners, "COMMAND", [sys.executable, str(script)])


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_each_rank_has_its_log_and_its_end(sent: int, of_one: int, quick: None, tmp_path: Path) -> None:
    """Of 3, of forerunners that become two of them or one; a killed one says so too."""
    waiting = Forerunners()
    waiting.send(sent, 1)
    where = [Place(str(tmp_path), rank, 3, "there") for rank in range(3)]
    ranks = waiting.start(where, 1, tmp_path, [], PATIENCE)
    assert len({rank.pid for rank in ranks}) == 3
    assert [rank.wait(PATIENCE) for rank in ranks[:2]] == [0, 1]
    assert ranks[2].poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        ranks[2].wait(0.05)
    ranks[2].kill()
    assert ranks[2].wait(PATIENCE) == ranks[2].poll() == -signal.SIGKILL
    ranks[2].kill()  # which is nobody's any more
    for rank in range(3):
        told = (tmp_path / f"rank-{rank}.log").read_text()
        assert told == f"rank {rank} of 3, {rank}, child of {os.getpid()}\n"


@pytest.mark.fault
def test_a_forerunner_that_is_killed_while_it_forks_leaves_none(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forks are no ranks before all are there; a new one takes its place."""
    if forerunners.ranks_of_one() < 2:
        pytest.skip("this machine has a GPU, or is no Linux: nothing is forked")
    once = tmp_path / "once"
    once.write_text("")
    script = (tmp_path / "rank.py").read_text()
    dies = """
import signal
from pathlib import Path
fork, forks = os.fork, []
def dying():
    forks.append(fork())
    if forks[-1] and len(forks) == 2 and Path("ONCE").exists():
        Path("ONCE").write_text(" ".join(map(str, forks)))
        Path("ONCE").rename("ONCE.done")
        os.kill(os.getpid(), signal.SIGKILL)
    return forks[-1]
os.fork = dying
""".replace("ONCE", str(once))
    (tmp_path / "rank.py").write_text(script.replace("place =", dies + "place ="))
    waiting = Forerunners()
    waiting.send(2, 1)
    ranks = waiting.start([Place(str(tmp_path), rank, 2, "there") for rank in range(2)], 1, tmp_path, [], PATIENCE)
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 1]
    left = [int(pid) for pid in once.with_name("once.done").read_text().split()]
    assert len(left) == 2 and not {rank.pid for rank in ranks} & set(left)
    for pid in left:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1, "adopted, and ended by itself"


@pytest.mark.fault
def test_forked_ranks_end_with_a_driver_that_is_killed(run: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(run), "two"], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(set(pids)) == 2 and all(psutil.pid_exists(pid) for pid in pids), "their peer has not come yet"
    driver.kill()
    driver.wait()
    assert all(gone(pid, PATIENCE) for pid in pids)
    with run_folder.locked(run, patience=0):
        pass


def test_there_are_none_where_no_local_rank_will_start(none_before: None, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    for launcher, folder in (("ray", None), ("torchrun", None), ("local", tmp_path)):
        with ahead() as sent:
            sent.send(1, 1)  # before the recipe was read
            sent.meant_for(recipe(launcher), folder)
            assert children() == []


@pytest.mark.parametrize(
    ("words", "ahead_of"),
    [
        ("--launcher local", True),
        ("--workers 2 --launch.launcher=local --zero 1", True),
        ("--launcher localhost", False),
        ("--launcher ray", False),
        ("--workers 2", False),
    ],
)
def test_one_is_sent_before_the_recipe_is_read(words: str, ahead_of: bool, none_before: None) -> None:
    """Where the command says that its ranks are local; it stays where it is what the recipe needs."""
    with ahead(words.split()) as sent:
        early = children()
        assert len(early) == ahead_of
        sent.meant_for(recipe(), None)
        assert len(children()) == 1 and children()[0] in (early or children())
        sent.send(1, 2)  # of two cores, which it was not started for
        assert len(children()) == 1 and children()[0] not in early


def test_no_more_are_sent_than_there_is_room_for(none_before: None) -> None:
    with ahead() as sent:
        sent.meant_for(recipe(workers=10_000), None)  # which is refused a moment later
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
    elif sys.argv[2] == "two":  # of three
        where = [Place(str(folder), rank, 3, str(folder / "rendezvous")) for rank in range(2)]
        ranks = Forerunners().start(where, 1, folder, run_folder.lock_of(folder), 600)
        print(*(rank.pid for rank in ranks), flush=True)
    else:  # as the message lies there before it is read
        rank = Forerunner(1)
        message = json.dumps({"place": dataclasses.asdict(place), "ranks": [0]}).encode()
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
def started(sent: Forerunners, run: Path, world: int) -> Iterator[Rank]:
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
def test_a_rank_says_in_its_log_what_is_wrong(
    died: bool, run: Path, none_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that had run ahead, and the one in the place of one that was killed meanwhile."""
    monkeypatch.setattr(forerunners, "ranks_of_one", lambda: 1)
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
