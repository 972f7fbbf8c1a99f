"""Features kept by sample: on every rank all of them, or, where they would be too large, on each rank its part.

Divided, a rank holds a contiguous stretch of the samples. A step needs the old features of its own samples only, so B
rows are exchanged, whatever N is.

Shapes: N training samples, B rows of the global batch, d width of a feature; 2 classes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 8192
"""Rows that are converted to float64, or sent to the other ranks, at a time."""


class Kept:
    """The newest feature of each sample, (N, d) float32, zero at first. All ranks call every method together.

    Args:
        samples: N.
        width: d.
        divided: each rank holds about N / ranks rows.
    """

    def __init__(self, samples: int, width: int, device: torch.device, divided: bool) -> None:
        self.samples = samples
        self._world, rank = (dist.get_world_size(), dist.get_rank()) if divided and _joined() else (1, 0)
        self._part = -(-samples // self._world)
        self.first, self.last = (min(samples, n * self._part) for n in (rank, rank + 1))
        # one row more, which everything is written to that is not held here or takes no part
        self._rows = torch.zeros(self.last - self.first + 1, width, device=device)

    def of(self, slots: Tensor) -> Tensor:
        """(B, d) of the samples in these rows, (B,); of the unread row N anything finite."""
        places, mine = self._places(slots)
        found = self._rows[places]
        if self._world > 1:
            found = found.where(mine[:, None], 0.0)
            dist.all_reduce(found)  # one rank's numbers and zeros: exactly those
        return found

    def put(self, slots: Tensor, features: Tensor) -> None:
        """The features (B, d) of the samples in these rows, (B,), from now on."""
        places, mine = self._places(slots)
        self._rows[places] = features.where(mine[:, None], 0.0) if self._world > 1 else features

    def sums(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (2, d) float64 of the features of each of two classes, and counts (2,); of classes (N + 1,) int8."""
        sums = torch.zeros(2, self._rows.shape[1], dtype=torch.float64, device=self._rows.device)
        counts = torch.zeros(2, dtype=torch.float64, device=self._rows.device)
        for own, rows in zip(classes[self.first : self.last].split(CHUNK), self._rows[:-1].split(CHUNK), strict=True):
            chosen = members(own)
            sums += chosen @ rows.double()
            counts += chosen.sum(1)
        if self._world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        return sums, counts

    def whole(self, keep: bool = True) -> Tensor | None:
        """(N, d) on the CPU, for a checkpoint; None on a rank that does not keep it."""
        if self._world == 1:
            return self._rows[:-1].to("cpu", copy=True) if keep else None
        whole = torch.empty(self.samples, self._rows.shape[1]) if keep else None
        for begin in range(0, self.samples, CHUNK):
            rows = torch.arange(begin, min(begin + CHUNK, self.samples), device=self._rows.device)
            chunk = self.of(rows)
            if whole is not None:
                whole[begin : begin + CHUNK] = chunk
        return whole

    def load(self, whole: Tensor) -> None:
        """Takes all samples' features (N, d) from a checkpoint."""
        self._rows[:-1] = whole[self.first : self.last]

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) where these samples are here, and whether they are; what is not is in the last row."""
        mine = (slots >= self.first) & (slots < self.last)
        return (slots - self.first).where(mine, self.last - self.first), mine


def members(classes: Tensor) -> Tensor:
    """(B,) classes -> (2, B) float64, 1 where the sample is in the class."""
    return torch.stack([classes == 1, classes == 2]).double()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
