"""Tracking and the registry in a real PostgreSQL: alone, and behind a real `mlflow server`."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmsa_dist.__main__ import main
from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.tracking import finish_run, open_run, open_tracker, store
from mmsa_dist.tracking.tracker import epoch_numbers
from shards.index import Index
from tests import postgres
from tests.mmsa_dist import runs
from tests.mmsa_dist.conftest import Process, free_port
from tests.postgres import Postgres

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    """One for all tests."""
    with postgres.started() as server:
        yield server


@pytest.fixture(scope="module")
def behind(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A tracking server over the same database, with its own place for files."""
    folder = tmp_path_factory.mktemp("server")
    store.connect(database.uri())  # makes the tables
    words = ["server", "--backend-store-uri", database.uri(), "--artifacts-destination", f"{folder}/artifacts"]
    process = Process(
        [*words, "--workers", "1"], free_port(), "/health", folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"
    )
    yield process
    process.close()


@pytest.fixture(params=["alone", "behind a server"])
def uri(request: pytest.FixtureRequest, database: Postgres) -> str:
    if request.param == "alone":
        return database.uri()
    server: Process = request.getfixturevalue("behind")
    return server.uri


def test_from_training_to_predicting(
    uri: str, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, two versions, the list, the comparison, a promotion, predictions; the password is written nowhere."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    name = "pg-" + ("server" if uri.startswith("http") else "alone")
    folders = []
    for seed in (1, 2):
        tracking = {"register_as": name, "alias": ["champion"] if seed == 1 else []}
        folder, recipe = runs.trained(tmp_path / "runs", index, f"run-{seed}", seed=seed, tracking=tracking)
        assert open_run(folder, recipe, command=["mmsa-dist", "train"])
        with open_tracker(folder) as tracker:
            for event in runs.run_folder.read_events(folder):
                tracker.epoch(epoch_numbers(event), event["step"])
        published = finish_run(folder, recipe)
        assert published is not None and published.uri == f"models:/{name}/{seed}"
        folders.append(folder)
    client = store.connect(uri)
    run = client.get_run(json.loads((folders[0] / "mlflow.json").read_text())["run_id"])
    assert run.info.status == "FINISHED" and run.data.metrics["test_mae"] > 0
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 2

    assert main(["models", name]) == 0
    assert "champion" in capsys.readouterr().out
    assert main(["compare", f"models:/{name}@champion", f"models:/{name}/2"]) == 0
    assert "their recipes differ" in capsys.readouterr().out
    assert main(["promote", name, "--version", "2", "--alias", "challenger", "--reason", "to see"]) == 0
    assert f"models:/{name}/2 is challenger now" in capsys.readouterr().out
    words = ["--data", str(index.folder), "--split", "test", "--out", "p.csv"]
    assert main(["predict", f"models:/{name}@challenger", *words]) == 0
    predicted = np.loadtxt("p.csv", delimiter=",", skiprows=1, usecols=3)
    with np.load(folders[1] / "predictions" / "test.npz") as saved:
        np.testing.assert_allclose(predicted, saved["p"], atol=1e-5)
    artifacts = [] if uri.startswith("http") else ["mlartifacts"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "runs"], "no folder of MLflow's own"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [*artifacts, "run-1", "run-2"]
    if not uri.startswith("http"):
        password = uri.partition("mmsa:")[2].partition("@")[0]
        texts = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".md")]
        assert texts and not [path for path in texts if password in path.read_text()]


def test_the_same_command_line_trains(
    database: Postgres, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of `mmsa-dist train`, with ranks of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.uri())
    words = ["train", "self_mm", "--data", str(index.folder), "--runs-dir", str(tmp_path), "--launcher", "local"]
    assert main([*words, "--epochs", "1", "--register", "pg-trained", "--alias", "champion"]) == 0
    client = store.connect(database.uri())
    version = client.get_model_version_by_alias("pg-trained", "champion")
    assert client.get_run(version.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("wrong", ["password", "database", "user"])
def test_who_is_not_let_in_is_told_at_once(wrong: str, database: Postgres) -> None:
    uri = {
        "password": database.uri("s3kret"),
        "database": database.uri(database="nowhere"),
        "user": database.uri().replace("//mmsa:", "//nobody:"),
    }[wrong]
    began = time.monotonic()
    with pytest.raises(ConfigError, match="lets nobody in so") as caught:
        store.connect(uri)
    assert time.monotonic() - began < 20
    assert "s3kret" not in str(caught.value) and database.password not in str(caught.value)


def test_a_database_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Of its own, as it is stopped."""
    with postgres.started() as server:
        uri = server.uri()
        client = store.connect(uri)
        run = client.create_run("0")
    began = time.monotonic()
    with pytest.raises(TransientError, match="no database answers") as caught:
        store.connect(uri)
    assert time.monotonic() - began < 20 and server.password not in str(caught.value)
    with pytest.raises(TransientError) as caught, store.said(uri):
        client.get_run(run.info.run_id)
    assert server.password not in str(caught.value)


def test_a_driver_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the database's driver is not installed here"):
        store._log_in("postgresql+pg8000://user:s3kret@127.0.0.1:1/db")


def test_files_lie_beside_the_runs(database: Postgres, tmp_path: Path) -> None:
    assert store.artifact_root(database.uri(), tmp_path) == f"file://{tmp_path}/mlartifacts"
    assert store.artifact_root("postgresql+psycopg://host/db", tmp_path) == f"file://{tmp_path}/mlartifacts"
    assert store.artifact_root("https://host", tmp_path) is None
