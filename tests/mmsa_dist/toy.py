"""A small system and batches without files, for tests of the engine."""

import torch
from torch import Tensor, nn

from mmsa_dist.config import Strict
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, weighted_mean
from shards.batch import Batch

SPEC = DataSpec({"text": 6, "audio": 5}, (-3.0, 3.0), ("M",))


class ToyConfig(Strict):
    """No switches."""


class Toy(System):
    """LSTM over audio (group audio), an odd-sized linear over text (rest), a frozen scale."""

    Config = ToyConfig
    name = "toy"

    def __init__(self, config: Strict, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.audio = nn.LSTM(5, 7, batch_first=True)
        self.mix = nn.Linear(6 + 7, 3)
        self.out = nn.Linear(3, 1)
        self.frozen = nn.Linear(1, 1)
        self.frozen.requires_grad_(False)

    def forward(self, batch: Batch) -> Prediction:
        audio, _ = self.audio(batch.values["audio"])
        text = batch.values["text"].mean(1)
        hidden = torch.relu(self.mix(torch.cat([text, audio[:, -1]], dim=1)))
        return Prediction({"M": self.frozen(self.out(hidden)).squeeze(1)}, {"M": hidden})

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        part = weighted_mean((prediction.tasks["M"] - targets["M"]).abs(), batch)
        return Losses(part, {"M": part.detach()})


def global_batch(step: int, size: int = 12) -> Batch:
    """The same batch for the same step, of full weight."""
    generator = torch.Generator().manual_seed(step)
    text, audio = torch.randn(size, 4, 6, generator=generator), torch.randn(size, 9, 5, generator=generator)
    labels = text.mean((1, 2)) * 3 + audio.mean((1, 2))
    full = torch.ones(size, dtype=torch.bool)
    return Batch(
        values={"text": text, "audio": audio},
        lengths={"text": torch.full((size,), 4), "audio": torch.full((size,), 9)},
        present={"text": full, "audio": full},
        labels={"M": labels},
        numbers=torch.arange(size),
        weight=torch.ones(size),
        norm=float(size),
        keys=[f"sample{step}-{i}" for i in range(size)],
    )


def share(batch: Batch, rank: int, world: int, accumulation: int = 1) -> list[Batch]:
    """This rank's micro-batches of a global batch."""
    parts = world * accumulation
    n = batch.size // parts
    pieces = []
    for i in range(rank * accumulation, (rank + 1) * accumulation):
        rows = slice(i * n, (i + 1) * n)
        pieces.append(
            Batch(
                values={k: v[rows] for k, v in batch.values.items()},
                lengths={k: v[rows] for k, v in batch.lengths.items()},
                present={k: v[rows] for k, v in batch.present.items()},
                labels={k: v[rows] for k, v in batch.labels.items()},
                numbers=batch.numbers[rows],
                weight=batch.weight[rows],
                norm=batch.norm / parts,
                keys=batch.keys[rows],
            )
        )
    return pieces
