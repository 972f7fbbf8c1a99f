"""`mmsa-dist sweep`: one real sweep of four trials, and its parts without a cluster."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from mmsa_dist import launch, run_folder, train
from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.recipe import Recipe, from_dict, load_recipe
from shards.index import Index
from tests.data import packed
from tune.outcome import DONE, FAILED, INTERRUPTED, STOPPED, Outcome, read_outcome, read_outcomes, winner
from tune.search import Asha, Drawing, concurrency
from tune.space import Space
from tune.sweep import _for_trials, _given_keys, _narrowed, main
from tune.table import trials_table, write_csv
from tune.trial import EPOCH, OBJECTIVE
from tune.watch import spare_disk

REPOSITORY = Path(__file__).parents[2]

SPACE = """
system: ufen_mtfn
learning rates:
  optim.lr.audio, optim.lr.vision, optim.lr.rest:
    choice: [5.0e-3, 1.0e-8]
    source: "one that learns, one that does not: ASHA has something to stop"
network:
  model.layers: {choice: [2, 1], source: "paper, table 7"}
  optim.accumulation: {choice: [1, 40], source: "40 micro-batches of 8 samples cannot be: such a trial fails"}
"""

SWEEP = """
import json, sys, time

import ray

# as on a machine with several clusters: Ray's own tidying up after stopped trials does not work without a dashboard
ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
from tune.sweep import main

code = main(sys.argv[1:])

total, began = ray.cluster_resources()["CPU"], time.monotonic()
while ray.available_resources().get("CPU", 0.0) < total and time.monotonic() - began < 60:
    time.sleep(0.5)
print(json.dumps({"code": code, "cpus": total, "free": ray.available_resources().get("CPU", 0.0)}))
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("data"), samples=80)


def clean() -> dict[str, str]:
    """The environment without what would send a sweep to somebody's cluster or MLflow server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return kept | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Four trials, two at a time, in a process and a cluster of their own."""
    folder = tmp_path_factory.mktemp("sweep")
    runs, space, recipe = folder / "runs", folder / "space.yaml", folder / "recipe.yaml"
    space.write_text(SPACE)
    rates = dict.fromkeys(("audio", "vision", "rest"), 5.0e-3)
    recipe.write_text(yaml.safe_dump({"optim": {"lr": {"text": 5.0e-5, **rates}}, "data": {"batch_size": 8}}))
    # this seed draws: 2 one that learns, 3 one that fails, 4 one that learns nothing
    options = ["--trials=4", "--epochs=3", "--grace=1", "--max-concurrent=2", "--seed=10", "--alias=champion"]
    paths = ["--data", str(data), "--recipe", str(recipe), "--space", str(space), "--runs-dir", str(runs)]
    command = [sys.executable, "-c", SWEEP, "ufen_mtfn", *paths, *options]
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sweep,) = runs.glob("sweep-ufen_mtfn-*")
    after = json.loads(done.stdout.strip().splitlines()[-1])
    return Swept(data, runs, sweep, done.stdout, read_outcomes(sweep / "trials", "mae"), after)


pytestmark = pytest.mark.timeout(1000)
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
        assert len(client.get_metric_history(run.info.run_id, "valid_mae")) == outcome.epochs
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
    assert recipe.train.test and recipe.train.epochs == 3
    assert recipe.tracking.parent is None and recipe.tracking.alias == ("champion",)
    assert "Best of 4 trials" in (swept.folder / "best.yaml").read_text().splitlines()[0]


@ray
def test_nothing_is_left_of_a_sweeps_own_run(swept: Swept) -> None:
    assert not {"events", "checkpoints", "predictions"} & {file.name for file in swept.folder.iterdir()}


# --- the test split is sacred -----------------------------------------------------------------------------------------


def test_a_trial_trains_where_the_test_shards_do_not_exist(data: Path, tmp_path: Path) -> None:
    without = tmp_path / "data"
    shutil.copytree(data, without)
    index = Index.load(without)
    for shard in index.shards:
        if shard.split == "test":
            (without / shard.url).unlink()
            (without / shard.table).unlink()
    recipe = _for_trials(tiny(without, launch={"launcher": "local"}), tmp_path)
    folder = train.prepare(recipe, index, tmp_path / "runs", "trial")
    result = launch.run(recipe, folder)
    assert "valid" in result and "test" not in result


def test_no_trial_reads_the_test_split_whatever_the_recipe_says(tmp_path: Path) -> None:
    assert not _for_trials(tiny(tmp_path, train={"test": True}), tmp_path).train.test


# --- how many at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "cpus", "gpus", "at_once"),
    [
        ({"workers": 1}, 2, 0, 2),
        ({"workers": 2}, 2, 0, 1),
        ({"workers": 2}, 9, 0, 4),
        ({"workers": 2, "cpus_per_worker": 3}, 16, 0, 2),
        ({"workers": 2, "gpus_per_worker": 1}, 64, 8, 4),
        ({"workers": 2, "gpus_per_worker": 0.25}, 64, 1, 2),
        ({"workers": 1, "gpus_per_worker": 0.1}, 64, 1, 10),
        ({"workers": 4, "gpus_per_worker": 1}, 8, 100, 2),
    ],
)
def test_as_many_trials_as_fit(values: dict[str, Any], cpus: float, gpus: float, at_once: int) -> None:
    assert concurrency(LaunchConfig(**values), cpus, gpus) == at_once


def test_not_even_one_trial_fits_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"one trial needs 3 CPUs = 3 workers x 1, the Ray cluster has 2 free; lower"):
        concurrency(LaunchConfig(workers=3), 2, 0)
    with pytest.raises(ConfigError, match=r"one trial needs 2 GPUs = 2 workers x 1, the Ray cluster has 1 free"):
        concurrency(LaunchConfig(workers=2, gpus_per_worker=1), 64, 1)


# --- drawing and pruning ----------------------------------------------------------------------------------------------


def tiny(path: Path, /, **changes: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "system": "ufen_mtfn",
        "data": {"path": str(path)},
        "optim": {"lr": {"text": 5e-5, "audio": 5e-3, "vision": 5e-3, "rest": 5e-3}},
        "train": {"epochs": 2},
        "tracking": {"enabled": False},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    return from_dict(values)


def searched(tmp_path: Path, text: str = SPACE) -> Space:
    (tmp_path / "space.yaml").write_text(text)
    return Space.load("ufen_mtfn", tmp_path / "space.yaml")


def test_the_first_trial_has_the_recipes_own_values_and_every_trial_a_folder(data: Path, tmp_path: Path) -> None:
    recipe = tiny(data, model={"layers": 1})
    drawing = Drawing(searched(tmp_path), recipe, tmp_path / "trials", "min")
    configs = [drawing.suggest(f"id{number}") for number in range(6)]
    outcomes = read_outcomes(tmp_path / "trials", "mae")
    assert [outcome.number for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert [str(outcome.folder) for outcome in outcomes] == [config["folder"] for config in configs]
    assert outcomes[0].values["model.layers"] == 1 and outcomes[0].values["optim.lr.rest"] == 5e-3
    assert outcomes[0].values["optim.accumulation"] == 1
    assert all(outcome.status == INTERRUPTED for outcome in outcomes), "none of them ran"
    again = Drawing(searched(tmp_path), recipe, tmp_path / "again", "min")
    for number in range(6):
        again.suggest(f"id{number}")
    assert [o.values for o in read_outcomes(tmp_path / "again", "mae")] == [o.values for o in outcomes], "seeded"


def test_an_unreachable_mlflow_in_mid_sweep_costs_the_record_not_the_trial(data: Path, tmp_path: Path) -> None:
    recipe = tiny(data, tracking={"enabled": True, "uri": "http://127.0.0.1:9"})
    config = Drawing(searched(tmp_path), recipe, tmp_path / "trials", "min").suggest("id")
    assert "error" not in config
    folder = Path(config["folder"])
    assert list(folder.parent.iterdir()) == [folder], "the first try left nothing"
    assert not yaml.safe_load((folder / "recipe.yaml").read_text())["tracking"]["enabled"]


def test_asha_never_stops_a_trial_at_its_last_epoch() -> None:
    def decisions(epochs: int) -> Iterator[str]:
        asha = Asha(epochs, 1)
        asha.set_search_properties(OBJECTIVE, "min")
        for number, objective in enumerate((0.1, 0.2, 9.0, 9.0)):
            trial = type("Trial", (), {"trial_id": str(number)})
            asha.on_trial_add(None, trial)
            decision = ""
            for epoch in range(1, epochs + 1):
                decision = asha.on_trial_result(None, trial, {EPOCH: epoch, OBJECTIVE: objective})
                if decision == TrialScheduler.STOP:
                    break
            yield f"{decision} {epoch}"

    assert list(decisions(3)) == ["CONTINUE 3", "STOP 1", "STOP 1", "STOP 1"]
    assert list(decisions(1)) == ["CONTINUE 1"] * 4


# --- outcomes, disk, table --------------------------------------------------------------------------------------------


def trial(trials: Path, number: int, values: list[float | None], **files: Any) -> Path:
    """A trial's folder as a real one leaves it: an epoch event for each validation value."""
    folder = trials / f"trial-{number:03d}"
    (folder / "events").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    events = run_folder.Events(folder, 0)
    for epoch, value in enumerate(values, 1):
        events.write("epoch", epoch=epoch, valid={"mae": value, "corr": None if value is None else -value})
    events.close()
    record = {"trial": f"id{number}", "number": number, "values": {"model.layers": number, "optim.lr.rest": 1e-3}}
    run_folder.write_json(folder / "trial.json", {**record, **files.pop("record", {})})
    for name, content in files.items():
        run_folder.write_json(folder / f"{name}.json", content)
    return folder


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    folder = tmp_path / "trials"
    trial(folder, 1, [1.2, 1.0, 1.1], result={})
    killed = {"message": "the actor died", "exit_code": 75}
    trial(folder, 2, [0.9, None], record={"stopped": True}, error=killed)
    trial(folder, 3, [0.1], error={"message": "the loss is not finite", "exit_code": 4})
    trial(folder, 4, [0.5])
    trial(folder, 5, [], error={"message": "values do not fit", "exit_code": 2})
    return folder


def test_an_outcome_is_read_from_the_folder(trials: Path) -> None:
    outcomes = read_outcomes(trials, "mae")
    seen = [(o.number, o.status, o.best, o.best_epoch, o.epochs) for o in outcomes]
    assert seen == [
        (1, DONE, 1.0, 2, 3),
        (2, STOPPED, 0.9, 1, 2),
        (3, FAILED, 0.1, 1, 1),
        (4, INTERRUPTED, 0.5, 1, 1),
        (5, FAILED, None, 0, 0),
    ]
    assert [outcome.error for outcome in outcomes[1:3]] == [None, "the loss is not finite"]
    assert read_outcome(trials / "trial-001", "corr").best == -1.0, "the highest of those"


def test_the_winner_is_the_best_that_holds_even_if_it_was_stopped_early(trials: Path) -> None:
    best = winner(read_outcomes(trials, "mae"), "mae")
    assert best is not None and best.number == 2
    best = winner(read_outcomes(trials, "corr"), "corr")
    assert best is not None and best.number == 2, "-0.9 is the highest"
    assert winner([], "mae") is None


def test_only_the_best_and_the_running_trials_keep_their_checkpoints(trials: Path) -> None:
    spare_disk(trials, "mae")
    kept = {folder.name for folder in trials.iterdir() if (folder / "checkpoints").is_dir()}
    assert kept == {"trial-002", "trial-004"}


def test_the_table_shows_the_best_first_and_why_trials_failed(trials: Path, tmp_path: Path) -> None:
    from rich.console import Console

    outcomes = read_outcomes(trials, "mae")
    space = searched(tmp_path, "a: {model.layers: {choice: [1, 2], source: s}}")
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    console.print(trials_table(outcomes, space, "mae", winner(outcomes, "mae")))
    text = console.export_text()
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["3", "4", "2 *", "1", "5"]
    assert "failed: the loss is not finite" in rows[0] and "stopped early" in rows[2]
    write_csv(outcomes, space, "mae", tmp_path / "trials.csv")
    written = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["valid_mae"] for row in written] == ["1.0", "0.9", "0.1", "0.5", ""]


# --- what is searched -------------------------------------------------------------------------------------------------


def test_what_the_command_fixes_or_what_would_change_nothing_is_not_searched(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(data, data={"modalities": ["text", "audio"]})
    space = _narrowed(Space.load("ufen_mtfn"), recipe, ["--batch-size", "16", "--model.layers=2", "--epochs", "3"])
    assert "data.batch_size" not in space.keys and "model.layers" not in space.keys
    assert "optim.lr.vision" not in space.keys and "optim.lr.audio" in space.keys
    assert "optim.lr.text" not in space.keys
    said = capsys.readouterr().out
    assert "as the command fixes them: data.batch_size, model.layers" in said
    assert "as there is no vision: optim.lr.vision, optim.weight_decay.vision" in said
    assert "as no text encoder is fine-tuned: optim.lr.text" in said


def test_nothing_left_to_search_is_refused(data: Path, tmp_path: Path) -> None:
    space = searched(tmp_path, "a: {model.layers: {choice: [1, 2], source: s}}")
    with pytest.raises(ConfigError, match="nothing is left to search"):
        _narrowed(space, tiny(data), ["--model.layers", "1"])


def test_flags_are_keys() -> None:
    words = ["--optim.weight-decay.text", "0", "--batch-size=4", "-h", "word"]
    assert _given_keys(words) == {"optim.weight_decay.text", "data.batch_size"}


# --- bad input, said before anything starts ---------------------------------------------------------------------------

REFUSED = {
    "unknown system": (["ufen_mtfm"], r"unknown system 'ufen_mtfm'; did you mean 'ufen_mtfn'"),
    "unknown value": (
        ["ufen_mtfn", "--optim.lr.txt", "1"],
        r"unknown option --optim.lr.txt; did you mean --optim.lr.text",
    ),
    "no trials": (["ufen_mtfn", "--trials", "0"], r"--trials is 0, expected at least 1"),
    "trials is no number": (["ufen_mtfn", "--trials", "many"], r"--trials.*invalid int value: 'many'"),
    "no grace": (["ufen_mtfn", "--grace", "0"], r"--grace is 0, expected at least 1"),
    "another launcher": (["ufen_mtfn", "--launcher", "local"], r"--launcher local: a sweep runs on Ray"),
    "a missing space": (["ufen_mtfn", "--space", "none.yaml"], r"search space none.yaml: cannot be read"),
    "an unreachable MLflow": (
        ["ufen_mtfn", "--tracking-uri", "http://127.0.0.1:9"],
        r"no MLflow server answers at http://127.0.0.1:9",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, message = REFUSED[case]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises((ConfigError, TransientError), match=message) as refused:
        main([*argv, "--data", str(data), "--runs-dir", str(tmp_path / "runs")])
    assert "\n" not in str(refused.value)


# in a process of its own: here another test may have started Ray already
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--address", "127.0.0.1:9"], 75, "error: launch.address: no Ray cluster answers at 127.0.0.1:9"),
        (["--workers", "4096"], 2, "error: launch.workers: 4096 workers"),
    ],
)
def test_what_the_cluster_cannot_do_is_one_sentence_and_an_exit_code(
    options: list[str], code: int, message: str, data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mmsa_dist", "sweep", "ufen_mtfn", "--data", str(data), "--tracking.no-enabled"]
    command += ["--batch-size", "4096", "--runs-dir", str(tmp_path), *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=clean(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(message) and "Traceback" not in done.stderr


def test_without_a_system_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert "--max-concurrent N" in capsys.readouterr().out
