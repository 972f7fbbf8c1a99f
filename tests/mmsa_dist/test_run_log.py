"""What a run's command says is kept in its folder."""

import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from mmsa_dist.errors import DataError
from mmsa_dist.run_log import FILE, logged


def lines(folder: Path) -> list[str]:
    return [re.sub(r"^\d{4}(-\d\d){2} \d\d(:\d\d){2}  ", "", line) for line in (folder / FILE).read_text().splitlines()]


def test_lines_of_both_streams_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of before there was a folder too; a second command's come behind."""
    with logged() as log:
        print("run x")
        log.into(tmp_path)
        print("in ", end="")
        print("two parts\n\nand more")
        print("a remark", file=sys.stderr)
    with logged() as log:
        log.into(tmp_path)
        print("again")
    print("not the run's")
    assert lines(tmp_path) == ["run x", "in two parts", "and more", "a remark", "again"]
    shown = capsys.readouterr()
    assert shown.out == "run x\nin two parts\n\nand more\nagain\nnot the run's\n" and shown.err == "a remark\n"


def test_the_error_that_ends_it_is_the_last_line(tmp_path: Path) -> None:
    before = sys.stdout
    with pytest.raises(DataError), logged() as log:
        log.into(tmp_path)
        raise DataError("shard 3: cut short")
    with pytest.raises(KeyboardInterrupt), logged() as log:
        log.into(tmp_path)
        raise KeyboardInterrupt
    assert lines(tmp_path) == ["error: shard 3: cut short", "ended by KeyboardInterrupt"]
    assert sys.stdout is before


def test_of_a_bar_only_its_end_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged() as log:
        log.into(tmp_path)
        terminal = Console(force_terminal=True, width=60, legacy_windows=False, color_system="standard")
        with Progress(console=terminal, auto_refresh=False) as bar:
            task = bar.add_task("epoch 1", total=3)
            for _ in range(3):
                bar.advance(task)
                bar.refresh()
            terminal.print("epoch   1  valid mae 0.5")
    assert "\x1b[" in capsys.readouterr().out, "a bar that moves"
    kept = lines(tmp_path)
    assert "epoch   1  valid mae 0.5" in kept and "100%" in kept[-1] and len(kept) == 2
    assert not any("\x1b" in line or "\r" in line for line in kept)


def test_a_full_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).mkdir()  # cannot be written to
    with logged() as log:
        log.into(tmp_path)
        print("goes on")
    assert capsys.readouterr().out == "goes on\n"
