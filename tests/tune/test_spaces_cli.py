"""`mmsa-dist spaces`: the list, one system's space beside its recipes, and a space of one's own."""

import re
from pathlib import Path

import pytest
import yaml

from mmsa_dist.__main__ import main
from mmsa_dist.recipe import flatten, load_recipe, packaged
from shards.progress import console
from tests.mmsa_dist.test_registry import third_party as third_party  # a fixture
from tune.space import PACKAGED, Knob, Space
from tune.spaces_cli import own_value, range_text

SYSTEMS = sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def page(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The rows of what `mmsa-dist spaces` prints, by cell."""
    assert main(["spaces", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def own(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return str(path)


# --- the list ---------------------------------------------------------------------------------------------------------


def test_every_space_is_listed_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row[0]: row[1:] for row in page(capsys) if row[0]}
    assert list(rows) == SYSTEMS
    assert rows["mult"][:3] == ["17", "20", "mult.yaml"] and "ACL 2019" in rows["mult"][3]
    for system in SYSTEMS:
        space = Space.load(system)
        assert rows[system][:2] == [str(len(space.knobs)), str(len(space.keys))]


# --- one space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_key_is_shown_under_its_heading(system: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [row[0] for row in page(capsys, system) if row[0]]
    tree = yaml.safe_load((PACKAGED / f"{system}.yaml").read_text())
    del tree["system"]
    wanted: list[str] = []
    for heading, entries in tree.items():
        wanted += [heading, *(key for name in entries for key in name.split(", "))]
    assert shown == wanted


def test_the_recipes_stand_beside_the_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spaces", "mult"]) == 0
    said = capsys.readouterr()
    assert re.search(r"┃ key +┃ range +┃ mosi +┃ iemocap +┃ mosei +┃ sims +┃ source +┃", said.out)
    assert "Search space of MulT: the values that MMSA draws from" in said.out, "what the file says of itself"
    assert "17 values for 20 keys, from " in said.err and "*: not the value for mosi" in said.err
    assert "outside" not in said.err
    rows = {row[0]: row[1:] for row in page(capsys, "mult")}
    assert rows["data.batch_size"][:5] == ["16 | 32 | 64 | 128", "128", "32 *", "32 *", "128"]
    assert rows["model.width"][1:5] == ["[50,10]", "[40,10] *", "[30,6] *", "[50,10]"]
    assert rows["model.width"][0].startswith("[30,6] | [30,10]") and rows["model.heads"][1:5] == [""] * 4
    assert rows["optim.lr.audio"][0].startswith("5e-04 | 0.001 | 0.002 |")
    assert rows["optim.lr.audio"][1:5] == ["0.002", "0.002", "5e-04 *", "0.002"]
    assert rows["optim.lr.audio"][5].startswith("MMSA: learning_rate")


def test_all_recipes_of_a_system_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """By the text of each cell: `own_value` says what a recipe has, the star where mosi has another."""
    for system in ("pmr", "ufen_mtfn"):
        names = sorted(packaged(system), key=lambda name: (name != "mosi", name))
        recipes = [flatten(load_recipe(system, name, [])) for name in names]
        rows = {row[0]: row[1:] for row in page(capsys, system)}
        for knob in Space.load(system).knobs:
            cells = rows[knob.keys[0]][1 : 1 + len(names)]
            assert [cell.removesuffix(" *") for cell in cells] == [own_value(knob, values) for values in recipes]
            differs = [any(values[key] != recipes[0][key] for key in knob.keys) for values in recipes]
            assert [cell.endswith(" *") for cell in cells] == differs


def test_a_narrow_terminal_has_it_all_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 80)
    text = " ".join(row[1] for row in page(capsys, "mult"))
    assert "[40,10] | [50,10] mosi [50,10], iemocap [40,10] *, mosei [30,6] *, sims [50,10] MMSA: dst_feature" in text
    words = set(text.split())
    for knob in Space.load("mult").knobs:
        assert words >= set(knob.source.split())


RANGES = {
    "16 | 32": Knob(("a",), "choice", (16, 32), "s"),
    "[] | [audio,vision]": Knob(("a",), "choice", ((), ("audio", "vision")), "s"),
    "true | false | -": Knob(("a",), "choice", (True, False, None), "s"),
    "5e-05 (fixed)": Knob(("a",), "value", (5e-5,), "s"),
    "0 … 0.5": Knob(("a",), "uniform", (0.0, 0.5), "s"),
    "1e-05 … 1e-04 (log)": Knob(("a",), "loguniform", (1e-5, 1e-4), "s"),
    "6.5e-04 … 0.01 (log)": Knob(("a",), "loguniform", (6.5e-4, 1e-2), "s"),
    "1 … 6 (whole)": Knob(("a",), "randint", (1, 6), "s"),
    "[30,6] | [40,10]": Knob(("a", "b"), "together", ((30, 6), (40, 10)), "s"),
}


@pytest.mark.parametrize("text", RANGES)
def test_a_range_is_written_as_people_write_it(text: str) -> None:
    assert range_text(RANGES[text]) == text


def test_a_recipes_value_is_in_brackets_where_it_lies_outside() -> None:
    tied = Knob(("a", "b"), "choice", (1, 2), "s")
    values = [own_value(tied, {"a": a, "b": b}) for a, b in [(1, 1), (1, 2), (3, 3), (1, 3)]]
    assert values == ["1", "1, 2", "(3)", "(1, 3)"]
    rows = Knob(("a", "b"), "together", ((1, 1), (2, 1)), "s")
    assert [own_value(rows, {"a": a, "b": 1}) for a in (1, 3)] == ["[1,1]", "([3,1])"]


# --- a space of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_file_is_a_start_for_a_space_of_ones_own(
    system: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["spaces", system, "--yaml"]) == 0
    said = capsys.readouterr()
    assert said.out == (PACKAGED / f"{system}.yaml").read_text() and said.err == ""
    assert Space.load(system, Path(own(tmp_path, said.out))).knobs == Space.load(system).knobs


def test_what_of_the_recipes_lies_outside_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = own(tmp_path, "sizes:\n  model.layers: {choice: [2, 6], source: mine}\n")
    assert main(["spaces", "mult", "--space", file]) == 0
    said = capsys.readouterr()
    assert re.search(r"model.layers +│ 2 \| 6 +│ \(4\) +│ \(4\) +│ \(4\) +│ 2 \* +│ mine ", said.out)
    assert f"1 value for 1 key, from {file}" in said.err and "(…): outside of the space" in said.err
    assert f"mmsa-dist sweep mult --data FOLDER --space {file} searches" in said.err
    assert not said.out.startswith("\n"), "no comment at its head, no gap"
    assert main(["spaces", "mult", "--space", file, "--yaml"]) == 0
    assert capsys.readouterr().out == Path(file).read_text()


def test_a_third_partys_space_stands_beside_its_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, third_party: Path
) -> None:
    file = own(tmp_path, "a:\n  optim.lr.rest: {loguniform: [1e-5, 1e-1], source: mine}\n")
    assert main(["spaces", "their_module:Theirs", "--space", file]) == 0
    said = capsys.readouterr()
    assert re.search(r"┃ key +┃ range +┃ default +┃ source", said.out)
    assert re.search(r"optim.lr.rest +│ 1e-05 … 0.1 \(log\) +│ [\d.e-]+ +│ mine", said.out)


# --- help and bad input -----------------------------------------------------------------------------------------------


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["spaces", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for kind in ("choice", "uniform", "loguniform", "randint", "value", "together"):
        assert re.search(rf"^  {kind}: ", text, re.MULTILINE)
    assert "mmsa-dist spaces mult --yaml > my.yaml" in text
    main(["sweep", "--help"])
    assert "mmsa-dist spaces SYSTEM" in capsys.readouterr().out


REFUSED = {
    "unknown system": (["mullt"], "unknown system 'mullt'; did you mean 'mult'"),
    "misspelt option": (["mult", "--spce", "x.yaml"], "unknown option --spce; did you mean --space?"),
    "no value": (["mult", "--space"], "--space: a value is missing"),
    "two systems": (["mult", "pmr"], "one word too many: pmr"),
    "a file of no system": (["--yaml"], "--space and --yaml are of one system"),
    "no such file": (["mult", "--space", "none.yaml"], "search space none.yaml: cannot be read: No such file"),
    "another system's file": (["mult", "--space", str(PACKAGED / "pmr.yaml")], "is for system 'pmr', but 'mult'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_a_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[case]
    assert main(["spaces", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_system_without_a_space_is_told_how_to_write_one(
    capsys: pytest.CaptureFixture[str], third_party: Path
) -> None:
    assert main(["spaces", "their_module:Theirs"]) == 2
    error = capsys.readouterr().err
    assert "no packaged search space for 'their_module:Theirs'" in error and "--yaml" in error
    assert error.count("\n") == 1


def test_a_wrong_space_is_refused_with_the_nearest_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = own(tmp_path, "a:\n  model.widht, model.heads: {together: [[30, 6]], source: mine}\n")
    assert main(["spaces", "mult", "--space", file, "--yaml"]) == 2
    assert "unknown key `model.widht`; did you mean 'model.width'" in capsys.readouterr().err
