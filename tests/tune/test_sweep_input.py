"""`mmsa-dist sweep`: what it searches of a space, and bad input."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmsa_dist.errors import ConfigError, TransientError
from tests.tune.sweeps import REPOSITORY, clean, searched, tiny
from tune.space import Space
from tune.sweep import _given_keys, _narrowed, main

# --- what is searched -------------------------------------------------------------------------------------------------


def test_what_the_command_fixes_or_what_would_change_nothing_is_not_searched(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(data, data={"modalities": ["text", "audio"]})
    space = _narrowed(Space.load("ufen_mtfn"), recipe, ["--batch-size", "16", "--model.layers=2", "--epochs", "3"])
    assert "data.batch_size" not in space.keys and "model.layers" not in space.keys
    assert "optim.lr.vision" not in space.keys and "optim.lr.audio" in space.keys
    assert "optim.lr.text" not in space.keys
    said = capsys.readouterr().out
    assert "as the command fixes them: data.batch_size, model.layers" in said
    assert "as there is no vision: optim.lr.vision, optim.weight_decay.vision" in said
    assert "as no text encoder is fine-tuned: optim.lr.text" in said


def test_nothing_left_to_search_is_refused(data: Path, tmp_path: Path) -> None:
    space = searched(tmp_path, "a: {model.layers: {choice: [1, 2], source: s}}")
    with pytest.raises(ConfigError, match="nothing is left to search"):
        _narrowed(space, tiny(data), ["--model.layers", "1"])


def test_of_keys_that_go_together_one_that_the_command_fixes_leaves_what_fits(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "{together: [[32, 2, 1], [64, 4, 1], [64, 2, 2]], source: s}"
    text = f"a:\n  model.width, model.heads, model.layers: {rows}"
    recipe = tiny(data, model={"width": 64, "heads": 2})
    space = _narrowed(searched(tmp_path, text), recipe, ["--model.width", "64"])
    assert [(knob.keys, knob.values) for knob in space.knobs] == [(("model.heads", "model.layers"), ((4, 1), (2, 2)))]
    assert capsys.readouterr().out == "not searched, as the command fixes them: model.width\n"
    with pytest.raises(ConfigError, match=r"no row of .* has `model.heads` 8, which the command fixes") as refused:
        _narrowed(searched(tmp_path, text), tiny(data, model={"width": 64, "heads": 8}), ["--model.heads=8"])
    assert "\n" not in str(refused.value)


def test_of_keys_that_go_together_one_that_changes_nothing_leaves_every_row(data: Path, tmp_path: Path) -> None:
    text = "a:\n  optim.lr.audio, optim.lr.vision: {together: [[1e-3, 1e-3], [5e-3, 1e-4]], source: s}"
    recipe = tiny(data, data={"modalities": ["text", "audio"]})
    (knob,) = _narrowed(searched(tmp_path, text), recipe, []).knobs
    assert (knob.keys, knob.kind, knob.values) == (("optim.lr.audio",), "choice", (1e-3, 5e-3))


def test_flags_are_keys() -> None:
    words = ["--optim.weight-decay.text", "0", "--batch-size=4", "-h", "word"]
    assert _given_keys(words) == {"optim.weight_decay.text", "data.batch_size"}


# --- bad input, said before anything starts ---------------------------------------------------------------------------

REFUSED = {
    "unknown system": (["ufen_mtfm"], r"unknown system 'ufen_mtfm'; did you mean 'ufen_mtfn'"),
    "unknown value": (
        ["ufen_mtfn", "--optim.lr.txt", "1"],
        r"unknown option --optim.lr.txt; did you mean --optim.lr.text",
    ),
    "no trials": (["ufen_mtfn", "--trials", "0"], r"--trials is 0, expected at least 1"),
    "trials is no number": (["ufen_mtfn", "--trials", "many"], r"--trials.*invalid int value: 'many'"),
    "no grace": (["ufen_mtfn", "--grace", "0"], r"--grace is 0, expected at least 1"),
    "another launcher": (["ufen_mtfn", "--launcher", "local"], r"--launcher local: a sweep runs on Ray"),
    "a missing space": (["ufen_mtfn", "--space", "none.yaml"], r"search space none.yaml: cannot be read"),
    "an unreachable MLflow": (
        ["ufen_mtfn", "--tracking-uri", "http://127.0.0.1:9"],
        r"no MLflow server answers at http://127.0.0.1:9",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, message = REFUSED[case]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises((ConfigError, TransientError), match=message) as refused:
        main([*argv, "--data", str(data), "--runs-dir", str(tmp_path / "runs")])
    assert "\n" not in str(refused.value)


# in a process of its own: here another test may have started Ray already
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--address", "127.0.0.1:9"], 75, "error: launch.address: no Ray cluster answers at 127.0.0.1:9"),
        (["--workers", "4096"], 2, "error: launch.workers: 4096 workers"),
    ],
)
def test_what_the_cluster_cannot_do_is_one_sentence_and_an_exit_code(
    options: list[str], code: int, message: str, data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mmsa_dist", "sweep", "ufen_mtfn", "--data", str(data), "--tracking.no-enabled"]
    command += ["--batch-size", "4096", "--runs-dir", str(tmp_path), *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=clean(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(message) and "Traceback" not in done.stderr


def test_without_a_system_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert "--max-concurrent N" in capsys.readouterr().out
