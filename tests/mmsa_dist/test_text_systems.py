"""Every system behind a text encoder: what it must do on given features, it must do there too."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsa_dist.config import OptimConfig
from mmsa_dist.learning_rates import parameter_groups
from mmsa_dist.systems import System
from shards.batch import Batch
from tests.mmsa_dist.batches import WIDTHS, build, loss_of, padded, ragged, rows, targets_of
from tests.mmsa_dist.encoders import ARCHITECTURES, WORDS, spec_of
from tests.mmsa_dist.test_systems import every_system, finite_and_near_in_bf16, outputs, same

Encoders = Callable[[str], Path]

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
either_way = pytest.mark.parametrize("architecture", ["bert", "distilbert"], ids=["no padding", "in parts"])
"""Roberta goes the way of distilbert."""

KEY_BIASES = ("key.bias", "k_lin.bias")
"""The softmax takes these out again: their gradient is zero but for rounding."""


def reads(cls: type[System], encoder: Path, **text: Any) -> System:
    return build(cls, spec_of(encoder, tuple(WIDTHS), **text))


def spoken(size: int, **values: Any) -> Batch:
    """Token ids for text, features for audio and vision."""
    return ragged(size=size, vocabulary=len(WORDS), **values)


def with_anything_in_padding(batch: Batch) -> Batch:
    more = padded(batch, {"text": 5, "audio": 3, "vision": 4}, None)
    ids = more.values["text"]
    ids = torch.where(more.mask("text"), ids, torch.randint_like(ids, 1, len(WORDS)))
    return replace(more, values={**more.values, "text": ids})


@every_system
@every_architecture
def test_padding_and_company_change_nothing(cls: type[System], architecture: str, encoders: Encoders) -> None:
    """Law 4."""
    batch = spoken(5, absent={"text": [2]})
    system = reads(cls, encoders(architecture))
    together = outputs(system, batch)
    same(together, outputs(system, with_anything_in_padding(batch)))
    for row in range(batch.size):
        alone = outputs(system, rows(batch, slice(row, row + 1), 1.0))
        same(alone, {name: value[row : row + 1] for name, value in together.items()})


@every_system
@every_architecture
def test_every_parameter_learns_the_encoders_too(cls: type[System], architecture: str, encoders: Encoders) -> None:
    """Law 5; without a pooler, which nothing reads."""
    system = reads(cls, encoders(architecture))
    loss_of(system, spoken(15)).backward()  # an odd number: see `test_systems`
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9 or name.endswith(KEY_BIASES), f"{name} gets a gradient of zero"
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(system, OptimConfig())}
    assert groups["text"] | groups["text_no_decay"] == {id(p) for p in system.get_submodule("text.model").parameters()}
    assert sum(len(group) for group in groups.values()) == len(list(system.parameters()))
    assert not any("pooler" in name for name, _ in system.named_parameters())


@every_system
def test_a_frozen_encoder_keeps_still(cls: type[System], encoders: Encoders) -> None:
    system = reads(cls, encoders("bert"), finetune=False).train()
    assert not any(module.training for module in system.get_submodule("text.model").modules())  # no dropout
    loss_of(system, spoken(15)).backward()
    for name, parameter in system.named_parameters():
        learns = not name.startswith("text.")
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name
    assert not {"text", "text_no_decay"} & {group["name"] for group in parameter_groups(system, OptimConfig())}


@every_system
@either_way
def test_it_does_with_an_encoders_states_what_it_does_with_given_features(
    cls: type[System], architecture: str, encoders: Encoders
) -> None:
    """And has no other parameters. Some samples lack text, one of them audio too."""
    batch = spoken(5, absent={"text": [1, 3], "audio": [3]})
    system = reads(cls, encoders(architecture)).eval()
    plain = build(cls, replace(system.spec, text=None), seed=1).eval()
    weights = {name: value for name, value in system.state_dict().items() if not name.startswith("text.")}
    plain.load_state_dict(weights)
    with torch.no_grad():
        given = replace(batch, values={**batch.values, "text": system.get_submodule("text")(batch)})
    same(outputs(system, batch), outputs(plain, given))
    assert loss_of(system, batch).item() == pytest.approx(loss_of(plain, given).item(), rel=1e-6)


@every_system
@either_way
def test_what_stands_in_an_absent_text_changes_nothing(
    cls: type[System], architecture: str, encoders: Encoders
) -> None:
    """Neither in an answer nor in a loss, in which its own task's label has no part."""
    batch = spoken(5, absent={"text": [1, 3]})
    ids, lengths = batch.values["text"].clone(), batch.lengths["text"].clone()
    ids[[1, 3]] = torch.randint_like(ids[[1, 3]], 1, len(WORDS))
    lengths[[1, 3]] = ids.shape[1]
    other = replace(batch, values={**batch.values, "text": ids}, lengths={**batch.lengths, "text": lengths})
    system = reads(cls, encoders(architecture)).eval()
    said = outputs(system, batch)
    assert all(value.isfinite().all() for value in said.values())
    same({"M": said["M"]}, {"M": outputs(system, other)["M"]})
    prediction, targets = system(other), targets_of(other)
    targets["T"] = targets["T"] + 2.0 * ~batch.present["text"]
    found = system.loss(prediction, other, targets).total
    assert found.item() == pytest.approx(loss_of(system, batch).item(), rel=1e-6)


@every_system
@either_way
def test_a_batch_without_any_text_still_gives_every_parameter_a_gradient(
    cls: type[System], architecture: str, encoders: Encoders
) -> None:
    """Zero to the encoder, but there: ranks whose batches differ must reduce the same gradients."""
    system = reads(cls, encoders(architecture))
    loss = loss_of(system, spoken(3, absent={"text": range(3)}))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not name.startswith("text.") or not parameter.grad.any(), name


@every_system
@either_way
def test_bf16_is_finite_and_near(cls: type[System], architecture: str, encoders: Encoders) -> None:
    batch = spoken(6, absent={"text": [1]})
    system = reads(cls, encoders(architecture)).eval()
    finite_and_near_in_bf16(system, batch)
