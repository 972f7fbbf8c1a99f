"""A system whose checkpoints are long on their way to rank 0, and a rank that fails meanwhile."""

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.distributed as dist
from torch import Tensor

from mmsa_dist import parts
from mmsa_dist.config import Strict
from mmsa_dist.systems.base import Losses, Prediction
from mmsa_dist.systems.self_mm import SelfMM, SelfMMConfig
from shards.batch import Batch

SECOND = 2 * 8 + 1
"""Losses of two epochs, and of the dry run: with the next one the second checkpoint is on its way, as it waited for the
first one to arrive."""


class SlowPartsConfig(SelfMMConfig):
    """Self-MM's, and who fails, once."""

    fails: Literal["raise", "die"] = "die"
    rank: int = 1
    done: str = ""
    """A file that is there once it has failed."""


class Slow:
    """`torch.distributed` as `parts` sees it, in small messages that take their time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def send(self, *what: Any) -> None:
        self._move(dist.send, what)

    def recv(self, *what: Any) -> None:
        self._move(dist.recv, what)

    def _move(self, how: Any, what: tuple[Any, ...]) -> None:
        time.sleep(0.02)
        how(*what)


class SlowParts(SelfMM):
    Config: ClassVar[type[Strict]] = SlowPartsConfig
    losses = 0

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        config = self.config
        assert isinstance(config, SlowPartsConfig)
        if not isinstance(parts.dist, Slow):
            parts.MESSAGE, parts.dist = 500, Slow()
        self.losses += self.training
        late = self.training and self.losses > SECOND and dist.get_rank() == config.rank
        if late and not (done := Path(config.done)).exists():
            done.touch()
            if config.fails == "raise":
                raise ValueError("as it was asked to")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(prediction, batch, targets)
