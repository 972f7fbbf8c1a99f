"""Shows a run's progress by following its events: the same picture whatever started the ranks.

On a terminal a bar; elsewhere one plain line an epoch, and one every half a minute of a longer epoch.
"""

import json
import threading
from pathlib import Path
from typing import Any, Self

from shards.progress import console

SECONDS_BETWEEN_LINES = 30.0


class Follower:
    """Follows ``events/rank-0.jsonl`` in a thread, as a context.

    Args:
        monitor: the validation metric to show.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.path = folder / "events" / "rank-0.jsonl"
        self.monitor = monitor
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-events", daemon=True)
        self._bar: Any = None
        self._task: Any = None
        self._seconds = 0.0
        self._said = 0.0  # when, on the clock of the events
        # what an earlier attempt wrote was shown then
        self._position = self.path.stat().st_size if self.path.is_file() else 0

    def __enter__(self) -> Self:
        if console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("starting ranks", total=None)
            self._bar.start()
        else:
            console.print("starting ranks")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._bar is not None:
            self._bar.stop()

    def _follow(self) -> None:
        while True:
            last = self._stop.is_set()
            for event in self._read():
                self._show(event)
            if last:
                return
            self._stop.wait(0.3)

    def _read(self) -> list[dict[str, Any]]:
        """Whole lines that came since the last call."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        events = []
        for line in whole.splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut short by a kill
        return events

    def _show(self, event: dict[str, Any]) -> None:
        if event["event"] in ("step", "first_step") and self._bar is not None:
            text = f"epoch {event['epoch']}  loss {event['loss']:.4f}"
            self._bar.update(self._task, description=text, completed=event["step"], total=event["of"])
        elif event["event"] == "first_step":
            self._said = event["time"]
        elif event["event"] == "step" and event["time"] - self._said >= SECONDS_BETWEEN_LINES:
            self._said = event["time"]
            console.print(f"epoch {event['epoch']:3d}  step {event['step']} of {event['of']}  loss {event['loss']:.4f}")
        elif event["event"] == "start":
            console.print(f"rank 0 of {event['world']} is up (pid {event['pid']})")
        elif event["event"] == "ready" and event["steps"]:
            console.print(f"going on after step {event['steps']:,}")
        elif event["event"] == "warning":
            console.print(f"warning: {event['message']}", soft_wrap=True)
        elif event["event"] == "epoch":
            self._said = event["time"]
            value = event["valid"][self.monitor]
            shown = "undefined" if value is None else f"{value:.4f}"
            star = "  (best)" if event["best_epoch"] == event["epoch"] else ""
            console.print(
                f"epoch {event['epoch']:3d}  train loss {event['train_loss']:.4f}  valid {self.monitor} {shown}{star}  "
                f"{self._took(event['seconds']):.0f} s",
                highlight=False,
            )

    def _took(self, seconds: float) -> float:
        """Seconds of this epoch; events count from the start of the attempt, so after a restart from 0 again."""
        before, self._seconds = self._seconds, seconds
        return seconds - before if seconds >= before else seconds
