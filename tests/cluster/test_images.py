"""The images are built nowhere here, so they are read: by hadolint, and for what it does not look at."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster").glob("Dockerfile*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction with its words, continued lines joined, comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for line in joined.splitlines() if line for name, _, rest in [line.partition(" ")]]


def tool(name: str) -> str:
    """A program beside this Python, or on the path; the test is skipped where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; pip install -e '.[dev]' brings it")
    return found


def test_there_is_one_for_cpus_and_one_for_cuda() -> None:
    assert [path.name for path in FILES] == ["Dockerfile", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_runs_as_root_and_bases_are_pinned(path: Path) -> None:
    found = instructions(path)
    names = [name for name, _ in found]
    assert names.count("FROM") == 2, "compilers and caches stay in the first"
    assert "ADD" not in names, "it fetches addresses and unpacks archives"
    (base,) = {rest.split()[0] for name, rest in found if name == "FROM"}
    (default,) = (rest for name, rest in found if name == "ARG")
    assert base == "python:${PYTHON}" and re.fullmatch(r"PYTHON=3\.11-slim-\w+", default)
    last = [rest for name, rest in found if name == "USER"][-1]
    assert last == "1000:1000" and names.index("USER") > len(names) - 1 - names[::-1].index("FROM")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_versions_are_those_that_were_tested(path: Path) -> None:
    installs = [part for _, rest in instructions(path) for part in rest.split("&&") if "pip install" in part]
    assert installs and all("-c constraints.txt" in part and "--no-cache-dir" in part for part in installs)
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    words = [word for part in installs for word in part.split("constraints.txt")[1].split()]
    named = [word for word in words if re.fullmatch(r"[a-z0-9-]+", word)]
    assert "boto3" in named and "google-api-python-client" in named and set(named) <= pinned


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_goes_in(path: Path) -> None:
    for name, rest in instructions(path):
        assert not re.search(r"token|password|secret|_key\b|credential", rest, re.IGNORECASE), f"{name} {rest}"
        if name == "COPY" and not rest.startswith("--from="):
            assert set(rest.split()[:-1]) <= {
                *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
                *("shards", "mmsa_dist", "tune", "cluster"),
            }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_package_and_extra_of_the_project_is_in_it(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {rest.split()[0] for name, rest in instructions(path) if name == "COPY"}
    assert packages <= copied
    extras = set(project["project"]["optional-dependencies"]) - {"dev"}
    assert f".[{','.join(sorted(extras, reverse=True))}]" in path.read_text(encoding="utf-8")


def test_the_builder_is_sent_what_is_copied_and_nothing_else() -> None:
    kept = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")}
    assert "*" in kept
    copied = {
        word
        for path in FILES
        for name, rest in instructions(path)
        if name == "COPY" and not rest.startswith("--from=")
        for word in rest.split()[:-1]
    }
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == copied


def test_manifests_run_it_as_its_user() -> None:
    from cluster.manifests.kuberay import USER

    assert all(f"useradd --uid {USER} " in path.read_text(encoding="utf-8") for path in FILES)
