"""Every second of a run is booked under one name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsa_dist import run_folder
from mmsa_dist.ledger import NAMES, Ledger, account


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.sampled_from([*NAMES, "end", "read"]), st.floats(0.0, 50.0)), max_size=60))
def test_all_time_is_booked_whatever_is_nested_in_what(moves: list[tuple[str, float]]) -> None:
    clock = Clock()
    ledger = Ledger(clock)
    inside: list[Any] = []
    for name, seconds in moves:
        if name == "end":
            if inside:
                inside.pop().__exit__(None, None, None)
        elif name == "read":
            ledger.booked()
        else:
            inside.append(ledger.under(name))
            inside[-1].__enter__()
        clock.now += seconds
    assert sum(ledger.booked().values()) == pytest.approx(clock.now - 1000.0, abs=1e-2)


def test_what_is_inside_counts_there_only() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    clock.now += 5

    def items() -> Iterator[int]:
        for n in range(2):
            clock.now += 3
            yield n

    with ledger.under("other"):
        for _ in ledger.waiting(items()):
            with ledger.under("step"):
                clock.now += 10
            clock.now += 1
    assert ledger.booked() == {"start": 5, "other": 2, "data": 6, "step": 20}


# --- the account of a run ---------------------------------------------------------------------------------------------


def written(folder: Path, driver: list[dict[str, Any]], rank: list[dict[str, Any]]) -> Path:
    (folder / "events").mkdir()
    for name, events in (("driver", driver), ("rank-0", rank)):
        (folder / "events" / f"{name}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def event(name: str, time: float, **values: Any) -> dict[str, Any]:
    return {"event": name, "time": time, **values}


FIRST = [
    event("start", 104.0, booked={"start": 1.0}),  # its process was there at 103
    # it was taken at 130, and written by 132
    event(
        "saved",
        132.0,
        booked={"start": 6.0, "step": 17.0, "data": 1.0, "checkpoint": 5.0},
        kept={"start": 6.0, "step": 15.0, "data": 1.0, "checkpoint": 5.0},
    ),
    event("warning", 131.0, message="of another writer"),
    event("step", 140.0, booked={"start": 6.0, "step": 24.0, "data": 2.0, "checkpoint": 5.0}),
]
SECOND = [
    event("start", 152.0, booked={"start": 1.0}),
    event("step", 160.0, booked={"start": 7.0, "step": 2.0}),
    event("end", 170.0, booked={"start": 7.0, "step": 8.0, "evaluation": 4.0}),
]


def test_an_undisturbed_run(tmp_path: Path) -> None:
    folder = written(tmp_path, [event("attempt", 149.0, resumed=True), event("attempt_end", 172.0)], SECOND)
    spent = account(folder)
    assert spent.seconds == {"start": 2 + 7.0, "step": 8.0, "evaluation": 4.0, "other": 2.0}
    assert (spent.wall, spent.restarts) == (23.0, 0)
    assert spent.goodput == 12 / 23


def test_a_restart_and_what_it_lost(tmp_path: Path) -> None:
    driver = [
        event("attempt", 100.0, resumed=True),
        event("attempt_end", 143.0),
        event("attempt", 149.0, resumed=False),
        event("attempt_end", 172.0),
    ]
    spent = account(written(tmp_path, driver, FIRST + SECOND))
    assert spent.seconds == {
        "start": 3 + 6.0,
        "data": 1.0,
        "step": 15.0 + 8.0,
        "evaluation": 4.0,
        "checkpoint": 5.0,
        "other": 2.0,
        "restart": 6.0 + 2 + 7.0,
        "lost": 9.0 + 1.0 + 3.0,  # steps, waiting, and until the driver saw it
    }
    assert sum(spent.seconds.values()) == spent.wall == 72.0
    assert spent.restarts == 1
    assert "72 s (1 restart)" in str(spent) and "lost 18.1 %" in str(spent)


def test_time_when_no_driver_ran_is_nobodys(tmp_path: Path) -> None:
    """A driver that was killed: its last attempt ends with the last sign of its rank."""
    driver = [
        event("attempt", 100.0, resumed=True),
        event("attempt", 149.0, resumed=True),
        event("attempt_end", 172.0),
    ]
    spent = account(written(tmp_path, driver, FIRST + SECOND))
    assert spent.wall == 40.0 + 23.0 == sum(spent.seconds.values())
    assert spent.seconds["lost"] == 10.0 and spent.seconds["restart"] == 9.0


def test_ranks_that_never_came_up(tmp_path: Path) -> None:
    spent = account(written(tmp_path, [event("attempt", 1.0, resumed=True), event("attempt_end", 4.0)], []))
    assert spent.seconds == {"start": 3.0} and spent.goodput == spent.stall == 0.0


def test_a_run_of_before_has_no_account(tmp_path: Path) -> None:
    spent = account(written(tmp_path, [], [event("start", 1.0), event("end", 2.0)]))
    assert spent.wall == 0 and not spent.seconds


def test_events_carry_what_was_booked(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    clock = Clock()
    events = run_folder.Events(tmp_path, 0, Ledger(clock).booked)
    clock.now += 2
    events.write("start")
    events.close()
    assert run_folder.read_events(tmp_path)[0]["booked"] == {"start": 2.0}
