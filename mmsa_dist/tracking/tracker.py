"""What the training loop knows of tracking: an object that takes an epoch's numbers and never makes it wait.

Rank 0 puts numbers into a queue, a thread sends them, and what cannot be sent goes to ``mlflow-spill.jsonl`` in the run
folder and is sent at the end.
"""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from mmsa_dist import run_folder
from mmsa_dist.errors import DataError, MmsaError
from mmsa_dist.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SPILL = "mlflow-spill.jsonl"
LINK = "mlflow.json"
METRICS_PER_CALL = 1000
WARN_EVERY = 60.0
"""Seconds between two warnings that MLflow cannot be reached."""
RETRY_EVERY = 30.0
"""Seconds after a failure during which nothing is sent: a dead server must not fill the queue."""


class Tracker(Protocol):
    """What the loop knows of tracking."""

    def epoch(self, metrics: Mapping[str, Any], step: int) -> None:
        """Records numbers at an optimizer step; values that are not numbers are left out. Never raises, never waits."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None:
        """Sends what is left."""


class NullTracker:
    """Records nothing: of ranks other than 0, and where tracking is off."""

    def epoch(self, metrics: Mapping[str, Any], step: int) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@dataclass(frozen=True)
class Link:
    """``mlflow.json`` of a run folder: the run in MLflow that belongs to it."""

    uri: str
    run_id: str
    experiment: str
    experiment_id: str
    model: str | None = None
    """``models:/NAME/VERSION`` once it is registered."""

    def save(self, run_dir: Path) -> None:
        """Without a password: that stays in the environment."""
        run_folder.write_json(run_dir / LINK, {**asdict(self), "uri": store.shown(self.uri)})

    @classmethod
    def load(cls, run_dir: Path) -> "Link | None":
        """None where the run is not tracked.

        Raises:
            DataError: the file is damaged.
        """
        path = run_dir / LINK
        if not path.is_file():
            return None
        try:
            link = cls(**run_folder.read_json(path))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be read, though it names the run in MLflow; put it there again, or remove it to go on "
                "untracked"
            ) from error
        given = os.environ.get("MLFLOW_TRACKING_URI")
        return replace(link, uri=given) if given and store.shown(given) == link.uri else link


def open_tracker(run_dir: Path, rank: int = 0) -> Tracker:
    """The tracker of a rank: rank 0's sends to the run that `open_run` opened, all others' do nothing."""
    link = Link.load(run_dir) if rank == 0 else None
    if link is None:
        return NullTracker()
    return MlflowTracker(link.uri, link.run_id, run_dir / SPILL, tell=partial(_tell, run_dir))


def _tell(run_dir: Path, message: str) -> None:
    """A warning among rank 0's events, which the driver shows; a rank's own log is seen by nobody while it trains."""
    try:
        events = run_folder.Events(run_dir, 0)
        events.write("warning", message=message)
        events.close()
    except OSError:  # training must not end of it
        log.warning(message)


class MlflowTracker:
    """Sends numbers from a thread, and samples of what the machine does (``system/…``) every ten seconds.

    Args:
        spill: file for what cannot be sent.
        tell: takes a warning, at most one in `WARN_EVERY` seconds, from any thread.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        spill: Path,
        sample_every: float | None = None,
        capacity: int = 1000,
        tell: Callable[[str], None] = log.warning,
    ) -> None:
        self.uri, self.run_id, self.spill, self._tell = uri, run_id, spill, tell
        interval = (
            os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "10") if sample_every is None else sample_every
        )
        self._interval = float(interval)
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(capacity)
        self._spill_lock = threading.Lock()
        self._warned = self._failed = float("-inf")
        self._spilled = 0
        self._hand: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def epoch(self, metrics: Mapping[str, Any], step: int) -> None:
        row = {"step": step, "timestamp": int(time.time() * 1000), "metrics": only_numbers(metrics)}
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._keep(row, "its queue is full")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(60.0 if exception[0] is None else 5.0)  # a rank that failed has its error to tell

    def close(self, timeout: float = 60.0) -> None:
        """Waits at most `timeout` seconds for the last numbers; what is not sent by then is in the spill."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            pass
        else:
            self._thread.join(timeout)
        if self._thread.is_alive():
            self._keep_waiting()
            self._warn(f"{store.shown(self.uri)} did not take the last ones within {timeout:.0f} s")

    def _keep_waiting(self) -> None:
        """Into the spill with what the thread has not sent, which may end with this process; a row twice is as once."""
        rows = [self._hand]
        with suppress(queue.Empty):
            while True:
                rows.append(self._queue.get_nowait())
        for row in rows:
            if row is not None:
                self._keep(row, None)
        self._queue.put_nowait(None)

    def _run(self) -> None:
        client: MlflowClient | None = None
        sampler = Sampler()
        next_sample, sampled = time.monotonic() + self._interval, False  # to import MLflow would hold up the first step
        row: dict[str, Any] | None = None
        while True:
            try:
                row = self._hand = self._queue.get(timeout=max(0.01, next_sample - time.monotonic()))
                last = row is None
            except queue.Empty:
                row, last = None, False
            if last or time.monotonic() >= next_sample or (row is not None and not sampled):
                sampled = True
                if sample := sampler.row():
                    client = self._send(client, sample)
                next_sample = time.monotonic() + self._interval
            if row is not None:
                client = self._send(client, row)
                self._hand = None
            if last:
                break
        down = time.monotonic() - self._failed < RETRY_EVERY  # then whoever ends the run tries again
        if self._spilled and client is not None and not down:
            self._try_replay(client)

    def _send(self, client: "MlflowClient | None", row: dict[str, Any]) -> "MlflowClient | None":
        """Sends one row or keeps it; gives the client for the next time."""
        if time.monotonic() - self._failed < RETRY_EVERY:
            self._keep(row, None)
            return client
        try:
            client = client or _client(self.uri)
            log_rows(client, self.run_id, [row])
        except Exception as error:
            self._failed = time.monotonic()
            self._keep(row, short(error))
        return client

    def _try_replay(self, client: "MlflowClient") -> None:
        try:
            replay(client, self.run_id, self.spill)
        except Exception as error:
            self._warn(f"{short(error)}; `finish_run` sends it")

    def _keep(self, row: dict[str, Any], reason: str | None) -> None:
        try:
            with self._spill_lock, self.spill.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._spilled += 1
        except OSError as error:
            reason = (
                f"{reason or 'it is down'}, and {self.spill} cannot be written ({error.strerror}): numbers are lost"
            )
        if reason:
            self._warn(reason)

    def _warn(self, reason: str) -> None:
        if time.monotonic() - self._warned >= WARN_EVERY:
            self._warned = time.monotonic()
            self._tell(f"MLflow takes no numbers, training goes on and they wait in {self.spill}: {reason}")


class Sampler:
    """What the machine does, in MLflow's own names for its *System metrics* page.

    MLflow's own monitor ends for good at the first failed call, and holds up the end of a run while the server is down;
    so only its probes are used here, and their numbers go the way of all others.
    """

    def __init__(self) -> None:
        self._monitors: list[Any] | None = None
        self._step = 0

    def row(self) -> dict[str, Any] | None:
        """One sample of CPU, memory, disk, network and, where there is one, GPU; None where it cannot be had."""
        metrics: dict[str, float] = {}
        try:
            self._monitors = _probes() if self._monitors is None else self._monitors
            for probe in self._monitors:
                probe.collect_metrics()
                metrics.update({f"system/{name}": float(value) for name, value in probe.aggregate_metrics().items()})
                probe.clear_metrics()
        except Exception:  # a machine that cannot be looked into is no reason to stop
            log.debug("no system metrics", exc_info=True)
            self._monitors = []
        self._step += 1
        return {"step": self._step - 1, "timestamp": int(time.time() * 1000), "metrics": metrics} if metrics else None


def _probes() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    probes: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        probes.append(GPUMonitor())
    except Exception:  # no NVIDIA driver or no binding for it
        log.debug("no GPU metrics", exc_info=True)
    return probes


PREFIXES = {"valid": "valid_", "parts": "loss_", "lr": "lr_"}
"""Groups of an epoch's numbers -> what their names begin with in MLflow."""


def epoch_numbers(event: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch's numbers under plain names: train_loss, loss_T, valid_mae, lr_text, …"""
    numbers: dict[str, Any] = {}
    for name, value in event.items():
        if name in PREFIXES:
            numbers.update({PREFIXES[name] + key: number for key, number in value.items()})
        elif name not in ("event", "step", "time"):
            numbers[name] = value
    return numbers


def replay(client: "MlflowClient", run_id: str, spill: Path) -> int:
    """Sends what was spilled and removes the file; how many rows. Sending a row twice changes nothing."""
    if not spill.is_file():
        return 0
    rows = []
    for line in spill.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the line that a kill cut short
    log_rows(client, run_id, rows)
    spill.unlink()
    return len(rows)


def _client(uri: str) -> "MlflowClient":
    """A client for the thread. A sqlite file that is not there lies on the driver's machine: nothing is made here."""
    if uri.startswith("sqlite") and not (file := Path(uri.removeprefix("sqlite:///"))).is_file():
        raise FileNotFoundError(f"{file} is not on this machine; runs over several machines need a server")
    return store.connect(uri)


def log_rows(client: "MlflowClient", run_id: str, rows: list[dict[str, Any]]) -> None:
    """Sends rows ``{"step", "timestamp" in ms, "metrics"}`` in as few calls as MLflow allows."""
    from mlflow.entities import Metric

    metrics = [
        Metric(name, float(value), row["timestamp"], row["step"])
        for row in rows
        for name, value in row["metrics"].items()
    ]
    for begin in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[begin : begin + METRICS_PER_CALL])


def only_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Without what is undefined (None) or no number."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def short(error: Exception) -> str:
    """What is wrong, without credentials: a sentence of ours whole, with its remedy; of others the beginning."""
    if isinstance(error, MmsaError):
        return str(error)
    return store.shown(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
