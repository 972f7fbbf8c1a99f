"""A sweep's pictures: what is in them, and what mattered."""

import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from tests.tune.sweeps import searched
from tune.outcome import DONE, FAILED, Outcome
from tune.plots import draw, importances, study_of
from tune.space import Space

SPACE = """
a:
  optim.lr.audio, optim.lr.vision: {loguniform: [1.0e-4, 1.0e-2], source: s}
  model.layers: {choice: [1, 2, 3, 4], source: s}
  model.dropout: {uniform: [0.0, 0.5], source: s}
"""


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return searched(tmp_path, SPACE)


def outcomes(number: int) -> list[Outcome]:
    """The number of layers decides, the learning rate a little, dropout nothing."""
    made = []
    for i in range(number):
        rate, layers, dropout = 10 ** (-4 + 2 * (i * 0.37 % 1)), 1 + i % 4, 0.5 * (i * 0.61 % 1)
        mae = 0.7 + 0.1 * layers + 5 * rate
        values: dict[str, Any] = {"optim.lr.audio": rate, "optim.lr.vision": rate}
        values |= {"model.layers": layers, "model.dropout": dropout}
        made.append(Outcome(Path(f"t{i}"), i + 1, values, DONE, mae, 1, 1, None, {"mae": mae}, 1000 * layers))
    made.append(Outcome(Path("t"), number + 1, {}, FAILED, None, 0, 0, "values do not fit together"))
    return made


def test_what_decides_is_found_to_matter_most(space: Space) -> None:
    found = importances(outcomes(60), space, "mae")
    assert next(iter(found)) == "layers" and found["layers"] > 3 * found["dropout"]
    assert sum(found.values()) == pytest.approx(1)


def test_of_too_few_trials_nothing_is_said(space: Space, tmp_path: Path) -> None:
    assert importances(outcomes(3), space, "mae") == {}
    assert importances(outcomes(0), space, "mae") == {}
    assert draw(outcomes(0), space, ["mae"], tmp_path / "pictures") == []
    assert not (tmp_path / "pictures").exists()


def test_the_pictures_show_trials_that_hold_by_their_own_values(space: Space, tmp_path: Path) -> None:
    study = study_of(outcomes(5), space, "mae")
    assert len(study.trials) == 5, "not the one that failed"
    assert study.trials[0].params == {"lr.audio+vision": 1e-4, "layers": "1", "dropout": 0.0}
    drawn = draw(outcomes(8), space, ["mae", "parameters"], tmp_path / "pictures")
    assert [path.name for path in drawn] == ["parallel.png", "slices.png", "importance.png", "front.png", "sweep.html"]
    for path in drawn[:-1]:
        picture = matplotlib.image.imread(path)
        assert picture.std() > 0.05, f"{path.name} is empty"
    page = drawn[-1].read_text()
    assert "lr.audio+vision" in page and "importance for mae" in page
    assert not re.findall(r"""<(?:script|link)[^>]+(?:src|href)=["']http""", page), "needs no network"


def test_one_trial_is_enough_for_pictures(space: Space, tmp_path: Path) -> None:
    names = [path.name for path in draw(outcomes(1), space, ["mae"], tmp_path / "pictures")]
    assert names == ["parallel.png", "slices.png", "sweep.html"]
