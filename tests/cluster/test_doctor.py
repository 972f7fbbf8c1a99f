"""`mmsa-dist doctor` as a command: what it compares, shows and returns, and what it leaves when it is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.doctor import across
from cluster.doctor.command import main
from cluster.doctor.finding import ASIDE, DATA, Finding
from cluster.doctor.nodes import Node, Nodes
from cluster.doctor.table import Report
from cluster.errors import ConfigError, TransientError
from shards.index import Index
from tests.data import packed

ROOT = Path(__file__).parents[2]
QUICK = ["--skip", "network", "mlflow", "trial"]


# --- between nodes ----------------------------------------------------------------------------------------------------


def software(ranges: dict[str, str] | None = None, **versions: str | None) -> list[Finding]:
    known = {"python": "3.11.7", "torch": "2.13.0+cpu", "mlflow": "3.17.2", "code": "abc", **versions}
    facts = {"versions": known, "ranges": ranges or {}, "executable": "/opt/python"}
    return [Finding("software", "versions", "ok", "", facts=facts)]


def lines(answers: across.ByNode, node: str) -> dict[str, Finding]:
    return {each.check: each for each in answers[node]}


def test_versions_are_held_against_the_head() -> None:
    found = across.versions(
        {
            "head": software(),
            "same": software(torch="2.13.0+cu130"),  # built for another device
            "other": software(torch="2.12.1", mlflow="3.16.0", code="abd"),
            "bare": software(torch=None, code=None),
        }
    )
    assert {each.state for node in ("head", "same") for each in found[node]} == {"ok"}
    other, bare = lines(found, "other"), lines(found, "bare")
    assert (other["torch"].state, other["torch"].found) == ("fail", "2.12.1; head has 2.13.0+cpu")
    assert other["torch"].remedy.startswith("/opt/python -m pip install torch==2.13.0 on that node")
    assert (other["mlflow"].state, other["mmsa-dist"].state) == ("warn", "fail")
    assert (bare["torch"].found, bare["torch"].state) == ("missing", "fail")
    assert "mmsa-dist submit" in bare["mmsa-dist"].remedy


def test_versions_are_those_that_were_asked_for() -> None:
    found = lines(across.versions({"here": software({"torch": ">=2.14"})}), "here")
    assert found["torch"].state == "fail" and found["torch"].found == "2.13.0+cpu; mmsa-dist needs >=2.14"


@pytest.mark.parametrize(("ahead", "state"), [(0.0, "ok"), (-0.8, "ok"), (5.0, "warn"), (-90.0, "fail")])
def test_clocks(ahead: float, state: str) -> None:
    node = Node("far", lambda method, timeout: time.time() + ahead)
    found = across.clocks([node])["far"][0]
    assert found.state == state and found.facts["ahead_s"] == pytest.approx(ahead, abs=0.5)
    assert ("time server" in found.remedy) == (state != "ok")


def test_a_node_that_is_slower_than_the_others() -> None:
    def trial(step: float) -> list[Finding]:
        return [Finding("trial", "10 steps", "ok", f"{1e3 * step:.0f} ms a step; all", facts={"step_s": step})]

    found = across.slow_ones({"a": trial(0.1), "b": trial(0.11), "c": trial(0.5)})
    assert [found[node][0].state for node in "abc"] == ["ok", "ok", "warn"]
    assert found["c"][0].found == "500 ms a step, the others 110; all"


def test_a_node_that_is_silent_or_dead_is_red() -> None:
    def silent(*_: Any, timeout: float) -> Any:
        raise TimeoutError

    def dead(*_: Any, timeout: float) -> Any:
        raise RuntimeError("Traceback …\n\nThe actor died: its node has died")

    for call, words in ((silent, "does not answer any more"), (dead, "its node has died")):
        (found,) = Node("n", call).ask("data", {}, 1.0)
        assert (found.group, found.state, found.code) == ("data", "fail", ASIDE)
        assert words in found.found and "ray status" in found.remedy


def test_all_that_is_being_asked_is_ended_at_once() -> None:
    """Though every node is busy, with a check that ends when it is told to."""
    told = threading.Event()

    def call(method: str, *_: Any, timeout: float) -> Any:
        if method == "ask":
            told.wait(60)
            return {"found": []}
        told.set()
        return None

    nodes = Nodes([Node(name, call) for name in "abc"], {})
    asking = threading.Thread(target=nodes.ask, args=("trial", lambda node: {}, 60.0, lambda done, of: None))
    asking.start()
    time.sleep(0.2)
    began = time.monotonic()
    nodes.close()
    asking.join(20)
    assert not asking.is_alive() and time.monotonic() - began < 20


# --- the table --------------------------------------------------------------------------------------------------------


def report(*found: dict[str, list[Finding]], nodes: int = 3) -> Report:
    made = Report([f"n{n}" for n in range(nodes)])
    for each in found:
        made.add(each)
    return made


def shown(report: Report, **settings: Any) -> str:
    console = Console(width=140, highlight=False, **settings)
    with console.capture() as capture:
        report.show(console)
    return capture.get()


BAD = Finding("storage", "write", "fail", "no room", "make some", code=ASIDE)


def test_what_is_the_same_everywhere_is_said_once() -> None:
    well = Finding("storage", "write", "ok", "100 MB/s")
    text = shown(report({"n0": [well], "n1": [well], "n2": [BAD]}))
    assert re.search(r"ok +write +n0, n1 +100 MB/s", text)
    assert re.search(r"FAIL +n2 +no room\s+→ make some", text)
    assert "not ready: 1 red line; each says what to do" in text
    assert re.search(r"ok +write +all 3 nodes", shown(report({f"n{n}": [well] for n in range(3)})))


def test_a_hundred_nodes_fit_on_a_screen_but_for_what_is_wrong() -> None:
    many = {f"n{n}": [Finding("machine", "memory", "ok", f"{n} GiB")] for n in range(100)}
    bad = {f"n{n}": [Finding("machine", "open files", "fail", str(n), "more")] for n in range(6)}
    text = shown(report(many, bad, nodes=100))
    assert len(re.findall("GiB", text)) == 4 and "96 nodes: " in text
    assert len(re.findall("FAIL", text)) == 6


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = report({"n0": [BAD]})
    assert "\x1b[" not in shown(made)
    assert "\x1b[1;31m" in shown(made, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in shown(made, force_terminal=True, color_system="standard")


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([], 0),
        ([Finding("machine", "open files", "warn", "few", "more")], 0),
        ([BAD], 75),
        ([BAD, Finding("data", "one shard", "fail", "damaged", "copy it", code=DATA)], 3),
        ([BAD, Finding("machine", "memory", "fail", "little", "more")], 2),
    ],
)
def test_the_exit_code_is_that_of_what_matters_most(findings: list[Finding], code: int) -> None:
    made = report({"n0": findings})
    assert made.exit_code == code == json.loads(made.json())["exit_code"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--adress", "head:1"], "unknown option --adress; did you mean --address?"),
        (["--skip", "disk"], "disk"),
        (["--timeout", "0"], "--timeout 0: expected a number of seconds"),
        (["--storage-mib", "0"], "--storage-mib 0: expected"),
        (["--address", "head"], "--address head: is not HOST:PORT"),
        (["--address", "ray://head:10001"], "mmsa-dist submit -- doctor"),
        (["--storage", "https://host/x"], "cannot be written to"),
        (["--tracking-uri", "http://bob:s3kret@host"], "MLFLOW_TRACKING_URI"),
        (["--storage", "s3://bob:s3kret@bucket/x"], "--storage holds a user, a password or a signature"),
        (["--data", "https://host/mosi?sig=s3kret"], "--data holds a user, a password or a signature"),
        (["--storage", "s3:/bucket/x"], "--storage s3:/bucket/x: neither a folder nor an address; s3://… is one"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        main(words)
    assert sentence in str(raised.value) and "\n" not in str(raised.value) and "s3kret" not in str(raised.value)


def test_no_cluster_is_said_within_seconds() -> None:
    with pytest.raises(TransientError, match=r"no Ray cluster answers there .*leave the address out"):
        main(["--address", "127.0.0.1:9"])


def doctor(*words: str, cwd: Path) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """The real command; what it found, by line."""
    command = [sys.executable, "-m", "mmsa_dist", "doctor", "--json", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout.startswith("{"), done.stderr
    told = json.loads(done.stdout)
    return {f"{each['group']}, {each['check']}": each for each in told["findings"]}, done


def test_a_laptop_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    """All of it: an all-reduce of two processes, the disk, a trial run of ten steps."""
    found, done = doctor("--timeout", "300", cwd=tmp_path)
    red = [f"{each['found']} {each['remedy']}" for each in found.values() if each["state"] == "fail"]
    assert (done.returncode, red) == (0, [])
    assert found["network, all-reduce, gloo"]["facts"]["bytes_per_s"] > 1e6
    assert found["trial, 10 steps"]["facts"]["step_s"] > 0
    assert found["storage, atomic rename"]["state"] == "ok"
    assert found["data, not looked at"]["state"] == "skip"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_a_damaged_shard_and_a_dead_server_are_red(tmp_path: Path) -> None:
    """Of everything else nothing is: the data's exit code comes first, as the server may be back later."""
    data = packed(tmp_path)
    shard = data / Index.load(data).shards[0].url
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-512])
    words = ["--data", str(data), "--tracking-uri", "http://127.0.0.1:9", "--skip", "network", "storage", "trial"]
    found, done = doctor(*words, cwd=tmp_path)
    damaged, dead = found["data, one shard"], found["mlflow, reachable, writable"]
    assert damaged["state"] == "fail" and shard.name in damaged["found"] + damaged["remedy"]
    assert "pack again" in damaged["remedy"]
    assert (dead["state"], dead["code"]) == ("fail", 75) and "--tracking-uri" in dead["remedy"]
    assert done.returncode == 3


@pytest.mark.fault
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_doctor_that_is_stopped_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """While it writes far more than it will get to."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "mmsa_dist", "doctor", *QUICK, "--storage", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [*command, "--storage-mib", "60000"], cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/.mmsa-dist-doctor-*-0/large")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out, error.splitlines()[-1]) == (code, "", "stopped")
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"] and not list(temporary.iterdir())
