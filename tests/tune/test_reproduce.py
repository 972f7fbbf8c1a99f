"""`mmsa-dist reproduce`: one real table of two rows and two seeds, whose driver is killed in the middle."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmsa_dist import run_folder
from tests.tune.sweeps import clean
from tune.reproduce import HELP, main

COMMAND = """
import sys

import ray

quiet = {"logging_level": "error", "log_to_driver": False}
ray.init("local", num_cpus=2, include_dashboard=False, **quiet)
from tune.reproduce import main

sys.exit(main(sys.argv[1:]))
"""
"""Without a dashboard, and with two CPUs whatever the machine has."""

pytestmark = pytest.mark.timeout(1900)
ray = pytest.mark.ray


@dataclass(frozen=True)
class Reproduced:
    """What two calls of the same command left behind.

    Attributes:
        killed: what was done when the first was killed: run folder -> when its result was written.
        out: what the second said.
    """

    words: list[str]
    where: Path
    killed: dict[Path, float]
    begun: set[Path]
    out: str

    @property
    def folder(self) -> Path:
        (folder,) = self.where.glob("tam_ulag-table-6-mosi-*")
        return folder


@pytest.fixture(scope="module")
def reproduced(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reproduced:
    folder = tmp_path_factory.mktemp("reproduce")
    small = ["--model.text-pooling", "mean", "--batch-size", "8", "--epochs", "2"]
    rows = ["--table", "6", "--seeds", "2", "--rows", "TAM-ULAG", "w/o ULAG"]
    words = ["tam_ulag", *rows, "--data", str(data), "--runs-dir", str(folder / "runs"), *small]
    command = [sys.executable, "-c", COMMAND, *words]
    where = folder / "runs" / "reproduce"
    with (folder / "first.txt").open("w") as said:
        first = subprocess.Popen(
            command, cwd=folder, env=clean(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 900
            while first.poll() is None and time.monotonic() < deadline:
                if len(list(where.glob("*/result.json"))) >= 2 and len(list(where.glob("*/plan.json"))) > 2:
                    break
                time.sleep(0.1)
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
    assert first.returncode == -signal.SIGKILL, (folder / "first.txt").read_text()[-3000:]
    killed = {file.parent: file.stat().st_mtime for file in where.glob("*/result.json")}
    begun = {file.parent for file in where.glob("*/plan.json")}
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Reproduced(words, where, killed, begun, done.stdout)


@ray
def test_a_killed_driver_is_gone_on_with_and_nothing_is_done_twice(reproduced: Reproduced) -> None:
    results = sorted(reproduced.where.glob("*/result.json"))
    assert len(results) == 4 and 2 <= len(reproduced.killed) < 4
    assert reproduced.begun <= {file.parent for file in results}, "what had begun was gone on with, not begun anew"
    for folder, written in reproduced.killed.items():
        assert (folder / "result.json").stat().st_mtime == written
        assert sum(event["event"] == "start" for event in run_folder.read_events(folder)) == 1
    assert f"4 runs: {len(reproduced.killed)} done" in reproduced.out


@ray
def test_two_ran_at_once(reproduced: Reproduced) -> None:
    spans = []
    for folder in reproduced.killed:
        times = [event["time"] for event in run_folder.read_events(folder)]
        spans.append((times[0], times[-1]))
    (a, b), (c, d) = sorted(spans)[:2]
    assert c < b and a < d


@ray
def test_each_line_of_progress_names_a_run_and_what_it_reached(reproduced: Reproduced) -> None:
    lines = [line for line in reproduced.out.splitlines() if " done: " in line]
    assert len(lines) == 4 - len(reproduced.killed)
    pattern = r"\d of \d done: (TAM-ULAG|w/o ULAG), seed [12]: test MAE \d\.\d{4}, of epoch [12] of 2"
    assert all(re.fullmatch(pattern, line) for line in lines), lines


@ray
def test_the_table_has_the_paper_and_ours(reproduced: Reproduced) -> None:
    text = (reproduced.folder / "table.md").read_text()
    assert "| TAM-ULAG | paper | 0.695 |" in text and "| w/o ULAG | paper | 0.719 |" in text
    assert text.count("| ours, 2 seeds |") == 2 and "| TAM-ULAG - w/o ULAG | 2 |" in text
    assert "w/o BERT | paper" in text, "rows that are not asked for have the paper's figures"
    page = (reproduced.folder / "table.html").read_text()
    assert "87.20?" in page and "pictures/loss-TAM-ULAG.png" in page and "pictures/tsne-TAM-ULAG.png" in page
    assert "labels that ulag generated for TAM-ULAG, seed 1, after epoch 2" in page
    summary = run_folder.read_json(reproduced.folder / "reproduction.json")
    rows = summary["rows"]
    for grid in summary["grids"]:
        assert all(f"| {' | '.join(cells)} |" in text for cells in (grid["header"], *grid["rows"]))
    for name in ("TAM-ULAG", "w/o ULAG"):
        for seed, key in rows[name]["runs"].items():
            recipe = (reproduced.where / key / "recipe.yaml").read_text()
            assert f"seed: {seed}\n" in recipe
            assert rows[name]["test"][seed] == run_folder.read_json(reproduced.where / key / "result.json")["test"]
    assert not (reproduced.folder / "tune").exists()


@ray
def test_the_same_command_again_trains_nothing(reproduced: Reproduced, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in reproduced.where.glob("*/*") if file.is_file()}
    record = (reproduced.folder / "reproduction.json").read_bytes()
    began = time.process_time()
    assert main(reproduced.words) == 0
    assert time.process_time() - began < 10, "seconds of this process: others may keep the machine busy"
    out = capsys.readouterr().out
    assert "4 runs: 4 done\n" in out and "begins" not in out
    changed = [file for file, at in before.items() if file.stat().st_mtime_ns != at]
    assert {file.name for file in changed} <= {"table.md", "table.html", "reproduction.json", ".lock"}
    assert (reproduced.folder / "reproduction.json").read_bytes() == record


@ray
def test_a_dry_run_says_what_more_seeds_would_take(reproduced: Reproduced, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*reproduced.words, "--seeds", "3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "TAM-ULAG (tam_ulag): seed 1 done, seed 2 done, seed 3 to be run" in out
    assert "6 runs: 4 done, 2 to be run; " in out and f"the table goes to {reproduced.folder}" in out


@ray
def test_mlflow_has_the_reproduction_as_parent_of_its_runs_with_table_and_pictures(reproduced: Reproduced) -> None:
    from mmsa_dist.tracking import Link, store

    parent = Link.load(reproduced.folder)
    assert parent is not None and parent.uri == f"sqlite:///{reproduced.where.parent / 'mlflow.db'}"
    client = store.connect(parent.uri)
    children = client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert {run.info.status for run in children} == {"FINISHED"}
    assert sorted(run.info.run_name for run in children) == sorted(
        file.parent.name for file in reproduced.where.glob("*/result.json")
    )
    assert all("test_mae" in run.data.metrics for run in children)
    whole = client.get_run(parent.run_id)
    assert whole.info.status == "FINISHED" and "w-o-ULAG/test_mae" in whole.data.metrics
    assert {"table.md", "table.html"} <= {file.path for file in client.list_artifacts(parent.run_id)}
    pictures = {file.path for file in client.list_artifacts(parent.run_id, "pictures")}
    assert {"pictures/loss-TAM-ULAG.png", "pictures/confusion-w-o-ULAG-7.png"} <= pictures
    assert {"pictures/tsne-TAM-ULAG.png", "pictures/tsne-w-o-ULAG.png"} <= pictures
    assert {"pictures/labels-TAM-ULAG.png", "pictures/cases-TAM-ULAG.png"} <= pictures
    assert "pictures/labels-w-o-ULAG.png" not in pictures, "it has the multimodal label alone"
    assert not client.search_registered_models(), "thirty runs for a table are no thirty models"


@ray
def test_what_a_run_that_is_done_needs_no_more_is_gone(reproduced: Reproduced) -> None:
    for file in reproduced.where.glob("*/result.json"):
        left = {each.name for each in file.parent.iterdir()}
        assert not left & {"checkpoints", "ray"} and {"best", "predictions", "events", "recipe.yaml"} <= left


# --- without training -------------------------------------------------------------------------------------------------


def test_without_a_table_the_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    everything = capsys.readouterr().out
    assert main(["iam"]) == 0
    own = capsys.readouterr().out
    assert all(name in everything for name in ("tam_ulag", "iemocap_unaligned", "ufen_mtfn", "CMU-MOSEI"))
    assert "uni+weight" in own and "tam_ulag" not in own


def test_a_table_without_data_is_shown_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tam_ulag", "--table", "8"]) == 0
    assert "109,694,858" in capsys.readouterr().out
    assert main(["iam", "--table", "5"]) == 0
    assert "84.41" in capsys.readouterr().out


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main(["iam", "--help"]) == 0
    for flag in ("--table", "--seeds", "--rows", "--recipe", "--dry-run", "--max-concurrent", "--runs-dir", "--data"):
        assert flag in HELP
    assert max(map(len, HELP.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["iamm"], "error: no published tables of 'iamm'; did you mean 'iam'"),
        (["--table", "5"], "error: no SYSTEM before --table"),
        (["iam", "--data", "x"], "error: --table is missing: which one of 3, 4, 5, 6?"),
        (["iam", "--table", "5", "--data", "nowhere"], "error: nowhere"),
        (["iam", "--table", "5", "--epochs", "2"], "error: no data: give --data FOLDER"),
        (["iam", "--table", "5", "--data", "x", "--seeds", "0"], "error: --seeds is 0, expected at least 1"),
        (["iam", "--table", "5", "--data", "x", "--seeds", "many"], "error: argument --seeds: invalid int value"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmsa_dist.__main__ import main as front_door

    monkeypatch.chdir(tmp_path)
    assert front_door(["reproduce", *words]) in (2, 3)
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
