"""One sweep, whose MLflow server is locked, slow, killed and started again while trials run; and what trials that are
stopped early had reserved."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist import run_folder
from mmsa_dist.report import epoch_events
from tests.mmsa_dist.conftest import Process, Wire, free_port, tracking_server
from tests.tune.sweeps import RATES, clean, in_mlflow
from tune.outcome import DONE, STOPPED, Outcome, read_outcomes

pytestmark = [pytest.mark.timeout(1900), pytest.mark.ray, pytest.mark.slow]

PATIENCE = 900.0
EPOCHS, TRIALS = 100, 6

SPACE = f"""{RATES}
optimizer:
  optim.clip: {{choice: [0.0, 1.0, 2.0], source: "three of each"}}
"""

SWEEP = """
import json, sys, threading, time
from pathlib import Path

import ray
from ray.util import placement_group_table

# Ray's own tidying up after stopped trials does not work without a dashboard
ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
from tune.sweep import main

runs, held, stopped, freed = Path(sys.argv[1]), {}, {}, {}


def watch():
    # folder -> when the trial was said to be stopped, and when its placement group was gone
    while True:
        for trial in runs.glob("*/trials/*"):
            note = trial / "placement-group"
            if note.is_file() and trial.name not in stopped:
                held[trial.name] = note.read_text().strip()
            if trial.name not in stopped and '"stopped"' in (trial / "trial.json").read_text():
                stopped[trial.name] = time.monotonic()
        table = placement_group_table()
        for name, since in stopped.items():
            if name not in freed and table.get(held.get(name), {}).get("state", "REMOVED") == "REMOVED":
                freed[name] = time.monotonic() - since
        time.sleep(0.5)


def forever():
    while True:
        try:
            watch()
        except OSError:  # a file that is being written
            continue


threading.Thread(target=forever, daemon=True).start()
code = main(sys.argv[2:])
time.sleep(2)
print(json.dumps({"code": code, "held": list(held), "stopped": list(stopped), "freed": freed}))
"""


@dataclass(frozen=True)
class Hit:
    """What a sweep left behind whose tracking was hit.

    Attributes:
        while_away: epochs that trials ended while there was no server, while it was slow, while it was locked.
        after: what its driver saw of placement groups.
    """

    folder: Path
    outcomes: list[Outcome]
    while_away: dict[str, int]
    uri: str
    out: str
    after: dict[str, Any]


def ended(runs: Path) -> int:
    """Epochs that all trials together have ended."""
    return sum(len(epoch_events(folder)) for folder in runs.glob("*/trials/*") if (folder / "events").is_dir())


@pytest.fixture(scope="module")
def hit(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hit]:
    folder = tmp_path_factory.mktemp("faults")
    runs, space, recipe = folder / "runs", folder / "space.yaml", folder / "recipe.yaml"
    space.write_text(SPACE)
    rates = dict.fromkeys(("audio", "vision", "rest"), 5.0e-3)
    recipe.write_text(yaml.safe_dump({"optim": {"lr": {"text": 5.0e-5, **rates}}, "train": {"patience": EPOCHS}}))
    server = tracking_server(folder, free_port())
    wire = Wire(server.port)
    words = ["ufen_mtfn", "--data", str(data), "--recipe", str(recipe), "--space", str(space), "--runs-dir", str(runs)]
    words += [f"--epochs={EPOCHS}", "--grace=2", "--search=grid"]
    words += ["--max-concurrent=2", f"--tracking-uri={wire.uri}"]
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    with (folder / "sweep.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SWEEP, str(runs), *words], cwd=folder, env={**clean(), **limits},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    servers = [server]
    try:
        hit_in_turn = in_turn(process, runs, folder, wire, servers)
        assert process.wait(timeout=PATIENCE) == 0, (folder / "sweep.log").read_text()[-4000:]
        out = (folder / "sweep.log").read_text()
        (sweep,) = runs.glob("sweep-*")
        after = json.loads([line for line in out.splitlines() if line.startswith('{"code"')][-1])
        yield Hit(sweep, read_outcomes(sweep / "trials", "mae"), hit_in_turn, wire.uri, out, after)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        wire.cut()
        for each in servers:
            each.close()


def in_turn(
    process: "subprocess.Popen[bytes]", runs: Path, folder: Path, wire: Wire, servers: list[Process]
) -> dict[str, int]:
    """Locks the server's database, slows it down, kills it and starts it again; what trials did meanwhile."""

    def until(seen: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not seen():
            said = (folder / "sweep.log").read_text()[-4000:]
            assert process.poll() is None and time.monotonic() < deadline, f"not {what}:\n{said}"
            time.sleep(0.05)

    def more(epochs: int, what: str) -> int:
        before = ended(runs)
        until(lambda: ended(runs) >= before + epochs, what)
        return ended(runs) - before

    found = {}
    until(lambda: ended(runs) >= 2, "a trial trains")
    with sqlite3.connect(folder / "mlflow.db", isolation_level=None, timeout=60) as other:
        other.execute("BEGIN EXCLUSIVE")
        found["locked"] = more(6, "trials train on beside a locked database")
        other.execute("ROLLBACK")
    other.close()
    wire.delay = 1.0
    found["slow"] = more(6, "trials train on beside a slow server")
    wire.delay = 0.0
    servers[0].signal(signal.SIGKILL)
    found["killed"] = more(6, "trials train on without a server")
    servers.append(tracking_server(folder, servers[0].port))
    return found


def test_training_goes_on_whatever_happens_to_the_server(hit: Hit) -> None:
    assert all(epochs >= 6 for epochs in hit.while_away.values()) and len(hit.while_away) == 3
    assert [each.number for each in hit.outcomes] == list(range(1, TRIALS + 1))
    assert {each.status for each in hit.outcomes} == {DONE, STOPPED}, [each.error for each in hit.outcomes]
    assert "Traceback" not in hit.out


def test_nothing_is_lost_and_all_runs_are_whole_afterwards(hit: Hit) -> None:
    client, whole, runs = in_mlflow(hit.folder, hit.uri)
    by_name = {run.info.run_name: run for run in runs}
    assert by_name.keys() == {each.folder.name for each in hit.outcomes}
    for each in hit.outcomes:
        run, events = by_name[each.folder.name], epoch_events(each.folder)
        history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "valid_mae")}
        trained = {event["step"]: event["valid"]["mae"] for event in events}
        # ranks that are stopped early train on until they hear of it
        judged = {event["step"]: event["valid"]["mae"] for event in events if event["epoch"] <= each.epochs}
        assert judged.items() <= history.items() <= trained.items()
        assert each.status == STOPPED or judged == trained
        assert run.info.status == "FINISHED" and run.data.tags["sweep.status"] == each.status
        assert run.data.metrics["best_valid_mae"] == pytest.approx(each.best)
        assert not (each.folder / "mlflow-spill.jsonl").exists()
    assert whole.info.status == "FINISHED" and "test_mae" in whole.data.metrics
    assert {"best.yaml", "trials.csv"} <= {file.path for file in client.list_artifacts(whole.info.run_id)}
    assert len(client.search_model_versions("name = 'ufen_mtfn'")) == 1


def test_a_trial_that_is_stopped_early_gives_its_place_back_within_a_minute(hit: Hit) -> None:
    early = {each.folder.name for each in hit.outcomes if each.status == STOPPED}
    assert early and set(hit.after["stopped"]) == early <= set(hit.after["held"])
    assert hit.after["freed"].keys() == early
    assert all(seconds < 60 for seconds in hit.after["freed"].values()), hit.after["freed"]


def test_the_place_is_taken_by_the_next_trial(hit: Hit) -> None:
    """Two CPUs and two trials at a time: without it the later ones would never have begun."""
    starts = {
        each.number: next(event["time"] for event in run_folder.read_events(each.folder) if event["event"] == "start")
        for each in hit.outcomes
    }
    first = min(each.number for each in hit.outcomes if each.status == STOPPED)
    assert max(starts) == TRIALS and starts[TRIALS] > starts[first]
