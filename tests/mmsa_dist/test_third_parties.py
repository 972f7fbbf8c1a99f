"""What a third party's code raises reaches a user as one sentence; what ours raises keeps its traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmsa_dist.__main__ import main
from mmsa_dist.errors import ConfigError
from mmsa_dist.registry import theirs
from mmsa_dist.systems import System
from tests.data import packed
from tests.mmsa_dist.test_registry import THEIRS

FAULTY = (
    THEIRS
    + """
class Built(Theirs):
    def __init__(self, config, spec):
        raise ValueError("no such\\nlayer")


class Forward(Theirs):
    def forward(self, batch):
        return batch["audio"]


import torch


class Scalar(Theirs):
    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.temperature = nn.Parameter(torch.tensor(1.0))


class Empty(Theirs):
    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.nothing = nn.Parameter(torch.empty(0, 3))


class Turned(Theirs):
    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.turned = nn.Parameter(torch.zeros(3, 2).t())


class Needy(Theirs):
    class Config(Config):
        width: int


from mmsa_dist.label_generators import LabelGenerator


class Labels(LabelGenerator):
    def __init__(self, config, split):
        raise KeyError("T")
"""
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(packed(tmp_path_factory.mktemp("third"), samples=40))


@pytest.fixture(autouse=True)
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of theirs, for this process and for ranks."""
    (tmp_path / "faulty.py").write_text(FAULTY.replace('@system("their_system")\n', ""))
    (tmp_path / "divides.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('not as a module')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.chdir(tmp_path)


def sentence(capfd: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """The one line that a command says which must fail."""
    assert main(list(words)) == code
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divides:X", "cannot be imported: ZeroDivisionError: division by zero"),
        ("leaves:X", "cannot be imported: SystemExit: not as a module"),
        ("faulty:Built", "failed when it was built: ValueError: no such layer; MMSA_DEBUG=1 shows where"),
        ("faulty:Needy", "failed when its Config was made: ValidationError: 1 validation error for Config width Field"),
    ],
)
def test_a_system_that_cannot_be_made(capfd: pytest.CaptureFixture[str], data: str, name: str, message: str) -> None:
    for words in (["systems", name], ["train", name, "--data", data], ["plan", name, "--data", data]):
        line = sentence(capfd, 2, *words)
        assert line.startswith("error: system '") and message in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Scalar", "its parameter temperature has the shape ()"),
        ("Empty", "its parameter nothing has the shape (0, 3)"),
        ("Turned", "its parameter turned is not contiguous"),
    ],
)
def test_a_parameter_that_cannot_be_sent_or_saved(
    capfd: pytest.CaptureFixture[str], data: str, name: str, said: str
) -> None:
    """DeepSpeed would end with an error of its own, or the first checkpoint would not load."""
    assert f"error: system faulty:{name}: {said}; " in sentence(capfd, 2, "train", f"faulty:{name}", "--data", data)


def test_a_system_that_cannot_predict(capfd: pytest.CaptureFixture[str], data: str) -> None:
    said = "'Batch' object is not subscriptable"
    line = sentence(capfd, 2, "systems", "faulty:Forward")
    assert f"system 'faulty:Forward' failed in its forward pass: TypeError: {said}" in line
    words = ["--data", data, "--launcher", "local", "--tracking.no-enabled"]
    line = sentence(capfd, 4, "train", "faulty:Forward", *words)
    assert f"rank 0 failed: TypeError: {said}; its traceback is in " in line
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    words[3] = "torchrun"
    command = [sys.executable, "-m", "mmsa_dist", "train", "faulty:Forward", *words]
    done = subprocess.run(command, env={**os.environ, **rank}, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
    assert f"error: rank 0 failed: TypeError: {said}; its traceback is in " in done.stderr


def test_a_label_generator_that_cannot_be_made(capfd: pytest.CaptureFixture[str], data: str) -> None:
    line = sentence(capfd, 2, "train", "self_mm", "--data", data, "--labels.generator", "faulty:Labels")
    assert "label generator 'faulty:Labels' failed when it was built: KeyError: 'T'; MMSA_DEBUG=1" in line


def test_a_system_without_options_needs_no_config() -> None:
    assert System.Config.model_fields == {}


def test_ours_keeps_its_traceback() -> None:
    own = type("Own", (), {"__module__": "mmsa_dist.systems.own"})
    with pytest.raises(ZeroDivisionError), theirs("system", "own", own, "when it was built"):
        1 / 0  # noqa: B018
    with pytest.raises(ConfigError, match="as it is"), theirs("system", "other", Path, "when it was built"):
        raise ConfigError("as it is")


@pytest.mark.parametrize("place", ["file/iam.png", "file/below/iam.png", "folder.png", "/proc/none/iam.png"])
def test_a_picture_where_none_can_be(capfd: pytest.CaptureFixture[str], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert f"--picture {place}: cannot be written: " in sentence(capfd, 2, "systems", "iam", "--picture", place)
