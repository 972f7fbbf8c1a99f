"""Which versions of what computes are installed on a node. Runs there.

Facts only: whether they are the right ones, and the same everywhere, is seen where all nodes' answers are.
"""

import hashlib
import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from cluster.doctor.finding import Finding

PACKAGES = ("torch", "deepspeed", "ray", "numpy", "transformers", "safetensors", "mlflow")
OURS = ("shards", "mmsa_dist", "tune", "cluster")


def look(wanted: dict[str, Any]) -> list[Finding]:
    """One finding whose facts are the versions: ``python``, each of `PACKAGES`, ``code``; None for what is missing.

    ``ranges`` has what the installed mmsa-dist asks for, where it is installed.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions.update({package: _version(package) for package in PACKAGES})
    versions["code"] = code()
    facts = {"versions": versions, "ranges": _ranges(), "executable": sys.executable}
    return [Finding("software", "versions", "ok", "", facts=facts)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ranges() -> dict[str, str]:
    """Package -> the versions that mmsa-dist asks for; nothing in a checkout that is not installed."""
    try:
        needed = requires("mmsa-dist") or []
    except PackageNotFoundError:
        return {}
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in needed]
    return {each.name: str(each.specifier) for each in parsed if each.marker is None and each.name in PACKAGES}


def code() -> str | None:
    """A fingerprint of our own code as this node would run it, None where there is none."""
    sys.path.append(str(Path.cwd()))  # as for python -m
    digest = hashlib.sha256()
    for package in OURS:
        # `cluster` is in the archive that this runs from: its place is that of its sister
        spec = importlib.util.find_spec(package if package != "cluster" else "shards")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(next(iter(spec.submodule_search_locations))).with_name(package)
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
