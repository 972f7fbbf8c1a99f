"""What the tests of sweeps share: a small space, a small recipe, an environment of their own."""

import os
from pathlib import Path
from typing import Any

from mmsa_dist.recipe import Recipe, from_dict
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
