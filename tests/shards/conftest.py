"""Settings of the tests of data, and the Ray cluster that some of them pack on."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

# a busy machine is slow, not wrong; and a failure must be the same failure when it is run again
settings.register_profile("data", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("data")


def _own_ray() -> Iterator[str]:
    """The address of a cluster that this process has joined: what it packs on Ray meanwhile, it packs there."""
    import ray

    from shards.ray_cluster import LOCAL, joined

    assert not ray.is_initialized(), "another test has not left its cluster"
    with joined(LOCAL):
        yield str(ray.get_runtime_context().gcs_address)


own_ray = pytest.fixture(_own_ray, scope="module")
own_ray_for_one_test = pytest.fixture(_own_ray)
