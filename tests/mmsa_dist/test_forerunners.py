"""Processes that import before there is a run: told which rank they are, and never left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mmsa_dist import places, run_folder
from mmsa_dist.errors import ConfigError
from mmsa_dist.forerunners import Forerunners, Place, ahead
from mmsa_dist.recipe import Recipe, load_recipe
from tests.end_to_end.started import gone, two_cpus


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


@pytest.mark.fault
def test_they_end_with_a_driver_that_is_killed() -> None:
    drive = "import time; from mmsa_dist.forerunners import Forerunners; sent = Forerunners(); sent.send(1, 1); "
    drive += "print(sent._waiting[0].process.pid, flush=True); time.sleep(600)"
    driver = subprocess.Popen([sys.executable, "-c", drive], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    assert gone(pid, 60)


@pytest.mark.fault
@pytest.mark.parametrize("died", [False, True])
def test_a_rank_says_in_its_log_what_is_wrong(died: bool, tmp_path: Path, none_before: None) -> None:
    """One that had run ahead, and the one in the place of one that was killed meanwhile."""
    sent, log = Forerunners(), tmp_path / "rank-0.log"
    sent.send(2, 1)
    first, second = (each.process for each in sent._waiting)
    if died:
        for process in (first, second):
            process.kill()
            process.wait()
    (tmp_path / "recipe.yaml").write_text("no recipe")
    rank = sent.start(Place(str(tmp_path), 0, 1, str(tmp_path / "rendezvous")), 1, log, [])
    assert (rank is first) is not died
    sent.end()
    assert second.poll() is not None, "nobody needs it"
    assert rank.wait(120) != 0
    assert "recipe.yaml" in log.read_text()


@pytest.mark.fault
def test_a_rank_holds_the_run_when_its_driver_is_gone(tmp_path: Path, none_before: None) -> None:
    """The lock goes with the message: a run whose ranks live is nobody else's."""
    (tmp_path / "recipe.yaml").write_text("system: self_mm\n")
    sent = Forerunners()
    sent.send(1, 1)
    with run_folder.locked(tmp_path):
        # its peer never comes: it waits
        rank = sent.start(
            Place(str(tmp_path), 0, 2, str(tmp_path / "rendezvous")), 1, tmp_path / "log", run_folder.lock_of(tmp_path)
        )
        held = psutil.Process(rank.pid)
        while not any(file.path == str(tmp_path / ".lock") for file in held.open_files()):
            assert rank.poll() is None
    assert run_folder.lock_of(tmp_path) == []
    try:
        with pytest.raises(ConfigError, match="the run is being trained by"), run_folder.locked(tmp_path, patience=0.2):
            pass
    finally:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    with run_folder.locked(tmp_path, patience=0.2):
        pass
