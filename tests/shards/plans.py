"""Random plans for tests: indexes without files, of ragged shards, alone and mixed, sorted by length or not."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.costs import CostRule
from shards.index import Index, Shard
from shards.mix import Mix
from shards.order import Numbers
from shards.plan import Piece, Plan, training_plan
from shards.utterance import SPLITS


def make_index(counts: dict[str, list[int]]) -> Index:
    """An index of shards with so many samples; a plan needs no files."""
    shards = [
        Shard(
            url=f"{split}-{i}.tar",
            bytes=0,
            sha256=f"{i:064x}",
            samples=count,
            split=split,
            table=f"{split}-{i}.arrow",
            table_bytes=0,
            table_sha256="0" * 64,
        )
        for split in SPLITS
        for i, count in enumerate(counts.get(split, []))
    ]
    return Index(
        name="made",
        synthetic=True,
        dtype="float16",
        modalities={},
        tasks=("M",),
        label_range=(-3, 3),
        has_raw_text=True,
        has_tokens=False,
        splits={split: sum(counts.get(split, [])) for split in SPLITS},
        shards=tuple(shards),
        statistics={},
        non_finite={},
        source={},
        tool_version="0",
        seed=0,
        folder=Path(),
    )


shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=30)
indexes = st.builds(lambda train, valid: make_index({"train": train, "valid": valid}), shard_sizes, shard_sizes)
seeds = st.integers(0, 2**64)
worlds = st.integers(1, 8)
accumulations = st.integers(1, 4)


RULE = CostRule((("length_text", 1),))


def cost(numbers: Numbers) -> NDArray[np.int64]:
    """Lengths with ties, in no order; a plan needs no files."""
    return numbers * 7919 % 13


def mixed(index: Index, draw: st.DrawFn) -> Mix:
    """`index` with one or two others, at any weights."""
    others = draw(st.lists(indexes, min_size=1, max_size=2))
    parts = [part.model_copy(update={"name": f"set-{i}"}) for i, part in enumerate([index, *others])]
    weights = draw(st.none() | st.tuples(*[st.sampled_from((0.25, 1, 2, 3.5, 10))] * len(parts)))
    return Mix(parts, weights)


@st.composite
def plans(draw: st.DrawFn, mix: bool | None = None, pool: int | None = None) -> Plan:
    """Of one set or of several, sorted by length or not."""
    index = draw(indexes)
    pool = draw(st.integers(0, 4)) if pool is None else pool
    plan = training_plan(
        mixed(index, draw) if (draw(st.booleans()) if mix is None else mix) else index,
        draw(st.sampled_from(["train", "valid"])),
        seed=draw(seeds),
        epoch=draw(st.integers(1, 100)),
        global_batch=draw(st.integers(1, 70)),
        window=draw(st.integers(1, 10)),
        pool=pool,
        rule=RULE if pool else None,
    )
    return replace(plan, costs=cost) if pool else plan


def copied(plan: Plan) -> Plan:
    """The plan as another process gets it, with its tables back."""
    copy: Plan = pickle.loads(pickle.dumps(plan))
    assert copy.costs is None
    return replace(copy, costs=plan.costs)


def epoch_of(plan: Plan) -> list[int]:
    return [int(number) for s in range(plan.num_steps) for number in plan.step(s)]


def real(piece: Piece) -> list[int]:
    return [int(n) for n, w in zip(piece.numbers, piece.weight, strict=True) if w]
