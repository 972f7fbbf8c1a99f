"""One measurement on disk: what was measured, beside the command, commit, date, machine and versions that it holds for.

A benchmark ends with ``record("startup", [Row(...)], raw={...})``; figures reach a page from that file only
(`benchmarks.render`), at once.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("mmsa-dist", "torch", "deepspeed", "ray", "mlflow", "transformers", "webdataset", "safetensors", "numpy")


@dataclass(frozen=True)
class Row:
    """One line of the figures' table.

    Attributes:
        what: what was measured, in words.
        value: the figure.
        unit: its unit; empty for a ratio.
        wanted: the bound it is held against, in words; empty where there is none.
        how: warm-up, repeats and the statistic, e.g. "median of 7 after 1".
        met: whether the bound holds; None where there is none.
        headline: shown in README.md too, as every row with a bound is; benchmarks/README.md shows all.
    """

    what: str
    value: float
    unit: str = ""
    wanted: str = ""
    how: str = ""
    met: bool | None = None
    headline: bool = False


@dataclass(frozen=True)
class Table:
    """Figures that are read side by side; benchmarks/README.md shows it below the rows."""

    title: str
    head: list[str]
    rows: list[list[str]]


def record(
    name: str,
    rows: list[Row],
    raw: dict[str, Any] | None = None,
    command: str | None = None,
    tables: Sequence[Table] = (),
) -> Path:
    """Writes ``benchmarks/results/NAME.json`` and gives its path.

    Args:
        name: the file's name.
        rows: what a page shows.
        raw: everything that was measured.
        command: the command that measured it; this process's by default.
        tables: shown below the rows.
    """
    content = {
        "name": name,
        "command": command or command_line(),
        **environment(),
        "rows": [asdict(row) for row in rows],
        **({"tables": [asdict(table) for table in tables]} if tables else {}),
        "raw": raw or {},
    }
    return write(name, content)


def write(name: str, content: dict[str, Any]) -> Path:
    """Writes one result file, whole or not at all, and renews the pages that show it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
    temporary.replace(path)
    if RESULTS.is_relative_to(ROOT):
        from benchmarks import render  # which reads this module's folders

        render.renew()
    return path


def environment() -> dict[str, Any]:
    """Commit, date, machine and versions that a figure holds for. Figures and pages written before it are no change."""
    pages = ("benchmarks/results", "README.md", "benchmarks/README.md", "docs/reproducing.md")
    others = (".", *(f":!{page}" for page in pages))
    return {
        "commit": _git("rev-parse", "--short", "HEAD") or "none",
        "changed_since_commit": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *others)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(_memory() / 2**30)},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def command_line() -> str:
    """This process's command as one would type it in the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [str(Path(sys.argv[0]).name)]
    return shlex.join(["python", *program, *map(portable, sys.argv[1:])])


def portable(argument: str) -> str:
    """A word of a command without this machine's folders: relative to the repository, else the file's name alone."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f".../{path.name}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
