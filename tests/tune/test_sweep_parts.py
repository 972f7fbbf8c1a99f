"""The parts of a sweep, without a cluster."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from mmsa_dist import launch, run_folder, train
from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError
from shards.index import Index
from tests.tune.sweeps import searched, tiny
from tune.outcome import DONE, FAILED, INTERRUPTED, STOPPED, read_outcome, read_outcomes, winner
from tune.search import Asha, Drawing, concurrency
from tune.sweep import _for_trials
from tune.table import trials_table, write_csv
from tune.trial import EPOCH, OBJECTIVE
from tune.watch import spare_disk

# --- the test split is sacred -----------------------------------------------------------------------------------------


def test_a_trial_trains_where_the_test_shards_do_not_exist(data: Path, tmp_path: Path) -> None:
    without = tmp_path / "data"
    shutil.copytree(data, without)
    index = Index.load(without)
    for shard in index.shards:
        if shard.split == "test":
            (without / shard.url).unlink()
            (without / shard.table).unlink()
    recipe = _for_trials(tiny(without, launch={"launcher": "local"}), tmp_path)
    folder = train.prepare(recipe, index, tmp_path / "runs", "trial")
    result = launch.run(recipe, folder)
    assert "valid" in result and "test" not in result


def test_no_trial_reads_the_test_split_whatever_the_recipe_says(tmp_path: Path) -> None:
    assert not _for_trials(tiny(tmp_path, train={"test": True}), tmp_path).train.test


# --- how many at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "cpus", "gpus", "at_once"),
    [
        ({"workers": 1}, 2, 0, 2),
        ({"workers": 2}, 2, 0, 1),
        ({"workers": 2}, 9, 0, 4),
        ({"workers": 2, "cpus_per_worker": 3}, 16, 0, 2),
        ({"workers": 2, "gpus_per_worker": 1}, 64, 8, 4),
        ({"workers": 2, "gpus_per_worker": 0.25}, 64, 1, 2),
        ({"workers": 1, "gpus_per_worker": 0.1}, 64, 1, 10),
        ({"workers": 4, "gpus_per_worker": 1}, 8, 100, 2),
    ],
)
def test_as_many_trials_as_fit(values: dict[str, Any], cpus: float, gpus: float, at_once: int) -> None:
    assert concurrency(LaunchConfig(**values), cpus, gpus) == at_once


def test_not_even_one_trial_fits_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"one trial needs 3 CPUs = 3 workers x 1, the Ray cluster has 2 free; lower"):
        concurrency(LaunchConfig(workers=3), 2, 0)
    with pytest.raises(ConfigError, match=r"one trial needs 2 GPUs = 2 workers x 1, the Ray cluster has 1 free"):
        concurrency(LaunchConfig(workers=2, gpus_per_worker=1), 64, 1)


# --- drawing and pruning ----------------------------------------------------------------------------------------------


def test_the_first_trial_has_the_recipes_own_values_and_every_trial_a_folder(data: Path, tmp_path: Path) -> None:
    recipe = tiny(data, model={"layers": 1})
    drawing = Drawing(searched(tmp_path), recipe, tmp_path / "trials", "min")
    configs = [drawing.suggest(f"id{number}") for number in range(6)]
    outcomes = read_outcomes(tmp_path / "trials", "mae")
    assert [outcome.number for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert [str(outcome.folder) for outcome in outcomes] == [config["folder"] for config in configs]
    assert outcomes[0].values["model.layers"] == 1 and outcomes[0].values["optim.lr.rest"] == 5e-3
    assert outcomes[0].values["optim.accumulation"] == 1
    assert all(outcome.status == INTERRUPTED for outcome in outcomes), "none of them ran"
    again = Drawing(searched(tmp_path), recipe, tmp_path / "again", "min")
    for number in range(6):
        again.suggest(f"id{number}")
    assert [o.values for o in read_outcomes(tmp_path / "again", "mae")] == [o.values for o in outcomes], "seeded"


def test_an_unreachable_mlflow_in_mid_sweep_costs_the_record_not_the_trial(data: Path, tmp_path: Path) -> None:
    recipe = tiny(data, tracking={"enabled": True, "uri": "http://127.0.0.1:9"})
    config = Drawing(searched(tmp_path), recipe, tmp_path / "trials", "min").suggest("id")
    assert "error" not in config
    folder = Path(config["folder"])
    assert list(folder.parent.iterdir()) == [folder], "the first try left nothing"
    assert not yaml.safe_load((folder / "recipe.yaml").read_text())["tracking"]["enabled"]


def test_asha_never_stops_a_trial_at_its_last_epoch() -> None:
    def decisions(epochs: int) -> Iterator[str]:
        asha = Asha(epochs, 1)
        asha.set_search_properties(OBJECTIVE, "min")
        for number, objective in enumerate((0.1, 0.2, 9.0, 9.0)):
            trial = type("Trial", (), {"trial_id": str(number)})
            asha.on_trial_add(None, trial)
            decision = ""
            for epoch in range(1, epochs + 1):
                decision = asha.on_trial_result(None, trial, {EPOCH: epoch, OBJECTIVE: objective})
                if decision == TrialScheduler.STOP:
                    break
            yield f"{decision} {epoch}"

    assert list(decisions(3)) == ["CONTINUE 3", "STOP 1", "STOP 1", "STOP 1"]
    assert list(decisions(1)) == ["CONTINUE 1"] * 4


# --- outcomes, disk, table --------------------------------------------------------------------------------------------


def trial(trials: Path, number: int, values: list[float | None], **files: Any) -> Path:
    """A trial's folder as a real one leaves it: an epoch event for each validation value."""
    folder = trials / f"trial-{number:03d}"
    (folder / "events").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    events = run_folder.Events(folder, 0)
    for epoch, value in enumerate(values, 1):
        events.write("epoch", epoch=epoch, valid={"mae": value, "corr": None if value is None else -value})
    events.close()
    record = {"trial": f"id{number}", "number": number, "values": {"model.layers": number, "optim.lr.rest": 1e-3}}
    run_folder.write_json(folder / "trial.json", {**record, **files.pop("record", {})})
    for name, content in files.items():
        run_folder.write_json(folder / f"{name}.json", content)
    return folder


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    folder = tmp_path / "trials"
    trial(folder, 1, [1.2, 1.0, 1.1], result={})
    killed = {"message": "the actor died", "exit_code": 75}
    trial(folder, 2, [0.9, None], record={"stopped": 2}, error=killed)
    trial(folder, 3, [0.1], error={"message": "the loss is not finite", "exit_code": 4})
    trial(folder, 4, [0.5])
    trial(folder, 5, [], error={"message": "values do not fit", "exit_code": 2})
    return folder


def test_an_outcome_is_read_from_the_folder(trials: Path) -> None:
    outcomes = read_outcomes(trials, "mae")
    seen = [(o.number, o.status, o.best, o.best_epoch, o.epochs) for o in outcomes]
    assert seen == [
        (1, DONE, 1.0, 2, 3),
        (2, STOPPED, 0.9, 1, 2),
        (3, FAILED, 0.1, 1, 1),
        (4, INTERRUPTED, 0.5, 1, 1),
        (5, FAILED, None, 0, 0),
    ]
    assert [outcome.error for outcome in outcomes[1:3]] == [None, "the loss is not finite"]
    assert read_outcome(trials / "trial-001", "corr").best == -1.0, "the highest of those"


def test_the_winner_is_the_best_that_holds_even_if_it_was_stopped_early(trials: Path) -> None:
    best = winner(read_outcomes(trials, "mae"), "mae")
    assert best is not None and best.number == 2
    best = winner(read_outcomes(trials, "corr"), "corr")
    assert best is not None and best.number == 2, "-0.9 is the highest"
    assert winner([], "mae") is None


def test_only_the_best_and_the_running_trials_keep_their_checkpoints(trials: Path) -> None:
    spare_disk(trials, "mae")
    kept = {folder.name for folder in trials.iterdir() if (folder / "checkpoints").is_dir()}
    assert kept == {"trial-002", "trial-004"}


def test_the_table_shows_the_best_first_and_why_trials_failed(trials: Path, tmp_path: Path) -> None:
    from rich.console import Console

    outcomes = read_outcomes(trials, "mae")
    space = searched(tmp_path, "a: {model.layers: {choice: [1, 2], source: s}}")
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    console.print(trials_table(outcomes, space, "mae", winner(outcomes, "mae")))
    text = console.export_text()
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["3", "4", "2 *", "1", "5"]
    assert "failed: the loss is not finite" in rows[0] and "stopped early" in rows[2]
    write_csv(outcomes, space, "mae", tmp_path / "trials.csv")
    written = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["valid_mae"] for row in written] == ["1.0", "0.9", "0.1", "0.5", ""]
