"""What a run tells Prometheus while it trains, by way of Ray: each node's agent exports what processes of the node set.

A thread looks once a second at what training notes anyway; the loop itself sets nothing and waits for nothing. Ray
forgets a gauge that is not set again within its interval of ten seconds: what a run that has ended, or a rank that
died, has said last goes away by itself. Names are those below, which Ray begins with ``ray_``.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mmsa_dist import run_folder
from mmsa_dist.ledger import USEFUL, Ledger, earlier
from mmsa_dist.run_folder import Events

if TYPE_CHECKING:
    from mmsa_dist.recipe import Recipe

log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two looks."""

WINDOW = 10.0
"""Seconds over which a rate is taken: as long as Ray takes to hand on what was set."""


@dataclass(frozen=True)
class Metric:
    """One name, as Prometheus knows it.

    Attributes:
        counter: it only grows; what is told is how much.
    """

    text: str
    labels: tuple[str, ...] = ("run", "sweep")
    counter: bool = False


RANK = ("run", "sweep", "rank")

METRICS = {
    "mmsa_dist_samples_per_second": Metric("samples that this rank trained on a second, its share of each step", RANK),
    "mmsa_dist_data_stall_ratio": Metric("share of training that was waiting for a batch, lately, 0 to 1", RANK),
    "mmsa_dist_activity_seconds_total": Metric(
        "seconds of a rank by what they went into, as in the run's time.json", (*RANK, "activity"), counter=True
    ),
    "mmsa_dist_goodput_ratio": Metric(
        "share of the run's time that went into steps and evaluations that counted, restarts included, 0 to 1"
    ),
    "mmsa_dist_checkpoint_age_seconds": Metric(
        "since the newest checkpoint was taken, or the run went on where there is none: the work at stake"
    ),
    "mmsa_dist_restarts_total": Metric("attempts after a run's first, told by each anew", counter=True),
    "mmsa_dist_epoch": Metric("the epoch that is being trained, from 1"),
    "mmsa_dist_step": Metric("optimizer steps in all, those of earlier attempts included"),
    "mmsa_dist_trials": Metric(
        "trials of a sweep by state: waiting, running, done, stopped (early), failed", ("sweep", "state")
    ),
}

Labels = dict[str, str]
Told = Iterator[tuple[str, Labels, float]]
"""Name, the labels that differ within one process, and a gauge's value or a counter's growth."""


class Exporter:
    """Sets metrics in a thread, as a context, in a process of a Ray cluster. Training does not end of its trouble.

    Args:
        look: gives what there is to tell, once a second.
        labels: that all of it has, where it has such a label.
    """

    def __init__(self, look: Callable[[], Told], **labels: str) -> None:
        self._look, self._labels = look, labels
        self._metrics: dict[str, Any] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="export-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        try:
            while not self._over.wait(EVERY):
                for name, labels, value in self._look():
                    told = {**self._labels, **labels}
                    self._tell(name, {label: told[label] for label in METRICS[name].labels}, value)
        except Exception as error:  # of Ray, whose cluster may be ending, or of a disk
            if not self._over.is_set():
                log.warning("no more metrics are exported: %s: %s", type(error).__name__, error)

    def _tell(self, name: str, labels: Labels, value: float) -> None:
        known = METRICS[name]
        if name not in self._metrics:
            from ray.util.metrics import Counter, Gauge

            self._metrics[name] = (Counter if known.counter else Gauge)(name, known.text, known.labels)
        if not known.counter:
            self._metrics[name].set(value, labels)
        elif value > 0:  # Ray's refuses 0
            self._metrics[name].inc(value, labels)


@dataclass
class Rank:
    """What one rank tells; ranks tell of themselves, and rank 0 of the run too.

    Attributes:
        seen: time, samples, and seconds waited and trained of the last looks.
        booked: seconds by activity that were told already.
    """

    folder: Path
    rank: int
    world: int
    events: Events
    ledger: Ledger
    began: float = field(default_factory=time.time)
    seen: deque[tuple[float, float, float, float]] = field(default_factory=deque)
    booked: dict[str, float] = field(default_factory=dict)
    before: "Before | None" = None
    shares: "Shares | None" = None

    def look(self) -> Told:
        """What there is to tell now."""
        booked = self.ledger.seen()
        for activity, seconds in booked.items():
            before = self.booked.get(activity, 0.0)
            yield "mmsa_dist_activity_seconds_total", {"activity": activity}, seconds - before
            self.booked[activity] = max(before, seconds)
        if self.events.place is not None:
            yield from self._rates(*self.events.place, booked)
        if self.rank == 0:
            yield from self._run(booked)

    def _rates(self, epoch: int, step: int, booked: dict[str, float]) -> Told:
        self.shares = self.shares or Shares.of(self.folder, self.rank, self.world)
        now = (time.monotonic(), self.shares.until(epoch, step), booked.get("data", 0.0), booked.get("step", 0.0))
        self.seen.append(now)
        while len(self.seen) > 2 and now[0] - self.seen[1][0] >= WINDOW:
            self.seen.popleft()
        seconds, samples, waited, trained = (after - before for before, after in zip(self.seen[0], now, strict=True))
        if seconds > 0:
            yield "mmsa_dist_samples_per_second", {}, samples / seconds
        if waited + trained > 0:
            yield "mmsa_dist_data_stall_ratio", {}, waited / (waited + trained)

    def _run(self, booked: dict[str, float]) -> Told:
        now = time.time()
        if self.before is None:
            self.before = Before.of(self.folder, self.began)
            yield "mmsa_dist_restarts_total", {}, self.before.restarts
        useful = self.before.useful + sum(booked.get(name, 0.0) for name in USEFUL)
        if (wall := self.before.wall + now - self.before.since) > 0:
            yield "mmsa_dist_goodput_ratio", {}, useful / wall
        yield "mmsa_dist_checkpoint_age_seconds", {}, max(0.0, now - (self.events.kept or self.before.saved))
        if self.events.place is not None and self.shares is not None:
            epoch, step = self.events.place
            yield "mmsa_dist_epoch", {}, epoch
            yield "mmsa_dist_step", {}, (epoch - 1) * self.shares.steps + step


@dataclass(frozen=True)
class Before:
    """What was before this attempt of a run.

    Attributes:
        wall: seconds of earlier attempts. useful: those of them that counted. restarts: as `ledger.Account`.
        since: when this one took over, in Unix time. saved: when the newest checkpoint was taken, else `since`.
    """

    wall: float
    useful: float
    restarts: int
    since: float
    saved: float

    @classmethod
    def of(cls, folder: Path, began: float) -> "Before":
        """By the run's events; `began` is when this rank did."""
        past, since = earlier(folder)
        saved = [taken for event in run_folder.read_events(folder) if (taken := run_folder.taken(event))]
        since = began if since is None else since
        useful = sum(past.seconds.get(name, 0.0) for name in USEFUL)
        return cls(past.wall, useful, past.restarts, since, saved[-1] if saved else since)


@dataclass(frozen=True)
class Shares:
    """How many samples of a run are one rank's, by the run's ``plan.json``.

    Attributes:
        samples: of an epoch, of all ranks. batch: of a step. steps: of an epoch.
        slots: where this rank's share of a whole step begins and ends.
    """

    samples: int
    batch: int
    steps: int
    slots: tuple[int, int]

    @classmethod
    def of(cls, folder: Path, rank: int, world: int) -> "Shares":
        plan = run_folder.read_json(folder / "plan.json")
        batch = int(plan["global_batch"])
        each = -(-batch // (world * int(plan["accumulation"]))) * int(plan["accumulation"])
        slots = (min(batch, rank * each), min(batch, (rank + 1) * each))
        return cls(int(plan["train_samples"]), batch, int(plan["steps_per_epoch"]), slots)

    def until(self, epoch: int, step: int) -> float:
        """The rank's samples up to a step; those of an epoch's last one, which may be smaller, in proportion."""
        share = (self.slots[1] - self.slots[0]) / self.batch
        return ((epoch - 1) * self.samples + min(step * self.batch, self.samples)) * share


def of_rank(recipe: "Recipe", folder: Path, rank: int, world: int, events: Events, ledger: Ledger) -> Exporter:
    """What exports a rank's metrics, for a worker of Ray Train."""
    told = Rank(folder, rank, world, events, ledger)
    sweep = str(recipe.tracking.tags.get("sweep", ""))
    return Exporter(told.look, run=folder.name, sweep=sweep, rank=str(rank))
