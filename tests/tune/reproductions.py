"""What the tests of reproductions share: a plan over the tiny data set, and runs that are done without training."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mmsa_dist import metrics, run_folder
from tune.outcome import ERROR, RESULT
from tune.papers.planned import Asked, Planned, plan
from tune.papers.published import Paper, load, paper_of
from tune.papers.runs import ENDED, Run, prepare

SMALL = ("--model.text-pooling", "mean", "--batch-size", "8", "--epochs", "2", "--tracking.no-enabled")


def asked(
    data: Path, runs: Path, /, *words: str, paper: str | Path = "tam_ulag", table: str = "6", **more: Any
) -> Asked:
    """A command on `data`; `more` are fields of `Asked`."""
    found: Paper = load(paper) if isinstance(paper, Path) else paper_of(paper)
    given = {"rows": ("TAM-ULAG", "w/o ULAG"), "seeds": 2, "recipe": None, **more}
    small = SMALL if paper == "tam_ulag" and table != "3" else SMALL[-1:]
    overrides = ("--data", str(data), *small, *words)
    return Asked(found, table, overrides=overrides, runs_dir=runs, **given)


def planned(data: Path, runs: Path, /, *words: str, **more: Any) -> Planned:
    return plan(asked(data, runs, *words, **more))


def pretend(run: Run, planned: Planned, error: float) -> None:
    """The folder of a run that is done, whose predictions are off by about `error`."""
    prepare(run, planned.index)
    rng = np.random.default_rng([run.seed, *run.row.encode()])
    y = np.concatenate([planned.index.table(n)["label_M"].to_numpy() for n in planned.index.shards_of("test")])
    keys = [key for n in planned.index.shards_of("test") for key in planned.index.table(n)["key"].to_pylist()]
    p = (y + error * rng.choice((-1, 1), len(y)) + rng.normal(0, 0.05, len(y))).astype(np.float32)
    np.savez(run.folder / "predictions" / "test.npz", numbers=np.arange(len(y)), key=np.array(keys), y=y, p=p)
    with closing(run_folder.Events(run.folder, 0)) as events:
        for epoch in (1, 2):
            events.write("epoch", epoch=epoch, step=epoch, train_loss=1 / epoch, valid={"mae": 1.0}, best_epoch=1)
    result = {"best_epoch": 1, "epochs": 2, "test": metrics.evaluate("mosi", y, p)}
    run_folder.write_json(run.folder / RESULT, result)


def pretend_failed(run: Run, planned: Planned, code: int, *, ended: bool = True) -> None:
    prepare(run, planned.index)
    run_folder.write_json(run.folder / ERROR, {"message": "the loss is not finite", "exit_code": code, ENDED: ended})
