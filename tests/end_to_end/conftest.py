"""A run of some seconds, and what it gives undisturbed."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.data import packed
from tests.end_to_end.started import Run

EPOCHS = 12


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of some seconds: Self-MM with its label generator and dropout, two ranks, ZeRO-2."""
    data = packed(tmp_path_factory.mktemp("faults"), samples=150)
    rates = [f"--optim.lr.{group}=1e-3" for group in ("text", "audio", "vision", "rest")]
    return [
        "self_mm", "--data", str(data), "--zero", "2", "--epochs", str(EPOCHS), "--train.patience", "99",
        "--tracking.no-enabled", "--batch-size", "12", *rates,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    run = Run(tmp_path_factory.mktemp("undisturbed"), *words, "--workers", "2", "--launcher", "local")
    yield run.result()
    run.kill()
