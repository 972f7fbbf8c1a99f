"""The packaged recipes: complete, valid, and every value of a paper's says where it comes from."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist.recipe import PACKAGED, from_dict, packaged
from mmsa_dist.systems import get_system, system_names

OURS = ("self_mm", "ufen_mtfn")
FILES = sorted(PACKAGED.glob("*.yaml"))

REFERENCE: dict[str, dict[str, Any]] = {
    # MMSA's tuned values for Self-MM: thuiar/MMSA a94e65d, config_regression.json
    "mosi": {
        "batch": 16 * 4, "lr": (5e-5, 5e-3, 5e-3, 1e-3), "decay": (0.001, 0.001, 0.001, 0.001),
        "hidden": (16, 32), "out": (16, 32), "dims": (128, 32, 16, 32), "dropouts": (0.0, 0.1, 0.1, 0.0),
    },
    "mosei": {
        "batch": 32 * 4, "lr": (5e-5, 5e-3, 1e-4, 1e-3), "decay": (0.001, 0.0, 0.0, 0.01),
        "hidden": (16, 32), "out": (16, 32), "dims": (128, 32, 16, 32), "dropouts": (0.1, 0.0, 0.0, 0.0),
    },
    "sims": {
        "batch": 32 * 4, "lr": (5e-5, 5e-3, 5e-3, 1e-3), "decay": (0.001, 0.01, 0.01, 0.001),
        "hidden": (16, 64), "out": (16, 32), "dims": (128, 64, 16, 32), "dropouts": (0.0, 0.1, 0.1, 0.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("system", OURS)
def test_there_is_one_for_every_data_set_of_the_papers(system: str) -> None:
    assert {"mosi", "mosei", "sims"} <= set(packaged(system))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_valid_and_named_by_what_is_in_it(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    assert file.name.startswith(f"{values['system']}.")
    assert values["system"] in system_names()
    recipe = from_dict(values, file.name)
    assert recipe.labels.generator == get_system(recipe.system).labels


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_value_says_its_source(file: Path) -> None:
    for line in file.read_text().splitlines():
        key = re.match(r"  (\w+): ", line)
        if key:
            assert re.search(r"# source: \S", line), f"{file.name}: {line}"


@pytest.mark.parametrize("data", list(REFERENCE))
def test_self_mm_is_tuned_as_published(data: str) -> None:
    recipe = from_dict(yaml.safe_load((PACKAGED / f"self_mm.{data}.yaml").read_text()))
    model: Any = recipe.model
    found = {
        "batch": recipe.data.batch_size,
        "lr": tuple(recipe.optim.lr.model_dump().values()),
        "decay": tuple(recipe.optim.weight_decay.model_dump().values()),
        "hidden": (model.audio_hidden, model.vision_hidden),
        "out": (model.audio_out, model.vision_out),
        "dims": tuple(getattr(model, f"post_{name}_dim") for name in ("fusion", "text", "audio", "vision")),
        "dropouts": tuple(getattr(model, f"post_{name}_dropout") for name in ("fusion", "text", "audio", "vision")),
    }
    assert found == REFERENCE[data]
    assert (recipe.optim.name, recipe.train.patience) == ("adam", 8)


def test_the_defaults_of_self_mm_are_mosis() -> None:
    recipe = from_dict(yaml.safe_load((PACKAGED / "self_mm.mosi.yaml").read_text()))
    assert recipe.model == get_system("self_mm").Config()
