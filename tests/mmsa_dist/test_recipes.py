"""The packaged recipes: complete, valid, and every value of a paper's says where it comes from."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist.recipe import PACKAGED, flatten, from_dict, packaged
from mmsa_dist.systems import get_system, system_names

OURS = ("iam", "mult", "pmr", "self_mm", "sugrm", "tam_ulag", "ufen_mtfn")
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

PUBLISHED: dict[str, dict[str, Any]] = {
    # Zhou and Li, section 3.3 and table 2
    "iam.mosi": {
        "data.batch_size": 32, "optim.lr": (5e-5, 6e-5, 6e-4, 6e-4), "model.dropout": 0.1,
        "model.lstm_dropout": 0.0, "model.audio_hidden": 16, "model.vision_hidden": 32,
    },
    "iam.mosei": {
        "data.batch_size": 32, "optim.lr": (5e-5, 6e-5, 5e-3, 6e-4), "model.dropout": 0.1,
        "model.lstm_dropout": 0.0, "model.audio_hidden": 16, "model.vision_hidden": 32,
    },
    "iam.sims": {
        "data.batch_size": 32, "optim.lr": (5e-5, 6e-5, 6e-4, 6e-4), "model.dropout": 0.1,
        "model.lstm_dropout": 0.0, "model.audio_hidden": 16, "model.vision_hidden": 64,
    },
    # Sun & Wang, table 2; learning rates and decay as MMSA's for Self-MM; widths of the authors' wsy981101/2021WSY
    "tam_ulag.mosi": {
        "data.batch_size": 32, "train.epochs": 30, "model.audio_hidden": 32, "model.vision_hidden": 64,
        "optim.lr": (5e-5, 5e-3, 5e-3, 1e-3), "optim.weight_decay": (0.001, 0.001, 0.001, 0.001),
        "model.post_fusion_dim": 128, "model.post_text_dim": 64, "model.post_audio_dim": 16,
        "model.post_vision_dim": 32, "model.audio_out": 16, "model.vision_out": 32, "train.patience": 8,
        "model.post_fusion_dropout": 0.1, "model.post_text_dropout": 0.0,
        "model.post_audio_dropout": 0.1, "model.post_vision_dropout": 0.1,
    },
    "tam_ulag.mosei": {
        "data.batch_size": 32, "train.epochs": 30, "model.audio_hidden": 32, "model.vision_hidden": 32,
        "optim.lr": (5e-5, 5e-3, 1e-4, 1e-3), "optim.weight_decay": (0.001, 0.0, 0.0, 0.01),
        "model.post_fusion_dim": 128, "model.post_text_dim": 32, "model.post_audio_dim": 16,
        "model.post_vision_dim": 16, "model.audio_out": 16, "model.vision_out": 32, "train.patience": 8,
        "model.post_fusion_dropout": 0.0, "model.post_text_dropout": 0.1,
        "model.post_audio_dropout": 0.0, "model.post_vision_dropout": 0.1,
    },
    "tam_ulag.sims": {
        "data.batch_size": 32, "train.epochs": 30, "model.audio_hidden": 16, "model.vision_hidden": 64,
        "optim.lr": (5e-5, 5e-3, 5e-3, 1e-3), "optim.weight_decay": (0.001, 0.01, 0.01, 0.001),
        "model.post_fusion_dim": 128, "model.post_text_dim": 64, "model.post_audio_dim": 16,
        "model.post_vision_dim": 32, "model.audio_out": 16, "model.vision_out": 32, "train.patience": 8,
        "model.post_fusion_dropout": 0.0, "model.post_text_dropout": 0.1,
        "model.post_audio_dropout": 0.1, "model.post_vision_dropout": 0.0,
    },
    # the authors' skystarhyw/SUGRM
    "sugrm.mosi": {
        "data.batch_size": 32 * 4, "optim.lr": (5e-5, 5e-4, 5e-4, 1e-2), "train.patience": 8,
        "optim.weight_decay": (0.001, 0.001, 0.001, 0.001), "model.common_dim": 32, "model.dropout": 0.3,
    },
    "sugrm.mosei": {
        "data.batch_size": 32 * 4, "optim.lr": (5e-5, 5e-4, 5e-4, 1e-3), "train.patience": 8,
        "optim.weight_decay": (0.001, 0.001, 0.001, 0.01), "model.common_dim": 32, "model.dropout": 0.1,
    },
    # MMSA's values for Self-MM, as the authors do not train on it
    "sugrm.sims": {
        "data.batch_size": 32 * 4, "optim.lr": (5e-5, 5e-3, 5e-3, 1e-3), "train.patience": 8,
        "optim.weight_decay": (0.001, 0.01, 0.01, 0.001), "model.audio_hidden": 16, "model.vision_hidden": 64,
    },
    # MMSA's tuned values for MulT, but for IEMOCAP the paper's (table 5)
    "mult.mosi": {
        "data.batch_size": 16 * 8, "optim.lr": (5e-5, 2e-3, 2e-3, 2e-3), "optim.clip": 0.6, "model.width": 50,
        "model.heads": 10, "model.layers": 4, "model.audio_kernel": 5, "model.vision_kernel": 5,
        "model.text_dropout": 0.5, "model.attention_dropout": 0.3, "model.audio_attention_dropout": 0.2,
        "model.vision_attention_dropout": 0.0, "model.relu_dropout": 0.0, "model.residual_dropout": 0.0,
        "model.embedding_dropout": 0.2, "model.output_dropout": 0.5,
    },
    "mult.mosei": {
        "optim.accumulation": 2, "train.epochs": 20, "train.patience": 8,
        "data.batch_size": 4 * 8, "optim.lr": (5e-5, 5e-4, 5e-4, 5e-4), "optim.clip": 0.6, "model.width": 30,
        "model.heads": 6, "model.layers": 4, "model.audio_kernel": 1, "model.vision_kernel": 3,
        "model.text_dropout": 0.3, "model.attention_dropout": 0.4, "model.audio_attention_dropout": 0.0,
        "model.vision_attention_dropout": 0.0, "model.relu_dropout": 0.0, "model.residual_dropout": 0.0,
        "model.embedding_dropout": 0.0, "model.output_dropout": 0.5,
    },
    "mult.sims": {
        "data.batch_size": 16 * 8, "optim.lr": (5e-5, 2e-3, 2e-3, 2e-3), "optim.clip": 0.6, "model.width": 50,
        "model.heads": 10, "model.layers": 2, "model.audio_kernel": 1, "model.vision_kernel": 1,
        "model.text_dropout": 0.3, "model.attention_dropout": 0.2, "model.audio_attention_dropout": 0.1,
        "model.vision_attention_dropout": 0.0, "model.relu_dropout": 0.0, "model.residual_dropout": 0.2,
        "model.embedding_dropout": 0.1, "model.output_dropout": 0.1,
    },
    # Cai et al., section "experiment settings" and tables 7 and 10
    **{
        f"ufen_mtfn.{data}": {"model.layers": 2, "model.unimodal_targets": "multimodal", "train.patience": 8}
        for data in ("mosi", "mosei", "sims")
    },
    "mult.iemocap": {
        "data.batch_size": 32, "optim.lr": (5e-5, 2e-3, 2e-3, 2e-3), "optim.clip": 0.8, "model.width": 40,
        "model.heads": 10, "model.layers": 4, "model.text_kernel": 3, "model.audio_kernel": 5,
        "model.vision_kernel": 3, "model.text_dropout": 0.3, "model.attention_dropout": 0.25,
        "model.audio_attention_dropout": 0.25, "model.vision_attention_dropout": 0.25, "model.relu_dropout": 0.1,
        "model.residual_dropout": 0.1, "model.embedding_dropout": 0.3, "model.output_dropout": 0.1,
        "train.epochs": 30,
    },
}  # fmt: skip
"""Recipe -> key -> value, that of a group of four in the order text, audio, vision, rest."""


@pytest.mark.parametrize("system", OURS)
def test_there_is_one_for_every_data_set_of_the_papers(system: str) -> None:
    assert {"mosi", "mosei", "sims"} <= set(packaged(system))


@pytest.mark.parametrize("system", ["mult", "pmr"])
def test_those_that_classify_have_one_for_iemocap(system: str) -> None:
    assert get_system(system).classifies
    assert "iemocap" in packaged(system)


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


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_it_has_the_published_values(name: str) -> None:
    recipe = from_dict(yaml.safe_load((PACKAGED / f"{name}.yaml").read_text()))
    values = flatten(recipe)
    for key, wanted in PUBLISHED[name].items():
        groups = tuple(value for flat, value in values.items() if flat.startswith(f"{key}."))
        assert (groups or values[key]) == wanted, key
    assert recipe.optim.name == "adam"


@pytest.mark.parametrize("data", ["mosi", "mosei", "sims"])
def test_ufen_mtfn_learns_as_fast_as_its_paper(data: str) -> None:
    recipe = from_dict(yaml.safe_load((PACKAGED / f"ufen_mtfn.{data}.yaml").read_text()))
    assert {recipe.optim.lr.audio, recipe.optim.lr.vision, recipe.optim.lr.rest} == {5e-3}


PMR_RANGES = {
    "data.batch_size": (16, 128), "optim.lr.rest": (1e-3, 2e-3), "model.layers": (1, 6), "model.width": (30, 64),
    "model.heads": (5, 10), "model.text_kernel": (1, 5), "model.audio_kernel": (1, 5), "model.vision_kernel": (1, 5),
    "optim.clip": (0.8, 0.8),
}  # fmt: skip
"""Within which the paper's values lie, which its text as available does not give one by one."""


@pytest.mark.parametrize("data", ["mosi", "mosei", "sims", "iemocap"])
def test_pmr_is_within_the_ranges_of_its_paper(data: str) -> None:
    values = flatten(from_dict(yaml.safe_load((PACKAGED / f"pmr.{data}.yaml").read_text())))
    for key, (low, high) in PMR_RANGES.items():
        assert low <= values[key] <= high, key


@pytest.mark.parametrize("system", OURS)
def test_the_defaults_are_mosis(system: str) -> None:
    recipe = from_dict(yaml.safe_load((PACKAGED / f"{system}.mosi.yaml").read_text()))
    assert recipe.model == get_system(system).Config()
