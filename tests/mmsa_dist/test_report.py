"""The table and the pictures at a run's end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmsa_dist.metrics import confusion
from mmsa_dist.recipe import Recipe
from mmsa_dist.report import (
    confusion_matrix,
    epoch_events,
    loss_curve,
    metrics_table,
    pictures,
    result_table,
    value_text,
)
from mmsa_dist.run_folder import Events
from shards.progress import console

RESULT = {
    "system": "self_mm",
    "data": "mosi",
    "synthetic": False,
    "selected_on": "validation mae",
    "best_epoch": 2,
    "epochs": 3,
    "valid": {"mae": 0.71234, "corr": 0.8, "acc2_has0": 0.8512, "loss": 0.5},
    "test": {"mae": 0.75, "corr": None, "acc2_has0": 0.84},
}


def shown(renderable: object) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mae", 0.71234, "0.7123"),
        ("corr", -0.05, "-0.0500"),
        ("acc7", 0.41666, "41.67 %"),
        ("f1_non0", 1.0, "100.00 %"),
        ("corr", None, "-"),
    ],
)
def test_numbers_are_printed_as_in_the_papers(name: str, value: float | None, text: str) -> None:
    assert value_text(name, value) == text


def test_the_table_says_what_was_chosen_and_how() -> None:
    text = shown(result_table(RESULT))
    assert "self_mm on mosi" in text and "synthetic" not in text
    assert "epoch 2 of 3, selected on validation mae; the test split was read once" in text
    row = next(line for line in text.splitlines() if "MAE" in line)
    assert "0.7123" in row and "0.7500" in row
    assert next(line for line in text.splitlines() if "Corr" in line).count("-") == 1  # undefined


def test_a_run_without_test_split_says_nothing_of_it() -> None:
    text = shown(result_table({name: value for name, value in RESULT.items() if name != "test"}))
    assert "test" not in text and "0.7123" in text


def test_synthetic_data_is_called_so() -> None:
    assert "mosi (synthetic)" in shown(result_table({**RESULT, "synthetic": True}))


@pytest.mark.parametrize("name", ["mosi[v2]", "a[/b]", "a:smile:"])
def test_the_name_of_a_data_set_is_printed_as_it_stands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.print(result_table({**RESULT, "data": name}))
    assert f"self_mm on {name}" in capsys.readouterr().out


def test_a_metric_that_one_split_lacks_leaves_a_gap() -> None:
    text = shown(metrics_table({"valid": {"mae": 1.0}, "test": {"mae": 2.0, "acc7": 0.5}}))
    assert "50.00 %" in text and "2.0000" in text


def test_the_loss_curve_draws_every_epoch_once(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    events = Events(tmp_path, 0)
    for epoch, loss in ((1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0)):  # epoch 2 was repeated after a restart
        events.write("step", loss=9.0)
        events.write("epoch", epoch=epoch, step=epoch, train_loss=loss, valid={"mae": loss / 2, "loss": None})
    events.close()
    (tmp_path / "events" / "rank-0.jsonl").open("a").write('{"event": "epoch", "epo')  # killed here
    figure = loss_curve(epoch_events(tmp_path), RESULT)
    left, right = figure.axes
    train = left.get_lines()[0]
    assert list(train.get_xdata()) == [1, 2, 3]
    assert list(train.get_ydata()) == [3.0, 2.5, 1.0]
    assert list(right.get_lines()[0].get_ydata()) == [1.5, 1.25, 0.5]
    assert right.get_ylabel() == "mae"
    assert "best epoch 2" in [text.get_text() for text in left.get_legend().get_texts()]


def test_the_confusion_matrix_shows_every_count() -> None:
    y, p = [-3, -3, 0, 3, 3, 3], [-3, -2, 0, 3, 3, -1]
    counts, labels = confusion(y, p, 7)
    axes = confusion_matrix(counts, labels, "title").axes[0]
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert {cell: int(text) for cell, text in cells.items() if text != "0"} == {
        (0, 0): 1,
        (0, 1): 1,
        (3, 3): 1,
        (6, 6): 2,
        (6, 2): 1,
    }
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(labels)
    assert axes.get_ylabel() == "true" and axes.get_xlabel() == "predicted"
    np.testing.assert_allclose(axes.images[0].get_array()[6], [0, 0, 1 / 3, 0, 0, 0, 2 / 3])


def test_a_finished_run_gives_its_pictures(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    from matplotlib.image import imread

    files = pictures(trained[0], tmp_path)
    expected = [f"confusion_{split}_{classes}.png" for split in ("valid", "test") for classes in (2, 7)]
    assert [file.name for file in files] == ["loss_curve.png", *expected]
    for file in files:
        image = imread(file)
        assert image.shape[0] > 200 and image.shape[1] > 200
        assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10  # not blank


@pytest.mark.parametrize(("kind", "classes"), [("sims", (2, 5)), ("other", ())])
def test_pictures_of_other_labels(
    kind: str, classes: tuple[int, ...], trained: tuple[Path, Recipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    card = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**card, "kind": kind}))
    names = {file.name for file in pictures(run, tmp_path / "pictures")}
    assert names == {"loss_curve.png"} | {f"confusion_{s}_{c}.png" for s in ("valid", "test") for c in classes}
