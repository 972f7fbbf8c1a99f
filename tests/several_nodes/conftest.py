"""A cluster of several machines, its bucket and its MLflow server, each a machine of its own; and a run on one machine.

Each file has a network of its own, which its tests break and mend.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mmsa_dist.run_folder import read_events
from tests.data import packed
from tests.end_to_end.started import Run
from tests.nodes import Network, Node
from tests.shards.remote.servers import KEY, SECRET

EPOCHS = 16
UPLOAD = """
import sys
from pathlib import Path
from tests.shards.remote.servers import Bucket
print(Bucket("http://bucket:5000").upload(Path(sys.argv[1]), "tiny"))
"""


@dataclass
class Site:
    """A head and a second node, whom others may join, a bucket with the data, an MLflow server.

    Attributes:
        data: its address in the bucket.
    """

    network: Network
    head: Node
    second: Node
    bucket: Node
    mlflow: Node
    data: str = ""

    def train(self, runs: Path, *words: str) -> Run:
        """Starts a run of the cluster at its head."""
        where = ["--data", self.data, "--address", self.head.ray_address]
        return Run(runs, "self_mm", *where, *words, on=self.head)

    @cached_property
    def tracking(self) -> list[str]:
        """What sends a run's record to the server, which starts with the first that asks."""
        self.mlflow.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven processes that nothing needs
        self.mlflow.serve("mlflow", 5000, *mlflow_server(self.mlflow))
        return ["--tracking.enabled", "--tracking-uri", "http://mlflow:5000"]

    def gets(self) -> Counter[tuple[str, str]]:
        """How often each node has fetched each tar of the bucket: (address, name) -> times, of the server's own log."""
        log = self.bucket.log("s3").read_text()
        return Counter(re.findall(r'^(\S+) - - \[.*\] "GET /\S+/([^/\s]+\.tar) HTTP', log, re.MULTILINE))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("several"), samples=150)


@pytest.fixture(scope="session")
def words() -> list[str]:
    """Of a run with a label generator and without dropout, whose losses no number of ranks changes."""
    rates = [f"--optim.lr.{group}=1e-4" for group in ("text", "audio", "vision", "rest")]
    still = ["--model.post-text-dropout", "0", "--model.post-audio-dropout", "0"]
    return ["--epochs", str(EPOCHS), "--train.patience", "99999", "--batch-size", "12", *rates, *still]


@pytest.fixture(scope="session")
def undisturbed(words: list[str], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The same run, two ranks of this machine, ZeRO-1; it goes on while the cluster starts."""
    place = ["--data", str(folder), "--launcher", "local", "--workers", "2", "--tracking.no-enabled"]
    run = Run(tmp_path_factory.mktemp("one-node"), "self_mm", *place, *words, "--zero", "1")
    yield run
    run.kill()


@pytest.fixture(scope="module")  # fixtures of a wider scope come first: the cluster is not to wait for it
def one_node(undisturbed: Run) -> Run:
    """That run, once it is finished."""
    undisturbed.result()
    return undisturbed


@pytest.fixture(scope="module")
def site(folder: Path, undisturbed: Run) -> Iterator[Site]:
    user = {
        "AWS_ENDPOINT_URL": "http://bucket:5000", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with Network() as network:
        head, second = (network.node(name, **user) for name in ("head", "second"))
        site = Site(network, head, second, network.node("bucket"), network.node("mlflow"))
        site.bucket.serve("s3", 5000, sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "5000")
        head.start_ray()
        second.start_ray(head)
        done = head.run(sys.executable, "-c", UPLOAD, str(folder))
        assert done.returncode == 0, done.stderr
        site.data = done.stdout.strip()
        yield site


def mlflow_server(node: Node) -> list[str]:
    stores = ["--backend-store-uri", f"sqlite:///{node.folder}/mlflow.db"]
    stores += ["--artifacts-destination", str(node.folder / "artifacts")]
    place = ["--host", "0.0.0.0", "--port", "5000", "--allowed-hosts", "*", "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *stores, *place]


def losses(run: Run) -> dict[int, dict[str, Any]]:
    """Of each epoch what was learned and how it did on the validation split."""
    epochs = [event for event in read_events(run.folder) if event["event"] == "epoch"]
    return {event["epoch"]: {"train_loss": event["train_loss"], **event["valid"]} for event in epochs}


def starts(run: Run) -> list[int]:
    """The numbers of ranks that the run has had, in order."""
    return [int(event["world"]) for event in read_events(run.folder) if event["event"] == "start"]


class Break:
    """Something that befalls a run now, and how long it takes to get over it: the table at the end of the test run."""

    table: ClassVar[list[str]] = []

    def __init__(self, what: str) -> None:
        self.what, self.at = what, time.time()

    def until_back(self, run: Run, worlds: list[int] | None = None) -> None:
        """Waits for an epoch after the break; of the last of so many ranks that the run has had one after another."""
        back = 0.0

        def trained(event: dict[str, Any]) -> bool:
            nonlocal back
            back = event["time"]
            begun = [e for e in read_events(run.folder) if e["event"] == "start"] if event["event"] == "epoch" else []
            numbers = [e["world"] for e in begun]
            return bool(begun) and worlds in (None, numbers) and back > max(self.at, begun[-1]["time"])

        run.until(trained, f"no epoch of {worlds or 'any'} ranks")
        ends = [e["time"] for e in read_events(run.folder, None) if e["event"] == "attempt_end" and e["time"] > self.at]
        noticed = f"{ends[0] - self.at:4.0f} s" if ends else "      "
        self.table.append(f"{noticed} | {back - self.at:4.0f} s | {self.what}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in ["noticed | training again | what befell it", *Break.table] if Break.table else []:
        terminalreporter.write_line(line)
