"""`mmsa-dist doctor` on a real Ray cluster: two nodes on one machine, one of which has another torch."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data import packed
from tests.ray_nodes import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.fault, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
OTHER = "2.12.1"
"""The torch of the second node, as it says itself."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    older = tmp_path_factory.mktemp("older")
    told = older / f"torch-{OTHER}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OTHER}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of all its nodes, and of who joins it
        with Cluster() as made:
            made.join(PYTHONPATH=str(older))
            yield made


def doctor(cluster: Cluster, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mmsa_dist", "doctor", "--address", cluster.address, "--timeout", "300", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


def test_every_node_is_looked_at(cluster: Cluster, tmp_path: Path) -> None:
    data, shared = packed(tmp_path), tmp_path / "shared"
    words = ["--data", str(data), "--storage", str(shared / "runs"), "--storage-mib", "4", "--skip", "trial", "--json"]
    done = doctor(cluster, *words)
    assert done.stdout.startswith("{"), done.stderr
    told = json.loads(done.stdout)
    assert len(told["nodes"]) == 2 and all(re.fullmatch(r"\S+ \(\w{6}\)", node) for node in told["nodes"])
    by_line: dict[str, list[dict[str, Any]]] = {}
    for each in told["findings"]:
        by_line.setdefault(f"{each['group']}, {each['check']}", []).append(each)
    # versions: the torch of the second alone
    assert [each["state"] for each in by_line["software, torch"]] == ["ok", "fail"]
    assert (
        OTHER in by_line["software, torch"][1]["found"]
        and "pip install torch==" in by_line["software, torch"][1]["remedy"]
    )
    assert [each["state"] for each in by_line["software, mmsa-dist"]] == ["ok", "ok"]
    assert done.returncode == 2 and told["red"] == 1, [each for each in told["findings"] if each["state"] == "fail"]
    # each node by itself, and what lies between them
    for line in ("cluster, clock", "machine, disk: Ray", "storage, atomic rename", "data, one shard"):
        assert [each["state"] for each in by_line[line]] == ["ok", "ok"], by_line[line]
    (reduced,) = by_line["network, all-reduce, gloo"]
    assert reduced["facts"]["world"] == 2 and reduced["state"] in ("ok", "warn")
    (read,) = by_line["storage, read from another node"]
    assert (read["node"], read["state"]) == (told["nodes"][1], "ok")
    assert not shared.exists() and not list(Path(tempfile.gettempdir()).glob("mmsa-doctor-*"))


def test_a_node_that_is_held_is_a_red_line_and_holds_nobody(cluster: Cluster) -> None:
    """The second node's raylet is stopped: it is in the cluster, and starts no process."""
    cluster.signal_raylet(cluster.nodes[-1], signal.SIGSTOP)
    try:
        done = doctor(cluster, "--skip", "network", "storage", "mlflow", "data", "trial")
    finally:
        cluster.signal_raylet(cluster.nodes[-1], signal.SIGCONT)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "FAIL" in done.stdout and "ray status" in done.stdout and "not ready: 1 red line" in done.stdout
