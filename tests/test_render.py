"""The pages show what was measured, from result files and from nowhere else."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import real, render
from benchmarks import record as record_module
from benchmarks.record import Row, Table, portable, record
from mmsa_dist.labels_shown import Change

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
    assert "labels generated" not in text


def test_generated_labels_are_counted_over_seeds(results: Path) -> None:
    def change(modality: str, samples: int, moved: int, turned: int, distance: float | None) -> dict[str, Any]:
        return asdict(Change(modality, samples, moved, turned, distance))

    made = [
        [change("text", 100, 10, 1, 0.25), change("vision", 0, 0, 0, None)],
        [change("text", 300, 50, 2, 0.05), change("vision", 0, 0, 0, None)],
    ]
    run = {"system": "self_mm", "command": "x", "seeds": [1, 2], "test": [{"mae": 0.7}] * 2, "generated": made}
    split = {"name": "official", "title": "MOSI, official split", "runs": [run]}
    (results / "real.json").write_text(json.dumps({"name": "real", **environment(), "splits": [split]}))
    text = render.sections(render.load())["real"]
    # by hand: 60 of 400, 3 of 400, (100 * 0.25 + 300 * 0.05) / 400
    assert "| self_mm | text | 15.0% | 0.8% | 0.100 |" in text
    assert "vision" not in text.partition("labels generated")[2].partition("</details>")[0]


def test_what_was_reproduced_stands_beside_the_papers(results: Path) -> None:
    """The mean over seeds, then the paper's figure, marked where its convention is open; none where it printed
    differences."""

    def page(paper: str, differences: bool) -> dict[str, Any]:
        tests = {"1": {"mae": 0.8, "acc2_has0": 0.82, "f1_has0": 0.84}, "2": {"mae": 0.7, "acc2_has0": 0.8}}
        rows = {"OURS": {"paper": {"mae": 0.741, "acc2": 84.1, "f1_has0": 80.0}, "test": tests}}
        grids = [{"title": "", "header": ["row", "", "MAE"], "rows": [["OURS", "ours, 2 seeds", "0.750 ± 0.071"]]}]
        told = {"title": f"{paper}, table 3", "command": f"mmsa-dist reproduce {paper}", "told": ["The paper: ..."]}
        return {
            "paper": paper, "table": "3", "differences": differences, **told, "notes": ["n1"], "grids": grids,
            "rows": rows,
        }  # fmt: skip

    content = {"name": "reproduced", **environment(), "pages": [page("iam", False), page("ufen_mtfn", True)]}
    record_module.write("reproduced", content)
    parts = render.sections(render.load())
    head = "| iam, 3 | **OURS** (2 seeds) | 0.750 ± 0.071 (0.741) |"
    assert f"{head}  |  | 81.0 ± 1.4% (84.1%?) |  | 84.0% (80.0%) |  |" in parts["reproduced"]
    assert "| ufen_mtfn, 3 | **OURS** (2 seeds) | 0.750 ± 0.071 |" in parts["reproduced"]
    for words in (
        "### iam, table 3",
        "mmsa-dist reproduce ufen_mtfn",
        "| OURS | ours, 2 seeds | 0.750 ± 0.071 |",
        "- n1",
    ):
        assert words in parts["tables"]


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


def test_systems_measured_another_day_stay_in_the_table(results: Path) -> None:
    def measured(system: str, mae: float) -> dict[str, Any]:
        return {"system": system, "command": f"mmsa-dist train {system}", "seeds": [1], "test": [{"mae": mae}]}

    for split, system, mae in (("official", "self_mm", 0.7), ("poria", "self_mm", 0.9), ("official", "iam", 0.6)):
        real.keep(split, measured(system, mae))
    real.keep("official", measured("self_mm", 0.8))
    splits = json.loads((results / "real.json").read_text())["splits"]
    found = [(split["name"], run["system"], run["test"][0]["mae"]) for split in splits for run in split["runs"]]
    assert found == [("official", "iam", 0.6), ("official", "self_mm", 0.8), ("poria", "self_mm", 0.9)]
    shown = render.sections(render.load())["real"]
    assert re.search(r"^mmsa-dist train iam  # commit \w+(?: with changes)?, \d{4}-\d\d-\d\d", shown, re.MULTILINE)


def test_commands_name_no_folder_of_this_machine() -> None:
    inside = record_module.ROOT / "benchmarks" / "peer.py"
    assert [portable(word) for word in ("--data", "../shared/data", str(inside), "/somewhere/else/file.pkl")] == [
        "--data",
        "../shared/data",
        "benchmarks/peer.py",
        ".../file.pkl",
    ]


def test_tables_stand_below_the_rows(results: Path) -> None:
    record("data", [Row("a rate", 2.0)], tables=[Table("Side by side.", ["", "0"], [["ours", "9,000"]])])
    text = render.sections(render.load())["all"]
    assert "| a rate | 2.00 |  |  |\n\nSide by side.\n\n|  | 0 |\n|---|---|\n| ours | 9,000 |" in text
