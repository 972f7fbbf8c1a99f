"""Seconds of `make demo` and `make test` in a clean clone, installation included.

The clone holds what git would commit: tracked files and new ones that it does not ignore, as they are now.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import ROOT, Row, record

BOUNDS = {"demo": 10, "test": 15}
"""Target -> minutes it may take on two cores."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clone", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(BOUNDS), help="make targets, each in a clone of its own")
    parser.add_argument("--keep", action="store_true", help="keep the clones and print where they are")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    rows, raw = [], {}
    for target in options.targets:
        folder = Path(tempfile.mkdtemp(prefix=f"mmsa-dist-{target}-"))
        copy(folder)
        began = time.perf_counter()
        code = subprocess.run(["make", target], cwd=folder, env=environment(), check=False).returncode
        minutes = (time.perf_counter() - began) / 60
        print(f"make {target}: {minutes:.1f} minutes, exit code {code}")
        if options.keep:
            print(f"clone: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        if code:
            return code
        raw[target] = minutes
        bound = BOUNDS.get(target)
        rows.append(
            Row(
                what=f"`make {target}` in a clean clone, installation included",
                value=minutes,
                unit="min",
                wanted=f"<= {bound} min" if bound else "",
                how="once",
                met=minutes <= bound if bound else None,
            )
        )
    if not options.no_record:
        record("clone", rows, raw={"minutes": raw})
    return 0


def copy(folder: Path) -> None:
    """What a clone would hold."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # a deleted file is listed until the deletion is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def environment() -> dict[str, str]:
    """Without what this process's own environment of programs would lend the clone."""
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != own)
    return {k: v for k, v in os.environ.items() if k not in {"VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS"}} | {"PATH": path}


if __name__ == "__main__":
    sys.exit(main())
