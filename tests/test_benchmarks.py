"""The pages show what was measured: figures come from result files, and from nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as record_module
from benchmarks import render
from benchmarks.record import Row, portable, record

PAGE = "before\n<!-- real:begin -->\nold\n<!-- real:end -->\n<!-- figures:begin -->\n<!-- figures:end -->\nafter\n"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results."""
    monkeypatch.setattr(record_module, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    return tmp_path


def environment() -> dict[str, Any]:
    return {
        "command": "make real DATA=x",
        "commit": "abc1234",
        "changed_since_commit": False,
        "date": "2026-01-01 00:00 UTC",
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 24},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }


def test_nothing_measured_shows_nothing(results: Path) -> None:
    parts = ("real", "figures")
    page = render.rendered(PAGE, parts, render.load())
    assert page == PAGE.replace("\nold", "")
    assert render.rendered(page, parts, {}) == page


def test_a_figure_keeps_its_command_commit_and_bound(results: Path) -> None:
    rows = [
        Row("`--help` | quick", 0.1234, "s", "< 0.5 s", "median of 3", True),
        Row("a rate", 12345.6, "samples/s", headline=True),
        Row("a detail", 5.0),
        Row("a miss", 1.0, "", "> 2", "", False),
    ]
    path = record("startup", rows, raw={"help": [0.1, 0.2]}, command="python -m benchmarks.startup")
    content = json.loads(path.read_text())
    assert content["raw"] == {"help": [0.1, 0.2]} and content["versions"]["torch"] and content["machine"]["cores"] >= 1
    shown = render.sections(render.load())
    text = shown["figures"]
    source = "[startup](benchmarks/results/startup.json)"
    assert f"| `--help` \\| quick | 0.123 s | < 0.5 s | median of 3 | {source} |" in text
    assert "| a rate | 12,346 samples/s |" in text
    assert "| 1.00 | > 2 (**missed**) |" in text
    assert f"Commit {content['commit']}" in text and content["date"] in text
    assert "python -m benchmarks.startup" in text and "a detail" not in text
    assert "| a detail | 5.00 |" in shown["all"] and "| a rate | 12,346 samples/s |" in shown["all"]
    assert not list(results.glob("*.tmp"))


def test_results_are_mean_and_deviation_over_seeds_beside_reference_points(results: Path) -> None:
    test = [{"mae": 0.7, "corr": 0.8, "acc2_has0": 0.8}, {"mae": 0.8, "corr": None, "acc2_has0": 0.82}]
    run = {"system": "self_mm", "command": "mmsa-dist train self_mm", "seeds": [1, 2], "test": test}
    split = {"name": "official", "title": "MOSI, official split", "runs": [run]}
    (results / "real.json").write_text(json.dumps({"name": "real", **environment(), "splits": [split]}))
    text = render.sections(render.load())["real"]
    # deviations by hand: of 0.7 and 0.8, 0.1 / sqrt(2); of 80 % and 82 %, 2 / sqrt(2)
    assert "| **self_mm** (2 seeds) | 0.750 ± 0.071 | 0.800 | 81.0 ± 1.4% |" in text
    assert "| *TF-IDF + linear model, text* | 1.191 | 0.516 | 68.7% |" in text
    assert "selected on validation" in text and "mmsa-dist train self_mm" in text


@pytest.mark.parametrize("page", ["", PAGE.replace("<!-- real:end -->", ""), PAGE + "<!-- real:begin -->"])
def test_a_page_without_its_marks_is_an_error(page: str) -> None:
    with pytest.raises(SystemExit, match=r"<!-- real:begin --> and <!-- real:end --> once each"):
        render.replaced(page, "real", "new")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.04567, "0.0457"), (1.0, "1.00"), (12.34, "12.3"), (1234.5, "1,234"), (1284000.0, "1,284,000")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert render.significant(value) == text


def test_commands_name_no_folder_of_this_machine() -> None:
    inside = record_module.ROOT / "benchmarks" / "peer.py"
    assert [portable(word) for word in ("--data", "../shared/data", str(inside), "/somewhere/else/file.pkl")] == [
        "--data",
        "../shared/data",
        "benchmarks/peer.py",
        ".../file.pkl",
    ]
