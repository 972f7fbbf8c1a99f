"""A sweep in a cluster that grows while it runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ray_nodes import Cluster
from tests.tune.sweeps import Sweep
from tune.outcome import INTERRUPTED

pytestmark = [pytest.mark.timeout(1900), pytest.mark.ray, pytest.mark.slow]

SPACE = """
system: ufen_mtfn
network:
  model.dropout: {uniform: [0.0, 0.5], source: "MMSA"}
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with Cluster() as made:
        yield made


def test_a_node_that_joins_takes_trials(data: Path, cluster: Cluster, tmp_path: Path) -> None:
    """The head has room for one trial; two run at a time once another node is there, and each trial once."""
    space, recipe = tmp_path / "space.yaml", tmp_path / "recipe.yaml"
    space.write_text(SPACE)
    rates = dict.fromkeys(("audio", "vision", "rest"), 5.0e-3)
    recipe.write_text(yaml.safe_dump({"optim": {"lr": {"text": 5.0e-5, **rates}}, "train": {"patience": 99}}))
    words = ["ufen_mtfn", "--data", str(data), "--recipe", str(recipe), "--space", str(space)]
    words += ["--address", cluster.address, "--workers", "1", "--tracking.no-enabled", "--batch-size", "8"]
    words += ["--trials=5", "--max-concurrent=2", "--epochs=8", "--search=random", "--stopping=none"]
    sweep = Sweep.start(tmp_path / "runs", *words)
    try:
        sweep.until(lambda seen: any(each.epochs for each in seen), "a trial trains")
        assert "--max-concurrent 2: the cluster has room for 1 until nodes join" in sweep.output
        assert len(sweep.outcomes()) == 1
        cluster.join()
        sweep.until(
            lambda seen: sum(each.status == INTERRUPTED and each.epochs > 0 for each in seen) == 2, "two at a time"
        )
        sweep.finished()
    finally:
        sweep.end()
    assert "the cluster has more room: 2 at a time" in sweep.output
    assert [each.number for each in sweep.outcomes()] == [1, 2, 3, 4, 5]
