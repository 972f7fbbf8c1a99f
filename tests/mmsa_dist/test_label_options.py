"""Options of third parties' label generators, of which the one in docs/systems.md is an example."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmsa_dist.checks import check_system
from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import differences, load_recipe, read_recipe
from mmsa_dist.session import label_generator, settled
from mmsa_dist.systems import get_system
from shards.index import Index
from tests.mmsa_dist.batches import ragged, spec_for

PAGE = (Path(__file__).parents[2] / "docs" / "systems.md").read_text()
NAME = "my_labels:Shrunk"


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's example as a module that can be imported."""
    (tmp_path / "my_labels.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)


def share(index: Index, recipe: Any) -> float:
    """What of y_m the labels of text are that a system would learn."""
    check_system(recipe, index)
    system = get_system(recipe.system)(recipe.model, spec_for())
    targets = label_generator(recipe, index, system, "cpu").targets(ragged())
    (found,) = {round(share, 6) for share in (targets["T"] / targets["M"]).tolist()}
    return found


def test_they_are_set_by_name(index: Index, tmp_path: Path) -> None:
    words = ["--labels.generator", NAME]
    assert share(index, load_recipe("self_mm", None, words)) == 0.5
    assert share(index, load_recipe("self_mm", None, [*words, "--labels.options", "share", "0.8"])) == 0.8
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"labels": {"generator": NAME, "options": {"share": 1}}}))
    assert share(index, load_recipe("self_mm", str(file), [])) == 1
    assert share(index, load_recipe("self_mm", str(file), ["--labels.options.share", "0"])) == 0


def test_they_stay_with_the_run(index: Index, tmp_path: Path) -> None:
    """A run is not gone on with under others."""
    words = ["--labels.generator", NAME, "--labels.options", "share"]
    recipe = settled(load_recipe("self_mm", None, [*words, "0.8"]), index)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.dump()))
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    (line,) = differences(recipe, load_recipe("self_mm", None, [*words, "0.7", "--train.monitor", "mae"]))
    assert line == "labels.options.share: 0.8 -> 0.7"


@pytest.mark.parametrize(
    ("generator", "option", "message"),
    [
        (
            NAME,
            ("shar", 0.8),
            r"labels\.options\.shar: .*'my_labels:Shrunk' has no such option \(valid: share\); leave it",
        ),
        (NAME, ("shar", False), r"labels\.options\.shar: label generator"),
        (NAME, ("share", 2), r"`labels\.options\.share`: input should be less than or equal to 1, found 2"),
        (NAME, ("share", "half"), r"`labels\.options\.share`: input should be a valid number.*, found 'half'"),
        ("ulgm", ("share", 1), r"labels\.options\.share: label generator 'ulgm' has no such option"),
        (
            "ulgm",
            ("divide_above", 1),
            r"`labels\.options`: .*divide_above is set as labels\.divide_above, not among the",
        ),
    ],
)
def test_what_it_does_not_have_is_refused(
    index: Index, tmp_path: Path, generator: str, option: tuple[str, Any], message: str
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"labels": {"generator": generator, "options": dict([option])}}))
    with pytest.raises(ConfigError, match=message) as caught:
        check_system(load_recipe("self_mm", str(file), []), index)
    assert "\n" not in str(caught.value)
