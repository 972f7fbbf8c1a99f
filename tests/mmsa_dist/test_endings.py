"""How ranks and their launcher end: in good order, and with the error that helps."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import worker
from mmsa_dist.errors import StoppedError


def test_a_rank_that_was_asked_to_end_is_no_failure_to_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed rank's peers are killed after two seconds; rank 0 may still be sending its checkpoint to the mirror."""

    def asked(*args: Any, **more: Any) -> None:
        raise StoppedError("SIGTERM to the driver; saved after step 3")

    (tmp_path / "recipe.yaml").write_text("system: self_mm\n")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MMSA_LAUNCHER": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    for module, name in ((worker, "join_group"), (worker, "end_with"), (worker.Requests, "listen")):
        monkeypatch.setattr(module, name, lambda *args, **more: None)
    monkeypatch.setattr(worker, "run_rank", asked)
    assert worker.main() == 0
