"""`mmsa-dist submit` against a real Ray head: exit codes, live logs, what is sent, what is refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from cluster.errors import ConfigError, TransientError
from cluster.submit import main, probe, split, unsent
from cluster.working_dir import files_to_send, measure, write_archive

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

REPOSITORY = Path(__file__).parents[2]


# --- a head of our own ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A running Ray head: its dashboard's address, and the process that owns all of it."""

    address: str
    process: subprocess.Popen[bytes]

    def submit(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts the real `mmsa-dist submit` as a process of its own."""
        command = [sys.executable, "-m", "mmsa_dist", "submit", "--address", self.address, "--python", sys.executable]
        return subprocess.Popen(
            [*command, *arguments],
            cwd=REPOSITORY,
            env=_environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `submit`."""
        process = self.submit(*arguments, **environment)
        out, error = process.communicate(timeout=240)
        return process.returncode, out, error


def _environment(extra: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "disabled", **extra}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def _running_head(**environment: str) -> Iterator[Head]:
    """`ray start --head --block` on free ports; ended by its process id, nothing left behind."""
    port, dashboard, agent, client = _free_ports(4)
    # the shortest folder there is: Ray puts sockets below it, whose paths may have 107 bytes
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
        command += [f"--temp-dir={temporary}", "--num-cpus=2", "--object-store-memory=100000000"]
        with (Path(temporary) / "head.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=_environment(environment), stdout=log, stderr=log, start_new_session=True
            )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            _wait_until_up(address, process, Path(temporary) / "head.log")
            yield Head(address, process)
        finally:
            _end(process)


def _wait_until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return probe(address, timeout=5)
        except TransientError:
            time.sleep(0.5)
    pytest.fail(f"the head did not start:\n{log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    for each in alive:
        each.kill()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with _running_head() as running:
        yield running


def _slow_program(folder: Path) -> Path:
    """A working dir whose `python -m mmsa_dist SECONDS CODE` prints, waits, prints and ends as it is told."""
    package = folder / "mmsa_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, signal, sys, time\n"
        "print('first line')\n"
        "time.sleep(float(sys.argv[1]))\n"
        "print('last line')\n"
        "if sys.argv[2] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _slow_program(tmp_path)


# --- jobs -------------------------------------------------------------------------------------------------------------


Ended = tuple[int, str, str]


@pytest.fixture(scope="module")
def ended(head: Head, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Exit code, stdout and stderr of jobs that ran side by side: each waits for Ray more than it works."""
    slow = ["--working-dir", str(_slow_program(tmp_path_factory.mktemp("slow"))), "--"]
    jobs = {
        "good": head.submit("--", "--version"),
        "bad data": head.submit("--", "inspect", str(tmp_path_factory.mktemp("empty"))),
        "bad command": head.submit("--", "trian"),
        "killed": head.submit(*slow, "0", "killed"),
    }
    return {name: (job.wait(240), *job.communicate()) for name, job in jobs.items()}


@pytest.mark.ray
def test_a_job_that_succeeds_returns_0_and_its_log_is_seen(ended: dict[str, Ended]) -> None:
    code, out, error = ended["good"]
    assert (code, error) == (0, "")
    assert "python -m mmsa_dist --version" in out.replace(sys.executable, "python")
    assert out.rstrip().endswith("0.1.0")


@pytest.mark.ray
def test_bad_data_on_the_cluster_returns_3_here(ended: dict[str, Ended]) -> None:
    code, out, _ = ended["bad data"]
    assert code == 3
    assert "index.json" in out


@pytest.mark.ray
def test_a_wrong_command_returns_2_with_its_sentence(ended: dict[str, Ended]) -> None:
    code, out, _ = ended["bad command"]
    assert code == 2
    assert "did you mean 'train'" in out


@pytest.mark.ray
def test_a_job_killed_by_a_signal_returns_137(ended: dict[str, Ended]) -> None:
    assert ended["killed"][0] == 137


@pytest.mark.ray
def test_the_log_is_followed_while_the_job_runs(head: Head, folder: Path) -> None:
    process = head.submit("--working-dir", str(folder), "--", "6", "0")
    assert process.stdout is not None
    seen: dict[str, float] = {}
    for line in process.stdout:
        seen[line.strip()] = time.monotonic()
    assert process.wait(60) == 0
    assert seen["last line"] - seen["first line"] > 3, "the first line came only with the last"


@pytest.mark.ray
def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(head: Head, folder: Path) -> None:
    process = head.submit("--name", "goes-on", "--working-dir", str(folder), "--", "60", "0")
    assert process.stdout is not None
    for line in process.stdout:
        if "first line" in line:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "job goes-on goes on" in error
    assert f"ray job logs goes-on --follow --address {head.address}" in error
    assert "Traceback" not in error
    client = _job_client(head)
    assert client.get_job_status("goes-on") == "RUNNING"
    assert client.stop_job("goes-on")


@pytest.mark.ray
def test_a_job_that_somebody_stops_returns_143(head: Head, folder: Path) -> None:
    process = head.submit("--name", "stopped", "--working-dir", str(folder), "--", "60", "0")
    assert process.stdout is not None
    for line in process.stdout:
        if "first line" in line:
            break
    _job_client(head).stop_job("stopped")
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (143, "job stopped was stopped")


@pytest.mark.ray
def test_detached_returns_at_once_and_a_name_serves_once(head: Head, folder: Path) -> None:
    arguments = ["--detach", "--name", "once", "--working-dir", str(folder), "--", "0", "5"]
    code, out, _ = head.result(*arguments)
    assert code == 0, "detached: the job's own code is not waited for"
    assert "ray job status once" in out
    code, _, error = head.result(*arguments)
    assert code == 2
    assert error.startswith("error: job once exists on this cluster already")


@pytest.mark.ray
def test_a_cluster_with_a_token_refuses_in_a_sentence(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    wrong = tmp_path / "wrong"
    wrong.write_text("fedcba9876543210" * 4)
    with _running_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)) as head:
        refused = [
            head.submit("--", "--version"),
            head.submit("--", "--version", RAY_AUTH_MODE="token", HOME=str(tmp_path)),
            head.submit("--", "--version", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong)),
        ]
        for process in refused:
            _, error = process.communicate(timeout=240)
            assert process.returncode == 2, error
            assert "refuses this client" in error
            assert "RAY_AUTH_MODE=token" in error and "RAY_AUTH_TOKEN_PATH" in error
            assert "Traceback" not in error
        code, out, error = head.result("--", "--version", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        assert code == 0, out + error
        assert token.read_text() not in out


def _job_client(head: Head) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(head.address)


# --- what needs no cluster --------------------------------------------------------------------------------------------


def test_an_unreachable_head_is_said_within_seconds() -> None:
    (port,) = _free_ports(1)
    started = time.monotonic()
    with pytest.raises(TransientError, match=f"no Ray head answers at http://127.0.0.1:{port} .*refused.*--address"):
        main(["--address", f"127.0.0.1:{port}", "--working-dir", str(REPOSITORY / "cluster"), "--", "train"])
    assert time.monotonic() - started < 5


def test_a_head_that_accepts_and_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(TransientError, match="no answer in 1 s"):
            probe(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=1)
        assert time.monotonic() - started < 5


@contextmanager
def _starting_head(*answers: tuple[int, str]) -> Iterator[tuple[str, list[str]]]:
    """What a head answers before it can run jobs: `answers` to one submission after the other. Gives the ids it saw."""
    import ray

    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
            self.answer(200, json.dumps(version) if self.path == "/api/version" else "")  # and has every package

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"])
            status, body = answers[len(asked) - 1]
            self.answer(
                status, json.dumps({"submission_id": asked[-1], "job_id": asked[-1]}) if status == 200 else body
            )

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


NO_AGENT = (500, "No available agent to submit job, please try again later.")


@pytest.mark.parametrize(
    "second", [(200, "taken"), (400, "job already exists")], ids=["takes it", "had heard the first time"]
)
def test_a_head_that_is_still_starting_is_asked_again(
    second: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _starting_head(NO_AGENT, second) as (address, asked):
        assert main(["--address", address, "--working-dir", str(tmp_path), "--detach", "--", "--version"]) == 0
    out, error = capsys.readouterr()
    assert len(asked) == 2 and asked[0] == asked[1] and f"job {asked[0]}: python -m mmsa_dist --version" in out
    assert error == "the head is still starting; asking again until it takes the job\n"


def test_a_head_that_never_takes_a_job_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.submit.START_SECONDS", 1.0)
    with _starting_head(*[NO_AGENT] * 5) as (address, asked), pytest.raises(TransientError, match="No available agent"):
        main(["--address", address, "--working-dir", str(tmp_path), "--", "--version"])
    assert 2 <= len(asked) <= 3


def test_the_front_door_prints_the_sentence_and_returns_the_code() -> None:
    command = [sys.executable, "-m", "mmsa_dist", "submit", "--address", "http://127.0.0.1:1", "--", "train"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75
    assert done.stderr.startswith("error: no Ray head answers at http://127.0.0.1:1")
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_command_is_refused() -> None:
    for argv in ([], ["--address", "http://127.0.0.1:1"], ["--"]):
        with pytest.raises(ConfigError, match='put the command after "--"'):
            main(argv)


def test_everything_after_the_first_two_dashes_belongs_to_the_command() -> None:
    assert split(["--detach", "--", "train", "--", "x"]) == (["--detach"], ["train", "--", "x"])


# --- the working dir --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with sources, an ignored folder and results of runs."""
    for name in ("a/code.py", "new.py", "data/big.bin", "runs/one/result.json", ".env", "a/__pycache__/code.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("/data/\n")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    return tmp_path


def test_what_git_ignores_and_what_runs_leave_stays_here(checkout: Path) -> None:
    assert [str(name) for name in files_to_send(checkout)] == [".gitignore", "a/code.py", "new.py"]


def test_a_folder_below_the_checkout_honours_it_too(checkout: Path) -> None:
    assert files_to_send(checkout / "a") == [Path("code.py")]


def test_without_git_everything_but_caches_and_results_is_sent(tmp_path: Path) -> None:
    for name in ("code.py", ".venv/x", "deep/.git/y", "deep/z.py", "mlruns/1", "runs/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "broken").symlink_to("nowhere")
    assert [str(name) for name in files_to_send(tmp_path)] == ["code.py", "deep/z.py"]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        files_to_send(tmp_path / "none")


def test_too_big_is_refused_before_anything_is_sent_and_names_what_is_big(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with (tmp_path / "shards" / "train.tar").open("wb") as sparse:
        sparse.truncate(600 * 2**20)
    (tmp_path / "code.py").write_text("x")
    message = r"holds 600\.0 MiB in 2 files, at most 512\.0 MiB can be sent; biggest: shards/ 600\.0 MiB, .*\.gitignore"
    with pytest.raises(ConfigError, match=message):
        main(["--working-dir", str(tmp_path), "--address", "http://127.0.0.1:1", "--", "train"])


def test_the_size_is_that_of_what_is_sent(checkout: Path) -> None:
    files = files_to_send(checkout)
    assert measure(checkout, files) == sum(len((checkout / name).read_text()) for name in files)


def test_the_archive_holds_the_files_and_is_the_same_every_time(checkout: Path, tmp_path: Path) -> None:
    files = files_to_send(checkout)
    (checkout / "new.py").chmod(0o755)
    write_archive(checkout, files, tmp_path / "1.zip")
    os.utime(checkout / "new.py", (1e9, 1e9))
    write_archive(checkout, files, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == [str(name) for name in files]
        assert archive.read("a/code.py") == b"a/code.py"
        assert archive.getinfo("new.py").external_attr >> 16 & 0o111
        assert not archive.getinfo("a/code.py").external_attr >> 16 & 0o111


def test_a_path_that_stays_here_is_pointed_out(checkout: Path) -> None:
    files = files_to_send(checkout)
    command = ["train", "self_mm", "--data", "data", "--recipe=a/code.py", "--runs=runs", "--text", "/somewhere"]
    assert [note.split(" exists here")[0] for note in unsent(checkout, files, command)] == ["data", "runs"]
