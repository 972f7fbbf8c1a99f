"""How ranks and their launcher end: in good order, and with the error that helps."""

import errno
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import watch, worker
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


@pytest.mark.parametrize("disk", ["full", "silent"])
def test_a_rank_that_stands_still_ends_though_it_cannot_write(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, told, codes = threading.Event(), list[str](), list[int]()

    def cannot(*args: Any) -> Path:
        if disk == "silent":
            over.wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    def ended(code: int) -> None:
        codes.append(code)
        over.set()

    for name, value in {"write_stacks": cannot, "GRACE": 0.0, "PATIENCE": 0.2}.items():
        monkeypatch.setattr(watch, name, value)
    monkeypatch.setattr("os._exit", ended)
    with watch.Watch(tmp_path, 0, 0.2, 0.2, lambda error: told.append(str(error))):
        assert over.wait(20) and codes[0] == 75
    if disk == "full":
        assert "where each of its threads stood could not be written (No space left on device)" in told[0]
