"""Subsets of the unimodal tasks, of every system that has them: the papers' ablations of multi-task learning."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from mmsa_dist.errors import ConfigError
from mmsa_dist.systems import System, get_system, system_names
from shards.utterance import UNIMODAL_TASK
from tests.mmsa_dist.batches import WIDTHS, build, padded, ragged, spec_for, targets_of
from tests.mmsa_dist.test_systems import outputs, same

SUBSETS = [chosen for n in range(4) for chosen in combinations(WIDTHS, n)]
MORE: dict[str, set[str]] = {"ufen_mtfn": {"F"}}
"""Tasks of a system beside the multimodal and the unimodal ones."""
OWN: dict[str, dict[str, Any]] = {"ufen_mtfn": {"unimodal_targets": "own"}}
"""What lets the unimodal tasks of a system learn labels of their own, where that is not the default."""

with_subtasks = [cls for cls in map(get_system, system_names()) if "subtasks" in cls.Config.model_fields]
every_system = pytest.mark.parametrize("cls", with_subtasks, ids=lambda cls: cls.name)
every_subset = pytest.mark.parametrize("chosen", SUBSETS, ids=lambda chosen: "+".join(chosen) or "none")


def head_of(name: str) -> tuple[str, str]:
    """What the parameters of a modality's head may begin with: some systems go by modality, some by task."""
    return f"heads.{name}.", f"heads.{UNIMODAL_TASK[name]}."


def test_these_systems_have_unimodal_tasks() -> None:
    assert {cls.name for cls in with_subtasks} >= {"iam", "self_mm", "sugrm", "tam_ulag", "ufen_mtfn"}


@every_system
@every_subset
def test_a_subset_has_its_heads_and_terms_and_no_others(cls: type[System], chosen: tuple[str, ...]) -> None:
    """Nothing else of the system is gone, and padding is still nothing."""
    batch = ragged(size=12)
    system = build(cls, spec_for(), subtasks=chosen)
    names, full = ({name for name, _ in built.named_parameters()} for built in (system, build(cls, spec_for())))
    gone = set()
    for name in set(WIDTHS) - set(chosen):
        heads = {parameter for parameter in full if parameter.startswith(head_of(name))}
        assert heads, f"{name} has no head of its own"
        gone |= heads
    assert names == full - gone
    tasks = {"M", *(UNIMODAL_TASK[name] for name in chosen)}
    prediction = system(batch)
    assert set(prediction.tasks) == tasks | MORE.get(cls.name, set())
    # of the tasks left out there need be no label
    targets = {task: label for task, label in targets_of(batch).items() if task in tasks}
    assert set(system.loss(prediction, batch, targets).parts) == set(prediction.tasks)
    more = padded(batch, {"text": 3, "audio": 5, "vision": 2}, None)
    same(outputs(system, batch), outputs(system, more))


@every_system
@every_subset
def test_a_subset_trains(cls: type[System], chosen: tuple[str, ...]) -> None:
    """Every parameter that is left gets a gradient, and the loss falls."""
    batch = ragged(size=15)  # an odd number: gradients of an L1 loss, ±1 each, cannot cancel
    system = build(cls, spec_for(), subtasks=chosen)
    optimizer = torch.optim.Adam(system.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = system.loss(system(batch), batch, targets_of(batch)).total
        loss.backward()
        for name, parameter in system.named_parameters() if step == 0 else ():
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_system
@every_subset
def test_a_label_generator_reads_the_features_of_a_subset(cls: type[System], chosen: tuple[str, ...]) -> None:
    """Those of the answer and of the tasks there are, whose labels it makes: each label has a part in the loss."""
    if not chosen and cls.name in OWN:
        with pytest.raises(ConfigError, match="own needs a unimodal task"):
            build(cls, spec_for(), subtasks=chosen, **OWN[cls.name])
        return
    batch = ragged(size=7)  # odd too
    system = build(cls, replace(spec_for(), tasks=("M",)), subtasks=chosen, **OWN.get(cls.name, {}))
    tasks = {"M", *(UNIMODAL_TASK[name] for name in chosen)}
    prediction = system(batch)
    found = {task: feature.shape[1] for task, feature in prediction.features.items()}
    assert found == system.feature_widths() and set(found) == tasks
    before = system.loss(prediction, batch, targets_of(batch))
    for task in tasks:
        other = {**targets_of(batch), task: targets_of(batch)[task] + 0.5}
        assert system.loss(prediction, batch, other).parts[task] != before.parts[task], task
