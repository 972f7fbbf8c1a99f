"""Laws 2 and 3 with real processes: readers ended by SIGKILL at some step, and gone on with at another number."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from shards.costs import CostRule
from shards.mix import AnyIndex, open_data
from shards.plan import training_plan
from tests.shards.made import packed, utterances
from tests.shards.ranks_killed import read_steps

pytestmark = pytest.mark.fault
PATIENCE = 120.0
"""Seconds; the first process imports torch."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("killed")
    sets = {"one": {"train": 90}, "two": {"train": 40}}
    return [str(packed(folder / n, utterances(c, seed=len(n)), name=n).folder) for n, c in sets.items()]


class Ranks:
    """Processes that read an epoch from some step on, each its share."""

    def __init__(self, folders: list[str], plan: dict[str, Any], world: int, start: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # torch is imported once, for all of them
        context.set_forkserver_preload(["torch", "shards.loader"])
        self.notes = [folder / f"{rank}-of-{world}.txt" for rank in range(world)]
        self.processes: list[BaseProcess] = []
        for file in self.notes:
            file.touch()
        notes = [str(file) for file in self.notes]
        for rank in range(world):
            process = context.Process(target=read_steps, args=(folders, plan, rank, start, notes), daemon=True)
            process.start()
            self.processes.append(process)

    def lines(self, rank: int) -> list[list[str]]:
        """Steps that were noted whole, with their keys."""
        return [line.split("\t") for line in self.notes[rank].read_text(encoding="utf-8").split("\n")[:-1]]

    def kill_at(self, step: int) -> None:
        """SIGKILL to one rank once it has noted so many steps; the others end as a group does that lost one."""
        deadline = time.monotonic() + PATIENCE
        while len(self.lines(0)) < step:
            assert time.monotonic() < deadline and self.processes[0].is_alive(), self.lines(0)
            time.sleep(0.002)
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL

    def join(self) -> None:
        for process in self.processes:
            process.join(PATIENCE)
            assert process.exitcode == 0

    def steps(self) -> list[list[str]]:
        """The keys of each global batch that all ranks have noted."""
        ranks = [self.lines(rank) for rank in range(len(self.notes))]
        whole = min(map(len, ranks))
        assert len({tuple(line[0] for line in lines[:whole]) for lines in ranks}) == 1
        return [[key for lines in ranks for key in lines[s][1:]] for s in range(whole)]


def wanted(index: AnyIndex, plan: dict[str, Any]) -> list[list[str]]:
    """The keys of each global batch, in this process and undisturbed."""
    keys = [key for n in range(len(index.shards)) for key in index.table(n)["key"].to_pylist()]
    order = training_plan(index, "train", **plan)
    return [[keys[int(n)] for n in order.step(s)] for s in range(order.num_steps)]


@pytest.mark.parametrize("case", range(3))
def test_readers_killed_at_any_step_go_on_at_another_number(folders: list[str], case: int, tmp_path: Path) -> None:
    chance = random.Random(case)
    sets = folders[: 1 + case % 2]
    pool = case  # not sorted by length, then over two and three batches
    plan: dict[str, Any] = {"seed": case, "epoch": 1 + case, "global_batch": 5, "window": 3, "pool": pool}
    plan["rule"] = CostRule((("length_audio", 1),)) if pool else None
    order = wanted(open_data(sets), plan)
    seen: list[list[str]] = []
    for world in (2, 3):
        ranks = Ranks(sets, plan, world, len(seen), tmp_path)
        ranks.kill_at(chance.randint(1, (len(order) - len(seen)) // 2))
        noted = ranks.steps()
        assert len(noted) < len(order) - len(seen), "it was killed after the end"
        seen += noted
    last = Ranks(sets, plan, 1, len(seen), tmp_path)
    last.join()
    assert seen + last.steps() == order
    assert len({key for keys in order for key in keys}) == sum(map(len, order))
