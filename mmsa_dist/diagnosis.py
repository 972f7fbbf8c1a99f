"""Why an attempt failed, of what its ranks wrote down and its launcher saw."""

import json
import os
from pathlib import Path
from typing import Any

from mmsa_dist.errors import ConfigError, DataError, MmsaError, TrainingError, TransientError

ELSEWHERE = "this rank's loss is finite"
"""Of a rank that ends because of what another one has met, and names."""

ROOM = 16_384
"""Bytes; what a disk that is full has left at times."""


def diagnose(folder: Path, outcome: str, printed: str = "") -> MmsaError:
    """The error behind a failed attempt: what a rank wrote down first; connection errors of its peers come after it.

    Args:
        outcome: what the launcher saw, '' for nothing.
        printed: where what the ranks printed lies, '' where only they know.
    """
    entries = failures(folder)
    if None in entries:
        outcome = f"{outcome or 'a rank failed'} and could not write down why"
    if own := written_down(folder):
        kinds: dict[int, type[MmsaError]] = {
            cls.exit_code: cls for cls in (ConfigError, DataError, TransientError, TrainingError)
        }
        told = min(own, key=lambda entry: ELSEWHERE in entry["message"])  # the first of those that know more
        return kinds.get(told["exit_code"], TrainingError)(told["message"])
    bugs = [entry for entry in entries if entry and not _of_a_peer(entry)]
    if bugs:
        first = bugs[0]
        return TrainingError(
            f"rank {first['rank']} failed: {first['type']}: {first_line(first['message'])}; "
            f"its traceback is in {folder / 'failures'}"
        )
    seen = outcome or "the ranks ended without a result"
    if full(folder):
        return TransientError(
            f"{folder}: no space left on its disk: {seen}. Free space, then go on with --resume, or begin anew in "
            "another --runs-dir"
        )
    return TransientError(f"{seen}; what the ranks printed is in {printed}" if printed else seen)


def full(folder: Path) -> bool:
    """Whether the disk has no room for so much as a sentence."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize < ROOM


def failures(folder: Path) -> list[dict[str, Any] | None]:
    """What ranks wrote down of how they failed, in order of time; None for what is cut short."""
    entries: list[dict[str, Any] | None] = []
    for path in sorted((folder / "failures").glob("*.json")):
        try:
            entries.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError:
            entries.append(None)
    return entries


def written_down(folder: Path) -> list[dict[str, Any]]:
    """Failures that ranks could name themselves: errors of ours, with an exit code."""
    return [entry for entry in failures(folder) if entry and entry["exit_code"] is not None]


def first_line(text: str) -> str:
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "")


PEER_DIED = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "gloo",
    "nccl",
    "broken pipe",
    "timed out",
    "workergroup",
)


def _of_a_peer(entry: dict[str, Any]) -> bool:
    """Whether a rank failed only because another one was gone."""
    text = f"{entry['type']} {entry['message']}".lower()
    ended = entry["type"] in ("SystemExit", "KeyboardInterrupt") or entry.get("alone", False)
    return ended or any(mark in text for mark in PEER_DIED)
