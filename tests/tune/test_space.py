"""Search spaces: strict parsing, what is drawn, and that the papers' own values lie inside."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import load_recipe, packaged
from tune.space import PACKAGED, Knob, Space, with_values

SYSTEMS = sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def space(tmp_path: Path, text: str, system: str = "self_mm") -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return Space.load(system, path).checked(load_recipe(system, None, []))


# --- the packaged spaces ----------------------------------------------------------------------------------------------


def test_both_systems_have_a_space() -> None:
    assert SYSTEMS == ["self_mm", "ufen_mtfn"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_key_exists_and_every_value_is_one_the_recipe_takes(system: str) -> None:
    Space.load(system).checked(load_recipe(system, None, []))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_range_names_its_source(system: str) -> None:
    for knob in Space.load(system).knobs:
        assert "MMSA" in knob.source or "paper" in knob.source, knob.name


@pytest.mark.parametrize(("system", "recipe"), [(system, name) for system in SYSTEMS for name in packaged(system)])
def test_the_values_of_the_packaged_recipes_lie_inside(system: str, recipe: str) -> None:
    assert Space.load(system).outside(load_recipe(system, recipe, [])) == {}


# The values that MMSA publishes as tuned (config_regression.json, self_mm), in the order MOSI, MOSEI, SIMS, SIMS v2.
SELF_MM_TUNED: dict[str, list[Any]] = {
    "data.batch_size": [16, 32, 32, 16],
    "optim.lr.text": [5e-5, 5e-5, 5e-5, 5e-5],
    "optim.lr.audio": [0.005, 0.005, 0.005, 0.001],
    "optim.lr.vision": [0.005, 0.0001, 0.005, 0.001],
    "optim.lr.rest": [0.001, 0.001, 0.001, 0.001],
    "optim.weight_decay.text": [0.001, 0.001, 0.001, 0.01],
    "optim.weight_decay.audio": [0.001, 0.0, 0.01, 0.0],
    "optim.weight_decay.vision": [0.001, 0.0, 0.01, 0.0],
    "optim.weight_decay.rest": [0.001, 0.01, 0.001, 0.001],
    "model.audio_hidden": [16, 16, 16, 16],
    "model.vision_hidden": [32, 32, 64, 64],
    "model.post_fusion_dim": [128, 128, 128, 128],
    "model.post_text_dim": [32, 32, 64, 64],
    "model.post_audio_dim": [16, 16, 16, 32],
    "model.post_vision_dim": [32, 32, 32, 32],
    "model.post_fusion_dropout": [0.0, 0.1, 0.0, 0.0],
    "model.post_text_dropout": [0.1, 0.0, 0.1, 0.0],
    "model.post_audio_dropout": [0.1, 0.0, 0.1, 0.1],
    "model.post_vision_dropout": [0.0, 0.0, 0.0, 0.0],
}


def test_self_mm_searches_what_its_authors_searched_and_their_tuned_values_lie_inside() -> None:
    knobs = {knob.name: knob for knob in Space.load("self_mm").knobs}
    assert knobs.keys() == SELF_MM_TUNED.keys()
    for key, values in SELF_MM_TUNED.items():
        assert all(knobs[key].holds(value) for value in values), key


def test_ufen_mtfn_holds_what_its_paper_found_best() -> None:
    knobs = {key: knob for knob in Space.load("ufen_mtfn").knobs for key in knob.keys}
    for key in ("optim.lr.audio", "optim.lr.vision", "optim.lr.rest"):
        assert knobs[key].holds(5e-3), "table 10: the best learning rate"
    assert [layers for layers in range(8) if knobs["model.layers"].holds(layers)] == [1, 2, 3, 4], "table 7"
    assert knobs["train.patience"].holds(8) and knobs["data.batch_size"].holds(32)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_one_of_each_kind_is_drawn_from_its_range_and_decoded(tmp_path: Path) -> None:
    searched = space(
        tmp_path,
        """
        rates:
          optim.lr.audio, optim.lr.vision: {loguniform: [1e-4, 1e-2], source: s}
          optim.clip: {uniform: [0.5, 2], source: s}
        rest:
          data.batch_size: {choice: [16, 32], source: s}
          model.audio_layers: {randint: [1, 3], source: s}
          data.normalize: {choice: [[], [audio], [audio, vision]], source: s}
          seed: {value: 7, source: s}
        """,
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [searched.decoded(study.ask(searched.distributions()).params) for _ in range(300)]
    assert all(values["optim.lr.audio"] == values["optim.lr.vision"] for values in drawn)
    rates = [values["optim.lr.audio"] for values in drawn]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / len(rates) < 0.6, "uniform in the logarithm"
    assert {values["data.batch_size"] for values in drawn} == {16, 32}
    assert {values["model.audio_layers"] for values in drawn} == {1, 2, 3}
    assert {values["data.normalize"] for values in drawn} == {(), ("audio",), ("audio", "vision")}
    assert all(0.5 <= values["optim.clip"] <= 2 and values["seed"] == 7 for values in drawn)
    recipe = with_values(load_recipe("self_mm", None, []), drawn[0])
    assert recipe.optim.lr.vision == rates[0] and recipe.seed == 7


def test_the_recipes_own_values_are_a_point_of_the_space_when_all_lie_inside(tmp_path: Path) -> None:
    recipe = load_recipe("self_mm", None, ["--optim.lr.audio", "0.005", "--optim.lr.vision", "0.005"])
    text = """
        a:
          optim.lr.audio, optim.lr.vision: {choice: [0.001, 0.005], source: s}
          model.audio_layers: {randint: [1, 3], source: s}
        """
    point = space(tmp_path, text).point(recipe)
    assert point == {"optim.lr.audio, optim.lr.vision": 1, "model.audio_layers": 1}
    assert space(tmp_path, text).decoded(point)["optim.lr.vision"] == 0.005
    untied = with_values(recipe, {"optim.lr.vision": 0.001})
    assert space(tmp_path, text).point(untied) is None, "tied keys differ"
    outside = with_values(recipe, {"model.audio_layers": 4})
    assert space(tmp_path, text).point(outside) is None
    assert space(tmp_path, text).outside(outside) == {"model.audio_layers": 4}


def test_keys_can_be_taken_out() -> None:
    searched = Space.load("ufen_mtfn").without(["optim.lr.audio", "model.layers"])
    assert "model.layers" not in searched.keys
    assert [knob.keys for knob in searched.knobs if "optim.lr.rest" in knob.keys] == [
        ("optim.lr.vision", "optim.lr.rest")
    ]


def test_a_bool_is_no_number() -> None:
    assert not Knob(("a",), "choice", (0, 1), "s").holds(False)
    assert Knob(("a",), "choice", (False, True), "s").holds(False)
    assert not Knob(("a",), "uniform", (0.0, 1.0), "s").holds(True)


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = "optim.lr.audio: {choice: [0.001], source: s}"

BAD = {
    "rates: {optim.lr.adio: {choice: [0.001], source: s}}": r"unknown key `optim.lr.adio`; did you mean 'optim.lr.au",
    "rates: {optim.lr.audio: {chioce: [0.001], source: s}}": r"unknown kind 'chioce'; did you mean 'choice'",
    "rates: {optim.lr.audio: {choice: [0.001]}}": r"optim.lr.audio: `source` is missing",
    "rates: {optim.lr.audio: {choice: [0.001], source: ''}}": r"`source` is missing",
    "rates: {optim.lr.audio: {source: s}}": r"expected one of choice, uniform, .* found none",
    "rates: {optim.lr.audio: {choice: [1], uniform: [0, 1], source: s}}": r"found choice and uniform",
    "rates: {optim.lr.audio: {choice: [], source: s}}": r"choice expects a list of values, found \[\]",
    "rates: {optim.lr.audio: {uniform: [1, 0], source: s}}": r"uniform expects \[low, high\], found \[1, 0\]",
    "rates: {optim.lr.audio: {uniform: [0, 1, 2], source: s}}": r"uniform expects \[low, high\]",
    "rates: {optim.lr.audio: {loguniform: [0, 1], source: s}}": r"loguniform expects \[low, high\], low above 0",
    "rates: {optim.lr.audio: {loguniform: [a, b], source: s}}": r"loguniform expects",
    "sizes: {data.batch_size: {randint: [1.5, 3], source: s}}": r"randint expects \[low, high\], whole numbers",
    "sizes: {data.batch_size: {uniform: [16, 32], source: s}}": r"`data.batch_size`: .*integer.* found 21.92",
    "sizes: {data.batch_size: {choice: [0, 16], source: s}}": r"data.batch_size.*greater than or equal to 1, found 0",
    "rates: {optim.lr.audio: {choice: [fast], source: s}}": r"optim.lr.audio.*valid number.* found 'fast'",
    "rates: {optim.lr.audio: 0.001}": r"optim.lr.audio: expected \{KIND: …, source: …\}",
    "rates: 3": r"under 'rates' expected",
    "optim.lr.audio": r"expected headings with keys under them, found str",
    "{}": r"nothing is searched",
    f"a: {{{GOOD}}}\nb: {{{GOOD}}}": r"`optim.lr.audio` is there twice",
    "a: {launch.workers: {choice: [1, 2], source: s}}": r"`launch.workers` cannot be searched",
    "a: {train.monitor: {choice: [mae], source: s}}": r"`train.monitor` cannot be searched",
    f"system: ufen_mtfn\na: {{{GOOD}}}": r"is for system 'ufen_mtfn', but 'self_mm' is searched",
    "a: [": r"is not YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_space_is_refused_in_a_sentence_that_says_where(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=BAD[text]) as refused:
        space(tmp_path, text)
    assert str(tmp_path / "space.yaml") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_system_without_a_space_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Space.load("self_mm", tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"no packaged search space for 'my.module:Mine' \(there are: self_mm, ufen"):
        Space.load("my.module:Mine")


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    assert isinstance(yaml.safe_load("1e-4"), str)
    searched = space(tmp_path, "a: {optim.lr.audio: {choice: [1e-4, 1e-3], source: s}}")
    assert searched.knobs[0].values == (1e-4, 1e-3)
