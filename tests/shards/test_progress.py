"""What is printed is printed as it stands: brackets and colons of a name are no markup."""

from pathlib import Path

import pytest

from mmsa_dist.__main__ import main


@pytest.mark.parametrize("name", ["mosi[v2]", "a[/b]", ":smile:"])
def test_a_name_is_shown_as_it_stands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / f"[/{name.strip('/')}" / "out")
    assert main(["pack", "generated", "--samples", "20", "--name", name, "--out", out]) == 0
    assert main(["inspect", out]) == 0
    assert name in capsys.readouterr().out
