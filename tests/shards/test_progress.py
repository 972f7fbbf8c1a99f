"""What is printed is printed as it stands: brackets and colons of a name are no markup."""

from pathlib import Path

import pytest

from mmsa_dist.__main__ import main
from shards.progress import meter


@pytest.mark.parametrize("name", ["mosi[v2]", "a[/b]", ":smile:"])
def test_a_name_is_shown_as_it_stands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / f"[/{name.strip('/')}" / "out")
    assert main(["pack", "generated", "--samples", "20", "--name", name, "--out", out]) == 0
    assert main(["inspect", out]) == 0
    assert name in capsys.readouterr().out


def test_a_meter_says_how_far_and_how_fast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.progress.SECONDS_BETWEEN_LINES", 0.0)
    with meter(1000, "packing", "going on: 1 of 4 shards are there") as tell:
        tell(250, 0)
        tell(500, 3_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["packing: going on: 1 of 4 shards are there", "packing: 250/1,000 (25 %)"]
    assert lines[2].startswith("packing: 750/1,000 (75 %), ") and lines[2].endswith(" MB/s")
    assert lines[3:] == ["packing: done"]


def test_a_meter_that_is_soon_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with meter(10, "packing") as tell:
        tell(10, 100)
    assert capsys.readouterr().err == ""
