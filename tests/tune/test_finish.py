"""How a sweep ends and is reopened: which trial counts, and what is done once alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist import launch, run_folder
from mmsa_dist.errors import ConfigError, DataError, TrainingError
from mmsa_dist.recipe import Recipe
from tests.tune.sweeps import tiny
from tune import finish
from tune.course import exportable, for_trials
from tune.finish import DivergedError, choose, chosen, reopened
from tune.outcome import DONE, FAILED, STOPPED, Outcome, read_outcome, read_outcomes, winner
from tune.resumed import _named
from tune.sweep import _given_keys, main


@pytest.fixture
def sweep(data: Path, tmp_path: Path) -> Path:
    """Three trials that ended: the second was stopped after two epochs, and is the best."""
    folder = tmp_path / "runs" / "sweep-x"
    for number, values in enumerate(([0.9, 0.8], [0.5, 0.4, 0.01], [0.7, 0.6]), 1):
        trial = folder / "trials" / f"trial-{number:03d}"
        for part in ("events", "checkpoints", "best"):
            (trial / part).mkdir(parents=True)
        events = run_folder.Events(trial, 0)
        for epoch, mae in enumerate(values, 1):
            events.write("epoch", epoch=epoch, valid={"mae": mae})
        events.close()
        stopped = {"stopped": 2} if number == 2 else {}
        record = {"number": number, "values": {"model.layers": 1 + number % 2}, **stopped}
        run_folder.write_json(trial / "trial.json", record)
        run_folder.write_text(trial / "recipe.yaml", yaml.safe_dump(tiny(data, train={"test": False}).dump()))
        if number != 2:
            run_folder.write_json(trial / "result.json", {"valid": {"mae": min(values)}})
    return folder


def best(sweep: Path) -> Outcome:
    found = winner(read_outcomes(sweep / "trials", "mae"), "mae")
    assert found is not None
    return found


def ending(result: dict[str, Any] | None, seen: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the training of a winner to its end: that it is trained so is `test_sweep`'s."""

    def run(recipe: Recipe, folder: Path) -> dict[str, Any]:
        seen.append(recipe)
        if result is None:
            raise TrainingError("the loss is not finite")
        run_folder.write_json(folder / "result.json", result)
        return result

    monkeypatch.setattr(launch, "run", run)


def test_the_winner_is_judged_by_the_search_whatever_it_does_later(
    sweep: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(data)
    before = best(sweep)
    assert (before.number, before.status, before.best, before.epochs) == (2, STOPPED, 0.4, 2)
    choose(before, recipe, sweep, 3)
    assert chosen(sweep) == before.folder
    assert yaml.safe_load((sweep / "best.yaml").read_text())["model"]["layers"] == 1
    seen: list[Recipe] = []
    ending({"valid": {"mae": 0.01}, "test": {"mae": 0.3}}, seen, monkeypatch)
    own = for_trials(recipe, sweep).model_copy(update={"train": recipe.train})
    finish._to_its_end(own, before.folder)
    assert seen[0].train.test
    after = read_outcome(before.folder, "mae")
    assert (after.status, after.best, after.epochs) == (STOPPED, 0.4, 2), "not the third epoch, nor the end"
    finish._to_its_end(own, before.folder)
    assert len(seen) == 1, "a second call trains nothing"


def test_a_data_set_without_a_test_split_is_finished_once_too(
    sweep: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, trial = tiny(data), best(sweep).folder
    seen: list[Recipe] = []
    ending({"valid": {"mae": 0.4}}, seen, monkeypatch)
    for _ in range(3):
        finish._to_its_end(recipe, trial)
    assert len(seen) == 1


def test_a_kill_while_the_winner_is_finished_leaves_it_the_winner_and_the_test_split_unread(
    sweep: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = best(sweep)
    choose(first, tiny(data), sweep, 3)

    def killed(recipe: Recipe, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        finish._to_its_end(tiny(data), first.folder)
    assert reopened(sweep) == "" and chosen(sweep) is None
    assert not (sweep / "best.yaml").exists(), "which would name a winner that is not chosen"
    again = best(sweep)
    assert (again.number, again.status) == (2, STOPPED), "it is not under way: no trial of the search is tested"


def test_a_winner_that_was_tested_is_named_when_more_trials_are_asked_for(sweep: Path, data: Path) -> None:
    choose(best(sweep), tiny(data), sweep, 3)
    tested = sweep / "trials" / "trial-002" / "predictions"
    tested.mkdir()
    (tested / "test.npz").touch()
    assert reopened(sweep) == (
        "trial-002 was tested already; if another trial wins, the test split is read once more, by that one"
    )
    from tune.watch import spare_disk

    better = sweep / "trials" / "trial-003"
    events = run_folder.Events(better, 0)
    events.write("epoch", epoch=3, valid={"mae": 0.1})
    events.close()
    spare_disk(sweep / "trials", "mae")
    kept = {folder.name: sorted(p.name for p in folder.glob("[bc]*")) for folder in (sweep / "trials").iterdir()}
    assert kept == {"trial-001": [], "trial-002": ["best"], "trial-003": ["best", "checkpoints"]}


def test_a_winner_that_does_not_hold_fails_and_another_wins(
    sweep: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = best(sweep)
    choose(first, tiny(data), sweep, 3)
    ending(None, [], monkeypatch)
    with pytest.raises(DivergedError, match="trial 2 did not hold when it went on to its end: the loss is not finite"):
        finish._to_its_end(tiny(data), first.folder)
    assert read_outcome(first.folder, "mae").status == FAILED
    assert (best(sweep).number, best(sweep).status) == (3, DONE)


def test_seeds_are_of_one_winner(sweep: Path, data: Path) -> None:
    recipe = tiny(data)
    first = finish._others(recipe, sweep, 3, winner=2)
    assert finish._others(recipe, sweep, 3, winner=2) == first, "made once"
    other = finish._others(recipe, sweep, 2, winner=3)
    assert len(first) == 2 and not set(first) & set(other)
    seeds = [yaml.safe_load((run / "recipe.yaml").read_text())["seed"] for run in first]
    assert seeds == [recipe.seed + 1, recipe.seed + 2]


def test_damage_is_one_sentence(sweep: Path, data: Path) -> None:
    choose(best(sweep), tiny(data), sweep, 3)
    (sweep / "winner.json").write_text("{")
    with pytest.raises(DataError, match=r"winner.json: is damaged .* remove it, the sweep then chooses again"):
        chosen(sweep)
    run_folder.write_json(sweep / "winner.json", {"trial": 9, "folder": "trial-009"})
    with pytest.raises(DataError, match=r"names trial-009, which is not there"):
        chosen(sweep)
    (sweep / "trials" / "trial-001" / "trial.json").write_text("[]")
    with pytest.raises(DataError, match=r"trial-001: what is written of this trial is damaged"):
        read_outcomes(sweep / "trials", "mae")


# --- the command line of --resume and --export ------------------------------------------------------------------------


def test_where_nothing_can_be_exported_is_said_before_anything_runs(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "best.yaml", tmp_path, Path("/proc/1/best.yaml")):
        with pytest.raises(ConfigError, match=r"--export .*: cannot be written there; give a file in a folder"):
            exportable(str(path))
    assert exportable(str(tmp_path / "best.yaml")) == tmp_path / "best.yaml"


def test_a_sweep_is_found_by_its_folder_its_name_and_the_beginning_of_it(tmp_path: Path) -> None:
    for name in ("sweep-[x]-20260101", "other-20260101", "other-20260102"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").touch()
    there = (tmp_path / "sweep-[x]-20260101").resolve()
    for given in (str(there), "sweep-[x]-20260101", "sweep-[x]"):
        assert _named(given, tmp_path) == there
    with pytest.raises(ConfigError, match=r"--resume other: there are 2 in .*other-20260101, .*other-20260102"):
        _named("other", tmp_path)
    for given in ("", "*", "/nowhere/sweep", "../sweep"):
        with pytest.raises(ConfigError, match=r"there is no such sweep; in .*: .*other-20260101"):
            _named(given, tmp_path)


@pytest.mark.parametrize(
    "words",
    [["ufen_mtfn"], ["--seeds", "1"], ["--search", "tpe"], ["--stopping", "asha"], ["--epochs", "9"], ["--name", "x"]],
)
def test_what_a_sweep_was_asked_at_first_stays(words: list[str]) -> None:
    resume = ["--resume", "x"]
    with pytest.raises(ConfigError, match=rf"leave out {words[0]}.*--trials, --max-concurrent"):
        main([*words, *resume] if words[0] == "ufen_mtfn" else [*resume, *words])


def test_a_flag_that_says_no_fixes_its_key() -> None:
    assert _given_keys(["--model.no-use-gru", "--model.noise=1"]) == {"model.use_gru", "model.noise"}


def test_of_a_name_that_no_folder_can_have(data: Path, tmp_path: Path) -> None:
    for name in ("a/b", ".x", "", "n" * 300):
        with pytest.raises(ConfigError, match="cannot be a folder's name"):
            main(["ufen_mtfn", "--data", str(data), "--name", name, "--runs-dir", str(tmp_path / "runs")])
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
