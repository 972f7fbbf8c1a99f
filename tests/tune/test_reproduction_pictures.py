"""What a reproduction draws of one run of a row: where its fused features lie, and the labels that it generated."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmsa_dist import checkpoint, run_folder
from mmsa_dist.checkpoint import Checkpoint
from mmsa_dist.portable import MOMENTS, State
from mmsa_dist.session import stable_id
from shards.index import Index
from tests.mmsa_dist import runs
from tests.tune.reproductions import planned, pretend
from tune.papers import cases, fused
from tune.papers.measured import measure
from tune.papers.pictures import draw, generated, of_first_seed
from tune.papers.reproduction import folder_of, reproduce
from tune.papers.runs import Run
from tune.papers.written import html, markdown

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.trained(tmp_path_factory.mktemp("runs"), Index.load(data))[0]


# --- fused features ---------------------------------------------------------------------------------------------------


def test_the_fused_features_are_those_of_every_test_sample(trained: Path) -> None:
    found = fused.features(trained)
    assert found is not None
    keys, y, vectors = found
    with np.load(trained / "predictions" / "test.npz") as file:
        assert keys == file["key"].tolist() and np.array_equal(y, file["y"])
    assert vectors.dtype == np.float32 and len(vectors) == len(keys)
    predictor = fused.Predictor.load(trained)
    assert vectors.shape[1] == predictor.system.feature_widths()["M"]  # type: ignore[operator]


def test_the_map_is_the_same_every_time_and_made_once(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one, two = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("one", "two"))
    first, second = fused.mapped(one), fused.mapped(two)
    assert first is not None and second is not None
    assert np.array_equal(first.xy, second.xy) and first.xy.shape == (len(first.y), 2)
    monkeypatch.setattr(fused, "features", None)
    again = fused.mapped(one)
    assert again is not None and np.array_equal(again.xy, first.xy), "from the run's folder"
    assert len(fused.figure(again, "title").axes) == 2, "dots, and what their colours mean"


def test_samples_of_like_labels_lie_together() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([-2.0, 2.0], 40)
    vectors = (rng.normal(size=(80, 6)) + 4 * y[:, None]).astype(np.float32)
    xy = fused.embedded(vectors)
    apart = np.linalg.norm(xy[y < 0].mean(0) - xy[y > 0].mean(0))
    assert apart > max(xy[y < 0].std(), xy[y > 0].std())


def test_a_system_that_names_no_fused_features_has_no_map(data: Path, tmp_path: Path) -> None:
    folder, _ = runs.trained(tmp_path, Index.load(data), system="mult", epochs=1)
    assert fused.mapped(folder) is None and not (folder / fused.FILE).exists()


# --- generated labels -------------------------------------------------------------------------------------------------


def with_labels(data: Path, tmp_path: Path, turned: int = 3) -> Run:
    """A run that is done whose generator gave every sample's label to each modality, and `turned` samples' audio the
    opposite."""
    found = planned(data, tmp_path)
    run = next(run for run in found.runs if run.row == "TAM-ULAG" and run.seed == 1)
    pretend(run, found, 0.1)
    index = found.index
    tables = [index.table(n) for n in index.shards_of("train")]
    ids = torch.tensor([stable_id(key) for table in tables for key in table["key"].to_pylist()])
    y = torch.from_numpy(np.concatenate([table["label_M"].to_numpy() for table in tables]).copy())
    audio = y.clone()
    audio[:turned] *= -0.5
    # of ULAG's label half is by centres, half by similarity
    made = {f"{kind}.{task}": y for kind in ("label", "similarity") for task in ("T", "V")}
    made |= {"label.A": audio, "similarity.A": audio}
    state = {"ids": ids, **{name: tensor.clone() for name, tensor in made.items()}}
    engine = State(6, {"w": torch.zeros(2)}, {key: {"w": torch.zeros(2)} for key in MOMENTS})
    whole = Checkpoint(engine, state, {"epoch": 3, "step_in_epoch": 0})
    checkpoint.save(run.folder / "checkpoints", whole, 1, None)
    return run


def test_labels_are_kept_when_checkpoints_go(data: Path, tmp_path: Path) -> None:
    run = with_labels(data, tmp_path)
    cases.keep(run)
    written = (run.folder / cases.FILE).stat().st_mtime_ns
    shutil.rmtree(run.folder / "checkpoints")
    cases.keep(run)
    assert (run.folder / cases.FILE).stat().st_mtime_ns == written
    shown = cases.kept(run.folder)
    assert shown is not None and shown.generator == "ulag" and shown.when == "after epoch 2 (step 6)"
    assert list(shown.labels.labels) == ["T", "A", "V"] and shown.labels.half_range == 3.0
    assert shown.what.startswith("changes of sign, ") and 1 <= len(shown.rows) <= 3
    assert any(shown.said), "what was said"


def test_the_cases_are_a_table_and_pictures(data: Path, tmp_path: Path) -> None:
    run = with_labels(data, tmp_path)
    cases.keep(run)
    found = planned(data, tmp_path)
    measured = [measure(row) for row in found.trained]
    (grid,) = generated(measured)
    assert grid.title.startswith("labels that ulag generated for TAM-ULAG, seed 1, after epoch 2 (step 6): changes of")
    assert grid.header == ("sample", "transcript", "y_m", "y_t", "y_a", "y_v")
    for _, words, own, text, audio, vision in grid.rows:
        assert words and audio.endswith("*") and float(audio[:-1]) == pytest.approx(-0.5 * float(own), abs=0.011)
        assert text == own and vision in (own, "-")
    shown = measured[0] if measured[0].name == "TAM-ULAG" else measured[1]
    assert {"labels", "cases"} <= of_first_seed(shown, "MOSI").keys()
    files = {file.name for file in draw(measured, "mosi", ("M",), "mae", "MOSI", tmp_path / "pictures")}
    assert {"labels-TAM-ULAG.png", "cases-TAM-ULAG.png"} <= files
    assert all((tmp_path / "pictures" / name).read_bytes().startswith(PNG) for name in files)


def test_where_no_sign_changes_the_largest_changes_are_shown(data: Path, tmp_path: Path) -> None:
    run = with_labels(data, tmp_path, turned=0)
    cases.keep(run)
    shown = cases.kept(run.folder)
    assert shown is not None and shown.what == "largest changes" and len(shown.rows) == cases.CASES


def test_a_row_that_generates_nothing_or_lost_its_data_has_no_cases(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = with_labels(data, tmp_path)
    other = next(each for each in planned(data, tmp_path).runs if each.row == "w/o ULAG")
    assert other.recipe.label_generator == "multimodal"
    shutil.copytree(run.folder / "checkpoints", other.folder / "checkpoints")
    cases.keep(other)
    assert not (other.folder / cases.FILE).exists()
    (path,) = checkpoint.saved(run.folder / "checkpoints")
    (path / "labels.safetensors").write_bytes(b"short")
    cases.keep(run)
    assert not (run.folder / cases.FILE).exists() and "its generated labels cannot be shown" in caplog.text


def test_the_page_has_the_cases_below_its_notes(data: Path, tmp_path: Path) -> None:
    with_labels(data, tmp_path)
    found = planned(data, tmp_path)
    for run in found.runs:
        if not (run.folder / "result.json").exists():
            pretend(run, found, 0.3)
    reproduce(found)
    folder = folder_of(found)
    for name in ("table.md", "table.html"):
        text = (folder / name).read_text()
        assert "abels that ulag generated for TAM-ULAG, seed 1" in text and "cases-TAM-ULAG.png" in text
    kept = run_folder.read_json(folder / "reproduction.json")
    assert "generated" not in " ".join(kept["notes"])
    drawn = {file: file.stat().st_mtime_ns for file in (folder / "pictures").iterdir()}
    reproduce(found)
    assert {file: file.stat().st_mtime_ns for file in (folder / "pictures").iterdir()} == drawn
    assert "abels that ulag generated" in (folder / "table.md").read_text(), "from what the run has kept"


def test_words_in_a_table_cannot_leave_their_cell() -> None:
    from tune.papers.page import Grid, Page

    grid = Grid("cases", ("sample", "transcript", "y_m"), [("a", "<b>I | said\nso</b>", "+1.00")])
    assert "| a | <b>I \\| said so</b> | +1.00 |" in markdown(Page("t"), (), [grid])
    assert "&lt;b&gt;I | said\nso&lt;/b&gt;" in html(Page("t"), (), [grid])
