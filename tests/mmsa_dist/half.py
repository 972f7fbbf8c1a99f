"""fp16 on a CPU, for tests: torch computes it there, but it is slow, so DeepSpeed and we refuse it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def half_precision(power: int = 16) -> Iterator[None]:
    """Lets engines of this process be made with fp16.

    Args:
        power: the loss scale begins with 2 to it; each step that overflows halves it.
    """
    from deepspeed.accelerator import get_accelerator

    from mmsa_dist import engine

    own = engine.deepspeed_config

    def config(*arguments: Any) -> dict[str, Any]:
        made = own(*arguments)
        return {**made, "fp16": {**made["fp16"], "initial_scale_power": power, "hysteresis": 1}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        patch.setattr(engine, "_check_precision", lambda config, device: None)
        patch.setattr(engine, "deepspeed_config", config)
        yield
