"""Which row of a label generator's state belongs to which sample.

Shapes: N training samples, B rows of the global batch.
"""

import numpy as np
import torch
from torch import Tensor

from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.label_generators.base import TrainSplit


class TrainSamples:
    """Row i is the train sample with the i-th smallest number, whatever the order in which they are handed over.

    One row more, the last, is written to by everything that takes no part (filler, absent modality) and read by
    nothing: so a step has fixed shapes and never waits for the device.

    Attributes:
        size: N, which is also the unread row.
        ids: (N,) int64, what the samples are known by in a checkpoint.
        truth: (N + 1,) float32, their labels y_m.
    """

    def __init__(self, split: TrainSplit, generator: str) -> None:
        order = np.argsort(split.numbers, kind="stable")
        self.size = len(order)
        self.ids = _checked_ids(split.ids)[order]
        truth = torch.from_numpy(_checked_labels(split.labels, generator)[order]).to(split.device)
        self.truth = torch.cat([truth, truth.new_zeros(1)])
        self._numbers = torch.from_numpy(split.numbers[order]).to(split.device)
        first, last = int(split.numbers.min()), int(split.numbers.max())
        self._first = first if last - first + 1 == self.size else None  # a whole split's numbers are a range
        self._position = torch.zeros(self.size + 1, dtype=torch.int64, device=split.device)

    @staticmethod
    def bytes(samples: int) -> int:
        """What is held of `samples` training samples: number, id, label and place in the batch."""
        return samples * (8 + 8 + 4 + 8)

    def rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) sample numbers -> their rows, and whether they are train samples (else the row is the unread one)."""
        if self._first is not None:
            rows = numbers - self._first
            known = (rows >= 0) & (rows < self.size)
        else:
            rows = torch.searchsorted(self._numbers, numbers).clamp_(max=self.size - 1)
            known = self._numbers[rows] == numbers
        return rows.where(known, self.size), known

    def first_of_each(self, rows: Tensor, real: Tensor) -> Tensor:
        """(B,) True for the first real row of every sample: a sample that a batch has twice counts once."""
        place = torch.arange(len(rows), device=rows.device)
        slots = rows.where(real, self.size)
        self._position.index_fill_(0, slots, len(rows))
        self._position.scatter_reduce_(0, slots, place, "amin")
        return real & (self._position[rows] == place)

    def places_in(self, saved: Tensor | None) -> Tensor:
        """(N,) where each of our samples is among the ids of a checkpoint.

        Raises:
            ConfigError: the checkpoint is of other samples.
        """
        ids = np.empty(0, dtype=np.int64) if saved is None else saved.cpu().numpy()
        order = np.argsort(ids, kind="stable")
        place = np.searchsorted(ids, self.ids, sorter=order)
        known = np.isin(self.ids, ids)
        if len(ids) != self.size or not known.all():
            raise ConfigError(
                f"the checkpoint's label generator knows {len(ids)} train samples, {int(known.sum())} of them among "
                f"this data set's {self.size}: start anew, or give the data that the checkpoint was made on"
            )
        return torch.from_numpy(order[place])


def _checked_ids(ids: np.ndarray) -> np.ndarray:
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"train: {len(ids)} samples have {len(np.unique(ids))} ids: keys must differ; re-pack the data")
    return ids


def _checked_labels(labels: np.ndarray, generator: str) -> np.ndarray:
    missing = int((~np.isfinite(labels)).sum())
    if missing:
        raise DataError(
            f"train: {missing} of {len(labels)} samples have no label M, from which label generator {generator!r} "
            "starts: pack the data without them"
        )
    return labels
