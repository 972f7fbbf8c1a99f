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

MESSAGES = 20
"""How many of a part's are sent before a rank fails."""


class SlowPartsConfig(SelfMMConfig):
    """Self-MM's, and who fails, once."""

    fails: Literal["raise", "die"] = "die"
    rank: int = 1
    done: str = ""
    """A file that is there once it has failed."""


class Slow:
    """`torch.distributed` as `parts` sees it, in small messages that take their time."""

    messages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def send(self, *what: Any) -> None:
        self._move(dist.send, what)

    def recv(self, *what: Any) -> None:
        self._move(dist.recv, what)

    def _move(self, how: Any, what: tuple[Any, ...]) -> None:
        self.messages += 1
        time.sleep(0.02)
        how(*what)


class SlowParts(SelfMM):
    Config: ClassVar[type[Strict]] = SlowPartsConfig

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        config = self.config
        assert isinstance(config, SlowPartsConfig)
        if not isinstance(parts.dist, Slow):
            parts.MESSAGE, parts.dist = 500, Slow()
        late = self.training and parts.dist.messages > MESSAGES and dist.get_rank() == config.rank
        if late and not (done := Path(config.done)).exists():
            done.touch()
            if config.fails == "raise":
                raise ValueError("as it was asked to")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(prediction, batch, targets)
