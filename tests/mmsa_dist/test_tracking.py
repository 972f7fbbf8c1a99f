"""A run in MLflow, against real stores: sqlite files and a server process."""

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from mmsa_dist import train
from mmsa_dist.cli import unrecorded
from mmsa_dist.errors import ConfigError
from mmsa_dist.follow import Follower
from mmsa_dist.recipe import Recipe, from_dict
from mmsa_dist.run_folder import read_events, read_json
from mmsa_dist.tracking import NullTracker, end_run, finish_run, open_run, open_tracker, store
from mmsa_dist.tracking.tracker import LINK, SPILL, Link, MlflowTracker, replay
from shards.index import Index
from tests.mmsa_dist import runs
from tests.mmsa_dist.conftest import Process, Tracked, Wire, free_port, wait_for


@pytest.fixture
def runs_dir(tmp_path: Path, empty_database: Path) -> Path:
    """A folder of runs with an empty database in it."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def described(runs_dir: Path, trained: tuple[Path, Recipe], **tracking: object) -> tuple[Path, Recipe]:
    """A run folder as the driver prepares it, before anything starts."""
    source, recipe = trained
    folder = runs_dir / "run"
    folder.mkdir()
    for name in ("recipe.yaml", "data.json", "environment.json", "plan.json"):
        shutil.copyfile(source / name, folder / name)
    return folder, from_dict({**recipe.dump(), "tracking": tracking})


def client_of(runs_dir: Path) -> MlflowClient:
    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    return MlflowClient(uri, uri)


# --- opening a run


def test_a_password_is_never_saved(
    runs_dir: Path, trained: tuple[Path, Recipe], server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.uri.replace("//", "//user:secret@")
    with pytest.raises(ConfigError) as raised:
        store.store_uri(uri, runs_dir)
    assert "MLFLOW_TRACKING_URI" in str(raised.value) and "secret" not in str(raised.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder, recipe = described(runs_dir, trained)
    run_id = open_run(folder, recipe)
    link = Link.load(folder)
    assert link is not None and link.uri == uri and link.run_id == run_id
    with open_tracker(folder) as tracker:
        tracker.epoch({"train_loss": 1.0}, 1)
    assert all(b"secret" not in file.read_bytes() for file in folder.rglob("*") if file.is_file())
    run = MlflowClient(server.uri).get_run(run_id)
    assert run.data.metrics["train_loss"] == 1.0 and "secret" not in str(run.to_dictionary())


def test_off_is_off(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    folder, recipe = described(runs_dir, trained, enabled=False)
    assert open_run(folder, recipe) is None
    assert isinstance(open_tracker(folder), NullTracker)
    assert finish_run(folder, recipe) is None
    end_run(folder)
    assert not (folder / LINK).exists()


def test_run_has_recipe_code_data_and_command(tracked: Tracked, index: Index) -> None:
    run = tracked.client.get_run(tracked.run_id)
    tags, params = run.data.tags, run.data.params
    assert tags["mlflow.runName"] == "run"
    assert tags["mlflow.source.name"] == "mmsa-dist train self_mm --data 'a folder'"
    assert tags["data.fingerprint"] == index.fingerprint
    assert tags["data.synthetic"] == "true"
    assert tags["owner"] == "tests"
    assert {"version.torch", "version.mlflow", "version.python", "version.mmsa-dist"} <= tags.keys()
    assert params["system"] == "self_mm"
    assert params["optim.lr.text"] == "5e-05"
    assert params["model.post_fusion_dim"] == "128"
    assert len(params) > 60
    (inputs,) = run.inputs.dataset_inputs
    assert inputs.dataset.name == index.name
    assert index.fingerprint.startswith(inputs.dataset.digest)
    assert tracked.client.get_experiment(run.info.experiment_id).name == index.name
    files = {file.path for file in tracked.client.list_artifacts(tracked.run_id)}
    assert {"recipe.yaml", "plan.json", "environment.json", "data.json", "result.json"} <= files


def test_git_state_is_recorded_where_the_code_is_a_checkout(tmp_path: Path) -> None:
    import subprocess

    from mmsa_dist.tracking import run

    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert run.git_tags(tmp_path) == {}
    git("init", "-q")
    (tmp_path / "code.py").write_text("one")
    git("add", ".")
    git("commit", "-qm", "one")
    assert run.git_tags(tmp_path) == {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": "false"}
    (tmp_path / "code.py").write_text("two")
    assert run.git_tags(tmp_path)["git.dirty"] == "true"
    (tmp_path / "inner").mkdir()
    assert run.git_tags(tmp_path / "inner") == {}  # installed inside somebody else's checkout


def test_recipe_artifact_is_the_whole_recipe(tracked: Tracked, tmp_path: Path) -> None:
    file = tracked.client.download_artifacts(tracked.run_id, "recipe.yaml", str(tmp_path))
    assert yaml.safe_load(Path(file).read_text()) == tracked.recipe.dump()


def test_long_values_are_cut_to_what_mlflow_takes(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    folder, recipe = described(runs_dir, trained, tags={"note": "n" * 7000})
    run_id = open_run(folder, recipe, command=["mmsa-dist", "x" * 9000])
    params = client_of(runs_dir).get_run(run_id).data.params
    assert params["tracking.tags.note"] == "n" * 6000


def test_child_of_another_run(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    client = client_of(runs_dir)
    location = (runs_dir / "artifacts").as_uri()
    parent = client.create_run(client.create_experiment("sweep", artifact_location=location)).info.run_id
    folder, recipe = described(runs_dir, trained, parent=parent, experiment="sweep")
    run_id = open_run(folder, recipe)
    run = client.get_run(run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.experiment_id == client.get_experiment_by_name("sweep").experiment_id


def test_a_parent_that_is_not_there_is_said(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    folder, recipe = described(runs_dir, trained, parent="0" * 32)
    with pytest.raises(ConfigError, match="0" * 32):
        open_run(folder, recipe)


def test_an_alias_that_mlflow_refuses_is_said_before_training(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    folder, recipe = described(runs_dir, trained, alias=["champion", "v2"])
    with pytest.raises(ConfigError, match="--alias 'v2': MLflow takes letters"):
        open_run(folder, recipe)
    assert not (folder / LINK).exists()


def test_a_deleted_experiment_is_said(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    client = client_of(runs_dir)
    client.delete_experiment(client.create_experiment("gone"))
    folder, recipe = described(runs_dir, trained, experiment="gone")
    with pytest.raises(ConfigError, match=r"was deleted.*restore"):
        open_run(folder, recipe)


def test_a_restart_goes_on_with_the_same_run(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    folder, recipe = described(runs_dir, trained)
    first = open_run(folder, recipe)
    end_run(folder, "KILLED")
    assert client_of(runs_dir).get_run(first).info.status == "KILLED"
    assert open_run(folder, recipe) == first
    assert client_of(runs_dir).get_run(first).info.status == "RUNNING"


@pytest.mark.parametrize("away", [False, True])
def test_a_resumed_run_stands_as_running_and_a_server_that_is_away_is_said(
    away: bool, runs_dir: Path, trained: tuple[Path, Recipe], index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recipe = described(runs_dir, trained)
    run_id = open_run(folder, recipe)
    end_run(folder, "KILLED")
    link = Link.load(folder)
    assert link is not None
    if away:
        replace(link, uri=f"http://127.0.0.1:{free_port()}").save(folder)
    assert train.begin(recipe, index, folder, runs_dir, "run") == folder
    assert client_of(runs_dir).get_run(run_id).info.status == ("KILLED" if away else "RUNNING")
    assert json.loads((folder / "plan.json").read_text())["ranks"] == recipe.launch.workers
    assert ("warning: MLflow does not show that the run goes on: no MLflow server" in capsys.readouterr().err) is away


# --- numbers


def test_every_epoch_arrives_with_its_step(tracked: Tracked) -> None:
    events = [event for event in read_events(tracked.folder) if event["event"] == "epoch"]
    for name, values in (
        ("train_loss", [event["train_loss"] for event in events]),
        ("valid_mae", [event["valid"]["mae"] for event in events]),
        ("lr_rest", [1e-3, 1e-3]),
    ):
        history = sorted(tracked.client.get_metric_history(tracked.run_id, name), key=lambda metric: metric.step)
        assert [(metric.step, metric.value) for metric in history] == [
            (event["step"], value) for event, value in zip(events, values, strict=True)
        ]


def test_the_result_arrives(tracked: Tracked) -> None:
    result = json.loads((tracked.folder / "result.json").read_text())
    metrics = tracked.client.get_run(tracked.run_id).data.metrics
    for split, prefix in (("valid", "best_valid_"), ("test", "test_")):
        for name, value in result[split].items():
            assert metrics.get(prefix + name) == value  # what is undefined is not there
    assert metrics["best_epoch"] == 2
    assert tracked.client.get_run(tracked.run_id).info.status == "FINISHED"


def test_system_metrics_arrive_even_of_a_short_run(tracked: Tracked) -> None:
    metrics = tracked.client.get_run(tracked.run_id).data.metrics
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    assert len(tracked.client.get_metric_history(tracked.run_id, "system/cpu_utilization_percentage")) >= 2


def test_what_is_undefined_is_left_out(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    folder, recipe = described(runs_dir, trained)
    run_id = open_run(folder, recipe)
    with open_tracker(folder) as tracker:
        tracker.epoch({"valid_corr": None, "valid_mae": 1.5, "note": "text", "flag": True}, 7)
    metrics = client_of(runs_dir).get_run(run_id).data.metrics
    assert {name for name in metrics if not name.startswith("system/")} == {"valid_mae"}


def test_only_rank_0_records(tracked: Tracked) -> None:
    assert isinstance(open_tracker(tracked.folder, rank=1), NullTracker)


def test_training_never_waits_for_a_server_that_hangs(
    tmp_path: Path, silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tracker = MlflowTracker(f"http://127.0.0.1:{silent_port}", "run", tmp_path / SPILL, capacity=10)
        began = time.monotonic()
        for step in range(500):
            tracker.epoch({"train_loss": 1.0}, step)
        assert time.monotonic() - began < 1
        tracker.close(timeout=30)
    rows = [json.loads(line) for line in (tmp_path / SPILL).read_text().splitlines()]
    assert sorted(row["step"] for row in rows if "train_loss" in row["metrics"]) == list(range(500))
    assert len(caplog.records) == 1  # one warning a minute
    assert "training goes on" in caplog.text


def test_a_warning_reaches_the_terminal_whole(
    runs_dir: Path, trained: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank says it among its events, and the driver, which follows them, prints it."""
    folder, _ = described(runs_dir, trained)
    (folder / "events").mkdir()
    Link(f"http://127.0.0.1:{free_port()}", "run", "experiment", "1").save(folder)
    with Follower(folder, "mae"), open_tracker(folder) as tracker:
        tracker.epoch({"train_loss": 1.0}, 1)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    assert "training goes on" in line and str(folder / SPILL) in line
    assert line.endswith(store.REMEDY)


def test_a_database_of_another_machine_is_not_made_here(tmp_path: Path) -> None:
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/elsewhere.db", "run", tmp_path / SPILL)
    tracker.epoch({"train_loss": 1.0}, 1)
    tracker.close()
    assert not (tmp_path / "elsewhere.db").exists()
    assert "train_loss" in (tmp_path / SPILL).read_text()


def test_a_server_that_goes_down_and_comes_back_has_every_epoch(
    tmp_path: Path, server: Process, trained: tuple[Path, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmsa_dist.tracking.tracker.RETRY_EVERY", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    wire = Wire(server.port)
    folder, recipe = described(tmp_path, trained, uri=wire.uri)
    run_id = open_run(folder, recipe)
    client = MlflowClient(server.uri)

    def losses() -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client.get_metric_history(run_id, "train_loss"))

    with open_tracker(folder) as tracker:
        tracker.epoch({"train_loss": 3.0}, 1)
        wait_for(lambda: losses() == [(1, 3.0)])
        wire.cut()
        tracker.epoch({"train_loss": 2.0}, 2)
        wait_for(lambda: (folder / SPILL).is_file() and '"train_loss": 2.0' in (folder / SPILL).read_text())
        wire.mend()
        tracker.epoch({"train_loss": 1.0}, 3)
    assert losses() == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert not (folder / SPILL).exists()
    end_run(folder)
    assert client.get_run(run_id).info.status == "FAILED"
    wire.cut()


def test_the_whole_way_over_a_server(tmp_path: Path, server: Process, index: Index) -> None:
    """Open, train, register, fetch: files travel over HTTP."""
    from mmsa_dist.predictor import Predictor
    from mmsa_dist.tracking.fetch import fetched

    folder, recipe = runs.trained(
        tmp_path, index, tracking={"uri": server.uri, "alias": ["best"], "experiment": "whole"}
    )
    open_run(folder, recipe)
    published = finish_run(folder, recipe)
    assert published is not None and published.aliases == ("best",)
    with fetched("models:/self_mm@best", server.uri, tmp_path) as model:
        there, here = Predictor.load(model), Predictor.load(folder)
        record = here.example()
        for task, values in here.predict([here.utterance(record, "a")]).items():
            np.testing.assert_array_equal(there.predict([there.utterance(record, "a")])[task], values)
    assert not model.exists()  # what was fetched is gone again


def test_what_was_spilled_is_sent_once_at_the_end(runs_dir: Path, trained: tuple[Path, Recipe]) -> None:
    folder, recipe = described(runs_dir, trained)
    run_id = open_run(folder, recipe)
    row = {"step": 4, "timestamp": 1000, "metrics": {"train_loss": 0.5}}
    (folder / SPILL).write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n" + '{"step": 5, "tim')  # killed here
    assert replay(client_of(runs_dir), run_id, folder / SPILL) == 2
    history = client_of(runs_dir).get_metric_history(run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(4, 0.5)]
    assert replay(client_of(runs_dir), run_id, folder / SPILL) == 0


def test_epochs_that_a_killed_rank_took_with_it_are_taken_from_its_events(
    runs_dir: Path, index: Index, trained: tuple[Path, Recipe]
) -> None:
    source, _ = trained
    folder, recipe = described(runs_dir, trained, register_as="none")
    run_id = open_run(folder, recipe)
    for part in ("events", "predictions", "best"):
        shutil.copytree(source / part, folder / part)
    shutil.copyfile(source / "result.json", folder / "result.json")
    published = finish_run(folder, recipe)
    assert published is not None and published.name is None
    history = client_of(runs_dir).get_metric_history(run_id, "train_loss")
    events = [event for event in read_events(folder) if event["event"] == "epoch"]
    assert sorted((m.step, m.value) for m in history) == [(event["step"], event["train_loss"]) for event in events]
    assert client_of(runs_dir).search_registered_models() == []


def test_a_run_that_is_stopped_while_it_is_registered_says_how_that_is_made_up_for(
    runs_dir: Path, trained: tuple[Path, Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = trained
    folder, recipe = described(runs_dir, trained)
    run_id = open_run(folder, recipe)
    for part in ("events", "predictions", "best"):
        shutil.copytree(source / part, folder / part)
    shutil.copyfile(source / "result.json", folder / "result.json")

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmsa_dist.tracking.models.publish", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.conclude(recipe, folder, read_json(folder / "result.json"))
    assert client_of(runs_dir).get_run(run_id).info.status == "KILLED"
    assert f"record it later with mmsa-dist train --resume {folder}\n" in capsys.readouterr().err
    assert unrecorded(folder), "so that --resume does not take it for done"


def test_an_end_that_cannot_be_recorded_does_not_hide_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Link(f"http://127.0.0.1:{free_port()}", "run", "experiment", "1").save(tmp_path)
    end_run(tmp_path)
    assert "could not be recorded" in caplog.text
