"""`mmsa-dist jobs watch` without a cluster: a run's folder in every state, a job's log, nodes and a Prometheus. That a
real job is seen so through its head, `tests/end_to_end/test_seeing.py` sees."""

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from cluster.errors import ConfigError, TransientError
from cluster.seen import ENDED, FAILED, RUNNING, Rank, Seen, changes, duration, line, screen
from cluster.watch import looks, main
from cluster.watch_job import Log, Sample, filled, of_nodes, of_prometheus
from cluster.watch_run import RunFolder
from mmsa_dist.ledger import account
from mmsa_dist.run_folder import locked

PLAN = {"train_samples": 100, "global_batch": 10, "steps_per_epoch": 10, "epochs": 4}


def shown(seen: Seen) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(screen(seen))
    return capture.get()


# --- the folder of a run ----------------------------------------------------------------------------------------------


class Folder:
    """A run's folder, written as ranks and driver write it."""

    def __init__(self, path: Path) -> None:
        self.path, self.now = path, time.time() - 100
        (path / "events").mkdir()
        (path / "recipe.yaml").write_text("system: self_mm\n")
        (path / "plan.json").write_text(json.dumps(PLAN))

    def driver(self, event: str, at: float, **values: Any) -> None:
        self._write("driver", event, at, values)

    def rank(self, number: int, event: str, at: float, **values: Any) -> None:
        self._write(f"rank-{number}", event, at, values)

    def _write(self, name: str, event: str, at: float, values: dict[str, Any]) -> None:
        with (self.path / "events" / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "time": self.now + at, **values}) + "\n")

    def begin(self) -> None:
        """Two ranks train for 60 s; rank 1 waits for data half of the time. Rank 0 has saved after step 10."""
        self.driver("attempt", 0, resumed=False)
        for rank, waits in ((0, 0.0), (1, 0.5)):
            self.rank(rank, "start", 5, pid=1, rank=rank, world=2, booked={"start": 5})
            for step, epoch in ((5, 1), (10, 1), (5, 2)):
                at = 10 * (step / 5 + 2 * (epoch - 1))
                booked = {"start": 5, "data": at * waits, "step": at * (1 - waits)}
                self.rank(rank, "step", 60 + at, epoch=epoch, step=step, of=10, loss=1 / at, booked=booked)
                if step == 10 and rank == 0:
                    valid = {"mae": 0.75, "corr": None}
                    self.rank(0, "epoch", 81, epoch=1, step=10, valid=valid, best_epoch=1, booked=booked)
                    self.rank(0, "saved", 84, step=10, blocked=0.1, seconds=2.0, kept={"step": 20}, booked=booked)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path)
    made.begin()
    return made


def test_a_run_that_trains_is_seen_whole(folder: Folder) -> None:
    seen = RunFolder(folder.path, 8).look()
    assert (seen.kind, seen.state) == (RUNNING, "training")
    assert (seen.epoch, seen.epochs, seen.step, seen.steps) == (2, 4, 5, 10)
    assert [(each.number, each.samples, each.stall) for each in seen.ranks] == [(0, 2.5, 0.0), (1, 2.5, 0.5)]
    assert seen.samples == 5.0 and seen.stall == 0.5, "of all ranks; of the one that waits most"
    assert seen.seconds_left == pytest.approx(25 * 2), "25 steps, two seconds each"
    assert (seen.checkpoint, seen.restarts, seen.result) == (10, 0, "epoch 1: mae 0.7500; best epoch 1")
    assert seen.age == pytest.approx(100 - 82, abs=2)
    assert seen.goodput == pytest.approx(0.3, abs=0.02), "30 of 100 s"
    text = shown(seen)
    for part in ("epoch 2 of 4, step 5 of 10", "5.0 samples/s of 2 ranks, data stall 50.0 %", "checkpoint  step 10"):
        assert part in text


def test_more_is_read_as_it_comes_and_half_a_line_is_not(folder: Folder) -> None:
    watched = RunFolder(folder.path, 8)
    watched.look()
    with (folder.path / "events" / "rank-0.jsonl").open("a") as file:
        file.write('{"event": "step", "time": ')
    assert watched.look().step == 5
    with (folder.path / "events" / "rank-0.jsonl").open("a") as file:
        file.write(f'{time.time()}, "epoch": 2, "step": 8, "of": 10, "loss": 0.1, "booked": {{}}}}\n')
    assert watched.look().step == 8


@pytest.mark.parametrize(
    "line", ["[]", "null", "1", "{}", '{"event": "step"}', '{"event": "epoch", "epoch": "x"}', "{"]
)
def test_an_odd_line_is_passed_over(line: str, folder: Folder) -> None:
    with (folder.path / "events" / "rank-0.jsonl").open("a") as file:
        file.write(f"{line}\n")
    folder.rank(0, "step", 90, epoch=3, step=1, of=10, loss=0.25, booked={})
    seen = RunFolder(folder.path, 8).look()
    assert (seen.epoch, seen.step) == (3, 1)


def test_a_restart_is_counted_and_what_was_lost_does_not_count(folder: Folder) -> None:
    folder.driver("attempt_end", 91)
    (folder.path / "failures-1").mkdir()
    failure = {"rank": 1, "time": folder.now + 90, "type": "OSError", "message": "the disk is full\nreally"}
    (folder.path / "failures-1" / "1-rank-1.json").write_text(json.dumps(failure))
    folder.driver("attempt", 92, resumed=False)
    seen = RunFolder(folder.path, 8).look()
    assert seen.restarts == 1 and seen.state.startswith("starting ranks for")
    assert seen.error is not None and seen.error.startswith("rank 1, ") and seen.error.endswith("the disk is full")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.now + 91))
    (folder.path / "run.log").write_text(f"{when}  rank 1: the disk is full; starting again (1 of 3)\n{when}  more\n")
    error = RunFolder(folder.path, 8).look().error
    assert error is not None and error.endswith(" ago: rank 1: the disk is full"), "the driver has seen all of them"
    folder.rank(0, "start", 95, pid=2, rank=0, world=2, booked={"start": 2})
    folder.rank(0, "first_step", 97, epoch=2, step=1, of=10, loss=0.1, booked={"start": 3, "step": 1})
    seen = RunFolder(folder.path, 8).look()
    assert seen.state == "training" and [each.number for each in seen.ranks] == [0]
    assert seen.goodput == pytest.approx((20 + 1) / 100, abs=0.01)


@pytest.mark.parametrize("whole", [True, False], ids=["it ended well", "it did not"])
def test_goodput_is_that_of_the_account(folder: Folder, whole: bool) -> None:
    """Without its ``time.json``, which a finished run has of it."""
    folder.driver("attempt_end", 91)
    folder.driver("attempt", 92, resumed=False)
    folder.rank(0, "start", 94, booked={"start": 2})
    if whole:
        folder.rank(0, "end", 98, booked={"start": 2, "step": 3, "evaluation": 1})
    folder.driver("attempt_end", 99)
    seen = RunFolder(folder.path, 8).look()
    assert seen.goodput == pytest.approx(account(folder.path).goodput)


def test_how_it_ended_is_said(folder: Folder) -> None:
    folder.driver("attempt_end", 95)
    seen = RunFolder(folder.path, 8).look()
    assert (seen.kind, seen.state) == (FAILED, "ended without a result")
    (folder.path / "stopped.json").write_text('{"why": "SIGTERM to the driver", "step": 15}')
    seen = RunFolder(folder.path, 8).look()
    assert (seen.kind, seen.state) == (ENDED, "stopped (SIGTERM to the driver)")
    (folder.path / "result.json").write_text("{}")
    (folder.path / "time.json").write_text('{"goodput": 0.5}')
    seen = RunFolder(folder.path, 8).look()
    assert (seen.kind, seen.state, seen.goodput) == (ENDED, "done", 0.5)


def test_between_two_attempts_a_run_goes_on(folder: Folder) -> None:
    """While its driver pauses, which holds it."""
    folder.driver("attempt_end", 95)
    with locked(folder.path):
        seen = RunFolder(folder.path, 8).look()
        assert (seen.kind, seen.state) == (RUNNING, "about to start ranks again")
    assert RunFolder(folder.path, 8).look().kind == FAILED


def test_a_driver_that_was_killed_is_missed(folder: Folder) -> None:
    (folder.path / ".lock").write_text(f"process {os.getpid()} on {platform.node()}")
    assert RunFolder(folder.path, 8).look().state == "training"
    (folder.path / ".lock").write_text(f"process {2**22 + 1} on {platform.node()}")
    seen = RunFolder(folder.path, 8).look()
    assert seen.kind == FAILED and "its driver is gone" in seen.state
    (folder.path / ".lock").write_text(f"process {2**22 + 1} on another-node")
    assert RunFolder(folder.path, 8).look().kind == RUNNING, "of another machine nothing is known"


def test_a_run_that_stands_still_says_so(folder: Folder) -> None:
    for path in (folder.path / "events").iterdir():
        moved = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**each, "time": each["time"] - 600}) + "\n" for each in moved))
    assert RunFolder(folder.path, 8).look().state == "no word of rank 0 for 10 min"


def test_a_sweep_is_its_trials(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    for number, files in enumerate((["result.json"], [], ["error.json"]), 1):
        trial = tmp_path / "trials" / f"trial-{number:03d}"
        trial.mkdir(parents=True)
        (trial / "trial.json").write_text(json.dumps({"number": number}))
        for name in files:
            (trial / name).write_text('{"message": "no such modality"}')
    seen = RunFolder(tmp_path, 8).look()
    assert seen.trials == {"running": 1, "done": 1, "stopped": 0, "failed": 1}
    assert seen.error == "trial 3: no such modality"
    assert "1 running, 1 done, 1 failed" in line(seen)
    (tmp_path / ".lock").write_text(f"process {2**22 + 1} on {platform.node()}")
    seen = RunFolder(tmp_path, 8).look()
    assert seen.kind == FAILED and "its driver is gone" in seen.state and seen.trials["open"] == 1


# --- a job ------------------------------------------------------------------------------------------------------------

LOG = """\
run /data/runs/ufen_mtfn-20260101-120000-ab12
reads text 12, audio 5, vision 7
global batch 12 = 2 ranks x 6 micro x 1 accumulation; epoch 90 samples -> 8 steps; at most 1,000 epochs = 8,000 steps
starting ranks
rank 0 of 2 is up (pid 77)
epoch   1  train loss 1.2345  valid mae 1.1000  3 s
epoch   2  train loss 1.1345  valid mae 1.0000  (best)  3 s
rank 1 was ended by SIGKILL; starting again from the last checkpoint (1 of 3)
epoch   3  step 4 of 8  loss 0.9000
"""


def test_a_log_says_how_far_a_job_is() -> None:
    log = Log()
    for text in (LOG[:100], LOG[100:]):  # cut anywhere
        log.take(text)
    seen = log.seen("job x", 2)
    assert log.runs == ["ufen_mtfn-20260101-120000-ab12"]
    assert (seen.epoch, seen.epochs, seen.step, seen.steps, seen.loss) == (3, 1000, 4, 8, 0.9)
    assert (seen.result, seen.restarts, seen.error) == (
        "epoch 2: mae 1.0000, the best", 1, "rank 1 was ended by SIGKILL",
    )  # fmt: skip
    assert seen.log == LOG.splitlines()[-2:]


def test_before_the_first_epoch_a_log_says_what_is_under_way() -> None:
    log, phases = Log(), []
    for said in ("run /runs/a", "starting ranks", "waiting for a node: 1 of 2", "rank 0 of 2 is up (pid 7)"):
        log.take(f"{said}\n")
        phases.append(log.phase)
    assert phases == ["", "starting ranks", "waiting for a node: 1 of 2", "rank 0 of 2 is up"]
    log.take("epoch   1  train loss 0.5000  valid mae 1.0000  (best)  1 s\n")
    assert not log.phase and log.seen("x", 0).epoch == 1


def sample(name: str, value: float, **labels: str) -> Sample:
    return Sample(name, {"run": "a", "sweep": "", **labels}, value)


def test_metrics_fill_in_what_the_log_does_not_say() -> None:
    samples = [
        sample("samples_per_second", 9.0, rank="1", WorkerId="old"),
        sample("samples_per_second", 10.0, rank="1", WorkerId="new"),
        sample("samples_per_second", 11.0, rank="0"),
        sample("data_stall_ratio", 0.1, rank="0"),
        sample("checkpoint_age_seconds", 90.0, WorkerId="old"),
        sample("checkpoint_age_seconds", 5.0, WorkerId="new"),
        sample("goodput_ratio", 0.8),
        sample("epoch", 3),
        sample("step", 22),
        sample("restarts_total", 2),
        sample("samples_per_second", 500.0, rank="0", run="another's"),
        Sample("trials", {"sweep": "a", "state": "running"}, 2.0),
    ]
    seen = filled(Seen("job", steps=8), samples, {"a"})
    assert seen.ranks == [Rank(0, 11.0, 0.1), Rank(1, 10.0, None)]
    assert (seen.age, seen.goodput, seen.epoch, seen.step, seen.restarts) == (5.0, 0.8, 3, 6, 2)
    assert seen.trials == {"running": 2}
    nothing = filled(Seen("job", epoch=2, step=4), [], {"a"})
    assert (nothing.epoch, nothing.step, nothing.ranks) == (2, 4, []), "what the log said stays"


@contextmanager
def answering(path: str, body: str, asked: list[str]) -> Iterator[str]:
    """Something that answers one path; gives its ``host:port``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if urlsplit(self.path).path == path else 404)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_nodes_that_answer_and_one_that_does_not() -> None:
    body = (
        '# HELP ray_mmsa_dist_epoch e\n# TYPE ray_mmsa_dist_epoch gauge\nray_mmsa_dist_epoch{run="a b",x=""} 3.0\n'
        "ray_node_cpu_count 2.0\n"
    )
    with answering("/metrics", body, []) as node:
        samples, silent = of_nodes([node, "127.0.0.1:1"])
    assert samples == [Sample("epoch", {"run": "a b", "x": ""}, 3.0)]
    assert silent == ["127.0.0.1:1"]


def test_a_prometheus_is_asked_for_ours() -> None:
    labels = {"__name__": "ray_mmsa_dist_epoch", "run": "a"}
    body = json.dumps({"status": "success", "data": {"result": [{"metric": labels, "value": [1.5, "3"]}]}})
    asked: list[str] = []
    with answering("/api/v1/query", body, asked) as address:
        assert of_prometheus(f"http://{address}/") == [Sample("epoch", labels, 3.0)]
    assert parse_qs(urlsplit(asked[0]).query) == {"query": ['{__name__=~"ray_mmsa_dist_.+"}']}
    with (
        answering("/", "<html>", []) as address,
        pytest.raises(TransientError, match="no Prometheus answers there"),
    ):
        of_prometheus(f"http://{address}")


def test_what_speaks_no_http_or_ends_in_the_middle_is_silent() -> None:
    """As a node does that dies while it is read."""
    said = (b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nray_mmsa")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for text in (said[0], said[1], said[0]):
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(text)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert of_nodes([address]) == ([], [address])
        assert of_nodes([address]) == ([], [address])
        with pytest.raises(TransientError, match="no Prometheus answers there"):
            of_prometheus(f"http://{address}")
        thread.join()


# --- the command ------------------------------------------------------------------------------------------------------


def test_without_a_terminal_one_screen_is_printed(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.path / "run.log").write_text("".join(f"line {n}\n" for n in range(20)))
    assert main(["--run", str(folder.path), "--lines", "3"]) == 0
    out = capsys.readouterr().out
    assert "epoch 2 of 4" in out and "line 17" in out and "line 16" not in out


def test_followed_it_says_each_change_until_the_end(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(range(10))

    def later(seconds: float) -> None:
        if next(turns) == 2:
            (folder.path / "result.json").write_text("{}")

    monkeypatch.setattr("cluster.watch.time.sleep", later)
    assert main(["--run", str(folder.path), "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "of two more looks at the same nothing new is said"
    assert "training  epoch 2 of 4, step 5 of 10" in lines[0] and "done" in lines[1]


def test_ctrl_c_ends_the_looking_only(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.watch.time.sleep", stop)
    assert main(["--run", str(folder.path), "--follow"]) == 130
    assert capsys.readouterr().err == "no longer watching; the run goes on\n"


def test_one_look_that_fails_is_made_again() -> None:
    class Flaky:
        def __init__(self) -> None:
            self.looks = 0

        def look(self) -> Seen:
            self.looks += 1
            if self.looks == 2:
                raise RuntimeError("the head is away")
            return Seen("x", kind=ENDED if self.looks == 4 else RUNNING)

    seen = [(each.kind, bool(each.notes)) for each in looks(Flaky(), 0.01)]
    assert seen == [(RUNNING, False), (RUNNING, True), (RUNNING, False), (ENDED, False)]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "what to watch: a job's id, or --run RUN_DIR"),
        (["job", "--run", "."], "and not both"),
        (["--run", "nowhere"], "--run nowhere: is no run's folder"),
        (["--run", ".", "--prometheus", "http://x"], "--prometheus belongs to a job"),
        (["job", "--every", "0"], "--every: more than 0 seconds"),
        (["job", "--every", "nan"], "--every: more than 0 seconds"),
        (["job", "--every", "1e9"], "at most an hour"),
        (["--runs", "."], "unknown option --runs; did you mean --run"),
    ],
)
def test_what_cannot_be_watched_is_one_sentence(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(argv)


def test_nothing_answers() -> None:
    with pytest.raises(TransientError, match="no Ray head answers at http://127"):
        main(["job", "--address", "http://127.0.0.1:1"])


def test_only_what_changes_is_a_change() -> None:
    one, other = (Seen("x", state=f"running for {n} s", epoch=1, age=n, ranks=[Rank(0, n)]) for n in (1.0, 2.0))
    assert changes(one) == changes(other)
    assert changes(one) != changes(Seen("x", epoch=2))
    assert [duration(each) for each in (5, 600, 7500, 200_000)] == ["5 s", "10 min", "2 h 5 min", "2 days"]
