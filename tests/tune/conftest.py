"""Fixtures for the tests of sweeps."""

from pathlib import Path

import pytest

from tests.data import packed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("data"), samples=80)
