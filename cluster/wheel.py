"""A built wheel as what travels with a job, for nodes that have the dependencies but not this program.

Its files are sent as the job's working directory, where Python finds them as if they were installed. Ray would have
each node install it with ``pip``, dependencies and all, from an index that nodes may not reach; and it knows a wheel by
its file's name, so that of two builds of one version it would run the first.
"""

import re
import zipfile
from pathlib import Path, PurePosixPath

from cluster.errors import ConfigError

PROJECT = "mmsa-dist"
PROGRAM = "mmsa_dist/__main__.py"
BUILD = "`python -m pip wheel --no-deps --wheel-dir dist .` in a checkout builds one"


def wheel_of(given: Path) -> Path:
    """The wheel itself, or the newest of this project in a folder.

    Raises:
        ConfigError: there is none, or it is of another project.
    """
    if not given.is_dir():
        check(given)
        return given
    found = sorted(given.glob("mmsa_dist-*.whl"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise ConfigError(f"--wheel {given}: there is no wheel of {PROJECT} in this folder (mmsa_dist-*.whl); {BUILD}")
    check(found[-1])
    return found[-1]


def check(wheel: Path) -> None:
    """
    Raises:
        ConfigError: not a wheel of this project that runs on any machine.
    """
    if not wheel.is_file():
        raise ConfigError(f"--wheel {wheel}: there is no such file; {BUILD}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            described = [name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
            metadata = archive.read(described[0]).decode() if len(described) == 1 else ""
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"--wheel {wheel}: not a wheel ({error}); {BUILD}") from error
    if not (named := re.search(r"^Name: *(\S+)", metadata, re.MULTILINE)):
        raise ConfigError(f"--wheel {wheel}: not a wheel (it lacks *.dist-info/METADATA); {BUILD}")
    if re.sub(r"[-_.]+", "-", named[1]).lower() != PROJECT or PROGRAM not in names:
        raise ConfigError(f"--wheel {wheel}: a wheel of {named[1]}, not of {PROJECT}; {BUILD}")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
        raise ConfigError(f"--wheel {wheel}: some of its files would lie outside the job's folder; {BUILD}")


def packages(wheel: Path) -> set[str]:
    """Names at the top of what a wheel installs."""
    with zipfile.ZipFile(wheel) as archive:
        return {PurePosixPath(name).parts[0] for name in archive.namelist()}
