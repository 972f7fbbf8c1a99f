"""A run over two machines gives what a run on one gives, and fetches its data once for each of them."""

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.started import Run, two_cpus
from tests.several_nodes.conftest import EPOCHS, Site, losses, starts

RECORDED = """
import json
from mlflow import MlflowClient
client = MlflowClient("http://mlflow:5000")
run = client.get_model_version("self_mm", "1").run_id
print(json.dumps([client.get_run(run).info.status, len(client.get_metric_history(run, "train_loss"))]))
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, two_cpus]


@pytest.fixture(scope="module")
def run(site: Site, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """ZeRO-1, a rank on each machine; the data comes from a third, the record goes to a fourth."""
    run = site.train(tmp_path_factory.mktemp("two"), *words, "--zero", "1", "--workers", "2", *site.tracking)
    run.result()
    return run


def test_two_nodes_give_the_losses_of_one(run: Run, one_node: Run) -> None:
    """Law 1, bit for bit: there are two ranks either way."""
    assert starts(run) == [2]
    assert losses(run) == losses(one_node)
    assert run.result() == one_node.result()


def test_each_shard_is_fetched_once_by_each_node(run: Run, site: Site, folder: Path) -> None:
    """By the server's own log: a node's rank reads it over and over, and the command at the head as well."""
    gets = site.gets()
    assert set(gets.values()) == {1}
    assert {tar for _, tar in gets} == {path.name for path in folder.glob("*.tar")}
    assert {node for node, _ in gets} == {site.head.address, site.second.address}


def test_it_is_recorded_by_the_server_on_a_fourth(run: Run, site: Site) -> None:
    search = (
        "import mlflow, json; c = mlflow.MlflowClient('http://mlflow:5000'); v = c.get_model_version('self_mm', '1'); "
    )
    search += "print(json.dumps([c.get_run(v.run_id).info.status, len(c.get_metric_history(v.run_id, 'train_loss'))]))"
    done = site.head.run(sys.executable, "-c", search)
    assert json.loads(done.stdout) == ["FINISHED", EPOCHS], done.stderr


def test_zero_3_over_two_nodes(site: Site, words: list[str], one_node: Run, tmp_path: Path) -> None:
    """The weights themselves are spread over the machines: the losses are the same up to rounding."""
    run = site.train(tmp_path, *words, "--zero", "3", "--workers", "2", "--tracking.no-enabled")
    run.result()
    alone = losses(one_node)
    assert losses(run).keys() == alone.keys()
    for epoch, numbers in losses(run).items():
        assert numbers["train_loss"] == pytest.approx(alone[epoch]["train_loss"], rel=1e-4), epoch


def test_a_network_that_delays_and_loses_changes_no_number(
    site: Site, words: list[str], one_node: Run, tmp_path: Path
) -> None:
    site.second.hamper("delay", "50ms", "loss", "1%")
    run = site.train(tmp_path, *words, "--epochs", "2", "--zero", "1", "--workers", "2", "--tracking.no-enabled")
    run.result()
    assert losses(run) == {epoch: numbers for epoch, numbers in losses(one_node).items() if epoch <= 2}
