"""The parts of a sweep, without a cluster."""

import argparse
import csv
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from mmsa_dist import launch, run_folder, train
from mmsa_dist.errors import ConfigError, TransientError
from mmsa_dist.tracking import Link, store
from shards.index import Index
from tests.mmsa_dist.conftest import free_port, tracking_server
from tests.tune.sweeps import searched, tiny
from tune import draw, resumed
from tune.asked import SEARCHES, Asked
from tune.course import for_trials
from tune.draw import Drawing, grid, levels
from tune.outcome import DONE, FAILED, INTERRUPTED, STOPPED, read_outcome, read_outcomes, winner
from tune.record import record_rest
from tune.stopping import Asha, Median, Past, make_scheduler, replay
from tune.sweep import _asked
from tune.table import trials_table, write_csv
from tune.trial import EPOCH, OBJECTIVE, run_trial
from tune.watch import spare_disk

GROUPS = ("text", "audio", "vision", "rest")

# --- the test split is sacred -----------------------------------------------------------------------------------------


def test_a_trial_trains_where_the_test_shards_do_not_exist(data: Path, tmp_path: Path) -> None:
    without = tmp_path / "data"
    shutil.copytree(data, without)
    index = Index.load(without)
    for shard in index.shards:
        if shard.split == "test":
            (without / shard.url).unlink()
            (without / shard.table).unlink()
    recipe = for_trials(tiny(without, launch={"launcher": "local"}), tmp_path)
    folder = train.prepare(recipe, index, tmp_path / "runs", "trial")
    result = launch.run(recipe, folder)
    assert "valid" in result and "test" not in result


def test_no_trial_reads_the_test_split_whatever_the_recipe_says(tmp_path: Path) -> None:
    assert not for_trials(tiny(tmp_path, train={"test": True}), tmp_path).train.test


# --- drawing and pruning ----------------------------------------------------------------------------------------------


def asked(**changes: Any) -> Asked:
    usual = Asked(
        trials=6,
        search="tpe",
        stopping="asha",
        grace=1,
        max_concurrent=None,
        objectives=("mae",),
        seeds=1,
        keys=(),
    )
    return replace(usual, **changes)


def test_the_first_trial_has_the_recipes_own_values_and_every_trial_a_folder(data: Path, tmp_path: Path) -> None:
    recipe = tiny(data, model={"layers": 1})
    drawing = Drawing(searched(tmp_path), recipe, tmp_path / "trials", asked())
    configs = [drawing.suggest(f"id{number}") for number in range(6)]
    assert drawing.suggest("one too many") == Searcher.FINISHED
    outcomes = read_outcomes(tmp_path / "trials", "mae")
    assert [outcome.number for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert [str(outcome.folder) for outcome in outcomes] == [config["folder"] for config in configs]  # type: ignore[index]
    assert outcomes[0].values["model.layers"] == 1 and outcomes[0].values["optim.lr.rest"] == 5e-3
    assert outcomes[0].values["optim.accumulation"] == 1
    assert all(outcome.status == INTERRUPTED for outcome in outcomes), "none of them ran"
    again = Drawing(searched(tmp_path), recipe, tmp_path / "again", asked())
    for number in range(6):
        again.suggest(f"id{number}")
    assert [o.values for o in read_outcomes(tmp_path / "again", "mae")] == [o.values for o in outcomes], "seeded"


@pytest.mark.parametrize("search", SEARCHES)
def test_however_trials_are_drawn_the_own_values_come_first(search: str, data: Path, tmp_path: Path) -> None:
    drawing = Drawing(searched(tmp_path), tiny(data), tmp_path / "trials", asked(search=search, trials=3))
    for number in range(3):
        drawing.suggest(f"id{number}")
    assert drawing.suggest("more") == Searcher.FINISHED
    first, *others = read_outcomes(tmp_path / "trials", "mae")
    assert first.values["model.layers"] == 2 and first.values["optim.accumulation"] == 1
    assert len(others) == 2


def test_a_grid_tries_every_combination_once(data: Path, tmp_path: Path) -> None:
    space = searched(tmp_path)
    drawing = Drawing(space, tiny(data), tmp_path / "trials", asked(search="grid", trials=100))
    assert drawing.total == drawing.left == 8
    while (config := drawing.suggest(f"id{drawing.drawn}")) != Searcher.FINISHED:
        assert "folder" in config  # type: ignore[operator]
    seen = [tuple(outcome.values.values()) for outcome in read_outcomes(tmp_path / "trials", "mae")]
    assert len(seen) == len(set(seen)) == 8


@pytest.mark.parametrize(("given", "trials"), [(None, 8), (3, 3), (100, 8)])
def test_a_grid_has_as_many_trials_as_combinations(given: int | None, trials: int, data: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(
        trials=given, search="grid", stopping=None, grace=None, max_concurrent=None, objectives=None, seeds=None
    )
    assert _asked(options, searched(tmp_path), tiny(data), Index.load(data), set()).trials == trials


def test_a_grid_of_ranges_has_their_ends_and_middles(tmp_path: Path) -> None:
    text = """
a:
  model.dropout: {uniform: [0.0, 0.5], source: s}
  optim.lr.rest: {loguniform: [1.0e-4, 1.0e-2], source: s}
  model.layers: {randint: [1, 4], source: s}
"""
    columns = [levels(knob) for knob in searched(tmp_path, text).knobs]
    assert columns[0] == [0.0, 0.25, 0.5]
    assert columns[1] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert columns[2] == [1, 2, 4]
    wide = "a:\n" + "".join(f"  optim.lr.{name}: {{choice: {list(range(1, 60))}, source: s}}\n" for name in GROUPS)
    with pytest.raises(ConfigError, match=r"--search grid: .* has 12,117,361 combinations; search fewer values"):
        grid(searched(tmp_path, wide), 1)


def test_what_was_begun_goes_on_and_what_was_done_is_known(data: Path, tmp_path: Path) -> None:
    """A killed driver's sweep: three done (one of them failed), one under way, two to be drawn."""
    space, recipe = searched(tmp_path, "a: {model.dropout: {uniform: [0.0, 0.5], source: s}}"), tiny(data)
    first = Drawing(space, recipe, tmp_path / "trials", asked(trials=4))
    folders = [Path(first.suggest(f"id{number}")["folder"]) for number in range(4)]  # type: ignore[index,call-overload]
    for folder, objective in zip(folders[:2], (1.0, 0.5), strict=True):
        events = run_folder.Events(folder, 0)
        events.write("epoch", epoch=1, valid={"mae": objective})
        events.close()
        run_folder.write_json(folder / "result.json", {})
    run_folder.write_json(folders[2] / "error.json", {"message": "no", "exit_code": 4})
    before = read_outcomes(tmp_path / "trials", "mae")
    assert [outcome.status for outcome in before] == [DONE, DONE, FAILED, INTERRUPTED]

    drawing = Drawing(space, recipe, tmp_path / "trials", asked(trials=6), before)
    known = drawing.study.trials
    assert [trial.value for trial in known] == [1.0, 0.5, None]
    assert [space.decoded(trial.params) for trial in known] == [outcome.values for outcome in before[:3]]
    assert (drawing.left, drawing.total) == (3, 6)
    assert drawing.suggest("a") == {"folder": str(folders[3])}
    names = [Path(drawing.suggest(name)["folder"]).name for name in "bc"]  # type: ignore[index,call-overload]
    assert [name[:9] for name in names] == ["trial-005", "trial-006"]
    assert drawing.suggest("d") == Searcher.FINISHED
    events = run_folder.Events(folders[3], 0)
    events.write("epoch", epoch=1, valid={"mae": 0.25})
    events.close()
    drawing.on_trial_complete("a", {})
    assert drawing.study.best_value == 0.25
    assert space.decoded(drawing.study.best_params) == before[3].values


def test_a_trial_that_failed_after_good_epochs_draws_nobody_near(data: Path, tmp_path: Path) -> None:
    drawing = Drawing(searched(tmp_path), tiny(data), tmp_path / "trials", asked())
    config = drawing.suggest("a")
    assert isinstance(config, dict)
    folder = Path(config["folder"])
    events = run_folder.Events(folder, 0)
    events.write("epoch", epoch=1, valid={"mae": 0.01})
    events.close()
    run_folder.write_json(folder / "error.json", {"message": "the loss is not finite", "exit_code": 4})
    drawing.on_trial_complete("a", {})
    again = Drawing(searched(tmp_path), tiny(data), tmp_path / "trials", asked(), read_outcomes(folder.parent, "mae"))
    for study in (drawing.study, again.study):
        assert [trial.state.name for trial in study.trials] == ["FAIL"]


def test_values_that_make_no_recipe_fail_when_the_sweep_goes_on_too(data: Path, tmp_path: Path) -> None:
    space = searched(tmp_path, "a: {optim.accumulation: {choice: [40], source: s}}")
    for _ in range(2):
        before = read_outcomes(tmp_path / "trials", "mae")
        config = Drawing(space, tiny(data), tmp_path / "trials", asked(trials=1), before).suggest("id")
        assert isinstance(config, dict)
        run_trial(config)
        (outcome,) = read_outcomes(tmp_path / "trials", "mae")
        assert outcome.status == FAILED and "cannot be shared by 1 workers x 40 accumulation" in (outcome.error or "")
        (outcome.folder / "error.json").unlink()


def test_data_that_is_gone_when_a_trial_is_drawn_fails_that_trial_alone(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    space = searched(tmp_path, "a: {model.dropout: {uniform: [0.0, 0.5], source: s}}")
    drawing = Drawing(space, tiny(tmp_path / "data"), tmp_path / "trials", asked(trials=3))
    for name in "abc":
        if name == "b":
            (tmp_path / "data").rename(tmp_path / "away")
        config = drawing.suggest(name)
        assert isinstance(config, dict) and ("error" in config) == (name == "b")
        if name == "b":
            run_trial(config)
            drawing.on_trial_complete(name, {})
            (tmp_path / "away").rename(tmp_path / "data")
    first, second, third = read_outcomes(tmp_path / "trials", "mae")
    assert (first.status, second.status, third.status) == (INTERRUPTED, FAILED, INTERRUPTED)
    assert second.error is not None and str(tmp_path / "data") in second.error
    assert run_folder.read_json(second.folder / "error.json")["exit_code"] in (2, 3)
    assert drawing.study.trials[1].state.name == "FAIL"


def test_a_fault_of_the_program_while_a_trial_is_drawn_fails_that_trial_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = Drawing(searched(tmp_path), tiny(data), tmp_path / "trials", asked(trials=2))

    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore of it")

    with monkeypatch.context() as patched:
        patched.setattr("tune.draw.sizes_of", broken)
        config = drawing.suggest("a")
    assert isinstance(config, dict)
    run_trial(config)
    assert "error" not in drawing.suggest("b")  # type: ignore[operator]
    failed, good = read_outcomes(tmp_path / "trials", "mae")
    assert (failed.status, good.status) == (FAILED, INTERRUPTED)
    trace = failed.folder / "traceback.txt"
    said = f"it could not be drawn: RuntimeError: mat1 and mat2 shapes cannot be multiplied; see {trace}"
    assert failed.error == said and "in broken" in trace.read_text()
    assert run_folder.read_json(failed.folder / "error.json")["exit_code"] == 4
    assert not list((tmp_path / "trials").glob("*/mlflow.json"))


def test_a_disk_that_takes_no_trial_ends_the_search_with_a_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("a file where the folder should be")
    with pytest.raises(TransientError, match=r"trials/trial-001: the trial's folder cannot be written: .*; free space"):
        Drawing(searched(tmp_path), tiny(data), tmp_path / "trials", asked()).suggest("a")


def test_what_mlflow_could_not_take_while_it_was_away_is_there_afterwards(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial that is drawn, trained and ended while no server answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    recipe = tiny(data, tracking={"enabled": True, "uri": f"http://127.0.0.1:{port}"})
    config = Drawing(searched(tmp_path), recipe, tmp_path / "trials", asked()).suggest("id")
    assert isinstance(config, dict) and "error" not in config
    folder = Path(config["folder"])
    assert list(folder.parent.iterdir()) == [folder], "the first try left nothing"
    assert not (folder / "mlflow.json").exists()
    events = run_folder.Events(folder, 0)
    for epoch, mae in enumerate((0.5, 0.25), 1):
        events.write("epoch", epoch=epoch, step=10 * epoch, train_loss=1.0, valid={"mae": mae})
    events.close()
    run_folder.write_json(folder / "result.json", {})
    record_rest(read_outcomes(tmp_path / "trials", "mae"), "mae")
    assert f"not wholly recorded in MLflow: {folder.name}; --resume records them" in capsys.readouterr().out

    server = tracking_server(tmp_path, port)
    try:
        record_rest(read_outcomes(tmp_path / "trials", "mae"), "mae")
        assert capsys.readouterr().out == ""
        link = Link.load(folder)
        assert link is not None
        client = store.connect(server.uri)
        run = client.get_run(link.run_id)
        assert run.info.status == "FINISHED" and run.data.metrics["best_valid_mae"] == 0.25
        assert [point.value for point in client.get_metric_history(link.run_id, "valid_mae")] == [0.5, 0.25]
    finally:
        server.close()


def test_the_size_of_each_system_is_known(data: Path, tmp_path: Path) -> None:
    drawing = Drawing(searched(tmp_path), tiny(data), tmp_path / "trials", asked(search="grid", trials=8))
    while drawing.suggest(f"id{drawing.drawn}") != Searcher.FINISHED:
        pass
    sizes: dict[int, set[int | None]] = {}
    for outcome in read_outcomes(tmp_path / "trials", "mae"):
        if outcome.values["optim.accumulation"] == 1:
            sizes.setdefault(outcome.values["model.layers"], set()).add(outcome.parameters)
    (one,), (two,) = sizes[1], sizes[2]
    assert one is not None and two is not None and one < two


def decisions(scheduler: TrialScheduler, objectives: Sequence[float], epochs: int) -> Iterator[str]:
    """What it decides last of trials that run one after another, each as good at every epoch."""
    for objective in objectives:
        trial = Past(uuid.uuid4().hex)
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        decision = ""
        for epoch in range(1, epochs + 1):
            decision = scheduler.on_trial_result(None, trial, {EPOCH: epoch, OBJECTIVE: objective})  # type: ignore[arg-type]
            if decision == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(None, trial, {"done": True})  # type: ignore[arg-type]
        yield f"{decision} {epoch}"


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_no_trial_is_stopped_at_its_last_epoch(mode: str, sign: int) -> None:
    values = [sign * value for value in (0.1, 0.2, 9.0, 9.0)]
    assert list(decisions(Asha(3, 1, mode), values, 3)) == ["CONTINUE 3", "STOP 1", "STOP 1", "STOP 1"]
    assert list(decisions(Asha(1, 1, mode), values, 1)) == ["CONTINUE 1"] * 4
    values = [sign * value for value in (0.1, 0.2, 0.3, 9.0, 0.05)]
    assert list(decisions(Median(3, 2, mode), values, 3)) == [*["CONTINUE 3"] * 3, "STOP 2", "CONTINUE 3"]
    assert list(decisions(Median(2, 2, mode), values, 2)) == ["CONTINUE 2"] * 5
    unstopped = make_scheduler(asked(stopping="none"), 3, mode)
    assert list(decisions(unstopped, values, 3)) == ["CONTINUE 3"] * 5


@pytest.mark.parametrize("stopping", ["asha", "median"])
def test_a_sweep_that_goes_on_stops_by_what_the_trials_before_reached(stopping: str, tmp_path: Path) -> None:
    values = [0.1, 0.2, 0.3, 0.4]
    whole = make_scheduler(asked(stopping=stopping), 4, "min")
    first = list(decisions(whole, values, 4))
    for number, (value, ends) in enumerate(zip(values, first, strict=True), 1):
        stopped = {"record": {"stopped": int(ends.split()[1])}} if ends.startswith("STOP") else {"result": {}}
        trial(tmp_path / "trials", number, [value] * int(ends.split()[1]), **stopped)
    again = make_scheduler(asked(stopping=stopping), 4, "min")
    replay(again, read_outcomes(tmp_path / "trials", "mae"), "mae")
    later = [0.05, 0.25, 9.0, 0.01]
    assert list(decisions(again, later, 4)) == list(decisions(whole, later, 4))
    assert "STOP 1" in list(decisions(again, [9.0], 4))


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


def test_what_may_be_mended_keeps_its_checkpoints_and_is_taken_up_by_resume(trials: Path) -> None:
    full = trial(trials, 6, [2.0], error={"message": "No space left on device", "exit_code": 75})
    assert [o.number for o in read_outcomes(trials, "mae") if o.status == FAILED] == [3, 5, 6]
    spare_disk(trials, "mae")
    assert (full / "checkpoints").is_dir()
    resumed._take_up(trials, "mae")
    statuses = {o.number: o.status for o in read_outcomes(trials, "mae")}
    assert statuses == {1: DONE, 2: STOPPED, 3: FAILED, 4: INTERRUPTED, 5: FAILED, 6: INTERRUPTED}


def test_any_seed_of_a_recipe_is_one_of_the_search() -> None:
    assert all(draw.sampler(search, 2**63 - 1) for search in ("tpe", "random"))


def test_the_table_shows_the_best_first_and_why_trials_failed(trials: Path, tmp_path: Path) -> None:
    from rich.console import Console

    outcomes = read_outcomes(trials, "mae")
    space = searched(tmp_path, "a: {model.layers: {choice: [1, 2], source: s}}")
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    console.print(trials_table(outcomes, space, ["mae"], winner(outcomes, "mae")))
    text = console.export_text()
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["3", "4", "2 *", "1", "5"]
    assert "failed: the loss is not finite" in rows[0] and "stopped early" in rows[2]
    write_csv(outcomes, space, ["mae"], tmp_path / "trials.csv")
    written = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["valid_mae"] for row in written] == ["1.0", "0.9", "0.1", "0.5", ""]


def test_the_table_shows_each_value_of_keys_that_go_together(trials: Path, tmp_path: Path) -> None:
    from rich.console import Console

    outcomes = read_outcomes(trials, "mae")
    rows = "{together: [[1, 0.001], [2, 0.001]], source: s}"
    space = searched(tmp_path, f"a:\n  model.layers, optim.lr.rest: {rows}")
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    console.print(trials_table(outcomes, space, ["mae"], None))
    text = console.export_text()
    assert "┃ layers+rest ┃" in text and "│ 2, 0.001    │" in text
