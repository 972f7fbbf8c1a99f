"""Systems are found by name; a third party adds one without touching our files."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import from_dict
from mmsa_dist.systems import DataSpec, System, get_system, system, system_names
from tests.mmsa_dist.batches import loss_of, ragged, spec_for

THEIRS = '''
from torch import nn
from mmsa_dist.config import Strict
from mmsa_dist.layers.pooling import masked_mean
from mmsa_dist.systems import Losses, Prediction, System, system
from mmsa_dist.systems.base import weighted_mean


class Config(Strict):
    bias: bool = True
    """Whether there is one."""


@system("their_system")
class Theirs(System):
    """Linear on the mean of audio."""

    Config = Config

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.audio = nn.Linear(spec.widths["audio"], 1, bias=config.bias)

    def forward(self, batch):
        return Prediction({"M": self.audio(masked_mean(batch.values["audio"], batch.mask("audio"))).squeeze(-1)})

    def loss(self, prediction, batch, targets):
        loss = weighted_mean((prediction.tasks["M"] - targets["M"]).abs(), batch)
        return Losses(loss, {"M": loss.detach()})


class NotASystem:
    pass
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with an entry point: a module and its metadata, as pip leaves them."""
    (tmp_path / "their_module.py").write_text(THEIRS)
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mmsa_dist.systems]\ntheir_system = their_module:Theirs\nbroken = their_missing_module:X\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("their_module", None)
    from mmsa_dist.systems.base import _REGISTRY

    _REGISTRY._classes.pop("their_system", None)


def test_ours_are_there() -> None:
    assert {"self_mm", "ufen_mtfn"} <= set(system_names())
    for name in ("self_mm", "ufen_mtfn"):
        cls = get_system(name)
        assert cls.name == name
        assert cls.paper
        assert cls.__doc__


@pytest.mark.parametrize("name", ["their_system", "their_module:Theirs"])
def test_a_third_partys_system_trains(third_party: Path, name: str) -> None:
    cls = get_system(name)
    recipe = from_dict({"system": name, "model": {"bias": False}})
    theirs = cls(recipe.model, spec_for())
    batch = ragged()
    loss_of(theirs, batch).backward()
    assert [parameter.grad is not None for parameter in theirs.parameters()] == [True]


def test_a_third_partys_system_is_listed(third_party: Path) -> None:
    assert "their_system" in system_names()
    with pytest.raises(ConfigError, match="did you mean 'their_system'"):
        get_system("their_sistem")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("self_m", r"unknown system 'self_m'; did you mean 'self_mm'\?.*ufen_mtfn"),
        ("their_module:Nothing", "'their_module:Nothing' cannot be imported.*Nothing.*package.module:Class"),
        ("no_such_module:X", "cannot be imported.*no_such_module"),
        (":X", "cannot be imported"),
        ("their_module:NotASystem", "wanted a subclass of mmsa_dist.systems.base.System"),
        ("broken", "'broken' cannot be imported.*their_missing_module"),
        ("faulty:X", "'faulty:X' cannot be imported.*division by zero"),
    ],
)
def test_what_cannot_be_found_is_a_sentence(third_party: Path, name: str, message: str) -> None:
    (third_party / "faulty.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message) as caught:
        get_system(name)
    assert "\n" not in str(caught.value)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="'self_mm' is already"):

        @system("self_mm")
        class Another(System):
            pass


def test_groups_are_by_module_name() -> None:
    class Grouped(System):
        Config = Strict

        def __init__(self, config: Strict, spec: DataSpec) -> None:
            super().__init__(config, spec)
            self.audio = torch.nn.Linear(1, 1)
            self.audio_head = torch.nn.Linear(1, 1)

    names = [name for name, _ in Grouped(Strict(), spec_for()).named_parameters()]
    assert [Grouped(Strict(), spec_for()).parameter_group(name) for name in names] == ["audio"] * 2 + ["rest"] * 2
