"""The folder that travels with a job: which of its files are sent, what is big of them, and the archive that is sent.

The archive is made here, not by Ray, so that what is measured is what is sent. Times in it are fixed: the same files
give the same bytes, and a cluster that has them already is not sent them again.
"""

import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

from cluster.errors import ConfigError

LIMIT = 512 * 2**20
"""Bytes. Ray keeps the archive in one message of its control store, which holds no more."""
MUCH = 100 * 2**20
"""Bytes that are sent without asking, but not without saying what they are: every node fetches them."""

NEVER_SENT = frozenset(
    {".git", ".venv", "venv", ".env", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
    | {".tox", ".ipynb_checkpoints", "node_modules", "runs", "mlruns", "mlartifacts", "mlflow.db", ".DS_Store"}
    | {
        ".ssh",
        ".aws",
        ".azure",
        ".config",
        ".docker",
        ".gnupg",
        ".kube",
        ".ray",
        ".netrc",
        ".pgpass",
        ".git-credentials",
    }
)
"""Names that are left out wherever they stand: history, environments, caches, secrets and the results of runs."""
SECRET = (".env.*", "*.pem", "id_rsa*", "id_ed25519*", "id_ecdsa*", "*.key")
"""Patterns of further names that are left out: what opens something."""

CODE = (".py", ".sh", ".yaml", ".yml", ".toml")
"""Endings of files that a job is likely to need."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold


def files_to_send(folder: Path) -> list[Path]:
    """The files of `folder` that a job gets, relative to it, sorted.

    In a git checkout: what git tracks or would track (its ignore files are honoured). Elsewhere: every file. Names in
    `NEVER_SENT` and of `SECRET` are left out in both. Links to folders are not followed.

    Raises:
        ConfigError: `folder` is no folder, or a checkout of which git says nothing.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"working dir {folder} is not a folder; name the checkout that the job needs with --working-dir"
        )
    found = _git_files(folder)
    names = _all_files(folder) if found is None else found
    kept = {name for name in names if NEVER_SENT.isdisjoint(name.parts)}  # git tells thrice of one in conflict
    secret = {name for name in kept if any(fnmatch(name.name, pattern) for pattern in SECRET)}
    return sorted(name for name in kept - secret if (folder / name).is_file())


def measure(folder: Path, files: list[Path], limit: int = LIMIT) -> int:
    """Bytes of `files` together.

    Raises:
        ConfigError: more than `limit`; names what is biggest, and what keeps it here.
    """
    total = sum((folder / name).stat().st_size for name in files)
    if total > limit:
        raise ConfigError(
            f"working dir {folder} holds {mib(total)} in {len(files)} files, at most {mib(limit)} can be sent; "
            f"{bulk(folder, files)}; put data where the cluster can read it"
        )
    return total


def bulk(folder: Path, files: list[Path], most: int = 4) -> str:
    """What makes a working dir big, and how it stays here: a clause.

    Folders without any code are named as a whole; of the others what is in them.
    """
    sizes: dict[Path, int] = {name: (folder / name).stat().st_size for name in files}
    below: dict[Path, Counter[Path]] = {}
    with_code: set[Path] = set()
    for name, size in sizes.items():
        for parent, child in pairwise((*reversed(name.parents), name)):
            below.setdefault(parent, Counter())[child] += size
        if name.suffix in CODE:
            with_code |= set(name.parents)

    def heavy(place: Path) -> Iterator[tuple[Path, int]]:
        for child, size in below.get(place, Counter()).items():
            if child in with_code:
                yield from heavy(child)
            else:
                yield child, size

    found = sorted(heavy(Path()), key=lambda each: (-each[1], each[0]))
    total = sum(sizes.values())
    named = [(place, size) for place, size in found[:most] if size * 50 >= total]
    lines = {place: f"{place.as_posix()}/" if place in below else place.as_posix() for place, _ in named}
    said = f"biggest: {', '.join(f'{lines[place]} {mib(size)}' for place, size in named)}"
    if _git(folder, "rev-parse", "--is-inside-work-tree") is None:
        return f"{said}; this is no git checkout, so all of it is sent: move them out, or name another --working-dir"
    ignore = ", ".join(f"/{line}" for line in lines.values())
    tracked = [lines[place] for place, _ in named if _git(folder, "ls-files", "-z", "--", str(place))]
    untrack = f" (and git rm -r --cached {' '.join(tracked)}, which git tracks)" if tracked else ""
    return f"{said}. Not sent any more with these lines in {folder / '.gitignore'}: {ignore}{untrack}"


def write_archive(folder: Path, files: list[Path], archive: Path, wheel: Path | None = None) -> None:
    """Writes `files` of `folder` into the zip `archive`, the same bytes for the same contents and modes.

    Args:
        wheel: what it holds is written too, as it would be installed.
    """

    def add(name: str, content: bytes, executable: bool) -> None:
        entry = zipfile.ZipInfo(name, _EPOCH)
        entry.compress_type = zipfile.ZIP_DEFLATED
        entry.external_attr = (0o100755 if executable else 0o100644) << 16
        out.writestr(entry, content)

    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for name in files:
            add(name.as_posix(), (folder / name).read_bytes(), os.access(folder / name, os.X_OK))
        if wheel is not None:
            with zipfile.ZipFile(wheel) as built:
                for member in sorted(built.namelist()):
                    if not member.endswith("/"):
                        add(member, built.read(member), executable=False)


def _git_files(folder: Path) -> list[Path] | None:
    """What git tracks or would track below `folder`; None where it is no checkout.

    Raises:
        ConfigError: it is one, but git is not there, refuses, or takes too long: what shall stay here is not known.
    """
    names = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if names is None and any((above / ".git").exists() for above in (folder.resolve(), *folder.resolve().parents)):
        raise ConfigError(
            f"working dir {folder} is in a git checkout, and git does not say which of its files are ignored: "
            f"{_refusal(folder)}; mend that, or name a folder outside with --working-dir"
        )
    return None if names is None else [Path(os.fsdecode(name)) for name in names.split(b"\0") if name]


def _git(folder: Path, *words: str) -> bytes | None:
    """What git says of `folder`; None where it is no checkout or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _refusal(folder: Path) -> str:
    """Why git does not say what it tracks."""
    try:
        done = subprocess.run(["git", "-C", str(folder), "status"], capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        return "git is not installed"
    except (OSError, subprocess.TimeoutExpired):
        return "it does not answer"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[0].removeprefix("fatal: ") if said else f"exit code {done.returncode}"


def _all_files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NEVER_SENT]
        for name in names:
            yield (Path(root) / name).relative_to(folder)


def mib(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**20:,.1f} MiB"
