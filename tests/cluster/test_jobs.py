"""`mmsa-dist jobs` against a real Ray head with a token: what was sent is found again, with what it has reached."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import jobs, results
from cluster.errors import ConfigError
from cluster.working_dir import files_to_send, write_archive
from mmsa_dist.run_folder import ray_job
from tests.cluster.heads import REPOSITORY, Head, ended, slow_program

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout's, really built."""
    folder = tmp_path_factory.mktemp("wheel")
    write_archive(REPOSITORY, files_to_send(REPOSITORY), folder / "sources.zip")
    with zipfile.ZipFile(folder / "sources.zip") as sources:
        sources.extractall(folder / "sources")
    command = [sys.executable, "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=folder / "sources", check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("mmsa_dist-*.whl")
    return built


@pytest.fixture(scope="module")
def trained(head: Head, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --runs-dir of the job ``trained``: an epoch on generated data, by a wheel's code, sent from an empty folder.

    The job ``waits`` runs beside it, and ``failed`` has ended with exit code 3.
    """
    folder = tmp_path_factory.mktemp("trained")
    slow = str(slow_program(tmp_path_factory.mktemp("slow")))
    data, runs, empty = folder / "data", folder / "runs", folder / "empty"
    empty.mkdir()
    pack = ["pack", "generated", "--like", "mosi", "--samples", "60", "--out", str(data), "--workers", "1"]
    subprocess.run([sys.executable, "-m", "mmsa_dist", *pack], cwd=REPOSITORY, check=True, capture_output=True)
    train = ["train", "ufen_mtfn", "--data", str(data), "--runs-dir", str(runs), "--epochs", "1"]
    train += ["--launcher", "local", "--tracking.no-enabled"]
    begun = [
        head.start("submit", "--wheel", str(wheel), "--name", "trained", "--", *train, cwd=empty),
        head.submit("--detach", "--name", "waits", "--working-dir", slow, "--", "600", "0"),
        head.submit("--name", "failed", "--working-dir", slow, "--", "0", "3"),
    ]
    for process, expected in zip(begun, (0, 0, 3), strict=True):
        code, out, error = ended(process)
        assert code == expected, out + error
    return runs


@pytest.mark.ray
def test_jobs_are_listed_the_newest_first_with_their_ends(head: Head, trained: Path) -> None:
    code, out, _ = head.jobs("list")
    first, *lines = out.splitlines()
    assert code == 0 and first.split() == ["id", "state", "started", "took", "command"]
    assert {line.split()[0]: " ".join(line.split()[1:]).split(" 20")[0] for line in lines} == {
        "trained": "succeeded", "waits": "running", "failed": "failed (3)",
    }  # fmt: skip
    (trained_line,) = (line for line in lines if line.startswith("trained"))
    assert trained_line.partition(" train ufen_mtfn --data")[2], "the command, without what starts it"
    listed = json.loads(head.jobs("list", "--json")[1])
    started = [job["started"] for job in listed]
    assert started == sorted(started, reverse=True) and all(moment.endswith("+00:00") for moment in started)
    assert {job["id"]: job["exit_code"] for job in listed} == {"trained": 0, "waits": None, "failed": 3}


@pytest.mark.ray
def test_the_status_of_a_job_names_its_run_folder(head: Head, trained: Path) -> None:
    code, out, _ = head.jobs("status", "trained")
    (run,) = trained.iterdir()
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert code == 0
    assert (rows["state"], rows["run"]) == ("succeeded", str(run))
    assert rows["command"].endswith("--tracking.no-enabled") and rows["says"] == "Job finished successfully."
    assert json.loads(head.jobs("status", "failed", "--json")[1])["exit_code"] == 3


@pytest.mark.ray
def test_a_run_predicts_in_a_job(head: Head, trained: Path) -> None:
    (run,) = trained.iterdir()
    out = trained.parent / "predictions.csv"
    words = ["predict", str(run), "--data", str(trained.parent / "data"), "--out", str(out)]
    code, log, error = head.result("--name", "predicts", "--working-dir", str(REPOSITORY), "--", *words)
    assert code == 0, log + error
    assert len(out.read_text().splitlines()) == 61


@pytest.mark.ray
def test_why_a_job_failed_is_its_own_sentence(head: Head, tmp_path: Path) -> None:
    command = ["train", "ufen_mtfn", "--data", str(tmp_path / "none"), "--runs-dir", str(tmp_path / "runs")]
    code, _, _ = head.result("--name", "refused", "--working-dir", str(REPOSITORY), "--", *command)
    rows = dict(line.split(None, 1) for line in head.jobs("status", "refused")[1].splitlines())
    assert code != 0 and rows["state"] == f"failed ({code})"
    assert str(tmp_path / "none") in rows["says"] and "exit code" not in rows["says"]
    code, _, error = head.jobs("result", "refused")
    assert code == 2 and error.startswith(f"error: job refused {rows['state']} before it had a run: {rows['says']}")


@pytest.mark.parametrize(
    ("command", "further"),
    [("train", "`mmsa-dist submit -- train --resume /runs/a`"), ("sweep", "with --resume"), ("predict", "(/runs/a)")],
)
def test_of_a_run_that_did_not_end_it_is_said_how_to_go_on(command: str, further: str) -> None:
    job: Any = SimpleNamespace(submission_id="mosi-1", status=SimpleNamespace(value="STOPPED"))
    sentence = jobs._unfinished(job, [command], Path("/runs/a"))
    assert sentence.startswith("job mosi-1 stopped before its run had a result (/runs/a)") and further in sentence


@pytest.mark.ray
def test_logs_are_printed_and_followed_to_the_jobs_own_exit_code(head: Head, trained: Path) -> None:
    code, out, _ = head.jobs("logs", "failed")
    assert code == 0 and "first line\nlast line" in out
    code, followed, _ = head.jobs("logs", "failed", "--follow")
    assert (code, followed) == (3, out)


@pytest.mark.ray
def test_the_result_of_a_wheels_run_is_that_of_its_folder(head: Head, trained: Path) -> None:
    (run,) = trained.iterdir()
    reached = json.loads((run / "result.json").read_text())
    code, out, _ = head.jobs("result", "trained")
    assert code == 0
    assert "ufen_mtfn on synthetic-mosi, epoch 1 of 1, selected on validation mae" in out
    assert ["mae", f"{reached['valid']['mae']:.4f}", f"{reached['test']['mae']:.4f}"] in map(
        str.split, out.splitlines()
    )
    assert json.loads(head.jobs("result", "trained", "--json")[1]) == reached
    environment = json.loads((run / "environment.json").read_text())
    assert environment["job"] == "trained" and environment["packages"]["mmsa-dist"] == "0.1.0"
    assert str(REPOSITORY) not in environment["command"][0], "the checkout's code ran, not the wheel's"


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.skipif(os.geteuid() != 0, reason="hides the run folder from the command by a mount of its own: needs root")
def test_a_result_is_found_without_the_log_and_read_on_the_cluster(head: Head, trained: Path) -> None:
    (log,) = head.folder.glob("session_2*/logs/job-driver-trained.log")
    log.rename(log.with_suffix(".away"))
    hidden = f'mount -t tmpfs none {trained} && exec "$@"'
    try:
        command = ["unshare", "--mount", "sh", "-c", hidden, "sh", *head.command("jobs", "result", "trained", "--json")]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=head.environment(), capture_output=True, text=True, timeout=300
        )
    finally:
        log.with_suffix(".away").rename(log)
    (run,) = trained.iterdir()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((run / "result.json").read_text())
    assert "mmsa-dist-read" not in head.jobs("list")[1]


@pytest.mark.ray
def test_the_result_of_a_job_that_the_cluster_has_forgotten_is_found_in_its_runs_dir(head: Head, trained: Path) -> None:
    (run,) = trained.iterdir()
    kept = run.with_name("older")
    kept.mkdir()
    (kept / "environment.json").write_text('{\n "job": "trained-long-ago",\n "packages": {}\n}\n')
    (kept / "result.json").write_text('{"system": "mult", "valid": {"mae": 0.5}}')
    code, out, error = head.jobs("result", "trained-long-ago", "--runs-dir", str(trained))
    assert code == 0, error
    assert out == f"mult on its data\nmetric   valid\nmae     0.5000\nrun {kept}\n"
    (kept / "result.json").unlink()
    (kept / "table.md").write_text("| ours | paper |\n")  # of a reproduction
    assert head.jobs("result", "trained-long-ago", "--runs-dir", str(trained))[:2] == (0, "| ours | paper |\n")
    (kept / "table.md").unlink()
    code, _, error = head.jobs("result", "trained-long-ago", "--runs-dir", str(trained))
    assert code == 2 and f"{kept}/result.json or {kept}/table.md is not there" in error
    (kept / "environment.json").unlink()
    code, _, error = head.jobs("result", "trained-long-ago", "--runs-dir", str(trained))
    assert code == 2 and f"no run in {trained} was begun by job trained-long-ago" in error


@pytest.mark.ray
def test_what_has_no_result_says_why(head: Head, trained: Path) -> None:
    code, _, error = head.jobs("result", "failed")
    assert code == 2 and "job failed runs '0 3', which leaves no result.json: train, sweep, reproduce do" in error


@pytest.mark.ray
def test_an_unknown_job_is_one_sentence_with_the_nearest(head: Head, trained: Path) -> None:
    for asked in [head.start("jobs", command, "trainde") for command in ("status", "logs", "stop", "result")]:
        code, _, error = ended(asked)
        assert code == 2
        assert error.startswith("error: no job 'trainde' on this cluster; did you mean trained? (`mmsa-dist jobs list`")
        assert len(error.splitlines()) == 1


@pytest.mark.ray
def test_stop_waits_until_the_job_has_stopped_and_says_how(head: Head, trained: Path) -> None:
    code, out, error = head.jobs("stop", "waits")
    assert (code, error) == (0, "")
    assert out.startswith("job waits is told to stop") and "first line" not in out, "the log from its beginning"
    assert "saved" in out and out.splitlines()[-1].startswith("job waits: stopped after")
    assert head.jobs("stop", "waits")[:2] == (0, "job waits has ended already: stopped\n")


# --- what needs no cluster --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entrypoint", "command"),
    [
        ("/usr/bin/python -m mmsa_dist train mult --name 'a b'", ["train", "mult", "--name", "a b"]),
        ("python -m mmsa_dist cluster run --nodes 1:4 -- sweep mult", ["sweep", "mult"]),
        ("python -m mmsa_dist cluster init", ["cluster", "init"]),
        ("python other.py", []),
        ("echo 'unclosed", []),
    ],
)
def test_the_command_is_found_within_what_starts_it(entrypoint: str, command: list[str]) -> None:
    assert results.command_of(entrypoint) == command


def test_the_run_folder_is_the_last_that_the_log_names() -> None:
    log = "going on with /runs/one\nrun /runs/one\nrun of the mill\nrun /runs/a folder\nsweep /runs/three\n"
    assert str(results.folder_in(log, ["train"])) == "/runs/a folder"
    assert str(results.folder_in(log, ["sweep"])) == "/runs/three"
    assert str(results.folder_in("table 3 of TAM-ULAG, MOSI: /runs/four\n", ["reproduce"])) == "/runs/four"
    assert results.folder_in(log, ["predict"]) is None
    assert results.folder_in("rank 0 run /runs/one", ["train"]) is None


def test_a_run_knows_the_job_that_it_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert ray_job() is None
    for told, job in (('{"metadata": {"job_submission_id": "mosi-1"}}', "mosi-1"), ('{"metadata": {}}', None)):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", told)
        assert ray_job() == job


def test_a_job_is_said_in_words() -> None:
    def job(state: str, **more: Any) -> Any:
        return SimpleNamespace(
            status=SimpleNamespace(value=state), driver_exit_code=None, submission_id="x", message="gone", **more
        )

    failed = job("FAILED", start_time=1_700_000_000_500, end_time=1_700_003_725_500)
    assert jobs.state(failed) == "failed"
    assert jobs.times(failed) == ("2023-11-14 22:13:20", "1 h 02 min")
    assert jobs.times(job("PENDING", start_time=None, end_time=None)) == ("-", "-")
    running = jobs.times(job("RUNNING", start_time=int(time.time() * 1000) - 90_000, end_time=None))
    assert running[1] in ("1 min 30 s", "1 min 31 s", "1 min 32 s")
    assert [jobs.duration(seconds) for seconds in (0.4, 59.4, 59.6, 3600)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "1 h 00 min",
    ]


def test_an_undefined_metric_is_a_dash_and_a_sweeps_result_has_no_epochs() -> None:
    table = results.table({"system": "mult", "data": "mosi", "valid": {"mae": 1.0, "corr": None}, "test": {"n": 7}})
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["metric", "valid", "test"], ["mae", "1.0000", "-"], ["corr", "-", "-"], ["n", "-", "7"],
    ]  # fmt: skip
    assert table.splitlines()[0] == "mult on mosi"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lst"], "unknown command 'lst' of mmsa-dist jobs; did you mean 'list'?"),
        (["status"], "ID missing; see mmsa-dist jobs status --help"),
        (["logs", "x", "--folow"], "unknown option --folow; did you mean --follow?"),
        (["list", "x"], "one word too many: x"),
    ],
)
def test_a_misspelt_command_line_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        jobs.main(words)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.main(["--help"]) == 0 and jobs.main([]) == 2
    out = capsys.readouterr().out
    assert all(f"mmsa-dist jobs {name}" in out for name in ("list", "status ID", "logs ID", "stop ID", "result ID"))
