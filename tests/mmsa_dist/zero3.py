"""ZeRO-3 as it is for large systems, in tests of small ones: every parameter is divided, and gathered for its layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AS_IF_LARGE = {"param_persistence_threshold": 0, "max_reuse_distance": 0}


@contextmanager
def as_if_large() -> Iterator[None]:
    """Engines that are made inside keep no parameter whole that no layer is working with."""
    from mmsa_dist import engine

    own = engine.deepspeed_config

    def config(*arguments: Any) -> dict[str, Any]:
        values = own(*arguments)
        values["zero_optimization"] |= {f"stage3_{name}": value for name, value in AS_IF_LARGE.items()}
        return values

    engine.deepspeed_config = config
    try:
        yield
    finally:
        engine.deepspeed_config = own
