"""`mmsa-dist sweep`: one real sweep of four trials."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist import run_folder
from mmsa_dist.recipe import load_recipe
from tests.tune.sweeps import SPACE, clean
from tune.outcome import DONE, FAILED, STOPPED, Outcome, read_outcomes, winner

SWEEP = """
import json, re, sys, threading, time, urllib.request

import ray

# Ray's own tidying up after stopped trials does not work without a dashboard
quiet = {"logging_level": "error", "log_to_driver": False}
ray.init("local", num_cpus=2, include_dashboard=False, **quiet)
from tune.sweep import main

node, told, over = ray.nodes()[0], set(), threading.Event()
address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def scrape():
    while not over.wait(1):
        try:
            text = urllib.request.urlopen(address, timeout=10).read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(("ray_mmsa_dist_trials{", "ray_mmsa_dist_epoch{")):
                labels = dict(re.findall(r'(run|sweep|state)="([^"]*)"', line))
                told.add((labels["sweep"], labels.get("state") or labels["run"], float(line.rpartition(" ")[2]) > 0))


scraping = threading.Thread(target=scrape)
scraping.start()
code = main(sys.argv[1:])
over.set()
scraping.join()

total, began = ray.cluster_resources()["CPU"], time.monotonic()
while ray.available_resources().get("CPU", 0.0) < total and time.monotonic() - began < 60:
    time.sleep(0.5)
free = ray.available_resources().get("CPU", 0.0)
print(json.dumps({"code": code, "cpus": total, "free": free, "told": sorted(told)}))
"""


# --- a real sweep -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """What a sweep left behind."""

    data: Path
    runs: Path
    folder: Path
    out: str
    outcomes: list[Outcome]
    after: dict[str, Any]


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Four trials, two at a time, in a process and a cluster of their own."""
    folder = tmp_path_factory.mktemp("sweep")
    runs, space, recipe = folder / "runs", folder / "space.yaml", folder / "recipe.yaml"
    space.write_text(SPACE)
    rates = dict.fromkeys(("audio", "vision", "rest"), 5.0e-3)
    recipe.write_text(yaml.safe_dump({"optim": {"lr": {"text": 5.0e-5, **rates}}, "data": {"batch_size": 8}}))
    # this seed draws: 2 one that learns, 3 one that fails, 4 one that learns nothing
    options = ["--trials=4", "--epochs=5", "--grace=1", "--max-concurrent=2", "--seed=10", "--alias=champion"]
    paths = ["--data", str(data), "--recipe", str(recipe), "--space", str(space), "--runs-dir", str(runs)]
    command = [sys.executable, "-c", SWEEP, "ufen_mtfn", *paths, *options]
    try:
        done = subprocess.run(
            command, cwd=folder, env=clean(), capture_output=True, text=True, timeout=1800, check=False
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"not done after {late.timeout} s:\n{seen(late.stdout)}\n{seen(late.stderr)}\n{last_signs(runs)}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sweep,) = runs.glob("sweep-ufen_mtfn-*")
    after = json.loads(done.stdout.strip().splitlines()[-1])
    return Swept(data, runs, sweep, done.stdout, read_outcomes(sweep / "trials", "mae"), after)


def seen(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")[-3000:]


def last_signs(runs: Path) -> str:
    """What each trial's rank did last, and when."""
    trials = sorted(runs.glob("*/trials/*"))
    return "\n".join(f"{trial.name}: {run_folder.read_events(trial)[-3:]}" for trial in trials)


pytestmark = pytest.mark.timeout(1900)
ray = pytest.mark.ray


@ray
def test_all_trials_ran_and_each_left_a_run_folder(swept: Swept) -> None:
    assert swept.after["code"] == 0
    assert [outcome.number for outcome in swept.outcomes] == [1, 2, 3, 4]
    assert {outcome.status for outcome in swept.outcomes} <= {DONE, STOPPED, FAILED}
    assert swept.outcomes[0].values["optim.lr.rest"] == 5e-3, "the recipe's own"
    for outcome in swept.outcomes:
        if outcome.status != FAILED:
            recipe = yaml.safe_load((outcome.folder / "recipe.yaml").read_text())
            assert recipe["optim"]["lr"]["audio"] == outcome.values["optim.lr.audio"]
            assert recipe["model"]["layers"] == outcome.values["model.layers"]


@ray
def test_prometheus_is_told_of_trials_and_of_their_runs(swept: Swept) -> None:
    """Of the sweep's driver how many are in which state; of each trial's rank how far it is, with the sweep's name."""
    told = {(name, positive) for sweep, name, positive in swept.after["told"] if sweep == swept.folder.name}
    states = {"running", "waiting", "done", "stopped", "failed"}
    assert states <= {name for name, _ in told}, "a state that no trial is in is told as 0"
    assert ("running", True) in told
    assert {name for name, _ in told} & {outcome.folder.name for outcome in swept.outcomes}


@ray
def test_a_failing_trial_is_recorded_and_does_not_stop_the_sweep(swept: Swept) -> None:
    assert [outcome.number for outcome in swept.outcomes if outcome.status == FAILED] == [3]
    assert "cannot be shared by 1 workers x 40 accumulation" in (swept.outcomes[2].error or "")
    assert "Traceback" not in swept.out


@ray
def test_two_trials_ran_at_once(swept: Swept) -> None:
    spans = []
    for outcome in swept.outcomes:
        if events := run_folder.read_events(outcome.folder) if (outcome.folder / "events").is_dir() else []:
            started = [event["time"] for event in events if event["event"] == "start"]
            last = [event["time"] for event in events if len(started) == 1 or event["time"] < started[-1]]
            spans.append((started[0], last[-1]))
    assert any(a[0] < b[1] and b[0] < a[1] for i, a in enumerate(spans) for b in spans[:i]), spans


@ray
def test_a_trial_that_does_not_learn_is_stopped_early(swept: Swept) -> None:
    idle = swept.outcomes[3]
    assert idle.values["optim.lr.rest"] == 1e-8
    assert (idle.status, idle.epochs) == (STOPPED, 1)


@ray
def test_what_was_reserved_is_free_again_within_a_minute(swept: Swept) -> None:
    assert swept.after["free"] == swept.after["cpus"]


@ray
def test_the_best_on_validation_was_chosen_and_only_it_was_tested(swept: Swept) -> None:
    best = winner(swept.outcomes, "mae")
    assert best is not None and best.values["optim.lr.rest"] == 5e-3
    assert best.best == min(outcome.best for outcome in swept.outcomes if outcome.best is not None)
    result = run_folder.read_json(swept.folder / "result.json")
    assert result["trial"] == best.number and result["valid"]["mae"] == pytest.approx(best.best) and "test" in result
    for outcome in swept.outcomes:
        tested = (outcome.folder / "predictions" / "test.npz").is_file()
        assert tested == (outcome == best), f"trial {outcome.number}"
    for outcome in swept.outcomes:
        assert (outcome.folder / "checkpoints").is_dir() == (outcome == best), "only the best keeps its checkpoints"


@ray
def test_mlflow_has_the_sweep_as_parent_its_trials_as_children_and_the_champion(swept: Swept) -> None:
    from mmsa_dist.tracking import Link, store

    parent, best = Link.load(swept.folder), winner(swept.outcomes, "mae")
    assert parent is not None and best is not None
    assert parent.uri == f"sqlite:///{swept.runs / 'mlflow.db'}"
    client = store.connect(parent.uri)
    children = client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    trained = [outcome for outcome in swept.outcomes if (outcome.folder / "mlflow.json").is_file()]
    assert len(children) == len(trained) == sum(outcome.status != FAILED for outcome in swept.outcomes)
    assert {run.info.status for run in children} == {"FINISHED"}
    by_name = {run.info.run_name: run for run in children}
    for outcome in trained:
        run = by_name[outcome.folder.name]
        assert run.data.metrics["best_valid_mae"] == pytest.approx(outcome.best)
        assert run.data.tags["sweep.status"] == outcome.status
        assert run.data.params["model.layers"] == str(outcome.values["model.layers"])
        assert len(client.get_metric_history(run.info.run_id, "valid_mae")) >= outcome.epochs
        assert ("test_mae" in run.data.metrics) == (outcome == best)
    whole = client.get_run(parent.run_id)
    assert whole.info.status == "FINISHED"
    assert whole.data.metrics["best_valid_mae"] == pytest.approx(best.best) and "test_mae" in whole.data.metrics
    files = {file.path for file in client.list_artifacts(parent.run_id)}
    assert {"best.yaml", "trials.csv", "space.yaml"} <= files
    version = client.get_model_version_by_alias("ufen_mtfn", "champion")
    assert version.run_id == by_name[best.folder.name].info.run_id
    assert len(client.search_model_versions("name = 'ufen_mtfn'")) == 1, "only the best is registered"


@ray
def test_the_table_and_the_csv_have_every_trial(swept: Swept) -> None:
    rows = list(csv.DictReader((swept.folder / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == [1, 2, 3, 4]
    for row, outcome in zip(rows, swept.outcomes, strict=True):
        assert float(row["optim.lr.rest"]) == outcome.values["optim.lr.rest"]
        assert row["status"] == outcome.status and int(row["epochs"]) == outcome.epochs
        assert (float(row["valid_mae"]) if row["valid_mae"] else None) == outcome.best
    for word in ("lr.aud", "layers", "MAE", "epochs", "status", "0.005", "1e-08", "stopped early"):
        assert word in swept.out
    assert "mlflow ui --backend-store-uri sqlite:///" in swept.out


@ray
def test_best_yaml_is_a_recipe_that_train_takes(swept: Swept) -> None:
    best = winner(swept.outcomes, "mae")
    assert best is not None
    recipe = load_recipe("ufen_mtfn", str(swept.folder / "best.yaml"), [])
    assert recipe.optim.lr.rest == best.values["optim.lr.rest"] and recipe.model.layers == best.values["model.layers"]  # type: ignore[attr-defined]
    assert recipe.train.test and recipe.train.epochs == 5
    assert recipe.tracking.parent is None and recipe.tracking.alias == ("champion",)
    assert "Best of 4 trials" in (swept.folder / "best.yaml").read_text().splitlines()[0]


@ray
def test_nothing_is_left_of_a_sweeps_own_run(swept: Swept) -> None:
    assert not {"events", "checkpoints", "predictions"} & {file.name for file in swept.folder.iterdir()}
