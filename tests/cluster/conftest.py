"""What the tests of this floor share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.heads import Head, running_head, slow_program


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head with a token, one for all tests of a file."""
    with running_head() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working dir with a program that takes its time."""
    return slow_program(tmp_path)
