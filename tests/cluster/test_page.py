"""docs/cluster.md: its commands are run where they can be, and marked where they cannot."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.commands import EXAMPLE
from cluster.manifests import TARGETS
from mmsa_dist.__main__ import main
from tests.cluster.descriptions import FULL, changed, written

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)]
MARK = "# not run in our tests: needs "
ELSEWHERE = "# run in "
"""Begins a block whose commands another test runs, against a cluster."""


def lines(*, marked: bool) -> list[list[str]]:
    """The words of each command of the page."""
    return [
        shlex.split(line, comments=True)
        for block in BLOCKS
        if not block[0].startswith(ELSEWHERE)
        for line in block
        if block[0].startswith(MARK) is marked and not line.startswith("#")
    ]


def test_what_is_not_marked_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page. The description is edited between, as it says: what one target needs is filled in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in lines(marked=False):
        if words[:2] == ["ray", "get-auth-token"]:
            ray = Path(sys.executable).parent / "ray"
            subprocess.run([ray, *words[1:]], check=True, timeout=300, capture_output=True)
            assert (tmp_path / ".ray" / "auth_token").is_file(), "where the files take it from"
            continue
        assert words[:2] == ["mmsa-dist", "cluster"], words
        if words[3:4] == ["ray-up-aws"]:
            written(tmp_path, FULL)
        assert main(words[1:]) == 0, words
    names = {path.name for path in tmp_path.iterdir()}
    assert {"cluster.yaml", "mosi.rayjob.yaml", "mosi.aws.yaml", "mosi.sbatch"} <= names


def test_what_is_run_elsewhere_is_run_there() -> None:
    for block in BLOCKS:
        if block[0].startswith(ELSEWHERE):
            tests = (PAGE.parent.parent / block[0].removeprefix(ELSEWHERE)).read_text(encoding="utf-8")
            for words in (shlex.split(line, comments=True) for line in block[1:]):
                assert f'"{words[1]}"' in tests and (words[1] != "jobs" or f'"{words[2]}"' in tests), words


def test_the_other_targets_are_named() -> None:
    assert all(f"`{name}`" in TEXT for name in TARGETS)


def test_what_is_marked_names_files_that_are_written(tmp_path: Path) -> None:
    """And programs and options of Ray's that there are."""
    named = {word for words in lines(marked=True) for word in words if word.startswith("mosi.")}
    assert named == {f"mosi.{TARGETS[name].file}" for name in ("kuberay-job", "ray-up-aws", "slurm")}
    programs = {words[0] for words in lines(marked=True)}
    assert programs == {
        *("docker", "helm", "openssl", "kubectl", "ray", "export", "mmsa-dist", "sbatch", "tail", "scancel", "chmod"),
        *("prometheus", "cp", "grafana"),
    }
    ray = Path(sys.executable).parent / "ray"
    done = subprocess.run([ray, "--help"], capture_output=True, text=True, timeout=300, check=True)
    for words in lines(marked=True):
        if words[0] == "ray":
            assert re.search(rf"^  {words[1]} ", done.stdout, re.MULTILINE), words


def test_the_submitted_command_is_one_that_is_written() -> None:
    """Its options are those that the files themselves use."""
    (words,) = (words for words in lines(marked=True) if words[0] == "mmsa-dist")
    from cluster import job
    from cluster.description import Description

    own = job.words(Description.model_validate(changed(FULL, command="train ufen_mtfn --data d")))
    assert {word for word in words if word.startswith("--")} - {"--address"} <= {w for w in own if w.startswith("--")}


@pytest.mark.parametrize("path", ["cluster/Dockerfile", "cluster/Dockerfile.cuda"])
def test_the_files_are_where_the_page_says(path: str) -> None:
    assert (PAGE.parent.parent / path).is_file()
    assert path.rpartition("/")[2] in TEXT


def test_the_page_and_the_example_agree() -> None:
    """Keys that the page names are the description's."""
    from cluster.description import Description

    for part, key in re.findall(r"`(shared|workers|checkpoint|kubernetes|cloud|slurm)\.(\w+)`", TEXT):
        assert key in Description.model_fields[part].annotation.model_fields, f"{part}.{key}"
        assert f"{key}:" in EXAMPLE.read_text(encoding="utf-8")
