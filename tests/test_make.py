"""`make` says in a sentence what it lacks, and takes up an installation that was interrupted."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """An environment that counts as installed and whose python says what it was asked to do."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    return tmp_path / "venv"


def test_no_python_is_a_sentence(tmp_path: Path) -> None:
    done = make("install", f"VENV={tmp_path / 'venv'}", "PYTHON=false /no/such/python")
    assert done.returncode == 2
    assert "error: none of 'false /no/such/python' is Python 3.11 or newer" in done.stderr
    assert "make PYTHON=/path/to/python3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_older_python_is_passed_over(tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.write_text("#!/bin/sh\nexit 1\n")  # what `sys.exit(version < (3, 11))` does there
    older.chmod(0o755)
    done = make("install", "--dry-run", f"VENV={tmp_path / 'venv'}", f"PYTHON={older}")
    assert done.returncode == 0
    done = make("install", f"VENV={tmp_path / 'venv'}", f"PYTHON={older}")
    assert done.returncode == 2 and "Python 3.11 or newer" in done.stderr


def test_an_installation_that_fails_is_not_taken_for_one(tmp_path: Path) -> None:
    python = tmp_path / "python3.11"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nexit 3\n')
    python.chmod(0o755)
    done = make("install", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode == 2
    assert not (tmp_path / "venv" / ".installed").exists()


def test_test_leaves_out_slow_and_gpu(pretended: Path) -> None:
    done = make("test", f"VENV={pretended}")
    assert done.returncode == 0, done.stderr
    assert "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not slow and not gpu" in done.stdout
    assert "installing" not in done.stdout


def test_real_needs_data(pretended: Path) -> None:
    done = make("real", f"VENV={pretended}")
    assert done.returncode == 2
    assert "make real needs DATA=FOLDER" in done.stderr


def test_help_lists_the_targets() -> None:
    done = make("help")
    assert {"demo", "test", "real", "check"} <= {line.split()[1] for line in done.stdout.splitlines()}
