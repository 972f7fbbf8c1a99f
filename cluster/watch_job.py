"""A job as its cluster shows it to who has only the dashboard's address, and its token where it asks for one.

The job's state and its log come through the head, always: the log has the run's name, its epochs and its errors. What
ranks measure (`mmsa_dist_*`) is with each node's agent, which the head names and does not pass on: it is read from the
nodes where they can be reached from here, or from a Prometheus that reads them (``--prometheus``); else the screen
says that it is not there.
"""

import asyncio
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster import stream
from cluster.errors import TransientError
from cluster.seen import ENDED, FAILED, RUNNING, Rank, Seen, duration

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PREFIX = "ray_mmsa_dist_"
"""Begins the names of our metrics, as Ray exports them."""

PATIENCE = 3.0
"""Seconds that a node, or a Prometheus, may take to answer."""

KEPT = 500
"""Lines of a log that are kept to be shown."""

STATES = {"PENDING": RUNNING, "RUNNING": RUNNING, "SUCCEEDED": ENDED, "STOPPED": ENDED, "FAILED": FAILED}


# --- metrics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One value of a metric of ours: its name without `PREFIX`, its labels."""

    name: str
    labels: dict[str, str]
    value: float


def parsed(text: str) -> list[Sample]:
    """Our metrics in what a node's agent answers."""
    from prometheus_client.parser import text_string_to_metric_families

    own = "\n".join(line for line in text.splitlines() if line.startswith(PREFIX))
    return [
        Sample(sample.name.removeprefix(PREFIX), dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(f"{own}\n")
        for sample in family.samples
    ]


def of_nodes(targets: list[str]) -> tuple[list[Sample], list[str]]:
    """What the agents at ``host:port`` tell, and which of them did not answer."""

    def ask(target: str) -> list[Sample] | None:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=PATIENCE) as answer:
                return parsed(answer.read().decode("utf-8", "replace"))
        except (OSError, ValueError, http.client.HTTPException):
            return None

    with ThreadPoolExecutor(min(16, max(1, len(targets)))) as pool:
        told = dict(zip(targets, pool.map(ask, targets), strict=True))
    silent = [target for target, samples in told.items() if samples is None]
    return [sample for samples in told.values() for sample in samples or ()], silent


def of_prometheus(address: str) -> list[Sample]:
    """What a Prometheus knows of our metrics now.

    Raises:
        TransientError: it does not answer, or what answers is none.
    """
    query = urllib.parse.urlencode({"query": f'{{__name__=~"{PREFIX}.+"}}'})
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/v1/query?{query}", timeout=PATIENCE) as answer:
            found = json.load(answer)["data"]["result"]
        return [
            Sample(labels["__name__"].removeprefix(PREFIX), labels, float(value))
            for labels, (_, value) in ((each["metric"], each["value"]) for each in found)
        ]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise TransientError(f"--prometheus {address}: no Prometheus answers there ({why})") from error


def filled(seen: Seen, samples: list[Sample], runs: set[str]) -> Seen:
    """`seen` with what the metrics of these runs (or of sweeps of these names) say; the newest run where there are
    several. A rank that began again is told twice for a while: the one of which there is more is meant."""
    trials = {s.labels["state"]: int(s.value) for s in samples if s.name == "trials" and s.labels["sweep"] in runs}
    own = [s for s in samples if s.labels.get("run") in runs]
    told: dict[str, float] = {}
    for sample in own:
        if "rank" not in sample.labels:
            least = sample.name == "checkpoint_age_seconds"
            known = told.get(sample.name, sample.value)
            told[sample.name] = min(known, sample.value) if least else max(known, sample.value)
    rates: dict[int, dict[str, float]] = {}
    for sample in own:
        if sample.name in ("samples_per_second", "data_stall_ratio"):
            rank = rates.setdefault(int(sample.labels["rank"]), {})
            rank[sample.name] = max(rank.get(sample.name, 0.0), sample.value)
    ranks = [Rank(n, rates[n].get("samples_per_second"), rates[n].get("data_stall_ratio")) for n in sorted(rates)]
    epoch = told.get("epoch")
    more: dict[str, Any] = {"ranks": ranks, "goodput": told.get("goodput_ratio")}
    more |= {"age": told.get("checkpoint_age_seconds"), "trials": trials}
    if epoch is not None:
        more |= {"epoch": int(epoch), "restarts": int(told.get("restarts_total", 0))}
        if seen.steps and "step" in told:
            more["step"] = int(told["step"]) - (int(epoch) - 1) * seen.steps
    return replace(seen, **more)


# --- the log ----------------------------------------------------------------------------------------------------------


class Log:
    """What the lines of a job's log say of its run, taken one by one.

    Attributes:
        runs: names of the folders of runs and sweeps that it has begun, the newest last.
        phase: what is under way before the first epoch, in its own words; '' from then on.
    """

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.phase = ""
        self.lines: deque[str] = deque(maxlen=KEPT)
        self._seen = Seen("")
        self._open = ""

    def take(self, text: str) -> None:
        """More of the log; the last line may go on with the next."""
        *lines, self._open = (self._open + text).split("\n")
        for line in filter(str.strip, lines):
            self.lines.append(line)
            self._take(line)

    def seen(self, title: str, lines: int) -> Seen:
        return replace(self._seen, title=title, log=list(self.lines)[-lines:] if lines else [])

    def _take(self, line: str) -> None:
        seen = self._seen
        if begun := re.match(r"(?:run|sweep) (/\S.*)$", line):
            self.runs.append(begun[1].rstrip("/").rpartition("/")[2])
            self._seen, self.phase = Seen("", error=seen.error), ""
        elif sums := re.search(r"-> ([\d,]+) steps?; at most ([\d,]+) epochs?", line):
            seen.steps, seen.epochs = (int(number.replace(",", "")) for number in sums.groups())
        elif step := re.match(r"epoch +(\d+)  step (\d+) of (\d+)  loss (\S+)", line):
            seen.epoch, seen.step, seen.steps = (int(number) for number in step.groups()[:3])
            seen.loss = float(step[4])
        elif epoch := re.match(r"epoch +(\d+)  train loss (\S+)  valid (\S+ \S+?)(  \(best\))?  \d+ s", line):
            seen.epoch, seen.step = int(epoch[1]), seen.steps
            seen.loss = float(epoch[2])
            seen.result = f"epoch {epoch[1]}: {epoch[3]}{', the best' if epoch[4] else ''}"
        elif again := re.match(r"(.*); starting again .*\((\d+) of \d+\)$", line):
            seen.error, seen.restarts = again[1], int(again[2])
        elif line.startswith("error: "):
            seen.error = line.removeprefix("error: ")
        elif re.match(r"starting ranks|waiting for |rank \d+ of \d+ is up", line):
            self.phase = line.partition(" (pid")[0]
        if seen.epoch is not None:
            self.phase = ""


class Followed(Log):
    """A job's log, which a thread follows from its beginning; a broken connection is taken up again."""

    def __init__(self, client: "JobSubmissionClient", job: str) -> None:
        super().__init__()
        self._client, self._job = client, job
        self._lock = threading.Lock()
        told = client.get_job_logs(job)
        self.take(told)  # what there is already is seen at once
        self._taken = len(told)
        self._thread = threading.Thread(target=self._work, name="follow-log", daemon=True)
        self._thread.start()

    def seen(self, title: str, lines: int) -> Seen:
        with self._lock:
            return super().seen(title, lines)

    def settle(self, seconds: float) -> None:
        """Waits until it has come as far as the job, which has ended, or for some seconds."""
        self._thread.join(timeout=seconds)

    def _work(self) -> None:
        asyncio.run(self._follow())

    async def _follow(self) -> None:
        import aiohttp

        while True:
            try:
                await stream.followed(self._client, self._job, self._taken, self._grow)
                details = await asyncio.to_thread(self._client.get_job_info, self._job)
                if details.status.is_terminal():
                    return
            except (TransientError, RuntimeError, OSError, aiohttp.ClientError):
                pass  # whoever looks at the job's state hears of it
            await asyncio.sleep(1.0)

    def _grow(self, new: str) -> None:
        self._taken += len(new)
        with self._lock:
            self.take(new)


# --- the job ----------------------------------------------------------------------------------------------------------


class Job:
    """A job of a cluster.

    Args:
        client: of the head. prometheus: the address of one that reads the nodes; None asks the nodes themselves.
        lines: of its log to show.
    """

    def __init__(self, client: "JobSubmissionClient", job: str, prometheus: str | None, lines: int) -> None:
        self._client, self.job, self._prometheus, self._lines = client, job, prometheus, lines
        self._log = Followed(client, job)
        self._title = f"job {job} at {client.get_address()}"

    def look(self) -> Seen:
        """What there is to see now.

        Raises:
            RuntimeError: the head does not know the job, or does not answer.
        """
        details = self._client.get_job_info(self.job)
        ended = details.status.is_terminal()
        if ended:
            self._log.settle(PATIENCE)
        seen = self._log.seen(self._title, self._lines)
        seen.kind, seen.state = STATES.get(details.status.value, RUNNING), _state(details)
        if ended:
            return seen
        seen.state += f"; {self._log.phase}" if self._log.phase else ""
        seen.notes, samples = [], []
        try:
            samples = self._samples(seen.notes)
        except TransientError as error:
            seen.notes.append(str(error))
        except (OSError, RuntimeError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            seen.notes.append(f"the head does not say where its nodes are ({why}); asking again")
        return filled(seen, samples, set(self._log.runs[-1:]))

    def _samples(self, notes: list[str]) -> list[Sample]:
        if self._prometheus:
            return of_prometheus(self._prometheus)
        targets = list(self._targets())
        samples, silent = of_nodes(targets)
        if silent and not samples:  # the dashboard and the autoscaler are asked too, and have nothing of ours
            notes.append(
                f"throughput, goodput and checkpoints are measured on the nodes, and {silent[0]} (of {len(silent)} "
                "such) cannot be reached from here; --prometheus URL asks one that can, --run DIR reads the run's "
                "folder where that is on a disk of this machine"
            )
        return samples

    def _targets(self) -> Iterator[str]:
        """Where the nodes' agents listen, by the head."""
        answer = self._client._do_request("GET", "/api/prometheus/sd", timeout=PATIENCE)
        for group in answer.json() if answer.status_code == 200 else ():
            yield from group["targets"]


def _state(details: "JobDetails") -> str:
    """A job's state, for how long it has been in it, and what it ended with."""
    state = str(details.status.value).lower()
    begin, end = details.start_time, details.end_time
    if details.status.is_terminal():
        code = "" if details.driver_exit_code in (None, 0) else f", exit code {details.driver_exit_code}"
        return f"{state}{code}" + (f", took {duration((end - begin) / 1000)}" if begin and end else "")
    return f"{state} for {duration(time.time() - begin / 1000)}" if begin else state
