"""A number of ranks that changes while a run goes on: nodes of a real Ray cluster that die and join."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import load_recipe
from mmsa_dist.run_folder import read_events
from tests.end_to_end.started import Run
from tests.mmsa_dist.conftest import wait_for
from tests.ray_nodes import Cluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # of all its nodes, and of who joins it
    with Cluster() as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that takes a silent node for dead after 10 s or so, where Ray's own needs half a minute."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("period", "timeout"):  # five of each
        monkeypatch.setenv(f"RAY_health_check_{name}_ms", "2000")
    with Cluster() as made:
        yield made


@pytest.mark.fault
@pytest.mark.ray
@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_go_and_come_with_the_nodes(zero: int, words: list[str], cluster: Cluster, tmp_path: Path) -> None:
    """One node of two is killed: one rank goes on. Another joins: two do. The losses are those of two ranks alone."""
    same = [*words, "--zero", str(zero), "--train.patience", "99999"]
    same += ["--model.post-text-dropout", "0", "--model.post-audio-dropout", "0"]
    # small steps: with large ones rounding, which is another at another number of ranks, grows to 2e-3 in 18 epochs
    same += [f"--optim.lr.{group}=1e-4" for group in ("text", "audio", "vision", "rest")]
    alone = Run(tmp_path / "alone", *same, "--epochs", "20", "--workers", "2", "--launcher", "local")
    alone.result()
    second = cluster.join()
    cluster.wait(2)
    # more epochs than there is time for: it is ended once all has happened
    run = Run(tmp_path / "elastic", *same, "--epochs", "9999", "--workers", "1:2", "--address", cluster.address)
    try:
        run.until_epoch(1)
        cluster.kill(second)
        run.until(lambda event: begun_by(run, [2, 1], event), "no beginning with one rank")
        cluster.join()
        run.until(lambda event: begun_by(run, [2, 1, 2], event), "no beginning with two ranks again")
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130, run.output
    finally:
        run.kill()
    said = (
        r"1 -> 2 workers, as there is room for them; saved after step [\d,]+, starting again"  # a thousand steps: 1,000
    )
    assert re.search(said, run.output)
    epochs = [event for event in read_events(run.folder) if event["event"] == "epoch"]
    assert {e["epoch"] for e in epochs} == set(range(1, epochs[-1]["epoch"] + 1)), "epochs were left out"
    assert all(e["step"] == e["epoch"] * epochs[0]["step"] for e in epochs), "an epoch has other steps than the first"
    losses = {e["epoch"]: e["train_loss"] for e in epochs}
    for event in read_events(alone.folder):
        if event["event"] == "epoch" and event["epoch"] in losses:
            assert losses[event["epoch"]] == pytest.approx(event["train_loss"], rel=1e-3), event["epoch"]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.ray
def test_a_killed_raylet_is_invisible(
    words: list[str], undisturbed: dict[str, Any], cluster: Cluster, tmp_path: Path
) -> None:
    """A fixed number of ranks waits for room again and goes on where the last checkpoint was: the same to the bit."""
    second = cluster.join()
    cluster.wait(2)
    run = Run(tmp_path / "raylet", *words, "--workers", "2", "--address", cluster.address)
    try:
        run.until_epoch(2)
        cluster.signal_raylet(second, signal.SIGKILL)
        cluster.join()
        assert run.result() == undisturbed
    finally:
        run.kill()
    assert ranks(run) == [2, 2]
    assert "starting again" in run.output and "Traceback" not in run.output


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.ray
def test_a_raylet_that_stands_still_is_a_node_that_is_gone(
    words: list[str], impatient: Cluster, tmp_path: Path
) -> None:
    """Ray takes its node for dead after some seconds; the rank there, which lives on, changes nothing any more."""
    alone = Run(tmp_path / "alone", *words, "--workers", "2", "--launcher", "local")
    alone.result()
    second = impatient.join()
    impatient.wait(2)
    endless = ("--epochs", "99999", "--train.patience", "99999")
    run = Run(tmp_path / "raylet", *words, *endless, "--workers", "2", "--address", impatient.address)
    try:
        run.until_epoch(1)
        impatient.signal_raylet(second, signal.SIGSTOP)
        impatient.join()
        run.until(lambda event: begun_by(run, [2, 2], event), "no beginning on another node")
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130, run.output
    finally:
        run.kill()
    assert "starting again" in run.output and "Traceback" not in run.output
    losses = {event["epoch"]: event["train_loss"] for event in read_events(run.folder) if event["event"] == "epoch"}
    assert sorted(losses) == list(range(1, len(losses) + 1)), "epochs were left out"
    for event in read_events(alone.folder):
        if event["event"] == "epoch":
            assert losses[event["epoch"]] == event["train_loss"], event["epoch"]


HOLD = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
class Holder:
    def held(self): return True

holder = Holder.remote()
print("held", ray.get(holder.held.remote()), flush=True)
time.sleep(3600)
"""

DECEIVED = """
import sys
from mmsa_dist import __main__, places

counted, lies = places.room, [2]
places.room = lambda launch: lies.pop() if lies else counted(launch)
sys.exit(__main__.main())
"""
"""Trains where others take the second place between the counting and the asking."""


@pytest.fixture
def held(cluster: Cluster) -> Iterator[None]:
    """Somebody else has one CPU of the cluster's two."""
    cluster.join()
    cluster.wait(2)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, cluster.address], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held True\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.ray
def test_room_that_others_take_in_between_is_not_waited_for(
    words: list[str], cluster: Cluster, held: None, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    command = [
        "train",
        *words,
        "--runs-dir",
        str(runs),
        "--workers",
        "1:2",
        "--address",
        cluster.address,
        "--epochs",
        "2",
    ]
    ended = subprocess.run([sys.executable, "-c", DECEIVED, *command], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert "others took the room for 2 workers before they could start; looking again" in ended.stderr
    assert "1 of 2 workers" in ended.stderr and "Traceback" not in ended.stderr
    (folder,) = runs.iterdir()
    assert [event["world"] for event in read_events(folder) if event["event"] == "start"] == [1]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.ray
def test_who_waits_for_others_says_so(words: list[str], cluster: Cluster, held: None, tmp_path: Path) -> None:
    run = Run(tmp_path / "queued", *words, "--workers", "2", "--address", cluster.address)
    try:
        waiting = "waiting for room for 2 workers of 1 CPU: others use the cluster, 1 of 2 CPUs are free"
        wait_for(lambda: waiting in run.output or run.process.poll() is not None, 300)
        assert waiting in run.output, run.output
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130, run.output
    finally:
        run.kill()


def begun_by(run: Run, worlds: list[int], event: dict[str, Any]) -> bool:
    """Whether an epoch has ended since the run began with as many ranks as the last of `worlds`, after the others."""
    return event["event"] == "epoch" and ranks(run) == worlds and event["time"] > starts(run)[-1]["time"]


def ranks(run: Run) -> list[int]:
    """The numbers of ranks that the run has had, in order."""
    return [int(event["world"]) for event in starts(run)]


def starts(run: Run) -> list[dict[str, Any]]:
    return [event for event in read_events(run.folder) if event["event"] == "start"]


def test_a_range_of_workers_is_read(data_words: list[str]) -> None:
    for words in (["--workers", "1:4"], ["--workers=1:4"], ["--launch.workers", "1:4"]):
        launch = load_recipe("self_mm", None, [*data_words, *words]).launch
        assert (launch.min_workers, launch.workers) == (1, 4)
    assert load_recipe("self_mm", None, ["--workers", "3"]).launch.min_workers is None
    with pytest.raises(ConfigError, match=r"min_workers: 4 are more than workers, 2; --workers LEAST:MOST"):
        load_recipe("self_mm", None, ["--workers", "4:2"])
    with pytest.raises(ConfigError, match="workers"):
        load_recipe("self_mm", None, ["--workers", "0:2"])


@pytest.fixture
def data_words(words: list[str]) -> list[str]:
    return words[1:3]


def test_more_than_the_machine_has_is_cut_down(words: list[str], tmp_path: Path) -> None:
    """The local launcher takes what fits, and says so."""
    cpus = len(os.sched_getaffinity(0))
    run = Run(
        tmp_path, *words, "--epochs", "1", "--workers", f"1:{cpus + 1}", "--launcher", "local", "--batch-size", "24"
    )
    result: dict[str, Any] = run.result()
    assert result["epochs"] == 1 and ranks(run) == [cpus]
    assert f"{cpus} of {cpus + 1} workers, as there is room for no more" in run.output
