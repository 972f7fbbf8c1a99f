"""Which MLflow store is used, whether it is there, and that no credentials are shown: sqlite files, real servers."""

import time
from pathlib import Path

import pytest

from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.tracking import store
from mmsa_dist.tracking.tracker import SPILL, MlflowTracker
from tests.answering import SSH, answering, http
from tests.mmsa_dist.conftest import Process, Wire, free_port, wait_for


def test_store_is_the_flag_then_the_environment_then_a_file_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.store_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert store.store_uri(None, tmp_path) == "http://server:5000"
    assert store.store_uri("https://other", tmp_path) == "https://other"


def test_relative_sqlite_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.store_uri("sqlite:///here/mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/here/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("./mlruns", "plain folder"),
        ("file:///tmp/mlruns", "plain folder"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite://", "names no file"),
        ("ftp://server/x", "unknown scheme 'ftp'"),
    ],
)
def test_a_store_that_cannot_keep_runs_is_refused(uri: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        store.store_uri(uri, tmp_path)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:abc", "http://[::1", "http://", "http://a b:1", "postgresql://host:99999/db"]
)
def test_what_is_no_address_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no address; expected http://HOST:PORT"):
        store.store_uri(uri, tmp_path)
    with pytest.raises(ConfigError, match="is no address"):  # as the environment or a run's folder may name it
        store.connect(uri)


@pytest.mark.parametrize("uri", ["databricks", "databricks-uc", "databricks://profile"])
def test_mlflows_own_names_of_databricks_are_taken(uri: str, tmp_path: Path) -> None:
    assert store.store_uri(uri, tmp_path) == uri


# --- credentials


@pytest.mark.parametrize(
    "uri",
    [
        "http://bob:s3kret@host",
        "http://bob:p@s3kret@host",
        "http://bob:p/s3kret@host",
        "postgresql://host/db?user=bob&password=s3kret",
        "https://host?token=s3kret",
        "https://host?API_KEY=s3)kret",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Ds3kret",
    ],
)
def test_credentials_of_every_form_are_kept_out(uri: str, tmp_path: Path) -> None:
    said = store.shown(f"calling {uri} failed")
    assert "kret" not in said and said.startswith("calling ") and said.endswith(" failed")
    with pytest.raises(ConfigError, match="holds a password or the like") as raised:
        store.store_uri(uri, tmp_path)
    assert "kret" not in str(raised.value)


def test_a_path_may_hold_what_looks_like_a_user(tmp_path: Path) -> None:
    uri = "sqlite:////home/bob@lab/mlflow.db"
    assert store.store_uri(uri, tmp_path) == store.shown(uri) == uri


def test_a_server_that_goes_down_gives_no_password_away(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own errors hold the whole address."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    wire = Wire(server.port)
    uri = wire.uri.replace("//", "//bob:p@s3kret@")
    client = store.connect(uri)
    run_id = client.create_run("0").info.run_id
    told: list[str] = []
    tracker = MlflowTracker(uri, run_id, tmp_path / SPILL, tell=told.append)
    tracker.epoch({"train_loss": 1.0}, 1)
    wait_for(lambda: client.get_metric_history(run_id, "train_loss"))
    wire.cut()
    tracker.epoch({"train_loss": 2.0}, 2)
    wait_for(lambda: told)
    tracker.close()
    with pytest.raises(TransientError) as raised, store.said(uri):
        client.get_run(run_id)
    for text in (*told, str(raised.value)):
        assert "s3kret" not in text and f"…@127.0.0.1:{wire.port}" in text


# --- whether it is there


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_an_unreachable_store_is_said_within_seconds(scheme: str) -> None:
    began = time.monotonic()
    with pytest.raises(TransientError) as raised:
        store.connect(f"{scheme}://user:secret@127.0.0.1:{free_port()}/")
    assert time.monotonic() - began < 6
    assert "127.0.0.1" in str(raised.value) and "--tracking.no-enabled" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_server_that_accepts_and_never_answers_is_said_within_seconds(silent_port: int) -> None:
    began = time.monotonic()
    with pytest.raises(TransientError, match="timed out"):
        store.connect(f"http://127.0.0.1:{silent_port}")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("answer", [SSH, http(b"<html>hello</html>")], ids=["ssh", "page"])
def test_another_program_behind_the_address_is_said(answer: bytes) -> None:
    with answering(answer) as port, pytest.raises(ConfigError, match="is not an MLflow server; give its address with"):
        store.connect(f"http://127.0.0.1:{port}")


def test_a_database_that_is_none_or_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("hello, I am no database")
    with pytest.raises(ConfigError, match="is not a sqlite database"):
        store.connect(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(TransientError, match="cannot be written"):
        store.connect(f"sqlite:///{tmp_path}/text.db/inside/mlflow.db")
