"""What the tests of sweeps share: a small space, a small recipe, an environment of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmsa_dist import run_folder
from mmsa_dist.recipe import Recipe, from_dict
from tune.outcome import Outcome, read_outcomes
from tune.space import Space

REPOSITORY = Path(__file__).parents[2]

RATES = """
system: ufen_mtfn
learning rates:
  optim.lr.audio, optim.lr.vision, optim.lr.rest:
    choice: [5.0e-3, 1.0e-8]
    source: "one that learns, one that does not: ASHA has something to stop"
"""

SPACE = f"""{RATES}
network:
  model.layers: {{choice: [2, 1], source: "paper, table 7"}}
  optim.accumulation: {{choice: [1, 40], source: "40 micro-batches of 8 samples cannot be: such a trial fails"}}
"""


PATIENCE = 900.0


def clean() -> dict[str, str]:
    """The environment of a sweep in a process of its own, in whatever folder."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"}


def in_mlflow(folder: Path, uri: str | None = None) -> tuple[Any, Any, list[Any]]:
    """A client of the store of the sweep in `folder` (at `uri`, where that is another now), its run, and its trials."""
    from mmsa_dist.tracking import Link, store

    parent = Link.load(folder)
    assert parent is not None
    client = store.connect(uri or parent.uri)
    runs = client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    return client, client.get_run(parent.run_id), list(runs)


def tiny(path: Path, /, **changes: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "system": "ufen_mtfn",
        "data": {"path": str(path)},
        "optim": {"lr": {"text": 5e-5, "audio": 5e-3, "vision": 5e-3, "rest": 5e-3}},
        "train": {"epochs": 2, "monitor": "mae"},
        "tracking": {"enabled": False},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    return from_dict(values)


def searched(tmp_path: Path, text: str = SPACE) -> Space:
    (tmp_path / "space.yaml").write_text(text)
    return Space.load("ufen_mtfn", tmp_path / "space.yaml")


@dataclass
class Sweep:
    """`mmsa-dist sweep` in a process of its own."""

    process: "subprocess.Popen[bytes]"
    log: Path
    runs: Path

    @classmethod
    def start(cls, runs: Path, *words: str) -> "Sweep":
        log = runs.parent / f"sweep-{time.monotonic_ns()}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "mmsa_dist", "sweep", *words, "--runs-dir", str(runs)]
            process = subprocess.Popen(
                command, cwd=runs.parent, env=clean(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        return cls(process, log, runs)

    @property
    def folder(self) -> Path:
        return next(self.runs.glob("sweep-*"))

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def outcomes(self) -> list[Outcome]:
        return read_outcomes(self.folder / "trials", "mae") if list(self.runs.glob("sweep-*")) else []

    def until(self, seen: Callable[[list[Outcome]], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"it ended before {what}:\n{self.output}")
            if found := seen(self.outcomes()):
                return found
            time.sleep(0.05)
        pytest.fail(f"not {what} within {PATIENCE} s:\n{self.output}")

    def finished(self) -> dict[str, Any]:
        assert self.process.wait(timeout=PATIENCE) == 0, self.output
        return dict(run_folder.read_json(self.folder / "result.json"))

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
