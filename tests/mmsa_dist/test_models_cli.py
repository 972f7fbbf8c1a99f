"""`mmsa-dist models`: what is registered, from a database and from a server."""

import shutil
import time
from pathlib import Path

import pytest

from mmsa_dist.__main__ import main
from mmsa_dist.tracking import finish_run, open_run
from shards.index import Index
from tests.mmsa_dist import runs
from tests.mmsa_dist.conftest import Process, Tracked, free_port
from tests.mmsa_dist.registered import fresh, register


def rows(printed: str) -> dict[str, list[str]]:
    """First cell -> the others, of a table's rows; the lines of a cell with a space between."""
    found: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if line.startswith("│"):
            first, *rest = (cell.strip() for cell in line.strip("│").split("│"))
            if first:
                last = found[first] = rest
            else:
                last[:] = [f"{above} {below}".strip() for above, below in zip(last, rest, strict=True)]
    return found


def test_all_models(tracked: Tracked, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, foreign = fresh(tracked), fresh(tracked)
    tracked.client.create_model_version(foreign, str(tmp_path))
    assert main(["models", "--runs-dir", str(tracked.runs_dir)]) == 0
    printed = capsys.readouterr()
    mae = float(tracked.client.get_model_version("tiny", "1").tags["valid.mae"])
    assert rows(printed.out)["tiny"] == ["1", "champion = 1", f"{index.name} (synthetic)", f"MAE ↓ {mae:.4f}"]
    assert rows(printed.out)[empty] == ["0", "-", "-", "-"]
    assert rows(printed.out)[foreign] == ["1", "-", "-", "-"], "registered by another program"
    assert "mmsa-dist models NAME" in printed.err


def test_the_versions_of_one(
    tracked: Tracked, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = fresh(tracked)
    for mae in ("0.75", "0.5"):
        register(tracked, name, tmp_path, valid__mae=mae, test__mae="0.625", code__commit=None, code__dirty=None)
    tracked.client.set_registered_model_alias(name, "champion", "1")
    assert main(["models", name, "--runs-dir", str(tracked.runs_dir)]) == 0
    printed = capsys.readouterr()
    found = rows(printed.out)
    assert list(found) == ["2", "1"], "the newest first"
    data = f"{index.name} (synthetic) {index.fingerprint[:8]}"
    assert found["1"][:5] == ["champion", data, "MAE ↓ 0.7500", "0.6250", "run 0.1.0"]
    assert found["2"][:5] == ["-", data, "MAE ↓ 0.5000", "0.6250", "run 0.1.0"]
    assert found["1"][5].startswith("20")
    assert f"mmsa-dist compare models:/{name}/A" in printed.err


def test_where_nothing_is_registered(empty_database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--runs-dir", str(tmp_path)]) == 2
    assert "there is no MLflow database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    assert main(["models", "--runs-dir", str(tmp_path)]) == 0
    assert "nothing is registered here yet: `mmsa-dist train SYSTEM" in capsys.readouterr().err
    assert main(["models", "tiny", "--runs-dir", str(tmp_path)]) == 2
    assert "no model 'tiny' (it has none: train one first)" in capsys.readouterr().err


def test_a_name_that_is_not_there_and_one_without_versions(
    tracked: Tracked, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "tinny", "--runs-dir", str(tracked.runs_dir)]) == 2
    assert "no model 'tinny'; did you mean 'tiny'?" in capsys.readouterr().err
    name = fresh(tracked)
    assert main(["models", name, "--runs-dir", str(tracked.runs_dir)]) == 0
    assert f"{name} has no version" in capsys.readouterr().err


def test_a_server_that_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    assert main(["models", "--tracking-uri", uri]) == 75
    assert uri in capsys.readouterr().err


def test_a_server_is_listed_compared_and_promoted_as_a_database_is(
    tmp_path: Path, server: Process, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files travel over HTTP."""
    tracking = {"uri": server.uri, "register_as": "over-http", "alias": ["best"], "experiment": "listed"}
    folder, recipe = runs.trained(tmp_path, index, tracking=tracking)
    open_run(folder, recipe)
    finish_run(folder, recipe)
    at = ["--tracking-uri", server.uri]
    assert main(["models", *at]) == main(["models", "over-http", *at]) == 0
    printed = rows(capsys.readouterr().out)
    assert printed["over-http"][:2] == ["1", "best = 1"] and printed["1"][0] == "best"
    assert main(["compare", "models:/over-http@best", str(folder), *at]) == 0
    printed_out = capsys.readouterr().out
    assert "their recipes are the same" in printed_out and "B - A: +0.0000" in printed_out
    assert main(["promote", "over-http", "--version", "1", "--alias", "champion", *at]) == 0
    assert "models:/over-http/1 is champion now" in capsys.readouterr().out
    assert main(["models", "over-http", *at]) == 0
    assert rows(capsys.readouterr().out)["1"][0] == "best champion"


# --- what people call things


@pytest.mark.parametrize("name", ["it's", 'the "best"', 'it\'s "the" best', "модель", "a b", "[bold]x", "x" * 200, "%"])
def test_any_name_that_mlflow_takes(
    name: str, tracked: Tracked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--runs-dir", str(tracked.runs_dir)]
    tracked.client.create_registered_model(name)
    register(tracked, name, tmp_path)
    assert main(["models", name, *at]) == 0
    assert list(rows(capsys.readouterr().out)) == ["1"]
    assert main(["compare", f"models:/{name}/1", "models:/tiny/1", *at]) == 0
    assert f"A is models:/{name}/1" in capsys.readouterr().out
    assert main(["models", *at]) == 0
    tracked.client.delete_registered_model(name)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "../x", "models:/tiny", "\n"])
def test_what_is_no_name(name: str, tracked: Tracked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", name, "--runs-dir", str(tracked.runs_dir)]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.err.startswith("error: ") and not rows(said.out)


def test_what_stands_in_the_registry_does_not_write_to_the_terminal(
    tracked: Tracked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escape sequences of whoever may write there."""
    name = fresh(tracked)
    register(tracked, name, tmp_path, data="\x1b[2Jtaken\x07", code__version="\x1b]0;owned\x07")
    for words in (["models"], ["models", name], ["compare", f"models:/{name}/1", "models:/tiny/1"]):
        assert main([*words, "--runs-dir", str(tracked.runs_dir)]) == 0
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err and "\x07" not in said.out + said.err


@pytest.mark.fault
def test_a_database_that_is_damaged(tracked: Tracked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At once: MLflow itself tries ten times, for minutes."""
    content = (tracked.runs_dir / "mlflow.db").read_bytes()
    for damaged in (content[:100] + bytes(len(content) - 100), content[:16] + b"x" * 84 + content[100:]):
        (tmp_path / "mlflow.db").write_bytes(damaged)
        began = time.monotonic()
        assert main(["models", "--runs-dir", str(tmp_path)]) == 2
        assert time.monotonic() - began < 30
        said = capsys.readouterr().err
        assert "mlflow.db: MLflow's database is damaged" in said and "Traceback" not in said
