"""The formula of a rank's memory, beside the bytes of the tensors of real ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import held
from mmsa_dist.memory import Sizes, checkpoint_bytes, need, sizes_of
from mmsa_dist.recipe import Recipe, from_dict
from mmsa_dist.session import open_index
from tests.data import packed
from tests.mmsa_dist.test_laws import recipe_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("memory"), samples=60)


def wide(data: Path, stage: int, precision: str, offload: str = "none", **text: Any) -> Recipe:
    """Self-MM with a layer so wide that batches weigh nothing: 16 million numbers."""
    engine = {"zero": stage, "precision": precision, "offload": offload}
    return recipe_for("self_mm", data, model={"post_fusion_dim": 4000}, engine=engine, text=text)


WITHIN = [*((stage, "fp32", world) for stage in range(4) for world in (1, 2)), (3, "fp32", 4), (3, "bf16", 2)]
"""Of all stages, precisions and numbers of ranks, those that are no slow tests."""


@pytest.mark.parametrize(
    ("stage", "precision", "world"),
    [
        pytest.param(stage, precision, world, marks=[] if (stage, precision, world) in WITHIN else pytest.mark.slow)
        for stage, precision in [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in (1, 2, 3))]
        for world in (1, 2, 4)
    ],
)
def test_ranks_hold_what_the_formula_says(
    stage: int, precision: str, world: int, ranks: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    for found in ranks(held, world, wide(data, stage, precision).dump(), tmp_path):
        formula, measured = found["formula"], found["measured"]
        assert measured["state"] == pytest.approx(formula["state"], rel=0.05)
        assert measured["step"] < 1.01 * formula["step"]
        if stage < 2:  # of the others it is the most that there can be
            assert measured["step"] == pytest.approx(formula["step"], rel=0.05)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_the_host_keeps_is_in_the_formula_too(
    stage: int, world: int, ranks: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """On a CPU both halves are the process's: their sum is what can be measured."""
    for precision in ("fp32", "bf16"):
        for found in ranks(held, world, wide(data, stage, precision, "optimizer").dump(), tmp_path):
            formula, measured = found["formula"], found["measured"]
            assert measured["state"] == pytest.approx(formula["state"] + formula["host"], rel=0.05), precision
            assert measured["step"] < 1.01 * (formula["step"] + formula["host"]), precision


def test_the_host_takes_off_a_gpu_what_adam_keeps() -> None:
    """All 12 bytes a number of it, and the gradients of the step."""
    sizes = Sizes({"rest": 10**9}, 0, 10**6)
    for stage in (1, 2, 3):
        plain, less = (need(sizes, stage, 1, "bf16", 10**6, offload) for offload in (False, True))
        assert plain.state - less.state >= 11.9e9 and plain.step - less.step >= 13.9e9 and less.host > 16e9
    assert need(sizes, 0, 1, "fp32", 10**6, True) == need(sizes, 0, 1, "fp32", 10**6)


def test_the_text_encoder_counts_and_is_not_loaded(data: Path, encoders: Callable[[str], Path]) -> None:
    recipe = wide(data, 1, "fp32", encoder=str(encoders("bert")))
    index = open_index(recipe)
    learning = sizes_of(recipe, index)
    frozen = sizes_of(from_dict({**recipe.dump(), "text": {**recipe.text.model_dump(), "finetune": False}}), index)
    assert frozen.frozen == learning.trained["text"] > 0 and "text" not in frozen.trained
    assert frozen.trained["rest"] == learning.trained["rest"]
    assert checkpoint_bytes(learning) - checkpoint_bytes(frozen) == 8 * frozen.frozen  # moments


def test_labels_that_are_divided_weigh_less_on_each_rank(data: Path) -> None:
    values = wide(data, 1, "fp32").dump()
    index = open_index(from_dict(values))
    whole = sizes_of(from_dict(values), index)
    divided = sizes_of(from_dict({**values, "labels": {"divide_above": 0}}), index)
    assert whole.label_state == divided.label_state > 0 and divided.label_state_divided
    less = [need(sizes, 1, 4, "fp32", 10**6).state for sizes in (divided, whole)]
    assert less[1] - less[0] == whole.label_state - whole.label_state // 4


def test_stages_of_the_papers_of_zero() -> None:
    """Rajbhandari et al. 2020: with mixed precision 16 bytes a number, of which a stage shards 12, 14 or all."""
    sizes = Sizes({"rest": 10**9}, 0, 10**6)
    given = {stage: need(sizes, stage, 64, "bf16", 1).step / 1e9 for stage in (1, 2, 3)}
    assert given[1] == pytest.approx(4 + 12 / 64)
    assert given[2] == pytest.approx(2 + 14 / 64, rel=0.01)
    assert given[3] == pytest.approx(16 / 64, rel=0.01)
