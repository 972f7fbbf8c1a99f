"""`mmsa-dist export`: what leaves a run loads with torch alone, answers as the run does, and is checked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import checkpoint
from mmsa_dist.__main__ import main
from mmsa_dist.checkpoint import Checkpoint
from mmsa_dist.errors import DataError
from mmsa_dist.portable import State
from mmsa_dist.predictor import Predictor
from tests.mmsa_dist.runs import packed, tiny_encoder, trained

ALONE = """
import json, sys
for name in ("deepspeed", "ray", "mlflow", "webdataset"):
    sys.modules[name] = None  # an import of it fails
from pathlib import Path
from mmsa_dist.predictor import Predictor
predictor = Predictor.load(Path(sys.argv[1]))
answers = predictor.predict([predictor.utterance(predictor.example(), "example")])
print(json.dumps({task: values.tolist() for task, values in answers.items()}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, behind a text encoder of its own."""
    folder = tmp_path_factory.mktemp("export")
    encoder = tiny_encoder(folder / "encoder")
    return trained(folder / "runs", packed(folder / "data"), encoder=str(encoder))[0]


def test_it_loads_with_torch_alone_and_answers_as_the_run_does(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    whole = Predictor.load(run)
    expected = whole.predict([whole.utterance(whole.example(), "example")])
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    assert json.loads(alone.stdout) == {task: values.tolist() for task, values in expected.items()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing hidden stays"
    again = tmp_path / "again"
    assert main(["export", str(tmp_path / "model"), "--to", str(again)]) == 0, "a model's folder can be exported too"
    assert (again / "weights.safetensors").read_bytes() == (tmp_path / "model" / "weights.safetensors").read_bytes()


def test_the_python_of_its_readme_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    code = (tmp_path / "model" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('": audio', '": [[0.5] * 5]').replace('": vision', '": None'), {})


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.yaml", "data.json", "encoder/vocab.txt"])
def test_what_was_changed_is_not_loaded(name: str, run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    file = tmp_path / "model" / name
    if not file.is_file():
        (file,) = (tmp_path / "model" / "encoder").glob("tokenizer.json")
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"bytes, expected \d+; export the model again"):
        Predictor.load(tmp_path / "model")


def test_a_flipped_bit_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither of a run nor of a model's folder: it would get checksums that agree with it."""
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    shutil.copytree(run, tmp_path / "run")
    for folder in (tmp_path / "run" / "best", tmp_path / "model"):
        content = bytearray((folder / "weights.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "weights.safetensors").write_bytes(content)
    for source, place in (("run", "run/best"), ("model", "model")):
        capsys.readouterr()
        assert main(["export", str(tmp_path / source), "--to", str(tmp_path / "again")]) == 3
        assert f"{tmp_path / place}: weights.safetensors differs from its sha256; " in capsys.readouterr().err
        assert not (tmp_path / "again").exists()


def saved(run: Path, unfinished: Path, step: int, best: int) -> None:
    """A checkpoint of a run that goes on; only the newest and the best one are kept."""
    weights = {name: value + 0 for name, value in Predictor.load(run).system.state_dict().items()}
    more = {name: value + step if value.is_floating_point() else value for name, value in weights.items()}
    content = Checkpoint(State(step, more, {"exp_avg": {}, "exp_avg_sq": {}}), {}, {"best_step": best})
    checkpoint.save(unfinished / "checkpoints", content, 1, best)


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """A run after two epochs, of which the first was the better one."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.yaml", "data.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    for step in (1, 2):
        saved(run, folder, step, 1)
    return folder


@pytest.mark.parametrize("when", ["looked for", "copied"])
def test_a_best_epoch_that_is_removed_meanwhile_gives_way_to_the_new_one(
    when: str, run: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = {"looked for": (checkpoint, "best_step"), "copied": (shutil, "copyfile")}[when]
    real = getattr(module, name)

    def removed(*args: Any) -> Any:
        found = None if when == "copied" else real(*args)
        monkeypatch.undo()
        saved(run, unfinished, 3, 3)
        return real(*args) if when == "copied" else found

    monkeypatch.setattr(module, name, removed)
    assert main(["export", str(unfinished), "--to", str(tmp_path / "model")]) == 0
    third = checkpoint.load_weights(unfinished / "checkpoints" / "step-00000003")
    given = Predictor.load(tmp_path / "model").system.state_dict()
    assert all((given[name] == value).all() for name, value in third.items())


def test_what_cannot_be_read_is_named(unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (unfinished / "recipe.yaml").unlink()
    assert main(["export", str(unfinished), "--to", str(tmp_path / "model")]) == 3
    assert f"error: {unfinished / 'recipe.yaml'}: cannot be read: No such file or directory" in capsys.readouterr().err


def test_a_run_that_goes_on_gives_its_best_epoch_so_far(unfinished: Path, tmp_path: Path) -> None:
    assert main(["export", str(unfinished), "--to", str(tmp_path / "model")]) == 0
    first = checkpoint.load_weights(unfinished / "checkpoints" / "step-00000001")
    given = Predictor.load(tmp_path / "model").system.state_dict()
    assert all((given[name] == value).all() for name, value in first.items())


def test_what_cannot_be_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    assert main(["export", str(run), "--to", str(taken)]) == 2 and list(taken.iterdir()) == []
    assert "is there already; choose another folder" in capsys.readouterr().err
    assert main(["export", str(taken), "--to", str(tmp_path / "new")]) == 3
    assert "holds no weights" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["export", str(tmp_path / "none"), "--to", str(tmp_path / "new")]) == 2
    assert main(["export", str(run)]) == 2 and main(["export", str(run), "--two", "x"]) == 2
