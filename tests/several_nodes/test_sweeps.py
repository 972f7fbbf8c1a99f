"""Sweeps over four nodes: one fills them with its trials, and two share them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mmsa_dist.run_folder import read_events
from tests.end_to_end.started import PATIENCE
from tests.processes import wait_until
from tests.several_nodes.conftest import Site
from tests.tune.sweeps import Sweep

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(2400)]

SPACE = """
system: ufen_mtfn
network:
  model.dropout: {uniform: [0.0, 0.5], source: "MMSA"}
"""
AFTER = 5.0
"""Seconds by which the clock of a rank's first event may be before its place is another's."""


def started(site: Site, folder: Path, name: str, trials: int) -> Sweep:
    """A sweep at the head, of trials of one rank each."""
    space, recipe, runs = folder / "space.yaml", folder / "recipe.yaml", folder / name
    space.write_text(SPACE)
    rates = dict.fromkeys(("audio", "vision", "rest"), 5.0e-3)
    recipe.write_text(yaml.safe_dump({"optim": {"lr": {"text": 5.0e-5, **rates}}, "train": {"patience": 99}}))
    words = ["ufen_mtfn", "--data", site.data, "--recipe", str(recipe), "--space", str(space)]
    words += ["--runs-dir", str(runs), "--address", site.head.ray_address, "--tracking.no-enabled"]
    words += [f"--trials={trials}", "--epochs=12", "--search=random", "--stopping=none", "--batch-size", "8"]
    process = site.head.start(name, sys.executable, "-m", "mmsa_dist", "sweep", *words)
    return Sweep(process, site.head.log(name), runs)


def times(sweep: Sweep) -> list[tuple[float, float]]:
    """When each trial that has begun began and ended, by its rank; in the order of their beginnings."""
    found = []
    for trial in sweep.runs.glob("sweep-*/trials/*"):
        events = {event["event"]: event["time"] for event in read_events(trial)}
        if "start" in events:
            found.append((events["start"], events.get("end", float("inf"))))
    return sorted(found)


@pytest.fixture(scope="module")
def four(site: Site) -> Iterator[Site]:
    """Two more nodes; a CPU each."""
    user = {name: value for name, value in site.head.environment.items() if name.startswith("AWS_")}
    for name in ("third", "fourth"):
        site.network.node(name, **user).start_ray(site.head)
    yield site


def at_once(trials: list[tuple[float, float]]) -> int:
    """The most that ran at the same time."""
    return max(sum(began <= moment < ended for began, ended in trials) for moment, _ in trials)


def test_one_fills_the_nodes_and_two_take_turns(four: Site, tmp_path: Path) -> None:
    """The second begins when the first has all of them: it waits for the next that is free, not for the first's end."""
    first = started(four, tmp_path, "first", trials=10)
    second = None
    try:
        wait_until(lambda: len(times(first)) >= 4 or first.process.poll() is not None, PATIENCE)
        second = started(four, tmp_path, "second", trials=4)
        first.finished()
        second.finished()
    finally:
        for sweep in (first, second):
            if sweep is not None:
                sweep.end()
    assert "10 trials over 1 value drawn at random, 4 at a time" in first.output
    assert "4 trials over 1 value drawn at random, 4 at a time" in second.output, (
        "others hold the CPUs, it has them too"
    )
    assert "of the cluster's 4 CPUs are free: what does not fit waits its turn" in second.output
    of_first, of_second = times(first), times(second)
    assert len(of_first) == 10 and len(of_second) == 4
    assert at_once(of_first) == 4, "packed"
    assert at_once([(began + AFTER, ended) for began, ended in of_first + of_second]) <= 4
    assert sum(began < of_first[-1][0] for began, _ in of_second) >= 2, "it was served before the first's last trials"
