"""Distributed evaluation: each sample once, metrics over all of them, the same on every rank.

A batch holds the same samples whatever the number of ranks, and metrics are computed over predictions sorted by sample
number, so they do not depend on the number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mmsa_dist import metrics
from mmsa_dist.errors import TransientError
from mmsa_dist.session import Session
from shards.mix import Mix
from shards.plan import evaluation_plan


@dataclass(frozen=True)
class Evaluation:
    """numbers (N,) sorted; truth, predicted (N,) float32; metrics: name -> value, None where undefined.

    Where labels are classes truth and predicted are (N, E), a column a task, and what is predicted are log-odds; see
    `metrics_classes`.
    """

    numbers: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    metrics: dict[str, float | None]


def evaluate(session: Session, split: str, beat: Callable[[], object] = lambda: None) -> Evaluation:
    """Predicts `split` on all ranks. A collective call.

    Args:
        beat: is called with every batch.
    """
    plan = evaluation_plan(session.index, split, session.recipe.data.eval_batch_size)
    tasks = session.spec.judged
    rows = []
    for batch in session.loader.evaluate(plan, session.rank, session.world):
        predicted = session.engine.predict(batch).tasks
        given = torch.stack([predicted[task] for task in tasks], dim=1).double().cpu()
        known = [batch.numbers, batch.weight, *(batch.labels[task] for task in tasks)]
        beat()
        rows.append(torch.cat([torch.stack([column.double() for column in known], dim=1), given], dim=1))
    table = gather_rows(torch.cat(rows), session.engine.device).numpy()
    table = table[table[:, 1] > 0]
    table = table[np.argsort(table[:, 0], kind="stable")]
    numbers = table[:, 0].astype(np.int64)
    truth, answers = np.split(table[:, 2:].astype(np.float32), 2, axis=1)
    if not session.spec.classes:
        truth, answers = truth[:, 0].copy(), answers[:, 0].copy()
    return Evaluation(numbers, truth, answers, metrics.evaluate(session.kind, truth, answers, tasks))


def by_set(session: Session, split: str, evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """Data set -> its own metrics, where several are trained on as one; else nothing."""
    if not isinstance(session.index, Mix):
        return {}
    found = {}
    for name, numbers in session.index.ranges(split).items():
        rows = slice(*np.searchsorted(evaluation.numbers, (numbers.start, numbers.stop)))
        truth, predicted = evaluation.truth[rows], evaluation.predicted[rows]
        found[name] = metrics.evaluate(session.kind, truth, predicted, session.spec.judged)
    return found


def gather_rows(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of all ranks, rank after rank, on every rank's CPU; each rank brings equally many columns."""
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=device))
    longest = max(int(n) for n in sizes)
    padded = torch.zeros(longest, rows.shape[1], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)]).cpu()


def save_predictions(session: Session, split: str, evaluation: Evaluation) -> None:
    """``predictions/<split>.npz``: numbers, key, y, p; where labels are classes y and p have a column for each of
    ``tasks``, p in log-odds."""
    index = session.index
    keys = np.array([key for no in index.shards_of(split) for key in index.table(no)["key"].to_pylist()], dtype=np.str_)
    tasks: dict[str, Any] = {"tasks": np.array(session.spec.judged, dtype=np.str_)} if session.spec.classes else {}
    target: Path = session.folder / "predictions" / f"{split}.npz"
    partial = target.with_name(f".{target.name}")
    try:
        with partial.open("wb") as file:
            np.savez(file, numbers=evaluation.numbers, key=keys, y=evaluation.truth, p=evaluation.predicted, **tasks)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TransientError(f"{target}: cannot be written: {error.strerror}") from error
