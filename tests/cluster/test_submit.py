"""`mmsa-dist submit` against a real Ray head: exit codes, live logs, what is sent, what is refused."""

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.client import probe
from cluster.errors import ConfigError, TransientError
from cluster.submit import main, split
from tests.cluster.heads import REPOSITORY, Ended, Head, ended, free_ports, slow_program, wait_for

# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(head: Head, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Exit code, stdout and stderr of jobs that ran side by side: each waits for Ray more than it works."""
    slow = ["--working-dir", str(slow_program(tmp_path_factory.mktemp("slow"))), "--"]
    jobs = {
        "good": head.submit("--", "--version"),
        "bad data": head.submit("--", "inspect", str(tmp_path_factory.mktemp("empty"))),
        "bad command": head.submit("--", "trian"),
        "killed": head.submit(*slow, "0", "killed"),
    }
    return {name: ended(job) for name, job in jobs.items()}


@pytest.mark.ray
def test_a_job_that_succeeds_returns_0_and_its_log_is_seen(finished: dict[str, Ended]) -> None:
    code, out, error = finished["good"]
    assert (code, error) == (0, "")
    assert "python -m mmsa_dist --version" in out.replace(sys.executable, "python")
    assert out.rstrip().endswith("0.1.0")


@pytest.mark.ray
def test_bad_data_on_the_cluster_returns_3_here(finished: dict[str, Ended]) -> None:
    code, out, _ = finished["bad data"]
    assert code == 3
    assert "index.json" in out


@pytest.mark.ray
def test_a_wrong_command_returns_2_with_its_sentence(finished: dict[str, Ended]) -> None:
    code, out, _ = finished["bad command"]
    assert code == 2
    assert "did you mean 'train'" in out


@pytest.mark.ray
def test_a_job_killed_by_a_signal_returns_137(finished: dict[str, Ended]) -> None:
    assert finished["killed"][0] == 137


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
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_without_a_terminal_a_signal_leaves_the_job_running_and_says_how_to_go_on(
    number: signal.Signals, code: int, head: Head, folder: Path
) -> None:
    name = f"goes-on-{code}"
    process = head.submit("--name", name, "--working-dir", str(folder), "--", "600", "0")
    wait_for(process, "first line")
    process.send_signal(number)
    left, _, error = ended(process)
    assert left == code
    assert f"job {name} goes on" in error
    assert f"mmsa-dist jobs logs {name} --follow --address {head.address}" in error
    assert "Traceback" not in error
    done, out, error = head.jobs("stop", name)
    assert done == 0, error
    assert "saved" in out and f"job {name}: stopped after" in out


@pytest.mark.ray
def test_ctrl_c_on_a_terminal_asks_whether_to_stop_the_job_or_only_to_stop_looking(head: Head, folder: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        head.command("submit", "--name", "asked", "--working-dir", str(folder), "--", "600", "0"),
        cwd=REPOSITORY,
        env=head.environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # whose keys send signals
    )
    os.close(theirs)
    seen = ""

    def until(text: str) -> str:
        nonlocal seen
        while text not in seen:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the terminal's other side is closed
                break
            seen += piece.decode()
        before, found, seen = seen.partition(text)
        assert found, f"{text!r} did not come: {before!r}"
        return before

    until("first line")
    os.write(ours, b"\x03")
    until("job asked is still running: [s]top it, [l]eave it running and stop looking, or Enter to go on? ")
    os.write(ours, b"what?\n")
    until("or Enter to go on? ")
    os.write(ours, b"\n")
    time.sleep(1)
    os.write(ours, b"\x03")
    until("or Enter to go on? ")
    os.write(ours, b"s\n")
    assert "first line" not in until("job asked was stopped"), "the log was printed anew"
    assert process.wait(60) == 143
    os.close(ours)


@pytest.mark.ray
def test_a_job_that_somebody_stops_returns_143(head: Head, folder: Path) -> None:
    process = head.submit("--name", "stopped", "--working-dir", str(folder), "--", "600", "0")
    wait_for(process, "first line")
    assert head.jobs("stop", "stopped")[0] == 0
    code, out, error = ended(process)
    assert (code, error.strip()) == (143, "job stopped was stopped")
    assert out.rstrip().endswith("saved"), "it was killed before it had saved"


@pytest.mark.ray
def test_detached_returns_at_once_and_a_name_serves_once(head: Head, folder: Path) -> None:
    arguments = ["--detach", "--name", "once", "--working-dir", str(folder), "--", "0", "5"]
    code, out, _ = head.result(*arguments)
    assert code == 0, "detached: the job's own code is not waited for"
    assert "mmsa-dist jobs status once" in out
    code, _, error = head.result(*arguments)
    assert code == 2
    assert error.startswith("error: job once exists on this cluster already")


@pytest.mark.ray
def test_a_cluster_with_a_token_refuses_in_a_sentence(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("fedcba9876543210" * 4)
    refused = [
        head.submit("--", "--version", RAY_AUTH_MODE="disabled"),
        head.submit("--", "--version", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path)),
        head.submit("--", "--version", RAY_AUTH_TOKEN_PATH=str(wrong)),
        head.start("jobs", "list", RAY_AUTH_MODE="disabled"),
    ]
    for process in refused:
        code, _, error = ended(process)
        assert code == 2, error
        assert "refuses this client" in error
        assert "RAY_AUTH_MODE=token" in error and "RAY_AUTH_TOKEN_PATH" in error
        assert "Traceback" not in error


@pytest.mark.ray
def test_what_can_never_run_there_is_refused_before_it_is_sent(head: Head) -> None:
    code, out, error = head.result("--", "train", "ufen_mtfn", "--data", "/none", "--workers", "3")
    assert (code, out) == (2, "")
    assert "begins with 3 ranks x 1 CPUs, and the cluster has 1 node with 2 CPUs, room for 2; use --workers 2" in error


# --- what needs no cluster --------------------------------------------------------------------------------------------


def test_an_unreachable_head_is_said_within_seconds() -> None:
    (port,) = free_ports(1)
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
def _starting_head(*answers: tuple[int, str], earlier: str = "") -> Iterator[tuple[str, list[str]]]:
    """What a head answers before it can run jobs: `answers` to one submission after the other. Gives the ids it saw.

    Args:
        earlier: what the job of that id runs that the head has already.
    """
    import ray

    asked: list[str] = []
    jobs: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
            told = {
                "/api/version": version,
                **{f"/api/jobs/{job}": DETAILS | {"entrypoint": jobs[job]} for job in jobs},
            }
            self.answer(200, json.dumps(told[self.path]) if self.path in told else "")  # and has every package

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["submission_id"])
            jobs.setdefault(asked[-1], earlier or body["entrypoint"])
            status, said = answers[len(asked) - 1]
            self.answer(
                status, json.dumps({"submission_id": asked[-1], "job_id": asked[-1]}) if status == 200 else said
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


DETAILS = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": ""}
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


def test_a_job_that_somebody_else_sent_in_between_is_not_taken_for_ours(tmp_path: Path) -> None:
    there = (400, "job already exists")
    with (
        _starting_head(NO_AGENT, there, earlier="python -m theirs") as (address, _),
        pytest.raises(ConfigError, match="exists on this cluster already"),
    ):
        main(["--address", address, "--name", "mosi", "--working-dir", str(tmp_path), "--", "--version"])


def test_a_head_that_never_takes_a_job_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.submit.START_SECONDS", 1.0)
    with _starting_head(*[NO_AGENT] * 5) as (address, asked), pytest.raises(TransientError, match="No available agent"):
        main(["--address", address, "--working-dir", str(tmp_path), "--", "--version"])
    assert 2 <= len(asked) <= 3


def test_the_front_door_prints_the_sentence_and_returns_the_code() -> None:
    command = [sys.executable, "-m", "mmsa_dist", "submit", "--address", "http://127.0.0.1:1"]
    command += ["--", "train", "--runs-dir", "/data/runs"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75
    assert done.stderr.startswith("error: no Ray head answers at http://127.0.0.1:1")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["", "a/b", "a b", ".a", "mosi\n", "x" * 101, "ü", "mmsa-dist-read-1"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--name .*: a job's id is 1 to 100 letters"):
        main(["--name", name, "--address", "http://127.0.0.1:1", "--", "--version"])


@pytest.mark.parametrize("option", ["--address", "--python"])
def test_a_variable_that_is_not_set_is_pointed_out(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is empty; leave it out"):
        main([option, "", "--", "--version"])


def test_what_cannot_be_read_cannot_be_sent(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.py")).touch()
    with (
        _starting_head((200, "")) as (address, asked),
        pytest.raises(ConfigError, match=r"a file's name is no UTF-8: .*; rename it"),
    ):
        main(["--address", address, "--working-dir", str(tmp_path), "--", "--version"])
    assert not asked


def test_no_command_is_refused() -> None:
    for argv in ([], ["--address", "http://127.0.0.1:1"], ["--"]):
        with pytest.raises(ConfigError, match='put the command after "--"'):
            main(argv)


def test_everything_after_the_first_two_dashes_belongs_to_the_command() -> None:
    assert split(["--detach", "--", "train", "--", "x"]) == (["--detach"], ["train", "--", "x"])
