"""Settings of the tests of data."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

# a busy machine is slow, not wrong; and a failure must be the same failure when it is run again
settings.register_profile("data", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("data")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was verified is remembered here, not in the user's cache folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MMSA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
