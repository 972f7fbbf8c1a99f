"""Fixtures for every test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.ranks import close_pools, run_ranks

settings.register_profile("house", deadline=None)  # a busy machine is not a slow program
settings.load_profile("house")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks`: ``ranks(fn, 2, *args)`` calls a module's function on two CPU ranks (see `tests.ranks`)."""
    yield run_ranks
    close_pools()
