"""One MLflow database, one server and a few tiny trained runs for all tests of tracking, serving and prediction."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.recipe import Recipe
from shards.index import Index
from tests.mmsa_dist import runs
from tests.mmsa_dist.encoders import write_encoder


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


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``encoders(architecture, dropout=0.1)``: the folder of a tiny text encoder, made once."""

    @cache
    def make(architecture: str, dropout: float = 0.1) -> Path:
        return write_encoder(tmp_path_factory.mktemp(architecture), architecture, dropout)

    return make


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


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Process:
    """A server process on 127.0.0.1, ended by its id.

    Args:
        health: path that answers 200 once it is up.
        python: of the environment whose MLflow it is; this one by default.
    """

    def __init__(
        self, arguments: list[str], port: int, health: str, folder: Path, python: Path | None = None, **environment: str
    ) -> None:
        program = Path(python or sys.executable)
        self.port, self.uri = port, f"http://127.0.0.1:{port}"
        self._log = folder / f"server-{port}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)],
                cwd=folder,
                env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", **environment},
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

    def signal(self, number: int) -> None:
        """To the server and its workers, e.g. SIGSTOP."""
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def close(self) -> None:
        """Ends the server and its workers, which are in its own process group."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 15)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()


class Wire:
    """A port that leads to another one, and can be cut: what a server that goes down and comes back looks like.

    Attributes:
        delay: seconds that everything takes on its way, from now on.
    """

    delay = 0.0

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._target = target
        self._open: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # nobody is there, now
                near.close()
                continue
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                time.sleep(self.delay)
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def tracking_server(folder: Path, port: int) -> Process:
    """A real one, over the database and the artifacts in `folder`."""
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    # without the job runner, which is a second process that nothing here needs
    return Process(
        ["server", *stores, "--workers", "1"], port, "/health", folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Process]:
    """One for all tests."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_database, folder / "mlflow.db")
    process = tracking_server(folder, free_port())
    yield process
    process.close()
