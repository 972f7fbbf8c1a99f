"""A real job on a real cluster, seen while it runs: its metrics scraped as Prometheus does, and `jobs watch`."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from cluster.submit import main as submit
from cluster.watch import main as watch
from cluster.watch_job import Sample, of_nodes
from mmsa_dist.exported import METRICS
from mmsa_dist.ledger import NAMES
from mmsa_dist.run_folder import read_events
from tests.cluster.heads import REPOSITORY, running_head
from tests.data import packed
from tests.end_to_end.started import PATIENCE, two_cpus

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

pytestmark = [pytest.mark.ray, two_cpus, pytest.mark.slow]
JOB = "to-be-seen"
Found = TypeVar("Found")


@dataclass(frozen=True)
class Running:
    """A job that trains on two workers."""

    address: str
    folder: Path
    client: "JobSubmissionClient"

    def samples(self) -> list[Sample]:
        """What all nodes tell, found as Prometheus finds them."""
        answer = self.client._do_request("GET", "/api/prometheus/sd")
        return of_nodes([target for group in answer.json() for target in group["targets"]])[0]

    def until(self, look: Callable[[], Found | None], what: str) -> Found:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := look():
                return found
            if self.client.get_job_status(JOB).is_terminal():
                break
            time.sleep(0.5)
        pytest.fail(f"{what}:\n{self.client.get_job_logs(JOB)[-3000:]}")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """More epochs than there is time for: it is stopped once all was seen."""
    from ray.job_submission import JobSubmissionClient

    data = packed(tmp_path_factory.mktemp("data"), samples=150)
    runs = tmp_path_factory.mktemp("runs")
    train = ["train", "ufen_mtfn", "--data", str(data), "--runs-dir", str(runs), "--workers", "2", "--batch-size", "12"]
    train += ["--epochs", "99999", "--train.patience", "99999", "--tracking.no-enabled"]
    with pytest.MonkeyPatch.context() as patch, running_head() as head:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token))
        where = ["--address", head.address, "--python", sys.executable, "--working-dir", str(REPOSITORY)]
        assert submit([*where, "--detach", "--name", JOB, "--", *train]) == 0
        running = Running(head.address, runs, JobSubmissionClient(head.address))
        try:
            folder = running.until(lambda: next(runs.glob("*/events/rank-1.jsonl"), None), "no rank began").parents[1]
            yield Running(head.address, folder, running.client)
        finally:
            running.client.stop_job(JOB)


def values(samples: list[Sample], name: str) -> list[float]:
    return [each.value for each in samples if each.name == name]


@pytest.fixture(scope="module")
def scraped(job: Running) -> list[Sample]:
    """The first scrape in which all that a run tells is there, and both ranks train."""
    wanted = {name.removeprefix("mmsa_dist_") for name in METRICS} - {"trials", "restarts_total"}

    def look() -> list[Sample] | None:
        samples = job.samples()
        busy = {s.labels["rank"] for s in samples if s.name == "samples_per_second" and s.value > 0}
        return samples if wanted <= {each.name for each in samples} and len(busy) == 2 else None

    return job.until(look, f"not all of {sorted(wanted)} was exported")


def test_all_that_a_run_tells_is_scraped_while_it_runs(job: Running, scraped: list[Sample]) -> None:
    assert {each.labels["run"] for each in scraped} == {job.folder.name}
    for each in scraped:
        assert set(METRICS[f"mmsa_dist_{each.name}"].labels) <= each.labels.keys()
    for name in ("data_stall_ratio", "goodput_ratio"):
        assert values(scraped, name) and all(0 <= value <= 1 for value in values(scraped, name)), name
    assert {each.labels["activity"] for each in scraped if each.name == "activity_seconds_total"} <= NAMES.keys()
    assert max(values(scraped, "step")) >= 8 * (max(values(scraped, "epoch")) - 1), "eight steps an epoch"


def test_the_scraped_rate_is_that_of_the_events(job: Running, scraped: list[Sample]) -> None:
    """Twelve samples a step: both ranks together, over the same while, within what ten seconds differ by."""
    steps = [event for event in read_events(job.folder) if event["event"] in ("first_step", "step")]
    (first, last) = steps[0], steps[-1]
    taken = (last["epoch"] - first["epoch"]) * 90 + (min(90, last["step"] * 12) - min(90, first["step"] * 12))
    rate = taken / (last["time"] - first["time"])
    assert rate / 4 < sum(values(scraped, "samples_per_second")) < 4 * rate


def test_the_job_is_watched_through_its_head(job: Running, scraped: list[Sample], capsys: Any) -> None:
    assert watch([JOB, "--address", job.address]) == 0
    out = capsys.readouterr().out
    for part in (f"job {JOB} at {job.address}", "running for", " of 99999, step", "samples/s of 2 ranks", "goodput"):
        assert part in out, out
    assert "restarts    0" in out and "run.log" not in out and "train loss" in out, "and the log's end"


def test_ray_provisions_grafana_where_the_page_says(job: Running) -> None:
    """A dashboard that is copied there is found by a Grafana that is started with Ray's own configuration."""
    import yaml

    (session,) = {Path(path).parent for path in _sessions(job)}
    grafana = session / "metrics" / "grafana"
    (provider,) = yaml.safe_load((grafana / "provisioning" / "dashboards" / "default.yml").read_text())["providers"]
    assert Path(provider["options"]["path"]).resolve() == (grafana / "dashboards").resolve()
    assert (session / "metrics" / "prometheus" / "prometheus.yml").is_file()
    found = json.loads((session / "prom_metrics_service_discovery.json").read_text())
    assert found[0]["targets"], "what Ray's Prometheus configuration reads"


def _sessions(job: Running) -> list[str]:
    """Where the head keeps the file that names its nodes for Prometheus."""
    folder = next(Path(line.partition("=")[2]) for line in _command(job) if line.startswith("--temp-dir="))
    return [str(path.resolve()) for path in folder.glob("session_*/prom_metrics_service_discovery.json")]


def _command(job: Running) -> list[str]:
    import psutil

    port = f"--dashboard-port={job.address.rpartition(':')[2]}"
    lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return next(line for line in lines if port in line and any(word.startswith("--temp-dir=") for word in line))


def test_a_job_that_is_not_there_is_one_sentence(job: Running) -> None:
    from cluster.errors import ConfigError

    with pytest.raises(ConfigError, match="no job 'nobodys' on this cluster"):
        watch(["nobodys", "--address", job.address])


@pytest.mark.fault
def test_a_killed_rank_is_seen_by_both(job: Running, scraped: list[Sample], capsys: Any) -> None:
    """The restart, and what it was for: in the metrics, through the head, and in the run's folder."""
    os.kill(read_events(job.folder, 1)[0]["pid"], signal.SIGKILL)
    job.until(lambda: 1.0 in values(job.samples(), "restarts_total"), "no restart was exported")
    for words in ([JOB, "--address", job.address], ["--run", str(job.folder)]):
        assert watch(words) == 0
        out = capsys.readouterr().out
        assert "restarts    1" in out and "last error" in out and "rank 1" in out.partition("last error")[2], out
