"""`mmsa-dist train --resume`: what it goes on with, and what it refuses without touching the run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist import run_folder
from mmsa_dist.__main__ import main
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import DataError
from mmsa_dist.session import check_same
from shards.index import Index
from shards.write import pack
from tests.data import TinySource, packed

Resume = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("resume"), samples=60)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, one local rank."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--launcher", "local", "--tracking.no-enabled", "--epochs", "2", "--data", str(data)]
    assert main(["train", "ufen_mtfn", "--runs-dir", str(runs), "--optim.lr.rest", "1e-3", *words]) == 0
    (run,) = runs.iterdir()
    return run


@pytest.fixture
def killed(finished: Path) -> Path:
    """The run as a kill between the last checkpoint and the result leaves it."""
    (finished / "result.json").unlink(missing_ok=True)
    return finished


@pytest.fixture
def resume(killed: Path, capfd: pytest.CaptureFixture[str]) -> Resume:
    def run(*words: str) -> tuple[int, str]:
        code = main(["train", "--resume", str(killed), *words])
        return code, capfd.readouterr().err

    return run


def test_a_kill_before_the_result_costs_nothing(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = run_folder.read_json(finished / "result.json")
    (finished / "result.json").unlink()
    capfd.readouterr()
    assert main(["train", "--resume", str(finished)]) == 0
    assert f"going on after step {before['steps']}\n" in capfd.readouterr().out
    assert run_folder.read_json(finished / "result.json") == before
    assert main(["train", "--resume", str(finished)]) == 2
    assert "the run is finished" in capfd.readouterr().err


def test_other_data_is_refused(killed: Path, resume: Resume, tmp_path: Path) -> None:
    before = (killed / "recipe.yaml").read_text()
    pack(TinySource(60, seed=5), tmp_path / "other", dtype="float32", shard_bytes=8_000)
    code, error = resume("--data", str(tmp_path / "other"))
    assert (
        code == 2
        and "it was trained on synthetic-tiny (fingerprint" in error
        and "give the data that it began with" in error
    )
    assert (killed / "recipe.yaml").read_text() == before


def test_a_rank_that_finds_other_data_than_its_driver_says_so(killed: Path, data: Path) -> None:
    """As on a node with another copy, or in a bucket that was written to in the meantime."""
    with pytest.raises(DataError, match=r"this run is on 0000.* begin a new run"):
        card = DataCard.load(killed).model_copy(update={"fingerprint": "0" * 64})
        card.save(killed.parent)
        check_same(killed.parent, Index.load(data))
    check_same(killed, Index.load(data))


def test_what_is_refused_or_only_printed_leaves_the_recipe(killed: Path, resume: Resume) -> None:
    before = (killed / "recipe.yaml").read_text()
    assert resume("--workers", "64", "--print-config")[0] == 0
    code, error = resume("--workers", "4096", "--batch-size", "32")
    assert code == 2 and "4096 workers" in error
    code, error = resume("--optim.lr.rest", "0.5")
    assert code == 2 and "optim.lr.rest: 0.001 -> 0.5" in error
    assert (killed / "recipe.yaml").read_text() == before


def test_a_relative_path_is_the_same_path(
    killed: Path, data: Path, resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    assert resume("--data", data.name) == (0, "")
    saved = json.dumps(run_folder.read_json(killed / "data.json"))
    assert str(data) in (killed / "recipe.yaml").read_text() and "tiny" in saved


@pytest.mark.parametrize("words", [[], ["--labels.generator", "none"]])
def test_a_run_whose_recipe_names_no_label_generator_goes_on(killed: Path, resume: Resume, words: list[str]) -> None:
    """As older versions left it open: the one of the system's paper is meant."""
    recipe = yaml.safe_load((killed / "recipe.yaml").read_text())
    assert recipe["labels"]["generator"] == "none"
    run_folder.write_text(killed / "recipe.yaml", yaml.safe_dump({**recipe, "labels": {}}))
    code, error = resume("--labels.generator", "multimodal")
    assert code == 2 and "labels.generator: none -> multimodal" in error
    assert resume(*words) == (0, "")
    assert yaml.safe_load((killed / "recipe.yaml").read_text()) == recipe


def test_a_run_that_another_process_trains_is_refused(killed: Path, resume: Resume) -> None:
    holder = "import sys, time; from pathlib import Path; from mmsa_dist.run_folder import locked\n"
    holder += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", holder, str(killed)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        before = (killed / "recipe.yaml").read_text()
        code, error = resume("--workers", "2", "--zero", "0")
        process.kill()
    assert (killed / "recipe.yaml").read_text() == before, "ranks that start again would read another recipe"
    assert code == 2 and f"the run is being trained by process {process.pid} on " in error
    assert resume()[0] == 0, "the lock died with its holder"


@pytest.mark.parametrize("content", [None, "", '{"name": "half'])
def test_a_run_without_a_whole_description_is_said(content: str | None, killed: Path, resume: Resume) -> None:
    file = killed / "data.json"
    before = file.read_text()
    try:
        file.unlink()
        if content is not None:
            file.write_text(content)
        code, error = resume()
        assert code == 3 and str(file) in error and "Traceback" not in error
    finally:
        file.write_text(before)


def test_a_mirror_that_cannot_be_written_leaves_the_run_as_it_was(
    killed: Path, resume: Resume, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    mirror = ("--checkpoint.mirror", f"file://{tmp_path}/file/runs")
    before = (killed / "recipe.yaml").read_text()
    assert resume(*mirror)[0] in (2, 3, 75) and (killed / "recipe.yaml").read_text() == before
    words = ["--launcher", "local", "--tracking.no-enabled", "--data", str(data), "--runs-dir", str(tmp_path / "runs")]
    assert main(["train", "ufen_mtfn", *words, *mirror]) in (2, 3, 75)
    assert not list((tmp_path / "runs").iterdir()), "a run that never began leaves nothing"
    address = f"file://{tmp_path}/nowhere/run"
    assert main(["train", "--resume", address, "--runs-dir", str(tmp_path / "runs")]) == 3
    assert "there is no run (no recipe.yaml)" in capfd.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


def test_a_damaged_best_checkpoint_is_not_published(killed: Path, resume: Resume) -> None:
    saved = {path: (path / "weights.safetensors").read_bytes() for path in (killed / "checkpoints").glob("step-*")}
    for path, content in saved.items():
        (path / "weights.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        code, error = resume()
        assert code == 3 and "weights.safetensors differs from its sha256" in error
        assert not (killed / "result.json").exists()
    finally:
        for path, content in saved.items():
            (path / "weights.safetensors").write_bytes(content)


class Constant(TinySource):
    """All labels are the same: no correlation is defined."""

    def read(self, split: str, number: int) -> Any:
        utterance = super().read(split, number)
        utterance.labels["M"] = 1.0
        return utterance


def test_a_monitor_that_is_never_defined_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pack(Constant(40), tmp_path / "data", dtype="float32")
    words = ["--launcher", "local", "--tracking.no-enabled", "--epochs", "2", "--data", str(tmp_path / "data")]
    assert main(["train", "ufen_mtfn", "--runs-dir", str(tmp_path / "runs"), "--train.monitor", "corr", *words]) == 4
    error = capfd.readouterr().err
    assert "train.monitor: corr was undefined on validation in all 2 epochs" in error and "Traceback" not in error
