"""`mmsa-dist cluster`: its words, the files that it writes, and what they lack."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.commands import Kind
from cluster.commands import main as cluster
from cluster.manifests import TARGETS
from mmsa_dist.__main__ import main
from tests.cluster.descriptions import FULL, LEAST, SMALL, changed, written

WHOLE: dict[str, dict[str, Any]] = {
    "ray-up-gcp": changed(FULL, cloud={"zones": ["us-central1-a"], "region": "us-central1"}),
    **{name: FULL for name in TARGETS if name != "ray-up-gcp"},
}
"""For each target a description that says everything."""


def rendered(target: str, description: dict[str, Any], folder: Path) -> str:
    assert cluster(["render", target, "--from", str(written(folder, description)), "--to", str(folder)]) == 0
    return (folder / f"mosi.{TARGETS[target].file}").read_text(encoding="utf-8")


def test_the_targets_are_those_of_the_command() -> None:
    assert list(TARGETS) == list(Kind.__args__)


def test_help_teaches_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster(["--help"]) == 0
    text = capsys.readouterr().out
    for name, target in TARGETS.items():
        assert name in text and target.about in text
    assert cluster([]) == 2


@pytest.mark.parametrize("command", ["init", "render", "run"])
def test_each_command_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cluster([command, "--help"])
    assert stop.value.code == 0
    assert f"mmsa-dist cluster {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rendr"], "unknown command 'rendr' of mmsa-dist cluster; did you mean 'render'?"),
        (["render"], "TARGET|missing; see mmsa-dist cluster render --help"),
        (["render", "slrm"], "slrm: there is none such; did you mean 'slurm'?"),
        (["render", "slurm", "--form", "x"], "unknown option --form; did you mean --from?"),
        (["render", "slurm", "x"], "one word too many: x"),
        (["render", "slurm", "--from"], "--from: a value is missing; see mmsa-dist cluster render --help"),
        (["render", "slurm", "--from", "none.yaml"], "none.yaml: No such file"),
        (["init", "--too", "x"], "unknown option --too; did you mean --to?"),
        (["run", "--nodes", "1:4"], "nothing to run"),
        (["run", "--nodes", "4:1", "--", "train"], "--nodes 4:1: neither a number of nodes nor LEAST:MOST"),
        (["run", "--nodes", "0", "--", "train"], "--nodes 0: neither a number of nodes nor LEAST:MOST"),
        (["run", "--cpus", "few", "--", "train"], "--cpus"),
    ],
)
def test_a_misspelt_command_line_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", *words]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(part in error for part in sentence.split("|")), error
    assert "╭" not in error and "│" not in error


def test_init_writes_the_example_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    assert main(["cluster", "init", "--to", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    before = path.read_text()
    assert main(["cluster", "init", "--to", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == before
    assert main(["cluster", "init", "--to", "-"]) == 0
    assert capsys.readouterr().out == before
    for target in ("kuberay-job", "kuberay-cluster", "slurm"):
        assert main(["cluster", "render", target, "--from", str(path), "--to", "-"]) == 0
    assert main(["cluster", "init", "--to", str(tmp_path / "none" / "x.yaml")]) == 75


@pytest.mark.parametrize("target", TARGETS)
def test_a_dash_prints_the_same_file(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(target, WHOLE[target], tmp_path)
    assert f"mosi.{TARGETS[target].file}: its first lines say how it is used" in capsys.readouterr().out
    assert cluster(["render", target, "--from", str(tmp_path / "cluster.yaml"), "--to", "-"]) == 0
    assert capsys.readouterr().out == text


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    path = written(tmp_path, FULL)
    assert main(["cluster", "render", "slurm", "--from", str(path), "--to", str(tmp_path / "file" / "x")]) == 75
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_target_makes_no_use_of_is_said(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rendered(target, WHOLE[target], tmp_path)
    (note,) = capsys.readouterr().err.splitlines()
    told = note.removeprefix(f"note: {target} makes no use of ").split(", ")
    has = {*FULL, *(f"{key}.{inner}" for key, part in FULL.items() if isinstance(part, dict) for inner in part)}
    assert set(told) == set(TARGETS[target].ignores) & has
    rendered(target, SMALL if target != "slurm" else LEAST, tmp_path)
    less = capsys.readouterr().err
    assert "kubernetes" not in less


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("description", ["whole", "small"])
def test_no_file_listens_to_the_world_or_holds_a_secret(target: str, description: str, tmp_path: Path) -> None:
    text = rendered(target, WHOLE[target] if description == "whole" else SMALL, tmp_path)
    assert "0.0.0.0" not in text and "LoadBalancer" not in text and "NodePort" not in text and "::/0" not in text
    assert "RAY_AUTH_TOKEN=" not in text and "name: RAY_AUTH_TOKEN," not in text
    assert "AWS_SECRET_ACCESS_KEY" not in text and "secretKeyRef" not in text
    assert "token" in text, "who uses the cluster shows its token"
    assert not any(line != line.rstrip() for line in text.splitlines()), "blanks at the end of a line"
    assert text.endswith("\n") and "\n\n\n" not in text


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "slurm"])
def test_files_are_yaml_with_no_key_twice_and_explain_themselves(target: str, tmp_path: Path) -> None:
    from cluster.description import _Loader

    text = rendered(target, WHOLE[target], tmp_path)
    assert isinstance(yaml.load(text, _Loader), dict)
    assert text.startswith("# mosi: ") and f"`mmsa-dist cluster render {target}`" in text
    assert text.count("#") > 15, "a file that a person would have written says why"


@pytest.mark.parametrize(
    ("target", "parts", "sentence"),
    [
        ("kuberay-job", {"image": None}, "image is missing: pods run nothing else"),
        ("kuberay-cluster", {"shared": {"claim": None}}, "shared.claim is missing: run folders must be on a disk"),
        ("kuberay-job", {"storage": "/data"}, "storage: /data is a place within one pod"),
        ("kuberay-job", {"kubernetes": {"credentials_secret": "s"}}, "one file opens one kind of bucket"),
        ("ray-up-aws", {"cloud": {"region": None}}, "cloud.region is missing"),
        ("ray-up-aws", {"storage": "file:///data"}, "storage: file:///data is a place on one machine"),
        ("ray-up-aws", {"shared": {"nfs": None}}, "shared.nfs is missing: run folders must be on a disk"),
        ("ray-up-gcp", {"cloud": {"project": None}}, "cloud.project is missing"),
        ("ray-up-gcp", {"cloud": {"zones": ["a", "b"]}}, "cloud.zones: 2 given; Google Cloud takes exactly one"),
        ("ray-up-gcp", {"head": {"machine": None}}, "head.machine is missing"),
        ("ray-up-gcp", {"workers": {"machine": None}}, "workers.machine is missing"),
        ("ray-up-gcp", {"workers": {"gpus": 1, "gpu": "t4"}, "cuda": True}, "cloud.machine_image is missing"),
        ("slurm", {"command": ["train", "mult", "--workers", "4"]}, "command: --workers is decided by workers.least"),
    ],
)
def test_what_a_target_lacks_is_one_sentence(
    target: str, parts: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, changed(SMALL, **parts))
    assert main(["cluster", "render", target, "--from", str(path), "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
