"""A sweep that is killed, rank by rank, trial by trial and as a whole, and gone on with."""

import csv
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist import run_folder
from tests.tune.sweeps import Sweep, in_mlflow
from tune.outcome import DONE, INTERRUPTED, Outcome

pytestmark = [pytest.mark.timeout(1900), pytest.mark.ray, pytest.mark.slow]

SPACE = """
system: ufen_mtfn
network:
  model.layers: {choice: [2, 1], source: "paper, table 7"}
  model.dropout: {uniform: [0.0, 0.5], source: "MMSA"}
"""

EPOCHS = 10


def under_way(outcomes: list[Outcome], epochs: int) -> list[Outcome]:
    """Trials that run and have that many epochs behind them, but not all but the last."""
    return [each for each in outcomes if each.status == INTERRUPTED and epochs <= each.epochs < EPOCHS - 2]


def starts(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [event for event in run_folder.read_events(folder, rank) if event["event"] == "start"]


def written(outcome: Outcome) -> tuple[int, int]:
    return (outcome.folder / "result.json").stat().st_mtime_ns, len(starts(outcome.folder))


@dataclass(frozen=True)
class Survived:
    """A sweep through all that was done to it."""

    sweep: Sweep
    result: dict[str, Any]
    outcomes: list[Outcome]
    done_before: dict[int, tuple[int, int]]
    open_before: dict[int, tuple[int, int]]
    """Epochs that they had behind them, and how often their ranks had been started."""
    before: str
    after: str


@pytest.fixture(scope="module")
def survived(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survived]:
    folder = tmp_path_factory.mktemp("resume")
    runs, space, recipe = folder / "runs", folder / "space.yaml", folder / "recipe.yaml"
    space.write_text(SPACE)
    rates = dict.fromkeys(("audio", "vision", "rest"), 5.0e-3)
    recipe.write_text(yaml.safe_dump({"optim": {"lr": {"text": 5.0e-5, **rates}}, "train": {"patience": EPOCHS}}))
    words = ["ufen_mtfn", "--data", str(data), "--recipe", str(recipe), "--space", str(space)]
    options = [f"--epochs={EPOCHS}", "--trials=4", "--max-concurrent=2", "--search=random", "--stopping=none"]
    sweep = Sweep.start(runs, *words, *options, "--seeds=2", "--objectives", "mae", "parameters")
    again = None
    try:
        # a rank of the first trial that trains
        hit = sweep.until(lambda seen: under_way(seen, 1), "a trial trains")[0]
        os.kill(starts(hit.folder)[-1]["pid"], signal.SIGKILL)
        sweep.until(lambda seen: len(starts(hit.folder)) > 1, "its rank is back")
        # the process of a trial, which owns its ranks: they end with it
        sweep.until(lambda seen: under_way(seen, 2), "a trial trains")
        next(p for p in sweep.below() if "ray::ImplicitFunc" in " ".join(p.cmdline())).kill()
        sweep.until(lambda _: "its process ended; it goes on" in sweep.output, "the trial is back")
        # the whole
        sweep.until(
            lambda seen: any(o.status == DONE for o in seen) and under_way(seen, 2), "one is done, one is under way"
        )
        sweep.process.kill()
        sweep.process.wait()
        before = sweep.outcomes()
        done = {each.number: written(each) for each in before if each.status == DONE}
        left = {each.number: (each.epochs, len(starts(each.folder))) for each in before if each.status == INTERRUPTED}
        again = Sweep.start(runs, "--resume", sweep.folder.name, "--export", str(folder / "exported.yaml"))
        result = again.finished()
        outcomes = again.outcomes()
        yield Survived(sweep, result, outcomes, done, left, sweep.output, again.output)
    finally:
        sweep.end()
        if again is not None:
            again.end()


def test_what_was_done_before_the_kill_is_not_done_again(survived: Survived) -> None:
    assert survived.done_before
    by_number = {outcome.number: outcome for outcome in survived.outcomes}
    for number, (_, begun) in survived.done_before.items():
        assert len(starts(by_number[number].folder)) == begun or number == survived.result["trial"]


def test_what_was_under_way_goes_on_from_its_checkpoint(survived: Survived) -> None:
    assert survived.open_before
    for outcome in survived.outcomes:
        assert outcome.status == DONE and outcome.epochs == EPOCHS, outcome
        if outcome.number in survived.open_before:
            behind, begun = survived.open_before[outcome.number]
            events = run_folder.read_events(outcome.folder)
            again = [i for i, event in enumerate(events) if event["event"] == "start"][begun]
            epoch = next(event["epoch"] for event in events[again:] if event["event"] == "epoch")
            assert epoch >= behind, "it did not begin anew"
    assert "done" in survived.after and "under way" in survived.after


def test_a_killed_rank_and_a_killed_trial_cost_no_trial(survived: Survived) -> None:
    assert [outcome.number for outcome in survived.outcomes] == [1, 2, 3, 4]
    assert not list(survived.sweep.folder.glob("trials/*/error.json"))
    assert "its process ended; it goes on" in survived.before


def test_the_sweep_ends_as_if_nothing_had_been(survived: Survived) -> None:
    folder, result = survived.sweep.folder, survived.result
    best = min(survived.outcomes, key=lambda outcome: outcome.best or float("inf"))
    assert result["trial"] == best.number
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["parameters"]) > 0 for row in rows) and any(row["front"] == "1" for row in rows)
    exported = yaml.safe_load((folder.parent.parent / "exported.yaml").read_text())
    assert exported["model"]["dropout"] == best.values["model.dropout"]
    for name in ("parallel.png", "slices.png", "front.png", "sweep.html"):
        assert (folder / "pictures" / name).is_file(), name


def test_the_best_recipe_was_trained_with_two_seeds_and_each_was_tested(survived: Survived) -> None:
    folder, result = survived.sweep.folder, survived.result
    (other,) = (folder / "seeds").iterdir()
    tested = [json.loads((run / "result.json").read_text()) for run in (folder / result["registered"], other)]
    assert all("test" in each for each in tested)
    over = result["seeds"]["test"]["mae"]
    trial = next(outcome for outcome in survived.outcomes if outcome.number == result["trial"])
    values = [json.loads((run / "result.json").read_text())["test"]["mae"] for run in (trial.folder, other)]
    assert over["mean"] == pytest.approx(sum(values) / 2)
    assert over["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert yaml.safe_load((other / "recipe.yaml").read_text())["seed"] == 2
    untested = [outcome for outcome in survived.outcomes if outcome.number != result["trial"]]
    assert not any((outcome.folder / "predictions" / "test.npz").is_file() for outcome in untested)


def test_mlflow_shows_a_whole_sweep(survived: Survived) -> None:
    client, whole, runs = in_mlflow(survived.sweep.folder)
    assert len(runs) == 5 and {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        assert len({point.step for point in client.get_metric_history(run.info.run_id, "valid_mae")}) == EPOCHS
    assert whole.info.status == "FINISHED" and whole.data.metrics["test_mae_std"] >= 0
    assert {f.path for f in client.list_artifacts(whole.info.run_id, "pictures")} >= {"pictures/sweep.html"}
    assert len(client.search_model_versions("name = 'ufen_mtfn'")) == 1
