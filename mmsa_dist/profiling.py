"""A trace of a few steps of each rank: what computed when, for https://ui.perfetto.dev, and a short table."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mmsa_dist.run_folder import Events, read_events

WARM_UP = 3
"""Steps before the first that is traced: DeepSpeed records the order of layers, the optimizer makes its state."""
SHOWN = 10
"""Operators in the table."""
LARGE = 100e6
"""Bytes of a trace that Perfetto is slow to open, and that take long to write."""


class Profile(Protocol):
    """Told of each step, and when there are no more."""

    def step(self) -> None: ...
    def close(self) -> None: ...


class NoProfile:
    """Where none is asked for."""

    def step(self) -> None:
        pass

    def close(self) -> None:
        pass


class Traced:
    """Traces steps `WARM_UP` + 1 to `WARM_UP` + `steps` of this attempt into ``profile/rank-R.json``.

    Beside it ``rank-R.txt``: the operators that took longest. A disk that is full is told of; the run goes on.
    """

    def __init__(self, folder: Path, rank: int, steps: int, events: Events) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        self._path, self._events, self._wanted = folder / "profile" / f"rank-{rank}.json", events, steps
        self._taken, self._open, self._on_gpu = 0, True, torch.cuda.is_available()
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_gpu],
            schedule=schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        if not self._open:
            return
        self._taken += 1
        self._profile.step()
        if self._taken == WARM_UP + self._wanted:
            self.close()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._profile.stop()
        if self._taken < WARM_UP + self._wanted:
            traced = max(0, self._taken - WARM_UP)
            self._events.write(
                "warning",
                message=f"train.profile: {traced} of {self._wanted} steps were traced: training ended after "
                f"{self._taken}, of which the first {WARM_UP} warm up",
            )

    def _write(self, profile: Any) -> None:
        partial = self._path.with_name(f".{self._path.name}")
        began = time.monotonic()
        try:
            self._path.parent.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(partial))
            partial.rename(self._path)
            self._path.with_suffix(".txt").write_text(table(profile.key_averages(), self._on_gpu), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._events.write("warning", message=f"{self._path}: the trace cannot be written: {error}")
            return
        size, seconds = self._path.stat().st_size, time.monotonic() - began
        self._events.write("profile", bytes=size, seconds=seconds)
        if size > LARGE:
            self._events.write(
                "warning",
                message=f"{self._path}: the trace takes {size / 1e6:,.0f} MB, and training waited {seconds:.0f} s "
                "until it was written; trace fewer steps (--profile N)",
            )


STEP = "ProfilerStep*"
"""What torch calls a step; by itself it is the time in which no operator runs."""


def table(averages: Any, on_gpu: bool) -> str:
    """The operators that took longest by themselves, of a GPU's time where there is one, else of the CPU's."""
    device = "device" if on_gpu else "cpu"

    def own(event: Any) -> float:
        return float(getattr(event, f"self_{device}_time_total"))

    steps = next((event.count for event in averages if event.key == STEP), 1)
    events = sorted((event for event in averages if own(event) > 0), key=own, reverse=True)
    whole = sum(map(own, events))
    lines = [f"{'operator':50} {'ms a step':>10} {'share':>7} {'calls a step':>13}  ({device} time by itself)"]
    for event in events[:SHOWN]:
        name = "(none: Python, waiting)" if event.key == STEP else event.key[:50]
        spent = own(event)
        lines.append(f"{name:50} {spent / 1000 / steps:10.2f} {spent / whole:7.1%} {event.count / steps:13.1f}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def profiled(folder: Path, rank: int, steps: int, events: Events) -> Iterator[Profile]:
    """What traces `steps` steps; where that is none, what does nothing."""
    profile: Profile = Traced(folder, rank, steps, events) if steps else NoProfile()
    try:
        yield profile
    finally:
        profile.close()


def shown(folder: Path) -> str | None:
    """What the run in `folder` says of its trace at its end; None where it has none."""
    written = folder / "profile" / "rank-0.txt"
    if not written.is_file():
        return None
    size = sum(trace.stat().st_size for trace in written.parent.glob("rank-*.json"))
    seconds = [event["seconds"] for event in read_events(folder) if event["event"] == "profile"]
    took = f"; training stood still for {sum(seconds):.1f} s" if seconds else ""
    return (
        f"{written.read_text(encoding='utf-8')}traces, for https://ui.perfetto.dev: {written.parent}/rank-*.json "
        f"({size / 1e6:,.1f} MB{took})"
    )
