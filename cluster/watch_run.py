"""A run as its folder shows it, whatever started its ranks: events of each rank and of the driver, failures, its log.

The files are read as they grow, from where the last look ended; what is kept of them does not grow with the run.
"""

import fcntl
import json
import os
import platform
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.seen import ENDED, FAILED, RUNNING, Rank, Seen, ago, duration

WINDOW = 30.0
"""Seconds over which a rate is taken, or two events where those are further apart."""

SILENCE = 60.0
"""Seconds without a word of rank 0 that are said."""

USEFUL = ("step", "evaluation")
"""What counts of a run's time, as in its ``time.json``."""

LATEST = 300
"""Lines of the log that are looked through for an error."""

TRIALS = "trials"
"""Where a sweep keeps the folders of its trials."""


class Tail:
    """A file of one JSON object a line, which somebody else writes."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def more(self) -> Iterator[dict[str, Any]]:
        """The whole lines that came since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except OSError:  # not there yet
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError):  # cut short by a kill
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


@dataclass
class RankFolder:
    """What the events of one rank say.

    Attributes:
        window: time, epoch and step, seconds waited for data and trained, of its last events.
        past: useful seconds of attempts that ended. booked, kept: of the one that goes on, until now and until its
            newest checkpoint. whole: whether it ended in good order.
    """

    tail: Tail
    heard: float | None = None
    window: deque[tuple[float, int, int, float, float]] = field(default_factory=deque)
    loss: float | None = None
    of: int | None = None
    epoch: dict[str, Any] | None = None
    saved: dict[str, Any] | None = None
    past: float = 0.0
    booked: float = 0.0
    kept: float = 0.0
    whole: bool = False
    last: str = ""

    def look(self) -> None:
        for event in self.tail.more():
            with suppress(KeyError, TypeError, ValueError):  # not one of ours
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        name, booked = event["event"], event.get("booked", {})
        self.heard, self.last = event["time"], name
        if name == "start":
            self.past += self.booked if self.whole else self.kept
            self.booked = self.kept = 0.0
            self.window.clear()
        self.whole = name in ("end", "stopped")
        self.booked = max(self.booked, _useful(booked))
        if name in ("first_step", "step"):
            self.loss, self.of = event["loss"], event["of"]
            now = (event["time"], event["epoch"], event["step"], booked.get("data", 0.0), booked.get("step", 0.0))
            self.window.append(now)
            while len(self.window) > 2 and now[0] - self.window[1][0] >= WINDOW:
                self.window.popleft()
        elif name == "epoch":
            self.epoch = event
        elif name == "saved":
            self.saved, self.kept = event, _useful(event["kept"])

    def seen(self, number: int, plan: dict[str, Any], ranks: int) -> Rank:
        """The rank as it is now; its samples are its share of those of all."""
        silent = None if self.heard is None else max(0.0, time.time() - self.heard)
        if len(self.window) < 2:
            return Rank(number, silent=silent)
        first, last = self.window[0], self.window[-1]
        seconds, waited, trained = last[0] - first[0], last[3] - first[3], last[4] - first[4]
        samples = (_samples(plan, last) - _samples(plan, first)) / ranks
        return Rank(
            number,
            samples / seconds if seconds > 0 else None,
            waited / (waited + trained) if waited + trained > 0 else None,
            silent,
        )


class RunFolder:
    """A run or a sweep, as its folder shows it.

    Args:
        lines: of its log to show.

    Raises:
        ConfigError: there is no run in the folder.
    """

    def __init__(self, folder: Path, lines: int) -> None:
        if not (folder / "recipe.yaml").is_file():
            raise ConfigError(f"--run {folder}: is no run's folder: it has no recipe.yaml; see what is in --runs-dir")
        self.folder, self.lines = folder.resolve(), lines
        self._ranks: dict[int, RankFolder] = {}
        self._driver = Tail(folder / "events" / "driver.jsonl")
        self._begun: float | None = None  # of the attempt that goes on
        self._ended: float | None = None  # of the one before
        self._wall, self._attempts, self._out = 0.0, 0, False

    def look(self) -> Seen:
        """What there is to see now."""
        seen = Seen(self.folder.name, log=_last_lines(self.folder / "run.log", self.lines))
        if (self.folder / TRIALS).is_dir() or (self.folder / "space.yaml").is_file():
            return self._sweep(seen)
        self._read()
        plan = _json(self.folder / "plan.json")
        seen.epochs, seen.steps = plan.get("epochs"), plan.get("steps_per_epoch")
        seen.restarts = max(0, self._attempts - 1)
        seen.error = last_error(self.folder)
        if self._ranks:
            self._progress(seen, plan)
        self._state(seen)
        return seen

    def _read(self) -> None:
        for path in (self.folder / "events").glob("rank-*.jsonl"):
            number = int(path.stem.partition("-")[2])
            self._ranks.setdefault(number, RankFolder(Tail(path)))
        for rank in self._ranks.values():
            rank.look()
        for event in self._driver.more():
            if event["event"] == "attempt":
                if self._begun is not None:  # its driver was killed: how long it ran, its ranks know
                    self._close(max(self._begun, self._last_before(event["time"])))
                if self._ended is not None and not event["resumed"]:
                    self._wall += event["time"] - self._ended
                self._begun, self._out = event["time"], False
                self._attempts += 1
            elif event["event"] == "attempt_end" and self._begun is not None:
                self._close(event["time"])

    def _close(self, end: float) -> None:
        assert self._begun is not None
        self._wall += end - self._begun
        self._begun, self._ended, self._out = None, end, True

    def _last_before(self, moment: float) -> float:
        heard = self._ranks[0].heard if 0 in self._ranks else None
        return heard if heard is not None and heard < moment else moment

    def _progress(self, seen: Seen, plan: dict[str, Any]) -> None:
        first = self._ranks.get(0) or next(iter(self._ranks.values()))
        live = [n for n, rank in self._ranks.items() if rank.window and rank.heard and first.heard]
        live = sorted(n for n in live if (self._ranks[n].heard or 0.0) >= (self._begun or 0.0)) or sorted(self._ranks)
        if plan:
            seen.ranks = [self._ranks[n].seen(n, plan, len(live)) for n in live]
        if first.window:
            _, seen.epoch, seen.step, _, _ = first.window[-1]
            seen.loss, seen.steps = first.loss, first.of
        if first.epoch is not None:
            seen.result = _result(first.epoch)
            if seen.epoch is None:
                seen.epoch = first.epoch["epoch"]
        if first.saved is not None:
            seen.checkpoint = first.saved["step"]
            seen.age = max(0.0, time.time() - first.saved["time"] + first.saved.get("seconds", 0.0))
        wall = self._wall + (time.time() - self._begun if self._begun is not None else 0.0)
        finished = _json(self.folder / "time.json")
        now = first.booked if first.whole or not self._out else first.kept
        seen.goodput = finished.get("goodput", (first.past + now) / wall if wall > 0 else None)
        if len(first.window) > 1 and seen.epochs and seen.steps:
            (t0, e0, s0, *_), (t1, e1, s1, *_) = first.window[0], first.window[-1]
            taken, left = (e1 - e0) * seen.steps + s1 - s0, (seen.epochs - e1 + 1) * seen.steps - s1
            seen.seconds_left = left * (t1 - t0) / taken if taken > 0 else None

    def _state(self, seen: Seen) -> None:
        first = self._ranks.get(0)
        if (self.folder / "result.json").is_file():
            seen.kind, seen.state, seen.seconds_left = ENDED, "done", None
        elif self._begun is None:
            if self._out and _held(self.folder):
                seen.state, seen.ranks, seen.seconds_left = "about to start ranks again", (), None
            elif self._out:
                stopped = _json(self.folder / "stopped.json")
                seen.kind = ENDED if stopped else FAILED
                seen.state = f"stopped ({stopped['why']})" if stopped else "ended without a result"
                seen.ranks, seen.seconds_left = (), None
            elif first is not None and first.heard is not None:  # an older version's, or without a driver
                seen.state = f"last heard of {ago(first.heard)}"
        elif gone := _driver_gone(self.folder):
            seen.kind, seen.state, seen.seconds_left = FAILED, f"its driver is gone ({gone})", None
        elif first is None or first.heard is None or first.heard < self._begun:
            seen.state = f"starting ranks for {duration(time.time() - self._begun)}"
            seen.ranks, seen.seconds_left = (), None
        else:
            silent = time.time() - first.heard
            doing = "training" if first.last in ("step", "first_step", "saved", "epoch", "warning") else "starting"
            seen.state = f"no word of rank 0 for {duration(silent)}" if silent > SILENCE else doing
            seen.kind = RUNNING

    def _sweep(self, seen: Seen) -> Seen:
        states = dict.fromkeys(("running", "done", "stopped", "failed"), 0)
        for path in (self.folder / TRIALS).glob("*/trial.json"):
            there = {name for name in ("result.json", "error.json") if (path.parent / name).is_file()}
            trial = _json(path)
            state = "done" if "result.json" in there else "stopped" if "stopped" in trial else None
            states[state or ("failed" if there else "running")] += 1
            if "error.json" in there:
                seen.error = f"trial {trial.get('number')}: {_json(path.parent / 'error.json').get('message')}"
        seen.trials, done = states, (self.folder / "result.json").is_file()
        seen.kind, seen.state = (ENDED, "sweep, done") if done else (RUNNING, "sweep")
        if not done and (gone := _driver_gone(self.folder)):
            seen.kind, seen.state = FAILED, f"sweep, its driver is gone ({gone}); `mmsa-dist sweep --resume` goes on"
            states["open"] = states.pop("running")
        return seen


def last_error(folder: Path) -> str | None:
    """What went wrong last, with who says it and when: the driver, who has seen all ranks, or else the newest of what
    ranks have written down."""
    found = _said(folder / "run.log")
    for path in folder.glob("failures*/*.json"):
        entry = _json(path)
        when = entry.get("time", 0.0)
        if entry and (found is None or int(when) > found[0]):
            message = str(entry.get("message")).strip().partition("\n")[0] or entry.get("type")
            found = (when, f"rank {entry.get('rank')}, {ago(when)}: {message}")
    return found[1] if found else None


def _said(log: Path) -> tuple[float, str] | None:
    """The last error that the driver has printed, and when."""
    for line in reversed(_last_lines(log, LATEST)):
        if found := re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (?:error: (.*)|(.*); starting again .*)", line):
            when = time.mktime(time.strptime(found[1], "%Y-%m-%d %H:%M:%S"))
            return when, f"{ago(when)}: {found[2] or found[3]}"
    return None


def _held(folder: Path) -> bool:
    """Whether somebody holds the run: its driver does from beginning to end, between two attempts as well."""
    try:
        with (folder / ".lock").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for this moment; whoever wants it tries for seconds
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without locks
        return False
    return False


def _driver_gone(folder: Path) -> str:
    """Which process was driving the run and is no more, where that can be known: on its own machine."""
    try:
        held = re.fullmatch(r"process (\d+) on (.*)", (folder / ".lock").read_text(encoding="utf-8").strip())
        if held and held[2] == platform.node():
            os.kill(int(held[1]), 0)
    except ProcessLookupError:
        return held[0] if held else ""
    except OSError:  # no lock, or somebody else's process
        return ""
    return ""


def _useful(booked: dict[str, float]) -> float:
    return sum(booked.get(name, 0.0) for name in USEFUL)


def _samples(plan: dict[str, Any], at: tuple[float, int, int, float, float]) -> float:
    """Of all ranks, until the step of an event."""
    _, epoch, step, _, _ = at
    return float((epoch - 1) * plan["train_samples"] + min(step * plan["global_batch"], plan["train_samples"]))


def _result(event: dict[str, Any]) -> str:
    """An epoch's validation in words: the first metrics, and which epoch is the best."""
    valid = [f"{name} {value:.4f}" for name, value in event["valid"].items() if isinstance(value, float)]
    best = f"; best epoch {event['best_epoch']}" if event.get("best_epoch") else ""
    return f"epoch {event['epoch']}: {', '.join(valid[:3]) or 'undefined'}{best}"


def _json(path: Path) -> dict[str, Any]:
    """An object of a file; empty where there is none, or half of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _last_lines(path: Path, lines: int) -> list[str]:
    """The last lines of a log, without reading all of it."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * max(1, lines)))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.splitlines()[-lines:] if lines else []
