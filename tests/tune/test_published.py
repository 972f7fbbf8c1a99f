"""The papers' tables: what is packaged fits its recipes, and a wrong file is one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import flatten, load_recipe
from mmsa_dist.systems import get_system
from mmsa_dist.systems_cli import switches
from tune.papers.page import as_published, figure
from tune.papers.published import DATA, PACKAGED, Paper, Row, load, packaged, paper_of, papers
from tune.space import with_values

TRAINED = [
    pytest.param(row, data, id=f"{paper.system} {number} {name} {data}")
    for paper in papers()
    for number, table in paper.tables.items()
    for name, row in table.trains.items()
    for data in table.data
]


# --- what is packaged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "data"), TRAINED)
def test_every_row_is_a_recipe_that_its_system_takes(row: Row, data: str) -> None:
    assert row.system is not None
    usual = load_recipe(row.system, data, [])
    assert row.set.keys() <= flatten(usual).keys()
    made = with_values(usual, row.set)
    assert {key: flatten(made)[key] for key in row.set} == row.set


def test_every_ablation_row_is_trained() -> None:
    for system, number in (("tam_ulag", "6"), ("tam_ulag", "7"), ("iam", "5"), ("iam", "6")):
        table = paper_of(system).table(number)
        assert table.trains.keys() == table.rows.keys()
        whole = [name for name, row in table.rows.items() if not row.set]
        assert whole == [table.own] or number == "7"
        made = [row.model_dump_json(include={"set"}) for row in table.rows.values()]
        assert len(set(made)) == len(made), "no two rows are the same"


def test_every_switch_of_a_system_stands_in_the_table_that_it_names() -> None:
    for paper in papers():
        for switch in switches(get_system(paper.system).Config):
            key = switch.flag.split()[0].removeprefix("--").replace("model.no-", "model.").replace("-", "_")
            for number in switch.table.split(", ") if switch.table != "-" else ():
                assert any(key in row.set for row in paper.table(number).rows.values()), (paper.system, number, key)


def test_rows_without_a_system_of_ours_are_few_and_known() -> None:
    names = {"MulT": "mult", "SUGRM": "sugrm", "Self-MM": "self_mm", "TAM-ULAG": "tam_ulag", "IAM": "iam"}
    names |= {"PMR": "pmr", "UFEN-MTFN": "ufen_mtfn"}
    for paper in papers():
        for number, table in paper.tables.items():
            for name, row in table.rows.items():
                if name in names and not table.instead:
                    assert row.system == names[name], (paper.system, number, name)


def test_figures_are_the_papers() -> None:
    tam = paper_of("tam_ulag")
    assert tam.table("3").rows["TAM-ULAG"].paper == {
        "mae": 0.695,
        "corr": 0.816,
        "acc7": 48.94,
        "acc2": 87.2,
        "f1": 87.12,
    }
    assert tam.table("6").rows["w/o ULAG"].paper["mae"] == 0.719
    assert tam.table("6").rows["w/o ULAG"].set == {"labels.generator": "multimodal"}
    assert tam.table("8").rows["TAM-ULAG"].paper["parameters"] == 109_694_858
    assert paper_of("iam").table("5").rows["uni+weight"].paper["f1_non0"] == 84.41
    assert "69.80" in str(paper_of("iam").table("3").rows["TFN"].note)
    iemocap = paper_of("pmr").table("iemocap_unaligned").rows["PMR"]
    assert (iemocap.paper["f1_neutral"], iemocap.other["f1_neutral"]) == (60.9, 46.9)
    assert paper_of("ufen_mtfn").table("3").rows["MISA"].paper["mae"] == -0.055


def test_a_figure_of_no_stated_convention_stands_in_both_columns_marked() -> None:
    figures = {"acc2": 87.2, "f1_non0": 85.0, "mae": 0.7}
    assert [figure(figures, c) for c in ("acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr")] == [
        "87.20?", "87.20?", "-", "85.00", "0.700", "-",
    ]  # fmt: skip


@pytest.mark.parametrize("paper", list(papers()), ids=lambda paper: paper.system)
def test_every_table_can_be_shown_as_published(paper: Paper) -> None:
    for number, table in paper.tables.items():
        shown = as_published(paper, number)
        assert {row[0] for row in shown.grids[0].rows if row[0]} == table.rows.keys()
        assert all(len(row) == len(shown.grids[0].header) for row in shown.grids[0].rows)
        assert any(DATA[data] in shown.title for data in table.data)


# --- bad input --------------------------------------------------------------------------------------------------------

ROW: dict[str, Any] = {"system": "iam", "paper": {"mae": 0.7, "acc7": 40.0}}
TABLE: dict[str, Any] = {"title": "t", "data": ["mosi"], "own": "A", "rows": {"A": ROW}}
GOOD: dict[str, Any] = {"system": "iam", "paper": "We", "conventions": "ours", "tables": {"1": TABLE}}

BAD = {
    "unknown key": ("titel", "t", r"`tables.1.titel`; did you mean 'title'"),
    "unknown metric": ("rows.A.paper.acc9", 1, r"row 'A': unknown metric 'acc9'; did you mean 'acc7'"),
    "metric of other data": ("data", ["sims"], r"unknown metric 'acc7'"),
    "no such own row": ("own", "B", r"own: 'B' is not a row that names a system"),
    "own of an untrained row": ("rows.A.system", None, r"own: 'A' is not a row that names a system"),
    "set without system": ("rows.B", {"set": {"model.bi": False}}, r"set, but no system"),
    "unknown data": ("data", ["mosie"], r"tables.1.data.0`: input should be 'mosi'"),
    "figure is a word": ("rows.A.paper.mae", "low", r"mae`: input should be a valid number"),
    "no row": ("rows", {}, r"tables.1.rows`: dictionary should have at least 1 item"),
    "a second source without name": ("rows.A.other", {"mae": 1}, r"other: name the second source"),
    "instead of nothing": ("own", None, r"instead stands where nothing is trained"),
    "instead of something trained": (
        "",
        {**TABLE, "own": None, "instead": "x"},
        r"instead, but row 'A' names a system",
    ),
}
"""What is set within the table, and what is said of it."""


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    path, value, message = BAD[case]
    tree = yaml.safe_load(yaml.safe_dump(GOOD))
    *branches, leaf = ["tables", "1", *filter(None, path.split("."))]
    node = tree
    for branch in branches:
        node = node[branch]
    node[leaf] = value
    (tmp_path / "we.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message) as refused:
        load(tmp_path / "we.yaml")
    assert "\n" not in str(refused.value) and str(tmp_path / "we.yaml") in str(refused.value)


def test_a_good_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "we.yaml").write_text(yaml.safe_dump(GOOD))
    assert load(tmp_path / "we.yaml").table("1").own == "A"


def test_no_such_file_paper_or_table_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    (tmp_path / "no.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=r"no published tables of 'iamm'; did you mean 'iam'"):
        paper_of("iamm")
    with pytest.raises(ConfigError, match=r"no tables of mult's own paper are here; it has rows in those of iam, pmr"):
        paper_of("mult")
    with pytest.raises(ConfigError, match=r"--table 12: Zhou and Li has none.*\(valid: 3, 4, 5, 6\)"):
        paper_of("iam").table("12")
    with pytest.raises(ConfigError, match=r"--table 99: .* has none \(valid: 3, 4, 5, 7, 8, 9, 10\)"):
        paper_of("ufen_mtfn").table("99")


def test_files_are_named_by_their_system() -> None:
    assert [load(PACKAGED / f"{name}.yaml").system for name in packaged()] == packaged()
