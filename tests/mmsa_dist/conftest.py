"""One MLflow database, one server and a few tiny trained runs for all tests of tracking, serving and prediction."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.recipe import Recipe
from shards.index import Index
from tests.mmsa_dist import runs


@pytest.fixture(scope="session", autouse=True)
def nothing_pickled() -> Iterator[None]:
    """No model of ours needs a pickle; the user's own tracking server is left alone."""
    names = ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_TRACKING_URI")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false", MLFLOW_DISABLE_TELEMETRY="true")
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return runs.packed(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, index: Index) -> tuple[Path, Recipe]:
    """A finished run that was not tracked."""
    return runs.trained(tmp_path_factory.mktemp("untracked"), index, data={"normalize": ["audio"]})


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made once: that takes seconds."""
    from mmsa_dist.tracking import store

    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    store.connect(f"sqlite:///{file}")
    return file


@dataclass
class Tracked:
    """A run that went through `open_run`, a tracker and `finish_run`, registered as ``tiny@champion``."""

    runs_dir: Path
    folder: Path
    recipe: Recipe
    run_id: str
    published: Any
    client: Any


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory, index: Index, empty_database: Path) -> Tracked:
    from mlflow import MlflowClient

    from mmsa_dist.tracking import finish_run, open_run, open_tracker
    from mmsa_dist.tracking.tracker import epoch_numbers

    runs_dir = tmp_path_factory.mktemp("tracked")
    shutil.copyfile(empty_database, runs_dir / "mlflow.db")
    tracking = {"register_as": "tiny", "alias": ["champion"], "tags": {"owner": "tests"}}
    folder, recipe = runs.trained(runs_dir, index, tracking=tracking)
    run_id = open_run(folder, recipe, command=["mmsa-dist", "train", "self_mm", "--data", "a folder"])
    assert run_id is not None
    with open_tracker(folder) as tracker:
        for event in runs.run_folder.read_events(folder):
            tracker.epoch(epoch_numbers(event), event["step"])
    published = finish_run(folder, recipe)
    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    return Tracked(runs_dir, folder, recipe, run_id, published, MlflowClient(uri, uri))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A server process on 127.0.0.1, ended by its id.

    Args:
        health: path that answers 200 once it is up.
    """

    def __init__(self, arguments: list[str], port: int, health: str, folder: Path, **environment: str) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        self._log = folder / f"server-{port}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)],
                cwd=folder,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait(health)
        except BaseException:
            self.close()
            raise

    def _wait(self, health: str) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            try:
                with urllib.request.urlopen(self.uri + health, timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"{self.uri} did not start: {self._log.read_text()}")

    def close(self) -> None:
        """Ends the server and its workers, which are in its own process group."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 15)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()


def tracking_server(folder: Path, port: int) -> Process:
    """A real tracking server over the database in `folder`."""
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    return Process(["server", *store, "--workers", "1"], port, "/health", folder)
