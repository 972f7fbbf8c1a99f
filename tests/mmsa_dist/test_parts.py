"""A checkpoint's numbers: each held by one rank, copied without a word to the others, and whole on rank 0."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmsa_dist import parts
from mmsa_dist.portable import MOMENTS
from mmsa_dist.recipe import from_dict
from tests.data import packed
from tests.mmsa_dist.test_laws import recipe_for

SPOKEN = ("all_reduce", "all_gather_into_tensor", "broadcast", "barrier", "send", "recv", "gather_object")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("parts"), samples=60)


def after_two_steps(recipe: dict[str, Any], folder: Path) -> Any:
    from mmsa_dist.session import open_session

    session = open_session(from_dict(recipe), folder, dist.get_rank(), dist.get_world_size())
    for taken, batches in enumerate(session.loader.train(session.plan(1), session.rank, session.world, 1), 1):
        session.engine.step(batches, lambda p, b: session.system.loss(p, b, session.generator.targets(b, p)))
        if taken == 2:
            break
    return session


def silent_part(engine: Any) -> parts.Part:
    """The part, where nobody can be spoken to."""
    with mock.patch.multiple(dist, **{name: mock.Mock(side_effect=AssertionError(name)) for name in SPOKEN}):
        return engine.part()


def whole_and_by_deepspeed(recipe: dict[str, Any], folder: Path, message: int) -> dict[str, Any]:
    """On rank 0 what was assembled and what DeepSpeed itself gathers; on all ranks where each one's numbers belong."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    session = after_two_steps(recipe, folder)
    part = silent_part(session.engine)
    with mock.patch.object(parts, "MESSAGE", message):
        state = session.engine.assembled(part)
    trained = {name: p for name, p in session.system.named_parameters() if p.requires_grad}
    theirs = {("weights", name): safe_get_full_fp32_param(p).clone() for name, p in trained.items()}
    theirs |= {(k, name): safe_get_full_optimizer_state(p, k).clone() for k in MOMENTS for name, p in trained.items()}
    session.close()
    if state is None:
        return {"places": part.places}
    whole = {"weights": state.weights, **state.moments}
    ours = {(kind, name): tensor for kind in whole for name, tensor in whole[kind].items() if name in trained}
    return {"places": part.places, "ours": ours, "theirs": theirs, "shapes": part.shapes}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parts_are_what_deepspeed_gathers(
    stage: int, world: int, ranks: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("self_mm", data, engine={"zero": stage}).dump()
    found = ranks(whole_and_by_deepspeed, world, recipe, tmp_path, 7)  # many messages a stretch
    ours, theirs = found[0]["ours"], found[0]["theirs"]
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor.view_as(ours[key])), key
    for (kind, name), tensor in theirs.items():
        own = sorted((p.start, p.size) for each in found for p in each["places"] if (p.kind, p.name) == (kind, name))
        ends = [start + size for start, size in own]
        assert [start for start, _ in own] == [0, *ends[:-1]] and ends[-1] == tensor.numel(), (kind, name)
    sizes = [sum(place.size for place in each["places"]) for each in found]
    assert max(sizes) < 1.1 * sum(sizes) / world, "one rank copies more than its share"


def saved_while_training(recipe: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """A part is assembled by a thread while the ranks take two more steps: the state of before, and of a plain call."""
    from concurrent.futures import ThreadPoolExecutor

    session = after_two_steps(recipe, folder)
    before = session.engine.state()
    part = session.engine.part()
    with ThreadPoolExecutor(1) as thread, mock.patch.object(parts, "MESSAGE", 5):
        done = thread.submit(session.engine.assembled, part)
        for batches in session.loader.train(session.plan(2), session.rank, session.world, 1):
            session.engine.step(batches, lambda p, b: session.system.loss(p, b, session.generator.targets(b, p)))
        meanwhile = done.result()
    after = session.engine.state()
    session.close()
    return before and {"before": before.weights, "meanwhile": meanwhile.weights, "after": after.weights}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_part_on_its_way_does_not_see_later_steps(
    stage: int, ranks: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    found = ranks(saved_while_training, 2, recipe_for("self_mm", data, engine={"zero": stage}).dump(), tmp_path)[0]
    assert all(torch.equal(found["before"][name], found["meanwhile"][name]) for name in found["before"])
    assert not all(torch.equal(found["before"][name], found["after"][name]) for name in found["before"])
