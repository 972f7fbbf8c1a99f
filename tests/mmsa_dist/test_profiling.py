"""A trace of a few steps, which changes nothing of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import profiling
from mmsa_dist.profiling import WARM_UP
from mmsa_dist.recipe import differences, load_recipe
from mmsa_dist.run_folder import Events, read_events
from tests.data import packed
from tests.mmsa_dist.test_laws import recipe_for, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("profiled"), samples=108)


def warnings(run: Path) -> list[str]:
    return [event["message"] for event in read_events(run) if event["event"] == "warning"]


@pytest.mark.parametrize("stage", [0, 3])
def test_so_many_steps_of_each_rank_are_traced_and_nothing_else_changes(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, stage: int
) -> None:
    """Over the end of an epoch, which has six steps; dropout is on."""
    runs = {}
    for steps in (0, 5):
        recipe = recipe_for(
            "self_mm", data, engine={"zero": stage}, train={"profile": steps}, model={"post_text_dropout": 0.3}
        )
        runs[steps] = ranks(train, 2, tmp_path / str(steps), recipe.dump())
    for plain, traced in zip(runs[0], runs[5], strict=True):
        assert plain["losses"] == traced["losses"] and len(plain["losses"]) == 12
        assert plain["result"] == traced["result"]
    assert not (tmp_path / "0" / "profile").exists() and profiling.shown(tmp_path / "0") is None
    for rank in range(2):
        trace = json.loads((tmp_path / "5" / "profile" / f"rank-{rank}.json").read_text())["traceEvents"]
        names = [event["name"] for event in trace if event.get("ph") == "X"]
        assert sorted({name for name in names if name.startswith("ProfilerStep")}) == [
            f"ProfilerStep#{WARM_UP + n}" for n in range(5)
        ]
        assert any(name.startswith("aten::") for name in names)
        assert any("Backward" in name for name in names)
    said = profiling.shown(tmp_path / "5")
    assert said is not None and len(said.splitlines()) == 1 + profiling.SHOWN + 1
    first = json.loads((tmp_path / "5" / "profile" / "rank-0.json").read_text())["traceEvents"]
    known = {event["name"][:50].rstrip() for event in first} | {"(none: Python, waiting)"}
    listed = {line[:50].rstrip() for line in said.splitlines()[1 : 1 + profiling.SHOWN]}
    assert listed <= known and len(listed) == profiling.SHOWN, "which are the slowest is the machine's affair"
    assert "ui.perfetto.dev" in said and str(tmp_path / "5" / "profile") in said
    assert warnings(tmp_path / "5") == []


def test_a_run_that_is_too_short_says_so(ranks: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    short = recipe_for("self_mm", data, train={"profile": 50, "epochs": 1})
    assert len(ranks(train, 1, tmp_path / "short", short.dump())[0]["losses"]) == 6
    (said,) = warnings(tmp_path / "short")
    assert said.startswith("train.profile: 3 of 50 steps were traced: training ended after 6")
    assert json.loads((tmp_path / "short" / "profile" / "rank-0.json").read_text())["traceEvents"]


def traced(folder: Path) -> None:
    """One step is, by a rank alone."""
    (folder / "events").mkdir()
    events = Events(folder, 0)
    with profiling.profiled(folder, 0, 1, events) as profile:
        for _ in range(WARM_UP + 2):
            profile.step()
    events.close()


def test_a_large_trace_says_what_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "LARGE", 1)
    traced(tmp_path)
    (said,) = warnings(tmp_path)
    assert "the trace takes" in said and "trace fewer steps (--profile N)" in said
    (event,) = (event for event in read_events(tmp_path) if event["event"] == "profile")
    assert event["bytes"] == (tmp_path / "profile" / "rank-0.json").stat().st_size
    shown = profiling.shown(tmp_path)
    assert shown is not None and f"MB; training stood still for {event['seconds']:.1f} s)" in shown


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    traced(tmp_path)
    (said,) = warnings(tmp_path)
    assert "rank-0.json: the trace cannot be written" in said


def test_a_short_flag_and_resumable() -> None:
    plain, profiled = (load_recipe("self_mm", None, words) for words in ([], ["--profile", "4"]))
    assert profiled.train.profile == 4 and differences(plain, profiled) == []
