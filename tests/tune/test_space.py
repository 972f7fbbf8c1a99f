"""Search spaces: strict parsing, what is drawn, and that the papers' own values lie inside."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import flatten, load_recipe, packaged
from mmsa_dist.systems import get_system, system_names
from tune.space import KINDS, PACKAGED, Knob, Space, with_values

SYSTEMS = sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def space(tmp_path: Path, text: str, system: str = "self_mm") -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return Space.load(system, path).checked(load_recipe(system, None, []))


# --- the packaged spaces ----------------------------------------------------------------------------------------------


def test_every_system_has_a_space() -> None:
    ours = [name for name in system_names() if get_system(name).__module__.startswith("mmsa_dist.")]
    assert set(SYSTEMS) == set(ours)


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


@pytest.mark.parametrize(("system", "recipe"), [(system, name) for system in SYSTEMS for name in packaged(system)])
def test_the_first_trial_of_a_sweep_can_have_the_packaged_recipes_values(system: str, recipe: str) -> None:
    values, searched = load_recipe(system, recipe, []), Space.load(system)
    tied = [knob for knob in searched.knobs if knob.kind != "together" and len(knob.keys) > 1]
    flat = flatten(values)
    apart = [knob.name for knob in tied if len({flat[key] for key in knob.keys}) > 1]
    point = searched.point(values)
    assert not apart and point is not None
    assert with_values(values, searched.decoded(point)) == values


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


# MMSA's search space (config_tune.json, mult) where the key is ours too; its batches are an eighth of a step.
MULT_SEARCHED: dict[str, list[Any]] = {
    "data.batch_size": [32, 64, 128],
    "optim.lr.audio, optim.lr.vision, optim.lr.rest": [0.0005, 0.001, 0.002, 0.005],
    "optim.clip": [0.6, 0.8, 1.0],
    "model.width, model.heads": [(30, 6), (30, 10), (32, 8), (36, 6), (40, 5), (40, 8), (40, 10), (50, 10)],
    "model.layers": [2, 4, 6],
    "model.text_kernel": [1, 3, 5],
    "model.audio_kernel": [1, 3, 5],
    "model.vision_kernel": [1, 3, 5],
    "model.text_dropout": [0.1, 0.2, 0.3, 0.4, 0.5],
    "model.attention_dropout": [0.1, 0.2, 0.3, 0.4, 0.5],
    "model.audio_attention_dropout": [0.0, 0.1, 0.2],
    "model.vision_attention_dropout": [0.0, 0.1, 0.2],
    "model.relu_dropout": [0.0, 0.1, 0.2],
    "model.residual_dropout": [0.0, 0.1, 0.2],
    "model.embedding_dropout": [0.0, 0.1, 0.2],
    "model.output_dropout": [0.1, 0.2, 0.3, 0.4, 0.5],
}

# MulT's paper, table 5, in the order MOSEI, MOSI, IEMOCAP.
MULT_PUBLISHED: dict[str, list[Any]] = {
    "data.batch_size": [16, 128, 32],
    "optim.lr.audio, optim.lr.vision, optim.lr.rest": [1e-3, 1e-3, 2e-3],
    "model.width, model.heads": [(40, 8), (40, 10), (40, 10)],
    "model.layers": [4, 4, 4],
    "model.text_kernel": [3, 3, 3],
    "model.vision_kernel": [3, 3, 3],
    "model.audio_kernel": [3, 3, 5],
    "model.text_dropout": [0.3, 0.2, 0.3],
    "model.attention_dropout": [0.1, 0.2, 0.25],
    "model.audio_attention_dropout": [0.1, 0.2, 0.25],
    "model.vision_attention_dropout": [0.1, 0.2, 0.25],
    "model.output_dropout": [0.1, 0.1, 0.1],
    "optim.clip": [1.0, 0.8, 0.8],
}


def test_mult_searches_what_mmsa_searched_and_the_papers_values_lie_inside() -> None:
    knobs = {knob.name: knob for knob in Space.load("mult").knobs}
    assert knobs.keys() == MULT_SEARCHED.keys() | {"optim.lr.text"}
    for key, values in [*MULT_SEARCHED.items(), *MULT_PUBLISHED.items()]:
        assert all(knobs[key].holds(value) for value in values), key


@pytest.mark.parametrize("system", ["tam_ulag", "sugrm"])
def test_what_descends_from_self_mm_searches_its_ranges(system: str) -> None:
    theirs = {knob.name: knob for knob in Space.load(system).knobs}
    for knob in Space.load("self_mm").knobs:
        if knob.name in theirs:
            assert all(theirs[knob.name].holds(value) for value in knob.values), knob.name
    missing = {knob.name for knob in Space.load("self_mm").knobs} - theirs.keys()
    assert all(name.startswith("model.post_") for name in missing) and (system == "sugrm" or not missing)


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
          train.patience: {value: 7, source: s}
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
    assert all(0.5 <= values["optim.clip"] <= 2 and values["train.patience"] == 7 for values in drawn)
    recipe = with_values(load_recipe("self_mm", None, []), drawn[0])
    assert recipe.optim.lr.vision == rates[0] and recipe.train.patience == 7


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


ROWS = "a:\n  model.width, model.heads: {together: [[30, 6], [30, 10], [40, 5], [40, 10], [50, 10]], source: s}"


def mult(tmp_path: Path, text: str = ROWS) -> Space:
    return space(tmp_path, text, "mult")


def test_keys_that_go_together_take_their_parts_of_a_row(tmp_path: Path) -> None:
    searched = mult(tmp_path)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [searched.decoded(study.ask(searched.distributions()).params) for _ in range(100)]
    pairs = {(values["model.width"], values["model.heads"]) for values in drawn}
    assert pairs == {(30, 6), (30, 10), (40, 5), (40, 10), (50, 10)}
    recipe = load_recipe("mult", "mosei", [])
    assert searched.point(recipe) == {"model.width, model.heads": 0}
    other = with_values(recipe, {"model.width": 40, "model.heads": 8})
    assert searched.point(other) is None
    assert searched.outside(other) == {"model.width": 40, "model.heads": 8}, "each lies in some row, not in one"


def test_every_row_is_tried_in_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"space.yaml: model.width, model.heads: .*width 40 must be divisible by he"):
        mult(tmp_path, "a:\n  model.width, model.heads: {together: [[30, 6], [40, 6]], source: s}")


def test_of_rows_those_are_left_that_have_the_value_which_the_command_fixes(tmp_path: Path) -> None:
    searched = mult(tmp_path)
    (knob,) = searched.fixed(["model.heads"], load_recipe("mult", None, ["--model.heads", "10"])).knobs
    assert (knob.keys, knob.kind, knob.values) == (("model.width",), "choice", (30, 40, 50))
    (knob,) = searched.fixed(["model.width", "seed"], load_recipe("mult", None, ["--model.width", "40"])).knobs
    assert (knob.keys, knob.values) == (("model.heads",), (5, 10))
    both = load_recipe("mult", None, ["--model.width", "60", "--model.heads", "4"])
    assert searched.fixed(["model.width", "model.heads"], both).knobs == (), (
        "none of it is searched, so no row is needed"
    )
    with pytest.raises(ConfigError) as refused:
        searched.fixed(["model.heads"], load_recipe("mult", None, ["--model.heads", "25"]))
    assert str(refused.value) == (
        f"{tmp_path / 'space.yaml'}: no row of model.width, model.heads has `model.heads` 25, which the command fixes "
        "(there are: [30, 6], [30, 10], [40, 5], [40, 10], [50, 10]); fix `model.width` too, or give a value that a "
        "row has"
    )


def test_of_three_keys_two_stay_together(tmp_path: Path) -> None:
    rows = "[[30, 6, 2], [30, 6, 4], [50, 10, 4], [40, 5, 4]]"
    searched = mult(tmp_path, f"a:\n  model.width, model.heads, model.layers: {{together: {rows}, source: s}}")
    (knob,) = searched.fixed(["model.layers"], load_recipe("mult", "mosi", [])).knobs
    assert (knob.keys, knob.kind) == (("model.width", "model.heads"), "together")
    assert knob.values == ((30, 6), (50, 10), (40, 5))
    (knob,) = searched.without(["model.layers"]).knobs
    assert knob.values == ((30, 6), (50, 10), (40, 5)), "once each, whatever the recipe's value"


SCALARS = st.one_of(st.integers(-9, 9), st.floats(-9, 9), st.booleans(), st.sampled_from(["sum", "concat"]), st.none())
LEAVES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2).map(tuple))
NUMBERS = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=2, unique=True).map(lambda each: tuple(sorted(each)))
WHOLE = st.lists(st.integers(-99, 99), min_size=2, max_size=2, unique=True).map(lambda each: tuple(sorted(each)))


@st.composite
def knobs(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(KINDS)) -> Knob:
    kind = draw(st.sampled_from(kinds))
    keys = tuple(f"model.{letter}" for letter in "abc"[: draw(st.integers(2 if kind == "together" else 1, 3))])
    values = {
        "choice": st.lists(LEAVES, min_size=1, max_size=5).map(tuple),
        "value": LEAVES.map(lambda value: (value,)),
        "together": st.lists(st.tuples(*[LEAVES] * len(keys)), min_size=1, max_size=6).map(tuple),
        "randint": WHOLE,
    }
    return Knob(keys, kind, draw(values.get(kind, NUMBERS)), "s")


@given(knob=knobs(), seed=st.integers(0, 99))
def test_whatever_is_drawn_lies_inside_and_would_be_drawn_again(knob: Knob, seed: int) -> None:
    distributions = {knob.name: knob.distribution()}
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask(distributions).params[knob.name]
    value = knob.decoded(drawn)
    assert knob.holds(value)
    recipe = knob.spread(value)
    assert list(recipe) == list(knob.keys)
    assert knob.read(recipe) == value and knob.outside(recipe) == []
    assert knob.decoded(knob.encoded(value)) == value


@given(knob=knobs())
def test_what_stands_for_a_range_lies_inside(knob: Knob) -> None:
    assert all(knob.holds(value) for value in knob.samples())


@given(knob=knobs(kinds=("together",)), data=st.data())
def test_a_fixed_value_and_what_is_left_of_a_row_are_a_row(knob: Knob, data: st.DataObject) -> None:
    """And every row with that value can still be drawn."""
    row = data.draw(st.sampled_from(knob.values))
    held = data.draw(st.sets(st.sampled_from(knob.keys), min_size=1, max_size=len(knob.keys) - 1))
    given = {key: value for key, value in knob.spread(row).items() if key in held}
    left = knob.having(given).without(held)
    assert left is not None and left.kind == ("together" if len(left.keys) > 1 else "choice")
    for value in left.values:
        assert knob.holds(knob.read({**left.spread(value), **given}))
    assert left.holds(left.read(knob.spread(row)))
    assert [left.encoded(value) for value in left.values] == list(range(len(left.values))), "once each"


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
    "a:\n  optim.lr.audio, optim.lr.audio: {choice: [1], source: s}": r"`optim.lr.audio` is there twice",
    "a: {optim.lr.audio: {together: [[1]], source: s}}": r"together is for two keys or more",
    "a:\n  optim.lr.audio, optim.lr.vision: {together: [], source: s}": r"a list of rows .* found \[\]",
    "a:\n  optim.lr.audio, optim.lr.vision: {together: 3, source: s}": r"a list of rows .* found 3",
    "a:\n  optim.lr.audio, optim.lr.vision: {together: [1, 2], source: s}": r"found 1 as row 1",
    "a:\n  optim.lr.audio, optim.lr.vision: {together: [[1, 2], [1]], source: s}": (
        r"together expects a list of rows \[optim.lr.audio, optim.lr.vision\], found \[1\] as row 2"
    ),
    "a:\n  optim.lr.audio, optim.lr.vsion: {together: [[1, 2]], source: s}": r"unknown key `optim.lr.vsion`; did you",
    "a:\n  optim.lr.audio, optim.lr.vision: {together: [[1, x]], source: s}": r"`optim.lr.vision`: .* found 'x'",
    "a: {data.without: {choice: [[a], []], source: s}}": r"`data.without` cannot be searched",
    "a: {data.quarantine: {choice: [true, false], source: s}}": r"`data.quarantine` cannot be searched",
    "a: [": r"is not YAML",
    "[" * 5000: r"is not YAML",
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
    with pytest.raises(ConfigError, match=r"no packaged search space for 'my.module:Mine' \(there are: iam, mult, pmr"):
        Space.load("my.module:Mine")


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    assert isinstance(yaml.safe_load("1e-4"), str)
    searched = space(tmp_path, "a: {optim.lr.audio: {choice: [1e-4, 1e-3], source: s}}")
    assert searched.knobs[0].values == (1e-4, 1e-3)
    searched = space(tmp_path, "a:\n  optim.lr.audio, optim.lr.vision: {together: [[1e-4, 1e-3]], source: s}")
    assert searched.knobs[0].values == ((1e-4, 1e-3),)
