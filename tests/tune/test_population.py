"""The rules of a population, without a cluster: who is copied by whom, what a copy has, and what is refused."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsa_dist import checkpoint, run_folder
from mmsa_dist.checkpoint import Checkpoint
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.portable import MOMENTS, State
from mmsa_dist.recipe import read_recipe
from tests.tune.sweeps import searched, tiny
from tune import rates
from tune.asked import Asked
from tune.draw import Drawing
from tune.finish import choose
from tune.outcome import INTERRUPTED, STOPPED, Outcome, read_outcome, read_outcomes
from tune.population import (
    Heir,
    beside,
    check,
    explored,
    generations,
    heirs_of,
    inherit,
    knobs_of,
    load,
    quarter,
    take_place,
)
from tune.space import Knob, with_rates

SPACE = """
a:
  optim.lr.rest: {loguniform: [1.0e-4, 1.0e-2], source: s}
  optim.lr.audio, optim.lr.vision: {choice: [1.0e-3, 1.0e-4, 5.0e-3], source: s}
  model.layers: {choice: [2, 1], source: s}
"""


def asked(**changes: Any) -> Asked:
    usual: dict[str, Any] = {
        "trials": 4, "search": "random", "stopping": "pbt", "grace": 2, "max_concurrent": None, "objectives": ("mae",),
        "seeds": 1, "keys": ("optim.lr.rest", "optim.lr.audio", "optim.lr.vision", "model.layers"),
    }  # fmt: skip
    return Asked(**{**usual, **changes})


def test_a_generation_never_leaves_less_than_itself() -> None:
    assert generations(16, 4) == [4, 8, 12]
    assert generations(10, 3) == [3, 6]
    assert generations(6, 3) == [3]
    assert generations(5, 3) == []


@pytest.mark.parametrize(("members", "few"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_quarter_ends_and_never_more_than_half(members: int, few: int) -> None:
    assert quarter(members) == few


@pytest.mark.parametrize(
    ("text", "changes", "epochs", "message"),
    [
        ("a: {model.layers: {choice: [2, 1], source: s}}", {}, 8, r"leaves no learning rate to search \(optim.lr.\*\)"),
        ("a: {optim.lr.rest: {value: 1.0e-3, source: s}}", {}, 8, r"leaves no learning rate to search"),
        (SPACE, {"trials": 1}, 8, r"a population has two trials or more; give --trials"),
        (SPACE, {"grace": 5}, 8, r"8 epochs have no two generations of 5; lower --grace"),
    ],
)
def test_what_a_population_can_do_nothing_with_is_refused(
    text: str, changes: dict[str, Any], epochs: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(searched(tmp_path, text), tiny(tmp_path, train={"epochs": epochs}), asked(**changes))


def test_a_recipe_that_changes_its_rates_itself_is_refused(tmp_path: Path) -> None:
    change = {"epoch": 2, "text": 0.1, "audio": 0.1, "vision": 0.1, "rest": 0.1}
    recipe = tiny(tmp_path, train={"epochs": 8}, optim={"lr_from": [change]})
    with pytest.raises(ConfigError, match=r"changes learning rates on the way itself \(optim.lr_from\); remove that"):
        check(searched(tmp_path, SPACE), recipe, asked())


def test_a_population_keeps_its_size() -> None:
    assert asked().with_more(4, None) == asked().with_more(None, None) == asked()
    with pytest.raises(ConfigError, match=r"has a population of 4, which keeps its size"):
        asked().with_more(8, None)


# --- explore ----------------------------------------------------------------------------------------------------------


def test_a_rate_changes_and_stays_within_its_range() -> None:
    rng, knob = random.Random(0), Knob(("optim.lr.rest",), "loguniform", (1e-4, 1e-2), "s")
    value, seen = 1e-3, set()
    for _ in range(300):
        after = beside(knob, value, rng)
        assert 1e-4 <= after <= 1e-2 and after != value
        value = after
        seen.add(round(after / 1e-3, 3))
    assert {0.8, 1.2} & seen and len(seen) > 20
    assert beside(knob, 1e-2, rng) == pytest.approx(8e-3) and beside(knob, 1e-4, rng) == pytest.approx(1.2e-4)


def test_a_rate_of_a_list_becomes_a_neighbour() -> None:
    rng, knob = random.Random(0), Knob(("optim.lr.rest",), "choice", (1e-3, 1e-4, 5e-3), "s")
    assert {beside(knob, 1e-3, rng) for _ in range(50)} == {1e-4, 5e-3}
    assert {beside(knob, 5e-3, rng) for _ in range(50)} == {1e-3}
    pairs = Knob(("optim.lr.rest", "optim.lr.audio"), "together", ((1e-3, 1e-4), (5e-3, 1e-3)), "s")
    assert beside(pairs, (1e-3, 1e-4), rng) == (5e-3, 1e-3)


def test_only_rates_that_are_searched_are_changed(tmp_path: Path) -> None:
    space = searched(tmp_path, SPACE)
    assert [knob.name for knob in knobs_of(space)] == ["optim.lr.rest", "optim.lr.audio, optim.lr.vision"]
    values = {"optim.lr.rest": 1e-3, "optim.lr.audio": 1e-3, "optim.lr.vision": 1e-3, "model.layers": 2}
    found = explored(space, values, random.Random(1))
    assert found.keys() == {"optim.lr.rest", "optim.lr.audio", "optim.lr.vision"}
    assert found["optim.lr.audio"] == found["optim.lr.vision"] != 1e-3, "one value for both"


# --- exploit ----------------------------------------------------------------------------------------------------------


def epoch_events(folder: Path, values: list[float | None]) -> None:
    events = run_folder.Events(folder, 0)
    for epoch, value in enumerate(values, 1):
        lr = {"rest": 1e-3, "audio": 1e-3}
        events.write("epoch", epoch=epoch, step=3 * epoch, train_loss=1.0, valid={"mae": value}, lr=lr, booked={"s": 1})
    events.close()


def saved(folder: Path, step: int, value: float) -> None:
    tensors = {"w": torch.full((3,), value)}
    state = State(step, tensors, {key: {"w": torch.full((3,), value)} for key in MOMENTS})
    progress = {"epoch": 3, "best_step": step, "best_epoch": 2}
    checkpoint.save(folder / "checkpoints", Checkpoint(state, {}, progress), keep=1, best_step=step)


@pytest.fixture
def four(data: Path, tmp_path: Path) -> Path:
    """Four trials that pause after epoch 2; the second is the best then, the third the worst."""
    recipe = tiny(data, train={"epochs": 6})
    drawing = Drawing(searched(tmp_path, SPACE), recipe, tmp_path / "trials", asked(), until=2)
    for number, values in enumerate(([0.4, 0.5], [0.9, 0.1], [0.2, 0.9], [0.6, 0.6])):
        config = drawing.suggest(f"id{number}")
        assert isinstance(config, dict) and config["until"] == 2
        folder = Path(config["folder"])
        epoch_events(folder, list(values))
        saved(folder, 6, float(number))
        run_folder.write_json(folder / "stopped.json", {"why": "a pause", "step": 6, "paused": 2})
    return tmp_path / "trials"


def chosen(trials: Path, data: Path, until: int = 2, **recipe: Any) -> list[Heir]:
    outcomes = read_outcomes(trials, "mae")
    space = searched(trials.parent, SPACE)
    return heirs_of(outcomes, len(outcomes), until, space, tiny(data, **recipe))


def test_the_worst_is_replaced_by_a_copy_of_the_best_of_that_epoch(four: Path, data: Path) -> None:
    (heir,) = chosen(four, data)
    assert (heir.number, heir.replaces, heir.origin) == (5, 3, 2), "whatever the others had reached before"
    assert chosen(four, data) == [heir], "the same for the same results"
    values = read_outcomes(four, "mae")[1].values
    assert all(heir.rates[key] != values[key] for key in heir.rates)


def test_what_is_undefined_is_worse_and_what_failed_is_replaced_first(four: Path, data: Path) -> None:
    folders = [each.folder for each in read_outcomes(four, "mae")]
    epoch_events(folders[0], [0.1, None])
    assert [heir.replaces for heir in chosen(four, data)] == [1]
    run_folder.write_json(folders[3] / "error.json", {"message": "the loss is not finite", "exit_code": 4})
    assert [(heir.number, heir.replaces, heir.origin) for heir in chosen(four, data)] == [(5, 4, 2)]


def test_who_has_ended_by_itself_is_neither_copied_nor_replaced(four: Path, data: Path) -> None:
    folders = [each.folder for each in read_outcomes(four, "mae")]
    for number in (1, 2):  # the best and the worst, by train.patience
        run_folder.write_json(folders[number] / "result.json", {})
    assert [(heir.replaces, heir.origin) for heir in chosen(four, data)] == [(4, 1)]


def test_nobody_is_copied_where_all_have_failed(four: Path, data: Path) -> None:
    for each in read_outcomes(four, "mae"):
        run_folder.write_json(each.folder / "error.json", {"message": "no", "exit_code": 4})
    assert chosen(four, data) == []


def test_an_heir_has_all_of_its_origin_and_its_own_rates(four: Path, data: Path) -> None:
    recipe = tiny(data, train={"epochs": 6})
    (heir,) = chosen(four, data)
    for _ in range(2):  # the second call finds all of it done
        take_place(heir, 2, recipe, four)
    outcomes = read_outcomes(four, "mae")
    assert [each.number for each in outcomes] == [1, 2, 3, 4, 5]
    origin, ended, own = outcomes[1], outcomes[2], outcomes[4]
    assert ended.status == STOPPED and ended.epochs == 2
    assert own.status == INTERRUPTED and own.origin == (2, 2) and (own.best, own.best_epoch, own.epochs) == (0.1, 2, 2)
    assert own.values == {**origin.values, **heir.rates} and own.parameters == origin.parameters
    state = checkpoint.load_latest(own.folder / "checkpoints")
    assert state is not None and state.engine.step == 6 and state.engine.weights["w"].tolist() == [1.0] * 3
    assert state.engine.moments["exp_avg"]["w"].tolist() == [1.0] * 3 and state.progress["best_epoch"] == 2
    events = run_folder.read_events(own.folder)
    assert [event["epoch"] for event in events] == [1, 2] and not any("booked" in event for event in events)
    made = read_recipe(own.folder / "recipe.yaml")
    assert made.optim.lr.rest == origin.values["optim.lr.rest"], "until epoch 2"
    assert [(each.epoch, each.rest, each.audio) for each in made.optim.lr_from] == [
        (3, heir.rates["optim.lr.rest"], heir.rates["optim.lr.audio"])
    ]
    assert made.optim.rates(2) == made.optim.lr and made.optim.rates(6).rest == heir.rates["optim.lr.rest"]
    assert made.tracking.tags["sweep.from"] == "trial 2, epoch 2"


def test_an_heir_of_an_heir_has_every_rate_that_its_weights_had(four: Path, data: Path) -> None:
    recipe = tiny(data, train={"epochs": 6})
    first = Heir(5, 3, 2, {"optim.lr.rest": 2e-3, "optim.lr.audio": 1e-4, "optim.lr.vision": 1e-4})
    take_place(first, 2, recipe, four)
    folder = read_outcomes(four, "mae")[4].folder
    run_folder.write_json(folder / "stopped.json", {"why": "a pause", "step": 12, "paused": 4})
    second = Heir(6, 1, 5, {"optim.lr.rest": 3e-3, "optim.lr.audio": 1e-3, "optim.lr.vision": 1e-3})
    take_place(second, 4, recipe, four)
    own, begun = read_outcomes(four, "mae")[5], read_outcomes(four, "mae")[1].values["optim.lr.rest"]
    made = read_recipe(own.folder / "recipe.yaml")
    assert [made.optim.rates(epoch).rest for epoch in range(1, 7)] == [begun, begun, 2e-3, 2e-3, 3e-3, 3e-3]
    assert [epoch for epoch, _ in own.rates] == [1, 3, 5]
    (four.parent / "sweep").mkdir()
    run_folder.write_json(own.folder / "result.json", {})
    choose(read_outcome(own.folder, "mae"), recipe, four.parent / "sweep", 6)
    best = read_recipe(four.parent / "sweep" / "best.yaml")
    assert best.optim == made.optim and best.model == made.model and best.train.test
    assert "optim.lr_from" in (four.parent / "sweep" / "best.yaml").read_text().splitlines()[1]


def test_an_origin_that_has_gone_on_is_not_copied_later(four: Path, data: Path) -> None:
    (heir,) = chosen(four, data)
    (read_outcomes(four, "mae")[1].folder / "stopped.json").unlink()
    with pytest.raises(DataError, match=r"trial 5 is gone, and trial 2, which it was a copy of, has gone on"):
        take_place(heir, 2, tiny(data), four)


def test_a_copy_and_its_origin_share_no_file_that_changes(four: Path, tmp_path: Path) -> None:
    origin = read_outcomes(four, "mae")[1].folder
    for part in ("events", "checkpoints"):
        (tmp_path / "copy" / part).mkdir(parents=True)
    inherit(origin, tmp_path / "copy", 2)
    saved(origin, 9, 7.0)  # it goes on: the checkpoint before goes
    assert [path.name for path in checkpoint.saved(origin / "checkpoints")] == ["step-00000009"]
    state = checkpoint.load_latest(tmp_path / "copy" / "checkpoints")
    assert state is not None and state.engine.weights["w"].tolist() == [1.0] * 3


def test_a_trial_without_heirs_before_it_is_an_ordinary_one(data: Path, tmp_path: Path) -> None:
    recipe = tiny(data)
    assert with_rates(recipe, {"optim.lr.rest": 1e-3}).optim.lr_from == ()


def test_what_was_decided_is_read_back_and_damage_is_a_sentence(tmp_path: Path) -> None:
    assert load(tmp_path) == {}
    heir = {"number": 5, "replaces": 3, "origin": 2, "rates": {"optim.lr.rest": 1e-3}}
    run_folder.write_json(tmp_path / "population.json", {"generations": [{"epoch": 2, "reached": {}, "heirs": [heir]}]})
    assert load(tmp_path) == {2: [Heir(5, 3, 2, {"optim.lr.rest": 1e-3})]}
    (tmp_path / "population.json").write_text("{")
    with pytest.raises(DataError, match=r"population.json: is damaged"):
        load(tmp_path)


# --- what one sees meanwhile ------------------------------------------------------------------------------------------


class Ended:
    """A trial as Ray Tune shows it when it has ended."""

    last_result = None

    def __init__(self, folder: Path) -> None:
        self.config = {"folder": str(folder)}


def test_who_waits_and_who_is_best_is_shown(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tune.generations import Generations

    watch = Generations(four, "mae", 6, 4, [2, 4])
    watch.begin(2)
    folders = [each.folder for each in read_outcomes(four, "mae")]
    run_folder.write_json(folders[3] / "error.json", {"message": "the loss is not finite", "exit_code": 4})
    (folders[3] / "stopped.json").unlink()
    for folder in folders:
        watch.on_trial_complete(0, [], Ended(folder))
    out = " ".join(capsys.readouterr().out.split())
    assert "generation 1 of 3, until epoch 2" in out
    assert "trial 2 of 4 waits after epoch 2 of 6: best valid mae 0.1000 at epoch 2" in out
    assert "trial 4 of 4 failed: the loss is not finite" in out
    said = watch.summary()
    assert said.startswith("generation 1 of 3 · 1 of 4 trials · 1 failed") and "3 wait, best: trial 2, 0.1000" in said
    assert watch.seconds_left() is not None


# --- rates over epochs ------------------------------------------------------------------------------------------------


def test_rates_are_a_table_and_lines(four: Path, data: Path, tmp_path: Path) -> None:
    take_place(chosen(four, data)[0], 2, tiny(data, train={"epochs": 6}), four)
    outcomes: list[Outcome] = read_outcomes(four, "mae")
    own = outcomes[4].folder
    events = run_folder.Events(own, 0)
    events.write("epoch", epoch=3, step=9, train_loss=1.0, valid={"mae": 0.05}, lr={"rest": 2e-3, "audio": 1e-4})
    events.close()
    run_folder.write_json(own / "result.json", {})
    outcomes = read_outcomes(four, "mae")
    rates.write_csv(outcomes, "mae", tmp_path / "rates.csv")
    with (tmp_path / "rates.csv").open(newline="") as file:
        rows = [(row["trial"], row["epoch"], row["lr_rest"], row["valid_mae"]) for row in csv.DictReader(file)]
    assert rows[-1] == ("5", "3", "0.002", "0.05") and len(rows) == 9, "an epoch is its own trial's alone"
    lines = rates.lines(outcomes, searched(tmp_path, SPACE), "mae")
    best = lines[4]
    assert best.best and best.begins == 3 and best.epochs == [1, 2, 3]
    assert best.rows == {
        "lr.rest": [1e-3, 1e-3, 2e-3], "lr.audio+vision": [1e-3, 1e-3, 1e-4], "validation mae": [0.9, 0.1, 0.05]
    }  # fmt: skip
    assert rates.draw(lines, tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    drawn = json.loads(rates.plotly(lines).to_json())
    assert {trace["name"] for trace in drawn["data"]} == {*(f"trial {n}" for n in range(1, 5)), "trial 5, the best"}
