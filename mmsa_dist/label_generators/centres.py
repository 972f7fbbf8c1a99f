"""Means of the features of two classes of samples, kept as running sums: a step costs O(B d), however many there are.

Shapes: N training samples, B rows of the global batch, d width of a feature; 2 classes.
"""

import torch
from torch import Tensor

from mmsa_dist.label_generators.kept import Kept, members


class Centres:
    """Sums are float64: float32 features add up in it almost without rounding.

    Attributes:
        of: the task whose features are averaged.
        classes: (N + 1,) int8, where a sample is counted: 0 nowhere, 1 in the first class, 2 in the second.
        sums: (2, d) float64. counts: (2,) float64.
    """

    def __init__(self, of: str, rows: int, width: int, device: torch.device) -> None:
        self.of = of
        self.classes = torch.zeros(rows, dtype=torch.int8, device=device)
        self.sums = torch.zeros(2, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def means(self) -> Tensor:
        """(2, d) float64, NaN where a class has no sample and so no centre."""
        counts = self.counts[:, None]
        # not 0 / 0: what rounding has left of an emptied class is no zero
        return torch.where(counts > 0, self.sums / counts, torch.nan)

    def move(self, slots: Tensor, part: Tensor, classes: Tensor, new: Tensor, old: Tensor) -> None:
        """Takes samples' old features out of the class they were counted in and puts the new ones in theirs.

        Args:
            slots: (B,) rows of the samples; the unread one where `part` is False.
            part: (B,) bool, who takes part.
            classes: (B,) int8 the new classes.
            new, old: (B, d) float32 features.
        """
        classes = classes * part
        left, joined = members(self.classes[slots] * part), members(classes)
        # Matrix products, not index_add: the same bits on every rank, on a GPU too.
        self.sums += joined @ new.double() - left @ old.double()
        self.counts += joined.sum(1) - left.sum(1)
        self.classes[slots] = classes

    def sum_anew(self, features: Kept) -> None:
        """From all samples' features, so that rounding does not add up over a run."""
        self.sums, self.counts = features.sums(self.classes)


def signs(labels: Tensor, zero_is_positive: bool) -> Tensor:
    """(B,) labels -> int8 classes: 1 positive, 2 negative, 0 neither."""
    positive = labels >= 0 if zero_is_positive else labels > 0
    return positive.to(torch.int8) + 2 * (labels < 0).to(torch.int8)
