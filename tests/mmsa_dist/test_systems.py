"""What every system must do, ours and a third party's alike: the same tests over the registry."""

import copy
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsa_dist.systems import System, get_system, system_names
from mmsa_dist.systems.base import GROUPS
from shards.batch import Batch
from tests.mmsa_dist.batches import (
    SMALL,
    WIDTHS,
    alternatives,
    build,
    loss_of,
    loss_of_step,
    make_batch,
    padded,
    ragged,
    rows,
    spec_for,
    targets_of,
)

GOLDEN = Path(__file__).parent / "golden"
SUBSETS = [("text", "audio", "vision"), ("text", "audio"), ("audio", "vision"), ("text",), ("vision",)]

every_system = pytest.mark.parametrize("cls", [get_system(name) for name in system_names()], ids=system_names())
every_subset = pytest.mark.parametrize("modalities", SUBSETS, ids="+".join)


def outputs(system: System, batch: Batch) -> dict[str, Tensor]:
    """All that a system says of a batch, in evaluation mode."""
    system.eval()
    with torch.no_grad():
        prediction = system(batch)
    return {**prediction.tasks, **{f"feature {name}": value for name, value in prediction.features.items()}}


@cache
def plain(cls: type[System]) -> System:
    """Built once, for tests that look at it many times and leave it as it is."""
    return build(cls, spec_for())


def same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_system
@every_subset
def test_a_batch_gets_an_answer_in_label_units(cls: type[System], modalities: tuple[str, ...]) -> None:
    batch = ragged(modalities=modalities)
    system = build(cls, spec_for(modalities))
    prediction = system(batch)
    assert set(prediction.tasks) >= {"M"}
    for answer in prediction.tasks.values():
        assert answer.shape == (batch.size,)
        assert answer.dtype == torch.float32
    assert {name: feature.shape[1] for name, feature in prediction.features.items()} == system.feature_widths()
    losses = system.loss(prediction, batch, targets_of(batch))
    assert losses.total.shape == ()
    assert losses.total.item() == pytest.approx(sum(part.item() for part in losses.parts.values()), rel=1e-6)
    assert not any(part.requires_grad for part in losses.parts.values())


# Law 4 -------------------------------------------------------------------------------------------------------------


@every_system
@pytest.mark.parametrize("fill", [0.0, None], ids=["zeros", "anything"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_padding_changes_nothing(cls: type[System], fill: float | None, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    lengths = {name: data.draw(st.lists(st.integers(1, 12), min_size=size, max_size=size)) for name in WIDTHS}
    extra = {name: data.draw(st.integers(0, 9)) for name in WIDTHS}
    batch = make_batch(lengths, seed=data.draw(st.integers(0, 99)))
    system = plain(cls)
    same(outputs(system, batch), outputs(system, padded(batch, extra, fill)))


@every_system
def test_padding_changes_no_gradient(cls: type[System]) -> None:
    batch = ragged()
    system = build(cls, spec_for())
    gradients = []
    for one in (batch, padded(batch, {"text": 3, "audio": 8, "vision": 5}, None)):
        system.zero_grad()
        loss_of(system, one).backward()
        gradients.append({name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None})
    same(*gradients, atol=1e-5)


@every_system
def test_a_sample_is_answered_alike_alone_and_in_company(cls: type[System]) -> None:
    batch = ragged(size=5)
    system = build(cls, spec_for())
    together = outputs(system, batch)
    for row in range(batch.size):
        alone = outputs(system, rows(batch, slice(row, row + 1), 1.0))
        same(alone, {name: value[row : row + 1] for name, value in together.items()})


# Shapes of batches -------------------------------------------------------------------------------------------------


@every_system
@pytest.mark.parametrize(
    "lengths",
    [
        {"text": [1], "audio": [1], "vision": [1]},
        {"text": [7], "audio": [1], "vision": [30]},
        {"text": [1, 1, 1], "audio": [1, 1, 1], "vision": [1, 1, 1]},
        {"text": [8, 8, 8], "audio": [8, 8, 8], "vision": [8, 8, 8]},
        {"text": [1, 2, 3], "audio": [9, 5, 1], "vision": [2, 40, 17]},
    ],
    ids=["one sample of one step", "one sample", "one step each", "equal lengths", "different lengths"],
)
def test_any_lengths_train(cls: type[System], lengths: dict[str, list[int]]) -> None:
    batch = make_batch(lengths)
    system = build(cls, spec_for(), dropout=True)
    loss = loss_of(system, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())


# Law 5 -------------------------------------------------------------------------------------------------------------


@every_system
@every_subset
def test_every_parameter_learns_and_has_one_group(cls: type[System], modalities: tuple[str, ...]) -> None:
    batch = ragged(size=15, modalities=modalities)  # an odd number: gradients of an L1 loss, ±1 each, cannot cancel
    system = build(cls, spec_for(modalities))
    loss_of(system, batch).backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.abs().max() > 1e-9, f"{name} gets a gradient of zero"
        assert system.parameter_group(name) in GROUPS
    for modality in ("audio", "vision"):
        names = [name for name, _ in system.named_parameters() if system.parameter_group(name) == modality]
        assert bool(names) == (modality in modalities)


def fingerprint(cls: type[System], batch: Batch, **values: Any) -> list[Tensor]:
    """All that a hyper-parameter can change: the parameters' shapes, what is said in training, and the loss."""
    torch.manual_seed(0)
    system = cls(cls.Config(**{**SMALL.get(cls.name, {}), **values}), spec_for())
    shapes = [torch.tensor([*parameter.shape, hash(name)]) for name, parameter in system.named_parameters()]
    torch.manual_seed(1)
    prediction = system.train()(batch)
    losses = system.loss(prediction, batch, targets_of(batch))
    said = [value.detach() for value in (*prediction.tasks.values(), *prediction.features.values())]
    return [*shapes, *said, losses.total.detach()]


def hyper_parameters() -> list[Any]:
    classes = [get_system(name) for name in system_names()]
    return [pytest.param(cls, field, id=f"{cls.name}-{field}") for cls in classes for field in cls.Config.model_fields]


@pytest.mark.parametrize(("cls", "field"), hyper_parameters())
def test_every_hyper_parameter_changes_something(cls: type[System], field: str) -> None:
    batch = ragged(size=8)
    before = fingerprint(cls, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, fingerprint(cls, batch), strict=True)), "not repeatable"
    for value in alternatives(cls.Config, field):
        try:
            after = fingerprint(cls, batch, **{field: value})
        except ValidationError:
            continue
        assert len(after) != len(before) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return
    pytest.fail(f"no other valid value of {field} was found")


@every_system
def test_every_hyper_parameter_has_its_help(cls: type[System]) -> None:
    for name, field in cls.Config.model_fields.items():
        assert field.description, f"{cls.__name__}.Config.{name} has no docstring"


# Absent modalities -------------------------------------------------------------------------------------------------


@every_system
@pytest.mark.parametrize("lacking", list(WIDTHS))
def test_what_stands_in_an_absent_modality_changes_nothing(cls: type[System], lacking: str) -> None:
    batch = ragged(size=5, absent={lacking: [1, 3]})
    values, lengths = batch.values[lacking].clone(), batch.lengths[lacking].clone()
    values[[1, 3]] = torch.randn_like(values[[1, 3]]) * 9
    lengths[[1, 3]] = values.shape[1]
    other = replace(batch, values={**batch.values, lacking: values}, lengths={**batch.lengths, lacking: lengths})
    system = build(cls, spec_for())
    same({"M": outputs(system, batch)["M"]}, {"M": outputs(system, other)["M"]}, atol=0)
    assert loss_of(system, batch).item() == loss_of(system, other).item()


@every_system
@pytest.mark.parametrize("has", list(WIDTHS))
def test_a_sample_with_one_modality_is_answered_from_it(cls: type[System], has: str) -> None:
    lacks = [name for name in WIDTHS if name != has]
    batch = ragged(size=4, absent={name: [0] for name in lacks})
    values = batch.values[has].clone()
    values[0] = -values[0]
    system = build(cls, spec_for())
    before, after = outputs(system, batch), outputs(system, replace(batch, values={**batch.values, has: values}))
    assert (before["M"][0] - after["M"][0]).abs() > 1e-5
    assert before["M"].isfinite().all()


@every_system
@pytest.mark.parametrize(
    "lacking", [("vision",), ("audio", "vision"), ("text",), ("text", "audio", "vision")], ids="+".join
)
def test_a_modality_absent_in_a_whole_batch_still_gives_every_parameter_a_gradient(
    cls: type[System], lacking: tuple[str, ...]
) -> None:
    """Zero, but there: ranks whose batches differ must reduce the same gradients."""
    batch = ragged(size=3, absent={name: range(3) for name in lacking})
    system = build(cls, spec_for())
    loss = loss_of(system, batch)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name in lacking:
        own = [p for n, p in system.named_parameters() if system.parameter_group(n) == name]
        assert all(p.grad is not None and not p.grad.any() for p in own)


@every_system
def test_an_absent_modality_has_no_part_in_its_task(cls: type[System]) -> None:
    batch = ragged(size=6, absent={"audio": [2]})
    system = build(cls, spec_for())
    prediction = system(batch)
    targets = targets_of(batch)
    before = system.loss(prediction, batch, targets).parts
    after = system.loss(prediction, batch, {**targets, "A": targets["A"] + torch.eye(6)[2]}).parts
    for task in before:
        assert before[task].item() == after[task].item()


# Numbers -----------------------------------------------------------------------------------------------------------


@every_system
def test_bf16_is_finite_and_near(cls: type[System]) -> None:
    batch = ragged(size=6, absent={"vision": [1]})
    system = build(cls, spec_for())
    finite_and_near_in_bf16(system, batch)


def finite_and_near_in_bf16(system: System, batch: Batch) -> None:
    exact = outputs(system, batch)["M"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(system, batch)
        loss.backward()
        near = outputs(system, batch)["M"]
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())
    torch.testing.assert_close(near, exact, atol=0.05, rtol=0.1)
    # DeepSpeed's bf16 converts the parameters themselves
    half = copy.deepcopy(system).bfloat16()
    loss_of(half, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    torch.testing.assert_close(outputs(half, batch)["M"], exact, atol=0.05, rtol=0.1)


@every_system
@every_subset
def test_saved_and_loaded_it_says_the_same(cls: type[System], modalities: tuple[str, ...], tmp_path: Path) -> None:
    batch = ragged(modalities=modalities)
    system = build(cls, spec_for(modalities))
    save_file(system.state_dict(), tmp_path / "weights.safetensors")
    other = build(cls, spec_for(modalities), seed=1)
    assert not torch.equal(outputs(system, batch)["M"], outputs(other, batch)["M"])
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    same(outputs(system, batch), outputs(other, batch), atol=0)


SQUARED = ("ufen_mtfn",)
"""Systems that learn a squared error: what is left of it is the square of what is left of the distance."""


@every_system
def test_it_can_learn_32_samples_by_heart(cls: type[System]) -> None:
    """Until answers lie 33 times nearer to the labels than at first, 0.05 of a range of 6."""
    batch = ragged(size=32, longest=4)
    system = build(cls, spec_for())
    optimizer = torch.optim.Adam(system.parameters(), lr=5e-3, fused=True)  # quicker where parameters are many
    first = loss = loss_of(system, batch).item()
    bound = first * 0.03 ** (2 if cls.name in SQUARED else 1)
    for _ in range(600):
        optimizer.zero_grad()
        total = loss_of(system, batch)
        total.backward()
        optimizer.step()
        loss = min(loss, total.item())
        if loss < bound:
            return
    pytest.fail(f"from {first:.3f} only to {loss:.3f}, not to {bound:.3f}")


# Law 1's kernel ----------------------------------------------------------------------------------------------------


@every_system
def test_the_mean_over_two_halves_is_the_joint_batch(cls: type[System]) -> None:
    """Losses and gradients, with filler in one half and an absent modality in the other."""
    batch = ragged(size=8, absent={"vision": [1]})
    weight = torch.ones(8)
    weight[7] = 0.0
    batch = replace(batch, weight=weight, norm=7.0)
    system = build(cls, spec_for())
    joint = loss_of(system, batch)
    joint.backward()
    wanted = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
    system.zero_grad()
    mean = loss_of_step(system, [rows(batch, half, 7.0 / 2) for half in (slice(0, 4), slice(4, 8))])
    mean.backward()
    assert mean.item() == pytest.approx(joint.item(), rel=1e-6)
    same(wanted, {name: p.grad for name, p in system.named_parameters() if p.grad is not None})


@every_system
def test_filler_of_weight_zero_changes_nothing(cls: type[System]) -> None:
    batch = ragged(size=5)
    weight = torch.ones(5)
    weight[4] = 0.0
    batch = replace(batch, weight=weight, norm=4.0)
    values = {name: torch.where(weight[:, None, None] > 0, x, x + 5) for name, x in batch.values.items()}
    labels = {name: torch.where(weight > 0, x, x + 5) for name, x in batch.labels.items()}
    system = build(cls, spec_for())
    assert loss_of(system, batch).item() == loss_of(system, replace(batch, values=values, labels=labels)).item()


# Golden losses -----------------------------------------------------------------------------------------------------


@every_system
def test_first_losses_are_the_golden_ones(cls: type[System]) -> None:
    """A change that should not change the computation reproduces them. One that should is committed together with
    new ones: ``MMSA_GOLDEN=write pytest tests/mmsa_dist/test_systems.py -k golden``."""
    file = GOLDEN / f"{cls.name}.json"
    if cls.__module__.partition(".")[0] != "mmsa_dist" and not file.exists():
        pytest.skip("a third party's system")
    system = build(cls, spec_for())
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-3)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_of(system, ragged(size=16, seed=step, absent={"audio": [step]}))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if os.environ.get("MMSA_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(json.dumps({"system": cls.name, "losses": losses}, indent=1) + "\n")
    np.testing.assert_allclose(losses, json.loads(file.read_text())["losses"], rtol=1e-5)
