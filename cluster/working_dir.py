"""The folder that travels with a job: which of its files are sent, how big they are, and the archive that is sent.

The archive is made here, not by Ray, so that what is measured is what is sent. Times in it are fixed: the same files
give the same bytes, and a cluster that has them already is not sent them again.
"""

import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError

LIMIT = 512 * 2**20
"""Bytes. Ray keeps the archive in one message of its control store, which holds no more."""

NEVER_SENT = frozenset(
    {".git", ".venv", "venv", ".env", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
    | {".tox", ".ipynb_checkpoints", "node_modules", "runs", "mlruns", "mlartifacts", "mlflow.db", ".DS_Store"}
)
"""Names that are left out wherever they stand: history, environments, caches, secrets and the results of runs."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold


def files_to_send(folder: Path) -> list[Path]:
    """The files of `folder` that a job gets, relative to it, sorted.

    In a git checkout: what git tracks or would track (its ignore files are honoured). Elsewhere: every file. Names in
    `NEVER_SENT` are left out in both. Links to folders are not followed.

    Raises:
        ConfigError: `folder` is no folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"working dir {folder} is not a folder; name the checkout that the job needs with --working-dir"
        )
    found = _git_files(folder)
    names = _all_files(folder) if found is None else found
    kept = (name for name in names if NEVER_SENT.isdisjoint(name.parts))
    return sorted(name for name in kept if (folder / name).is_file())


def measure(folder: Path, files: list[Path], limit: int = LIMIT) -> int:
    """Bytes of `files` together.

    Raises:
        ConfigError: more than `limit`; names what is biggest.
    """
    sizes: Counter[str] = Counter()
    for name in files:
        sizes[name.parts[0] + ("/" if len(name.parts) > 1 else "")] += (folder / name).stat().st_size
    total = sizes.total()
    if total > limit:
        biggest = ", ".join(f"{name} {_mib(size)}" for name, size in sizes.most_common(3))
        raise ConfigError(
            f"working dir {folder} holds {_mib(total)} in {len(files)} files, at most {_mib(limit)} can be sent; "
            f"biggest: {biggest}. Add what the job does not need to .gitignore; put data where the cluster can read it"
        )
    return total


def write_archive(folder: Path, files: list[Path], archive: Path) -> None:
    """Writes `files` of `folder` into the zip `archive`, the same bytes for the same contents and modes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for name in files:
            entry = zipfile.ZipInfo(name.as_posix(), _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            executable = os.access(folder / name, os.X_OK)
            entry.external_attr = (0o100755 if executable else 0o100644) << 16
            out.writestr(entry, (folder / name).read_bytes())


def _git_files(folder: Path) -> list[Path] | None:
    """What git tracks or would track below `folder`; None where it is no checkout or there is no git."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def _all_files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NEVER_SENT]
        for name in names:
            yield (Path(root) / name).relative_to(folder)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
