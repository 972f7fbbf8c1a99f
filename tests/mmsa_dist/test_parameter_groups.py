"""The optimizer's groups where an encoder reads the text: who is in which, how fast it learns and decays."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mmsa_dist.config import GroupValues, OptimConfig
from mmsa_dist.label_generators import make_generator
from mmsa_dist.learning_rates import parameter_groups
from mmsa_dist.systems import System, get_system, system_names
from tests.mmsa_dist.batches import WIDTHS, build
from tests.mmsa_dist.encoders import ARCHITECTURES, spec_of

OPTIM = OptimConfig(
    lr=GroupValues(text=1e-5, audio=2e-3, vision=3e-3, rest=4e-3),
    weight_decay=GroupValues(text=0.1, audio=0.2, vision=0.3, rest=0.4),
)
"""No two values are alike, so none can stand in for another."""
VALUES = {
    "text": (1e-5, 0.1),
    "text_no_decay": (1e-5, 0.0),
    "audio": (2e-3, 0.2),
    "vision": (3e-3, 0.3),
    "rest": (4e-3, 0.4),
}
"""Group -> its learning rate and its weight decay."""

every_system = pytest.mark.parametrize("cls", [get_system(name) for name in system_names()], ids=system_names())


def built(cls: type[System], encoder: Path, **text: Any) -> System:
    """A system behind an encoder, with its label generator's own layers."""
    system = build(cls, spec_of(encoder, tuple(WIDTHS), **text))
    widths = system.feature_widths()
    generator = make_generator(
        cls.labels, numbers=range(4), ids=range(4), labels=[-3, -1, 1, 3], widths=widths, label_range=(-3, 3)
    )
    if generator.layers is not None:
        system.attach(generator.layers)
    return system


def expected(system: System) -> dict[str, str]:
    """Parameter -> group, told by names and by kinds of layers, and not by shapes as the engine does."""
    norms = [name for name, module in system.named_modules() if isinstance(module, nn.LayerNorm)]
    assert any(name.startswith("text.") for name in norms)
    found = {}
    for name, _ in system.named_parameters():
        first, layer = name.partition(".")[0], name.rpartition(".")[0]
        group = first if first in ("text", "audio", "vision") else "rest"
        bare = group == "text" and (layer in norms or name.endswith(".bias"))
        found[name] = "text_no_decay" if bare else group
    return found


@every_system
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_in_its_one_group_with_the_recipes_values(
    cls: type[System], architecture: str, encoders: Callable[..., Path]
) -> None:
    system = built(cls, encoders(architecture))
    groups = parameter_groups(system, OPTIM)
    assert sorted(group["name"] for group in groups) == sorted(VALUES)
    for group in groups:
        assert (group["lr"], group["weight_decay"]) == VALUES[group["name"]], group["name"]
        assert group["base_lr"] == group["lr"], "the schedule multiplies it"
    names = {id(parameter): name for name, parameter in system.named_parameters()}
    found = [(names[id(parameter)], group["name"]) for group in groups for parameter in group["params"]]
    assert max(Counter(name for name, _ in found).values()) == 1
    assert dict(found) == expected(system)


@every_system
def test_a_frozen_encoder_is_in_no_group(cls: type[System], encoders: Callable[..., Path]) -> None:
    system = built(cls, encoders("bert"), finetune=False)
    groups = parameter_groups(system, OPTIM)
    assert sorted(group["name"] for group in groups) == ["audio", "rest", "vision"]
    found = {id(parameter) for group in groups for parameter in group["params"]}
    assert found == {id(p) for name, p in system.named_parameters() if not name.startswith("text.")}
