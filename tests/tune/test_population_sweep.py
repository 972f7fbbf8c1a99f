"""`mmsa-dist sweep --stopping pbt`: one real population of three, whose driver is killed in its second generation."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist import launch, run_folder, train
from mmsa_dist.recipe import load_recipe, read_recipe
from mmsa_dist.report import epoch_events
from shards.index import Index
from tests.tune.sweeps import in_mlflow
from tests.tune.test_sweep_resume import Sweep, starts
from tune.outcome import DONE, INTERRUPTED, STOPPED, Outcome

pytestmark = [pytest.mark.timeout(1900), pytest.mark.ray, pytest.mark.slow]

LOW, HIGH = 1e-6, 2e-2
SPACE = f"""
system: ufen_mtfn
learning rates:
  optim.lr.audio, optim.lr.vision, optim.lr.rest: {{loguniform: [{LOW}, {HIGH}], source: "from nothing to too much"}}
network:
  model.layers: {{choice: [2, 1], source: "a copy has the network of its origin"}}
"""
EPOCHS, PAUSES = 6, [2, 4]
RATE = "optim.lr.rest"


@dataclass(frozen=True)
class Bred:
    """A population through a kill.

    Attributes:
        decided: what stood in population.json when its driver was killed. begun: by trial how often its ranks had been
            started then.
    """

    data: Path
    sweep: Sweep
    result: dict[str, Any]
    outcomes: list[Outcome]
    decided: dict[str, Any]
    begun: dict[int, int]
    out: str

    @property
    def heirs(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.origin]

    def trial(self, number: int) -> Outcome:
        return self.outcomes[number - 1]


@pytest.fixture(scope="module")
def bred(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bred]:
    folder = tmp_path_factory.mktemp("population")
    runs, space, recipe = folder / "runs", folder / "space.yaml", folder / "recipe.yaml"
    space.write_text(SPACE)
    rates = dict.fromkeys(("audio", "vision", "rest"), 5.0e-3)
    recipe.write_text(yaml.safe_dump({"optim": {"lr": {"text": 5.0e-5, **rates}}, "train": {"patience": EPOCHS}}))
    words = ["ufen_mtfn", "--data", str(data), "--recipe", str(recipe), "--space", str(space), "--trials=3"]
    sweep = Sweep.start(
        runs, *words, f"--epochs={EPOCHS}", "--stopping=pbt", "--grace=2", "--search=random", "--max-concurrent=2"
    )
    again = None
    try:
        sweep.until(
            lambda seen: any(each.status == INTERRUPTED and each.epochs > 2 for each in seen), "the second generation"
        )
        sweep.process.kill()
        sweep.process.wait()
        decided = run_folder.read_json(sweep.folder / "population.json")
        begun = {each.number: len(starts(each.folder)) for each in sweep.outcomes()}
        again = Sweep.start(runs, "--resume", sweep.folder.name)
        result = again.finished()
        yield Bred(data, sweep, result, again.outcomes(), decided, begun, sweep.output + again.output)
    finally:
        sweep.end()
        if again is not None:
            again.end()


def test_after_each_generation_the_worst_ends_and_a_copy_of_the_best_goes_on(bred: Bred) -> None:
    kept = run_folder.read_json(bred.sweep.folder / "population.json")["generations"]
    assert [each["epoch"] for each in kept] == PAUSES
    assert [each.number for each in bred.outcomes] == [1, 2, 3, 4, 5]
    members = {1, 2, 3}
    for generation, number in zip(kept, (4, 5), strict=True):
        reached = {int(trial): value for trial, value in generation["reached"].items()}
        (heir,) = generation["heirs"]
        assert reached.keys() == members and heir["number"] == number
        assert heir["replaces"] == max(reached, key=lambda trial: reached[trial])
        assert heir["origin"] == min(reached, key=lambda trial: reached[trial])
        ended = bred.trial(heir["replaces"])
        assert (ended.status, ended.epochs) == (STOPPED, generation["epoch"])
        assert bred.trial(number).origin == (heir["origin"], generation["epoch"])
        members = members - {heir["replaces"]} | {number}
    assert {(each.status, each.epochs) for each in bred.outcomes if each.number in members} == {(DONE, EPOCHS)}


def test_a_copy_goes_on_with_the_weights_and_moments_of_its_origin_and_its_own_rates(
    bred: Bred, tmp_path: Path
) -> None:
    """Its recipe, trained alone from the beginning, has every loss that the copy and its origins had: bit for bit."""
    heir = bred.heirs[-1]
    recipe = read_recipe(heir.folder / "recipe.yaml")
    recipe = recipe.model_copy(
        update={
            "launch": recipe.launch.model_copy(update={"launcher": "local"}),
            "tracking": recipe.tracking.model_copy(update={"enabled": False}),
            "train": recipe.train.model_copy(update={"test": False}),
        }
    )
    alone = train.prepare(recipe, Index.load(bred.data), tmp_path, "alone")
    launch.run(recipe, alone)
    found, wanted = epoch_events(heir.folder), epoch_events(alone)
    assert [event["epoch"] for event in found] == list(range(1, heir.epochs + 1))
    for one, other in zip(found, wanted, strict=True):
        assert one["train_loss"] == other["train_loss"] and one["valid"] == other["valid"] and one["lr"] == other["lr"]


def test_a_copy_begins_with_what_its_origin_had_reached(bred: Bred) -> None:
    for heir in bred.heirs:
        assert heir.origin is not None
        number, epoch = heir.origin
        own, origin = epoch_events(heir.folder), epoch_events(bred.trial(number).folder)
        for n in range(epoch):
            assert own[n]["train_loss"] == origin[n]["train_loss"] and own[n]["valid"] == origin[n]["valid"]
        assert {event["inherited"] for event in own[:epoch]} and not any("inherited" in each for each in own[epoch:])
        assert heir.values["model.layers"] == bred.trial(number).values["model.layers"]
        if len(origin) > epoch:
            assert own[epoch]["train_loss"] != origin[epoch]["train_loss"], "other rates, other losses"


def test_rates_change_stay_in_their_range_and_are_written_down(bred: Bred) -> None:
    for heir in bred.heirs:
        assert heir.origin is not None
        number, epoch = heir.origin
        before = bred.trial(number).values[RATE]
        assert heir.values[RATE] != before and LOW <= heir.values[RATE] <= HIGH
        used = [event["lr"]["rest"] for event in epoch_events(heir.folder)]
        assert used[epoch - 1] == before and set(used[epoch:]) == {heir.values[RATE]}
    folder = bred.sweep.folder
    with (folder / "rates.csv").open(newline="") as file:
        rows = [(int(row["trial"]), int(row["epoch"]), float(row["lr_rest"])) for row in csv.DictReader(file)]
    for each in bred.outcomes:
        begins = each.origin[1] if each.origin else 0
        assert [(epoch, rate) for trial, epoch, rate in rows if trial == each.number] == [
            (epoch, each.values[RATE]) for epoch in range(begins + 1, each.epochs + 1)
        ]
    with (folder / "trials.csv").open(newline="") as file:
        origins = [(row["from_trial"], row["from_epoch"]) for row in csv.DictReader(file)]
    assert origins == [tuple(map(str, each.origin)) if each.origin else ("", "") for each in bred.outcomes]
    assert (folder / "pictures" / "rates.png").is_file()
    assert "learning rates over epochs" in (folder / "pictures" / "sweep.html").read_text()


def test_a_killed_driver_costs_no_generation(bred: Bred) -> None:
    (first,) = bred.decided["generations"]
    kept = run_folder.read_json(bred.sweep.folder / "population.json")["generations"]
    assert kept[0] == first, "what was decided stays"
    assert "generation 1 of 3" in bred.out and bred.out.count("generation 1 of 3, until epoch 2") == 1
    (heir,) = first["heirs"]
    assert len(starts(bred.trial(heir["replaces"]).folder)) == bred.begun[heir["replaces"]], "it was not begun again"
    for each in bred.outcomes:  # each epoch of its own once: none was trained twice but where a kill came in between
        events = [e for e in run_folder.read_events(each.folder) if e["event"] == "epoch"]
        assert len(events) <= len({event["epoch"] for event in events}) + 1


def test_the_winner_was_chosen_on_validation_and_only_it_was_tested(bred: Bred) -> None:
    best = min(bred.outcomes, key=lambda each: (each.best or 9.0, each.number))
    assert bred.result["trial"] == best.number and bred.result["valid"]["mae"] == pytest.approx(best.best)
    tested = {each.number for each in bred.outcomes if (each.folder / "predictions" / "test.npz").is_file()}
    assert tested == {best.number}
    recipe = load_recipe("ufen_mtfn", str(bred.sweep.folder / "best.yaml"), [])
    assert [recipe.optim.rates(n).rest for n in range(1, best.epochs + 1)] == [
        event["lr"]["rest"] for event in epoch_events(best.folder)
    ]


def test_mlflow_shows_every_trial_with_all_its_epochs_and_where_it_comes_from(bred: Bred) -> None:
    client, whole, runs = in_mlflow(bred.sweep.folder)
    assert len(runs) == 5 and {run.info.status for run in runs} == {"FINISHED"}
    by_name = {run.info.run_name: run for run in runs}
    for each in bred.outcomes:
        run = by_name[each.folder.name]
        history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "valid_mae")}
        assert sorted(history.values()) == sorted(event["valid"]["mae"] for event in epoch_events(each.folder))
        assert len(history) == each.epochs and run.data.tags["sweep.status"] == each.status
        rates = {p.value for p in client.get_metric_history(run.info.run_id, "lr_rest")}
        assert each.values[RATE] in rates
        if each.origin:
            assert run.data.tags["sweep.from"] == f"trial {each.origin[0]}, epoch {each.origin[1]}"
    files = {file.path for file in client.list_artifacts(whole.info.run_id)}
    assert {"rates.csv", "population.json", "best.yaml"} <= files
