"""Rows of predictions: what is written of each sample, and what metrics are computed from.

Shapes: B samples, E judged tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmsa_dist.metrics import Running, running
from mmsa_dist.predictor import Predictor
from shards.utterance import UNIMODAL_TASK, Utterance

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Some samples of one split, predicted.

    Attributes:
        keys: B of them.
        columns: name -> (B,) numbers to write; NaN where a sample has no such label.
        truth: (B, E) labels of the judged tasks, NaN where there is none.
        answers: (B, E) predictions as metrics take them; of classes log-odds.
        unread: how many samples hold nothing that the model reads.
    """

    keys: list[str]
    columns: dict[str, Floats]
    truth: Floats
    answers: Floats
    unread: int


def label_name(task: str) -> str:
    """Column of a task's labels."""
    return "y" if task == "M" else f"y_{task}"


def prediction_name(task: str) -> str:
    """Column of a task's predictions."""
    names = {"M": "prediction", **{unimodal: f"prediction_{modality}" for modality, unimodal in UNIMODAL_TASK.items()}}
    return names.get(task, f"prediction_{task}")


def column_names(predictor: Predictor) -> list[str]:
    """Columns of numbers that a row has."""
    return [*map(label_name, predictor.card.judged), *map(prediction_name, predictor.tasks)]


def predicted(predictor: Predictor, chunk: Sequence[Utterance], labelled: bool) -> Rows:
    """Rows of some samples, which go through the system together.

    Args:
        labelled: the labels here are those that the model learnt; else they are left out.
    """
    judged = predictor.card.judged
    answers = predictor.predict(chunk)
    labels = [utterance.labels if labelled else {} for utterance in chunk]
    y = np.array([[known.get(task, np.nan) for task in judged] for known in labels], dtype=np.float32)
    columns = {label_name(task): values for task, values in zip(judged, y.T, strict=True)}
    columns |= {prediction_name(task): values for task, values in predictor.readable(answers).items()}
    return Rows(
        keys=[utterance.key for utterance in chunk],
        columns=columns,
        truth=y,
        answers=np.stack([answers[task] for task in judged], axis=1),
        unread=sum(not predictor.reads(utterance) for utterance in chunk),
    )


class Score:
    """What is counted while a split's rows go by.

    Args:
        kind: of the labels, `metrics.kind_for`.
        judged: the E tasks.

    Attributes:
        unread: samples that hold nothing that the model reads.
    """

    def __init__(self, kind: str, judged: Sequence[str]) -> None:
        self.unread = 0
        self._metrics: Running = running(kind, judged)

    def add(self, rows: Rows) -> None:
        """Some more rows."""
        self.unread += rows.unread
        labelled = np.isfinite(rows.truth).all(axis=1)
        self._metrics.add(rows.truth[labelled], rows.answers[labelled])

    def values(self) -> dict[str, Any] | None:
        """``samples``, those with labels, and their metrics; None where no sample has any."""
        samples = self._metrics.samples
        return {"samples": samples, **self._metrics.values()} if samples else None
