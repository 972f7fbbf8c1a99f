"""What `test_killed` runs in processes of their own: a rank that reads its batches and notes each step it has done."""

import time
from pathlib import Path
from typing import Any

PAUSE = 0.005
"""Seconds that a step takes, so that there is a middle to be killed in."""


def read_steps(folders: list[str], plan: dict[str, Any], rank: int, start: int, notes: list[str]) -> None:
    """Writes a line ``step key key …`` after each step; then waits for the other ranks, as a collective would.

    Args:
        notes: a file for each rank.
    """
    import torch

    from shards.batch import BatchSpec
    from shards.loader import Loader
    from shards.mix import open_data, open_reader
    from shards.plan import training_plan

    torch.set_num_threads(1)
    index = open_data(folders)
    order = training_plan(index, "train", **plan)
    files = [Path(file) for file in notes]
    with files[rank].open("a", encoding="utf-8") as file, Loader(open_reader(index), BatchSpec.of(index), 2) as loader:
        for step, batches in enumerate(loader.train(order, rank, len(notes), start_step=start), start):
            keys = [key for b in batches for key, weight in zip(b.keys, b.weight, strict=True) if weight]
            file.write("\t".join([str(step), *keys]) + "\n")
            file.flush()
            while any(other.read_bytes().count(b"\n") <= step - start for other in files):
                time.sleep(PAUSE)
