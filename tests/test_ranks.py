"""The helper that distributed tests stand on."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks

Ranks = Callable[..., list[Any]]


@dataclass
class Payload:
    """Defined here, so that it unpickles only where this module has been loaded."""

    value: int


class OwnError(Exception):
    def __init__(self, one: int, two: int) -> None:  # pickles, but does not come back
        super().__init__(f"{one} and {two}")


def summed(payload: Payload) -> tuple[int, float, int]:
    mine = torch.tensor(float(payload.value * (dist.get_rank() + 1)))
    dist.all_reduce(mine)
    return dist.get_rank(), mine.item(), os.getpid()


def raises_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise OwnError(rank, 2)
    dist.barrier()


def raises_everywhere() -> None:
    raise ValueError(f"rank {dist.get_rank()} had enough")


def dies_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hangs_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def seeds_and_surroundings() -> tuple[float, str | None, str]:
    before = os.environ.get("LEFT_BEHIND"), str(Path.cwd())
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    return torch.rand(()).item(), *before


@pytest.mark.parametrize("world_size", [1, 2])
def test_results_come_by_rank_and_processes_stay(ranks: Ranks, world_size: int) -> None:
    first = ranks(summed, world_size, Payload(3))
    assert [r[:2] for r in first] == [(r, 3.0 * sum(range(1, world_size + 1))) for r in range(world_size)]
    assert [r[2] for r in ranks(summed, world_size, Payload(1))] == [r[2] for r in first]
    assert os.getpid() not in [r[2] for r in first]


def test_a_call_leaves_nothing_behind_for_the_next(ranks: Ranks) -> None:
    first = ranks(seeds_and_surroundings, 2)
    assert first == ranks(seeds_and_surroundings, 2)
    assert first[0] == first[1]


def test_an_exception_comes_back_with_its_traceback_and_the_pool_starts_again(ranks: Ranks) -> None:
    before = {r[2] for r in ranks(summed, 2, Payload(1))}
    with pytest.raises(RankError, match=r"rank 1 of 2 raised OwnError") as caught:
        ranks(raises_on, 2, 1)
    assert "raise OwnError(rank, 2)" in str(caught.value) and caught.value.rank == 1
    assert before.isdisjoint({r[2] for r in ranks(summed, 2, Payload(1))})


def test_the_same_error_on_every_rank_keeps_the_pool(ranks: Ranks) -> None:
    before = {r[2] for r in ranks(summed, 2, Payload(1))}
    with pytest.raises(RankError) as caught:
        ranks(raises_everywhere, 2)
    assert isinstance(caught.value.cause, ValueError)
    assert before == {r[2] for r in ranks(summed, 2, Payload(1))}


def test_a_dead_rank_fails_the_call_with_its_last_words(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2 was killed by SIGKILL.*last words"):
        ranks(dies_on, 2, 0)
    assert len(ranks(summed, 2, Payload(1))) == 2


def test_a_hung_rank_fails_the_call_and_says_where_it_stands(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"(?s)hangs_on: no answer within 1 s from rank 1 of 2.*in hangs_on"):
        ranks(hangs_on, 2, 1, timeout=1.0)
    assert len(ranks(summed, 2, Payload(1))) == 2


def test_a_local_function_is_refused() -> None:
    with pytest.raises(TypeError, match="top level"):
        run_ranks(lambda: None, 1)
