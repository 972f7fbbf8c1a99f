"""What torchrun decides in the place of our launchers: how many ranks there are, and that they are started again."""

import os
import platform
from pathlib import Path

from mmsa_dist import run_folder
from mmsa_dist.config import LaunchConfig

MARK = ".torchrun"
"""In a run's folder: whose ranks train it."""


def restarts() -> int:
    """How often torchrun has started this rank again (its --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def whose() -> str:
    """The same in all attempts of one torchrun: its id, or where it has none the process that starts ranks."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return job if job != "none" else f"process {os.getppid()} on {platform.node()}"


def mark(folder: Path) -> None:
    """Notes that this torchrun's ranks train the run in `folder`."""
    run_folder.write_text(folder / MARK, whose())


def begun_before(runs_dir: Path) -> Path | None:
    """The run that ranks of this torchrun began before they were started again; None where these are the first."""
    if not restarts():
        return None
    marks = [mark for mark in runs_dir.glob(f"*/{MARK}") if mark.read_text(encoding="utf-8") == whose()]
    return max(marks, key=lambda mark: mark.stat().st_mtime).parent.resolve() if marks else None


def without_effect(launch: LaunchConfig, world: int, *, resumed: bool) -> list[str]:
    """Sentences about values that torchrun decides itself.

    Args:
        resumed: the number of workers may be one that an earlier attempt had, and no wish.
    """
    said = []
    if launch.min_workers is not None or (launch.workers not in (1, world) and not resumed):
        said.append(f"--workers is without effect: torchrun has started {world} (--nproc-per-node, --nnodes)")
    if launch.max_failures != LaunchConfig().max_failures:
        said.append("launch.max_failures is without effect: torchrun starts ranks again itself (--max-restarts)")
    return said
