"""Ranks of ZeRO-3 build a system together: none but the first ever holds it whole, and it is the same system."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmsa_dist.recipe import from_dict
from mmsa_dist.systems import system_names
from tests.data import packed
from tests.mmsa_dist.test_laws import recipe_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("divided"), samples=40)


def weights(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, torch.Tensor] | None, torch.Tensor]:
    """A fresh session's, whole, on the first rank; and each rank's random numbers after it."""
    from mmsa_dist.session import open_session

    session = open_session(from_dict(recipe), folder, dist.get_rank(), dist.get_world_size())
    state = session.engine.state()
    buffers = {name: buffer.clone() for name, buffer in session.system.named_buffers()}
    assert not any(t.is_meta for t in [*session.system.parameters(), *buffers.values()])
    session.close()
    return state and state.weights | buffers, torch.rand(4)


@pytest.mark.parametrize("system", system_names())
@pytest.mark.parametrize("pretrained", [None, True, False])
def test_a_divided_system_is_the_one_that_a_rank_alone_builds(
    system: str,
    pretrained: bool | None,
    ranks: Callable[..., Any],
    data: Path,
    tmp_path: Path,
    encoders: Callable[[str], Path],
) -> None:
    text = {} if pretrained is None else {"encoder": str(encoders("bert")), "pretrained": pretrained}
    recipe = recipe_for(system, data, text=text)
    ((alone, numbers),) = ranks(weights, 1, recipe.dump(), tmp_path)
    found = ranks(weights, 2, recipe_for(system, data, text=text, engine={"zero": 3}).dump(), tmp_path)
    together = found[0][0]
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert all(torch.equal(rest, numbers) for _, rest in found)


def held_while_built(recipe: dict[str, Any], folder: Path) -> dict[str, int]:
    """Bytes of this rank's tensors: before every 16th module is divided, at most; and all weights'."""
    import deepspeed

    from benchmarks.memory import tensor_bytes
    from mmsa_dist.session import open_session

    plain, before, seen, calls = deepspeed.zero.Init, tensor_bytes(), [], itertools.count()

    def watched(*args: Any, **options: Any) -> Any:
        if next(calls) % 16 == 0:  # to count takes a while
            seen.append(tensor_bytes() - before)
        return plain(*args, **options)

    deepspeed.zero.Init = watched
    try:
        session = open_session(from_dict(recipe), folder, dist.get_rank(), dist.get_world_size())
    finally:
        deepspeed.zero.Init = plain
    sizes = [4 * p.ds_numel for p in session.system.parameters()]
    session.close()
    return {"most": max(seen), "whole": sum(sizes), "largest": max(sizes), "divisions": next(calls)}


def test_no_rank_but_the_first_holds_it_whole(
    ranks: Callable[..., Any], data: Path, tmp_path: Path, encoders: Callable[[str], Path]
) -> None:
    deep = tmp_path / "deep"
    shutil.copytree(encoders("bert"), deep)
    shape = json.loads((deep / "config.json").read_text())
    shape |= {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 12}
    (deep / "config.json").write_text(json.dumps(shape))
    text = {"encoder": str(deep), "pretrained": False}
    recipe = recipe_for("self_mm", data, engine={"zero": 3}, text=text)
    first, *others = ranks(held_while_built, 4, recipe.dump(), tmp_path)
    assert first["whole"] > 36e6 and first["divisions"] > 50
    assert first["most"] >= first["whole"]
    for other in others:
        assert other["most"] < 1.02 * first["whole"] / 4 + 2 * first["largest"] < first["whole"] / 3
