"""The Grafana dashboard asks for metrics that are exported, by labels that they have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.exported import METRICS

FILE = Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "mmsa-dist.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
PREFIX = "ray_"
"""Ray puts it before every name."""
ASKED = [
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
    *(each["definition"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"),
]
"""Every query of the dashboard."""


def names(query: str) -> set[str]:
    """Metrics that a query of PromQL names."""
    return {name.removeprefix(PREFIX) for name in re.findall(r"\bray_\w+", query)}


@pytest.mark.parametrize("query", ASKED)
def test_it_asks_for_what_is_exported(query: str) -> None:
    asked = names(query)
    assert asked and asked <= METRICS.keys()
    labels = set.intersection(*(set(METRICS[name].labels) for name in asked))
    groups = re.findall(r"(?:by|on|ignoring) \(([^)]*)\)|\{(\w+)=~|, (\w+)\)$", query)
    used = {label for group in groups for part in group for label in re.findall(r"\w+", part)}
    assert used <= labels, f"{used - labels} of {asked}"
    assert all(query.count(a) == query.count(b) for a, b in ("()", "{}", "[]"))


def test_it_shows_all_that_is_exported() -> None:
    assert set().union(*map(names, ASKED)) == METRICS.keys()


def test_legends_are_labels_that_the_query_keeps() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            kept = set(re.findall(r"\w+", re.findall(r"by \(([^)]*)\)", target["expr"])[0]))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_its_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", METRICS)
def test_names_follow_the_practice_of_prometheus(name: str) -> None:
    """Base units, ratios from 0 to 1; a counter, and nothing else, ends with _total."""
    assert re.fullmatch(r"mmsa_dist_[a-z_]+", name)
    assert METRICS[name].counter == name.endswith("_total")
    assert not re.search(r"percent|millis|minutes|hours", name)
