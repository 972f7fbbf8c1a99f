"""Where the seconds of a run go: each is booked under one name.

A rank books as it goes, and says what it has booked with every event, so that little is unknown of one that is killed.
`account` puts together what all attempts of a run have booked, and what its driver saw of the time between them.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from mmsa_dist import run_folder

NAMES = {
    "start": "until the loop begins: processes, imports, data set, system, engine, dry run",
    "data": "waiting for a batch",
    "step": "optimizer steps",
    "evaluation": "the validation split after each epoch, and all splits at the end",
    "checkpoint": "the loop held up by a checkpoint",
    "other": "records, and ending",
    "restart": "from where ranks have died until the loop goes on",
    "lost": "work of ranks that died, after their last checkpoint",
}
"""What a second can be booked under."""

USEFUL = ("step", "evaluation")
Item = TypeVar("Item")


class Ledger:
    """Seconds by name, of one process; at any time exactly one name is booked under, "start" at first.

    Args:
        watcher: is told of each stretch that ended, by name: a sign of life.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, watcher: Callable[[str], None] = lambda name: None
    ) -> None:
        self._clock, self._name, self._since = clock, "start", clock()
        self._watcher = watcher
        self._seconds: dict[str, float] = {}

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Books under `name` inside, and under what it was before afterwards."""
        assert name in NAMES
        before = self._turn(name)
        try:
            yield
        finally:
            self._turn(before)

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; books what it takes to get them under "data"."""
        while True:
            with self.under("data"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def beat(self) -> None:
        """Books what there is until now: a sign of life in the middle of a long stretch."""
        self._turn(self._name)

    def booked(self) -> dict[str, float]:
        """Seconds by name until now."""
        self._turn(self._name)
        return {name: round(seconds, 4) for name, seconds in self._seconds.items()}

    def seen(self) -> dict[str, float]:
        """The same, for another thread; books nothing. What is turned over meanwhile may be missed until the next."""
        seconds, name, since = self._seconds.copy(), self._name, self._since
        seconds[name] = seconds.get(name, 0.0) + max(0.0, self._clock() - since)
        return seconds

    def _turn(self, name: str) -> str:
        now = self._clock()
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        before, self._name, self._since = self._name, name, now
        self._watcher(before)
        return before


@dataclass(frozen=True)
class Account:
    """A run's time.

    Attributes:
        wall: seconds while a driver was running it; those between an interrupted run and its ``--resume`` are none.
        seconds: the same by name (`NAMES`).
        restarts: attempts after the first.
    """

    wall: float
    seconds: dict[str, float]
    restarts: int

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps and evaluations that counted."""
        return sum(self.seconds.get(name, 0.0) for name in USEFUL) / self.wall if self.wall else 0.0

    @property
    def stall(self) -> float:
        """The share of training that was waiting for data."""
        waited, trained = self.seconds.get("data", 0.0), self.seconds.get("step", 0.0)
        return waited / (waited + trained) if waited + trained else 0.0

    def __str__(self) -> str:
        shares = ", ".join(
            f"{name} {100 * self.seconds[name] / self.wall:.1f} %" for name in NAMES if self.seconds.get(name)
        )
        again = f" ({self.restarts} restart{'s' if self.restarts > 1 else ''})" if self.restarts else ""
        return f"time {self.wall:.0f} s{again}: {shares}; goodput {100 * self.goodput:.1f} %"

    def dump(self) -> dict[str, Any]:
        """For ``time.json`` and MLflow."""
        by_name = {f"{name}_s": self.seconds.get(name, 0.0) for name in NAMES}
        rates = {"goodput": self.goodput, "data_stall": self.stall}
        return {"wall_s": self.wall, **by_name, **rates, "restarts": self.restarts}


def account(folder: Path) -> Account:
    """What the events of the run in `folder` say, of its driver and of rank 0."""
    ranks = _of_ranks(folder)
    return _account(ranks, _attempts(folder, ranks))


def earlier(folder: Path) -> tuple[Account, float | None]:
    """The same of all attempts before the one that goes on, and since when that one's time counts, in Unix time: from
    the end of the one before, where the same driver began both. None where no driver has said that it began."""
    ranks = _of_ranks(folder)
    attempts = _attempts(folder, ranks)
    past = _account(ranks, attempts[:-1])
    if not attempts:
        return past, None
    begun, _, resumed = attempts[-1]
    since = begun if resumed or len(attempts) == 1 else attempts[-2][1]
    return replace(past, restarts=len(attempts) - 1), since


Attempt = tuple[float, float, bool]
"""Begin, end, and whether the driver has begun anew before."""


def _of_ranks(folder: Path) -> list[dict[str, Any]]:
    return [event for event in run_folder.read_events(folder) if "booked" in event]


def _attempts(folder: Path, ranks: list[dict[str, Any]]) -> list[Attempt]:
    attempts: list[Attempt] = []
    driver = run_folder.read_events(folder, None)
    for event, after in pairwise([*driver, None]):
        assert event is not None
        if event["event"] != "attempt":
            continue
        begun = event["time"]
        if after is not None and after["event"] == "attempt_end":
            end = after["time"]
        else:  # the driver was killed
            until = after["time"] if after is not None else float("inf")
            end = max((e["time"] for e in ranks if begun <= e["time"] < until), default=begun)
        attempts.append((begun, end, event["resumed"]))
    return attempts


def _account(ranks: list[dict[str, Any]], attempts: list[Attempt]) -> Account:
    seconds = dict.fromkeys(NAMES, 0.0)
    for number, (begun, end, resumed) in enumerate(attempts):
        if number and not resumed:
            seconds["restart"] += begun - attempts[number - 1][1]
        for name, spent in _of_attempt([e for e in ranks if begun <= e["time"] <= end], begun, end).items():
            seconds["restart" if name == "start" and number else name] += spent
    seconds = {name: spent for name, spent in seconds.items() if spent > 0}
    return Account(_wall(attempts), seconds, max(0, len(attempts) - 1))


def _wall(attempts: list[Attempt]) -> float:
    wall = sum(end - begun for begun, end, _ in attempts)
    return wall + sum(after[0] - before[1] for before, after in pairwise(attempts) if not after[2])


def _of_attempt(events: list[dict[str, Any]], begun: float, end: float) -> Mapping[str, float]:
    """Seconds by name of one attempt, from its driver's `begun` to its `end`."""
    if not events:
        return {"start": end - begun}
    last = events[-1]
    seconds = dict(last["booked"])
    seconds["start"] = seconds.get("start", 0.0) + events[0]["time"] - begun - events[0]["booked"].get("start", 0.0)
    if last["event"] in ("end", "stopped"):
        seconds["other"] = seconds.get("other", 0.0) + end - last["time"]
        return seconds
    kept: dict[str, float] = next((e["kept"] for e in reversed(events) if e["event"] == "saved"), {})
    lost = end - last["time"]
    for name in seconds.keys() - {"start"}:
        lost += seconds[name] - kept.get(name, 0.0)
        seconds[name] = kept.get(name, 0.0)
    return {**seconds, "lost": lost}
