"""What a rank reads of a data set, and that two read the same."""

import torch

from shards.batch import Batch, BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.mix import Mix, open_reader
from shards.plan import evaluation_plan, training_plan


def epoch(
    index: Index | Mix, seed: int, rank: int = 0, world: int = 1, start: int = 0, readers: int = 2
) -> list[Batch]:
    """The training batches of a rank, then those of an evaluation."""
    plan = training_plan(index, "train", seed, epoch=1, global_batch=8, window=3)
    with open_reader(index, open_shards=6) as reader, Loader(reader, BatchSpec.of(index), readers) as loader:
        batches = [batch for step in loader.train(plan, rank, world, start_step=start) for batch in step]
        return batches + list(loader.evaluate(evaluation_plan(index, "valid", 5), rank, world))


def assert_same(mine: list[Batch], others: list[Batch]) -> None:
    assert [batch.keys for batch in mine] == [batch.keys for batch in others]
    for one, other in zip(mine, others, strict=True):
        for field in ("values", "lengths", "labels"):
            for name, value in getattr(one, field).items():
                torch.testing.assert_close(value, getattr(other, field)[name], rtol=0, atol=0, equal_nan=True)
