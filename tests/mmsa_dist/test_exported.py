"""What a rank tells Prometheus, of what it notes itself; `tests/end_to_end/test_seeing.py` sees that it arrives."""

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist import exported, run_folder
from mmsa_dist.exported import METRICS, Before, Exporter, Rank, Shares
from mmsa_dist.ledger import Ledger, account, earlier
from shards.plan import share
from tests.mmsa_dist.test_ledger import Clock, event

PLAN = {"train_samples": 95, "global_batch": 10, "accumulation": 1, "steps_per_epoch": 10, "epochs": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "events").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    return tmp_path


def told(rank: Rank) -> dict[str, float]:
    """What a look gives, by name and activity."""
    return {f"{name} {labels.get('activity', '')}".strip(): value for name, labels, value in rank.look()}


def test_a_rank_tells_its_rate_its_waiting_and_where_its_time_went(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    ledger = Ledger(clock)
    monkeypatch.setattr(exported.time, "monotonic", clock)
    events = run_folder.Events(folder, 1, ledger.booked)
    rank = Rank(folder, 1, 2, events, ledger)
    clock.now += 5
    assert told(rank) == {"mmsa_dist_activity_seconds_total start": 5.0}
    for step in (1, 5):
        with ledger.under("data"):
            clock.now += 1
        with ledger.under("step"):
            clock.now += 3
        events.step(1, step, 10, 0.5)
        seen = told(rank)
    assert seen["mmsa_dist_samples_per_second"] == 4 * 5 / 4, "half of ten samples a step, four steps in four seconds"
    assert seen["mmsa_dist_data_stall_ratio"] == 0.25
    assert seen["mmsa_dist_activity_seconds_total step"] == 3.0, "what came since the last look"
    assert not {name for name in seen if "goodput" in name or "checkpoint" in name}, "rank 0 tells of the run"


def test_rank_0_tells_of_the_run(folder: Path) -> None:
    ledger = Ledger()
    events = run_folder.Events(folder, 0, ledger.booked)
    rank = Rank(folder, 0, 1, events, ledger, began=time.time() - 100)
    first = told(rank)
    assert first["mmsa_dist_restarts_total"] == 0 and first["mmsa_dist_goodput_ratio"] == 0
    assert first["mmsa_dist_checkpoint_age_seconds"] == pytest.approx(100, abs=5), "none was taken: all is at stake"
    events.step(2, 3, 10, 0.5)
    events.write("saved", step=13, blocked=0.1, seconds=2.0, kept={})
    seen = told(rank)
    assert (seen["mmsa_dist_epoch"], seen["mmsa_dist_step"]) == (2, 13)
    assert seen["mmsa_dist_checkpoint_age_seconds"] == pytest.approx(2, abs=5), "of when it was taken"
    assert "mmsa_dist_restarts_total" not in seen, "a counter is told what came since"


def test_a_rank_that_stands_still_is_seen_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(exported.time, "monotonic", clock)
    events = run_folder.Events(folder, 1)
    rank = Rank(folder, 1, 2, events, Ledger(clock))
    events.step(1, 9, 10, 0.5)
    for _ in range(60):
        clock.now += 1
        seen = told(rank)
    assert seen["mmsa_dist_samples_per_second"] == 0
    assert len(rank.seen) <= exported.WINDOW + 2, "what is kept does not grow"


def test_every_label_that_is_told_is_one_that_the_metric_has(folder: Path) -> None:
    ledger = Ledger()
    events = run_folder.Events(folder, 0, ledger.booked)
    events.step(1, 1, 10, 0.5)
    rank = Rank(folder, 0, 1, events, ledger, seen=deque([(0.0, 0.0, 0.0, -1.0)]))
    looked = list(rank.look())
    assert {name for name, _, _ in looked} == METRICS.keys() - {"mmsa_dist_trials"}
    for name, labels, _ in looked:
        assert {"run", "sweep", "rank", *labels} >= set(METRICS[name].labels)


@pytest.mark.parametrize("world, accumulation", [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3)])
def test_shares_are_those_of_the_plan(folder: Path, world: int, accumulation: int) -> None:
    """Of whole steps exactly, of all ranks together exactly."""
    import numpy as np

    (folder / "plan.json").write_text(json.dumps(PLAN | {"accumulation": accumulation}))
    shares = [Shares.of(folder, rank, world) for rank in range(world)]
    for rank, own in enumerate(shares):
        real = sum(float(piece.weight.sum()) for piece in share(np.arange(10), rank, world, accumulation))
        assert own.until(1, 1) == pytest.approx(real)
    assert sum(own.until(3, 10) for own in shares) == pytest.approx(3 * 95)


# --- what was before --------------------------------------------------------------------------------------------------


def restarted(folder: Path, *, resumed: bool) -> float:
    """A run whose first attempt took 50 s and kept 20 s of steps; the second one began 4 s later. Gives when."""
    past = [
        event("start", 1001.0, booked={"start": 1.0}),
        event("saved", 1031.0, step=9, seconds=1.0, kept={"start": 5.0, "step": 20.0}, booked={"step": 21.0}),
        event("step", 1049.0, booked={"start": 5.0, "step": 39.0}),
    ]
    driver = [
        event("attempt", 1000.0, resumed=False),
        event("attempt_end", 1050.0),
        event("attempt", 1054.0, resumed=resumed),
    ]
    for name, events in (("rank-0", past), ("driver", driver)):
        text = "".join(json.dumps(each) + "\n" for each in events)
        (folder / "events" / f"{name}.jsonl").write_text(text)
    return 1054.0


@pytest.mark.parametrize("resumed, since", [(False, 1050.0), (True, 1054.0)])
def test_what_was_before_counts(folder: Path, resumed: bool, since: float) -> None:
    """The time between two attempts is the run's where its driver saw it, and nobody's where somebody resumed it."""
    restarted(folder, resumed=resumed)
    before = Before.of(folder, 1060.0)
    assert before == Before(wall=50.0, useful=20.0, restarts=1, since=since, saved=1030.0)


def test_the_account_of_the_past_and_of_all_agree(folder: Path) -> None:
    begun = restarted(folder, resumed=False)
    with run_folder.events_file(folder, 0).open("a") as file:
        file.write(json.dumps(event("end", begun + 20, booked={"start": 2.0, "step": 18.0})) + "\n")
    with run_folder.events_file(folder, None).open("a") as file:
        file.write(json.dumps(event("attempt_end", begun + 20)) + "\n")
    past, since = earlier(folder)
    assert since is not None
    whole = account(folder)
    assert whole.wall == past.wall + begun + 20 - since
    assert whole.goodput == pytest.approx((past.seconds["step"] + 18) / whole.wall)
    assert whole.restarts == past.restarts


# --- the ledger, from another thread ----------------------------------------------------------------------------------


def test_a_look_at_the_ledger_books_nothing() -> None:
    clock = Clock()
    watched: list[str] = []
    ledger = Ledger(clock, watched.append)
    with ledger.under("step"):
        clock.now += 2
        assert ledger.seen() == {"start": 0.0, "step": 2.0}
        clock.now += 1
    assert watched == ["start", "step"], "only what books is a sign of life"
    assert ledger.booked()["step"] == 3


def test_trouble_with_the_export_ends_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported, "EVERY", 0.01)

    def broken() -> Any:
        raise OSError("the disk")
        yield

    with Exporter(broken) as exporter:
        exporter._thread.join(10)
        assert not exporter._thread.is_alive()
    assert "no more metrics are exported: OSError: the disk" in caplog.text
