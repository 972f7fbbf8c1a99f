"""What trials are compared by: the Pareto front against its definition, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsa_dist.errors import ConfigError
from tune.objectives import check, front, values
from tune.outcome import DONE, FAILED, STOPPED, Outcome

KNOWN = ["mae", "corr", "acc7"]


def outcome(number: int, mae: float | None, corr: float | None, size: int | None, status: str = DONE) -> Outcome:
    metrics = {"mae": mae, "corr": corr}
    return Outcome(Path(f"trial-{number}"), number, {}, status, mae, 1, 1, None, metrics, size)


trials = st.lists(
    st.tuples(
        st.integers(0, 4) | st.none(),
        st.integers(-2, 2),
        st.integers(1, 4),
        st.sampled_from([DONE, STOPPED, FAILED]),
    ),
    max_size=12,
)


@given(trials)
def test_the_front_is_what_no_other_trial_dominates(drawn: list[tuple[int | None, int, int, str]]) -> None:
    outcomes = [outcome(i, mae, corr, size, status) for i, (mae, corr, size, status) in enumerate(drawn)]
    held = [each for each in outcomes if each.status != FAILED and each.best is not None]

    def dominates(one: Outcome, other: Outcome) -> bool:
        """At least as good in all, better in one: MAE and size down, correlation up."""
        a, b = one.metrics, other.metrics
        at_least = a["mae"] <= b["mae"] and a["corr"] >= b["corr"] and one.parameters <= other.parameters  # type: ignore[operator]
        better = a["mae"] < b["mae"] or a["corr"] > b["corr"] or one.parameters < other.parameters  # type: ignore[operator]
        return at_least and better

    expected = [each.number for each in held if not any(dominates(other, each) for other in held)]
    assert [each.number for each in front(outcomes, ["mae", "corr", "parameters"])] == expected


def test_what_is_not_known_is_no_value() -> None:
    assert values(outcome(1, 0.5, None, 3), ["mae", "parameters"]) == [0.5, 3.0]
    assert values(outcome(1, 0.5, None, 3), ["mae", "corr"]) is None
    assert values(outcome(1, 0.5, float("nan"), 3), ["corr"]) is None
    assert values(outcome(1, 0.5, 1.0, None), ["parameters"]) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["mae", "parametres"],
            r"unknown 'parametres'; did you mean 'parameters'\? \(valid: acc7, corr, mae, parameters\)",
        ),
        (["mae", "mae"], r"--objectives mae mae: one of them is there twice"),
        (["parameters", "mae"], r"trials keep their best epoch by mae, so the first must be mae"),
        (["corr"], r"or give --train.monitor corr"),
    ],
)
def test_objectives_that_cannot_be_are_refused(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(given, "mae", KNOWN)
    check(["mae", "corr", "parameters"], "mae", KNOWN)
