"""A real MLflow server that is stopped, killed and started again while a run is on; a store that is locked."""

import json
import logging
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mmsa_dist.errors import TransientError
from mmsa_dist.recipe import Recipe
from mmsa_dist.tracking import finish_run, open_run, tracker
from mmsa_dist.tracking.tracker import SPILL, MlflowTracker
from tests.mmsa_dist.conftest import Process, free_port, tracking_server, wait_for
from tests.mmsa_dist.test_tracking import described


@pytest.fixture
def own(tmp_path: Path, empty_database: Path) -> Iterator[Process]:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    process = tracking_server(tmp_path, free_port())
    yield process
    process.close()


def spilled(folder: Path) -> set[int]:
    lines = (folder / SPILL).read_text().splitlines() if (folder / SPILL).is_file() else []
    return {row["step"] for row in map(json.loads, lines) if "train_loss" in row["metrics"]}


def test_a_server_that_hangs_and_dies_costs_no_time_and_no_number(
    tmp_path: Path,
    own: Process,
    trained: tuple[Path, Recipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracker, "RETRY_EVERY", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    source, _ = trained
    folder, recipe = described(tmp_path, trained, uri=own.uri)
    for part in ("predictions", "best"):
        shutil.copytree(source / part, folder / part)
    run_id = open_run(folder, recipe)
    assert run_id is not None

    def there() -> set[int]:
        return {metric.step for metric in MlflowClient(own.uri).get_metric_history(run_id, "train_loss")}

    sender = MlflowTracker(own.uri, run_id, folder / SPILL, sample_every=3600)
    waited = 0.0

    def epoch(step: int) -> None:
        nonlocal waited
        began = time.monotonic()
        sender.epoch({"train_loss": 1 / step}, step)
        waited += time.monotonic() - began

    with caplog.at_level(logging.WARNING):
        epoch(1)
        wait_for(lambda: there() == {1})
        own.signal(signal.SIGSTOP)
        epoch(2)
        wait_for(lambda: spilled(folder) == {2})
        own.signal(signal.SIGCONT)
        time.sleep(0.6)
        epoch(3)
        wait_for(lambda: 3 in there())
        own.signal(signal.SIGKILL)
        epoch(4)
        wait_for(lambda: spilled(folder) == {2, 4})
        epoch(5)
        began = time.monotonic()
        sender.close()
        assert time.monotonic() - began < 5 and waited < 0.1
        assert spilled(folder) == {2, 4, 5}
    assert len([record for record in caplog.records if "takes no numbers" in record.message]) == 1, "one a minute"
    shutil.copyfile(source / "result.json", folder / "result.json")  # the run ends, and the server is still away
    (folder / "events").mkdir()
    with pytest.raises(TransientError, match="no MLflow server answers"):
        finish_run(folder, recipe)
    again = tracking_server(tmp_path, own.port)
    try:
        finish_run(folder, recipe)
        assert there() == {1, 2, 3, 4, 5} and not (folder / SPILL).exists()
        assert MlflowClient(own.uri).get_run(run_id).info.status == "FINISHED"
    finally:
        again.close()


def test_what_a_server_that_hangs_has_not_taken_at_the_end_is_kept(
    tmp_path: Path, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what still waits in the queue: the process ends with the thread that would have sent it."""
    monkeypatch.setattr(tracker, "_client", lambda uri: time.sleep(60))
    sender = MlflowTracker(f"http://127.0.0.1:{silent_port}", "run", tmp_path / SPILL, sample_every=3600)
    for step in range(1, 8):
        sender.epoch({"train_loss": 1.0}, step)
    sender.close(timeout=0.5)
    assert spilled(tmp_path) == set(range(1, 8))


def test_a_locked_database_holds_nobody_up(
    tmp_path: Path, empty_database: Path, trained: tuple[Path, Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    folder, recipe = described(tmp_path, trained)
    run_id = open_run(folder, recipe)
    assert run_id is not None
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        sender = MlflowTracker(uri, run_id, folder / SPILL, sample_every=3600)
        began = time.monotonic()
        sender.epoch({"train_loss": 1.0}, 1)
        assert time.monotonic() - began < 0.1
        sender.close(timeout=1.0)
        assert spilled(folder) == {1}
        other.execute("ROLLBACK")
    other.close()
