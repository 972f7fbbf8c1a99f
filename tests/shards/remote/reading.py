"""What a rank of a node does with a data set, without the weight of torch: for processes that tests start."""

import sys

from shards.ahead import looking_ahead
from shards.index import Index
from shards.plan import training_plan
from shards.read import ShardReader


def read_epoch(address: str, seed: int) -> None:
    """Reads an epoch as `shards.loader.Loader` does, and sees that each sample of it comes once."""
    index = Index.load(address)
    plan, keys = training_plan(index, "train", seed, epoch=1, global_batch=8, window=3), []
    with ShardReader(index) as reader, looking_ahead(index, plan.order, 0, depth=3) as reach:
        for step in range(plan.num_steps):
            reach((step + 1) * plan.global_batch)
            keys += [sample.key for sample in reader.samples(plan.step(step))]
    assert len(keys) == len(set(keys)) == index.splits["train"]


if __name__ == "__main__":
    read_epoch(sys.argv[1], int(sys.argv[2]))
