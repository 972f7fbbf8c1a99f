"""IAM against its equations, its ablation switches, and its loss over ranks and micro-batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmsa_dist.config import EngineConfig, OptimConfig
from mmsa_dist.systems import get_system
from mmsa_dist.systems.base import Losses, Prediction
from mmsa_dist.systems.iam import Iam, IamConfig, by_share
from shards.batch import Batch
from tests.mmsa_dist.batches import build, padded, ragged, rows, spec_for, targets_of
from tests.mmsa_dist.test_layers import affine, softmax

ALL = ("text", "audio", "vision")
TASK = {"text": "T", "audio": "A", "vision": "V"}


def reading(asking: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """softmax(h_i h_j^T) h_j of whole sequences (eqs. 3-5; 6-11 with the shapes made right): (T_i, d)."""
    return softmax(asking @ asked.T) @ asked


def states_of(system: Iam, batch: Batch, row: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """h_n of one sample, its real steps alone, and where in them its vector stands: eqs. 1 and 2, the common width.

    A direction of the LSTM ends at the last step or at the first one. The vector is the layer to the common width of
    both ends, which is no row of the sequence: it is put in front of it as the one that asks.
    """
    states, vectors = {}, {}
    for name in system.spec.widths:
        common = system.common[name]
        steps = batch.values[name][row : row + 1, : int(batch.lengths[name][row])]
        if name == "text":
            states[name] = affine(common, steps[0].numpy())
            vectors[name] = states[name][0]
            continue
        lstm = getattr(system, name)
        hidden = torch.nn.LSTM.forward(lstm, steps)[0][0].detach().numpy()  # PyTorch's own, on a sample without padding
        states[name] = affine(common, hidden)
        vectors[name] = affine(common, np.concatenate([hidden[-1, : lstm.hidden_size], hidden[0, lstm.hidden_size :]]))
    return states, vectors


def regressor(layer: Any, vector: np.ndarray) -> tuple[float, np.ndarray]:
    """Eqs. 14 and 15."""
    feature = np.maximum(affine(layer.first, vector), 0)
    return float(affine(layer.second, feature)[0]), feature


@pytest.mark.parametrize("pooling", ["state", "mean"])
@pytest.mark.parametrize("join", ["sum", "concat"])
def test_forward_is_the_equations(pooling: str, join: str) -> None:
    """Sample by sample over real steps; of whole attentions the row that is read, or the mean of all."""
    batch = ragged(size=4, seed=3)
    system = build(Iam, spec_for(), pooling=pooling, join=join, width=6).eval()
    with torch.no_grad():
        said = system(batch)
    for row in range(batch.size):
        h, vector = states_of(system, batch, row)
        if pooling == "mean":
            asking, vector = h, {name: h[name].mean(0) for name in h}
        else:
            asking = {name: vector[name][None] for name in h}
        H = {}
        for i in ALL:
            others = [reading(asking[i], h[j]).mean(0) for j in ALL if j != i]
            H[i] = sum(others) if join == "sum" else affine(system.join[i], np.concatenate(others))
        F = np.concatenate([*(H[i] for i in ALL), *(vector[i] for i in ALL)])
        answer, feature = regressor(system.answer, F)
        assert said.tasks["M"][row].item() == pytest.approx(answer, abs=1e-5)
        np.testing.assert_allclose(said.features["M"][row], feature, atol=1e-5)
        for name, task in TASK.items():
            own = reading(asking[name], h[name]).mean(0)
            np.testing.assert_allclose(said.features[task][row], own, atol=1e-5)
            assert said.tasks[task][row].item() == pytest.approx(regressor(system.heads[name], own)[0], abs=1e-5)


def test_the_row_of_cls_is_read_from_the_whole_attention() -> None:
    """Asking with [CLS] alone gives what the whole matrix of eq. 5 has in its first row."""
    batch = ragged(size=1)
    system = build(Iam, spec_for(), width=6).eval()
    h, _ = states_of(system, batch, 0)
    np.testing.assert_allclose(system(batch).features["T"][0].detach(), reading(h["text"], h["text"])[0], atol=1e-5)


# The loss ----------------------------------------------------------------------------------------------------------


def losses_of(said: dict[str, Tensor], targets: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, float]:
    """L_s of eqs. 17 and 18, averaged over the batch."""
    y = {task: values.numpy().astype(np.float64) for task, values in targets.items()}
    p = {task: values.detach().numpy().astype(np.float64) for task, values in said.items()}
    found = {"M": float(np.abs(p["M"] - y["M"]).mean())}
    for name, task in TASK.items():
        each = np.tanh(np.abs(y[task] - y["M"])) * np.abs(p[task] - y[task]) * present[name].numpy()
        found[task] = float(each.mean())
    return found


def test_the_loss_is_eqs_17_to_19() -> None:
    batch = ragged(size=7, absent={"vision": [2]})
    system = build(Iam, spec_for())
    prediction, targets = system(batch), targets_of(batch)
    losses = system.loss(prediction, batch, targets)
    L = losses_of(prediction.tasks, targets, batch.present)
    wanted = {task: L[task] / sum(L.values()) * L[task] for task in L}
    assert {task: part.item() for task, part in losses.parts.items()} == pytest.approx(wanted, rel=1e-5)
    assert losses.total.item() == pytest.approx(sum(wanted.values()), rel=1e-5)


def test_no_gradient_goes_through_the_shares() -> None:
    """The slope along L_s is its share alone; through the shares it would be (2 L_s - total) / Σ L."""
    L = torch.tensor([2.0, 1.0, 0.0, 1.0], requires_grad=True)
    by_share(["M", "T", "A", "V"], L, L.detach()).total.backward()
    assert L.grad is not None
    assert L.grad.tolist() == [0.5, 0.25, 0.0, 0.25]


def test_losses_of_zero_are_zero() -> None:
    L = torch.zeros(4, requires_grad=True)
    losses = by_share(["M", "T", "A", "V"], L, L.detach())
    losses.total.backward()
    assert losses.total.item() == 0
    assert L.grad is not None and L.grad.tolist() == [0, 0, 0, 0]


def test_in_the_first_epoch_the_answer_alone_is_learned() -> None:
    """Generated labels start as y_m, so eq. 17 is zero and the answer's share is one."""
    batch = ragged(size=5)
    system = build(Iam, spec_for())
    prediction = system(batch)
    losses = system.loss(prediction, batch, dict.fromkeys("MTAV", batch.labels["M"]))
    assert [losses.parts[task].item() for task in "TAV"] == [0, 0, 0]
    assert losses.total.item() == pytest.approx((prediction.tasks["M"] - batch.labels["M"]).abs().mean().item())


OPTIM = OptimConfig(lr={"text": 1e-3, "audio": 3e-3, "vision": 3e-3, "rest": 3e-3})  # type: ignore[arg-type]


def global_batch(step: int) -> Batch:
    """12 samples, of which the last is filler, and one lacks a modality."""
    batch = ragged(size=12, seed=step, absent={"audio": [step]})
    weight = torch.ones(12)
    weight[11] = 0.0
    return replace(batch, weight=weight, norm=11.0)


def small(dropout: float) -> Iam:
    torch.manual_seed(0)
    return Iam(IamConfig(width=6, dropout=dropout), spec_for())


def plain(steps: int) -> list[float]:
    """The joint batch in plain torch."""
    system = small(0.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in system.named_parameters() if system.parameter_group(n) == group], "lr": lr}
            for group, lr in (("audio", 3e-3), ("vision", 3e-3), ("rest", 3e-3))
        ],
        weight_decay=0.0,
    )
    losses = []
    for step in range(steps):
        batch = global_batch(step)
        loss = system.loss(system(batch), batch, targets_of(batch)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def stepped(stage: int, accumulation: int, steps: int, dropout: float = 0.0) -> tuple[list[float], list[Tensor]]:
    """The same through the engine, on this rank's micro-batches: losses, and what was said in the last step."""
    from mmsa_dist.engine import Engine

    rank, parts = dist.get_rank(), dist.get_world_size() * accumulation
    system = small(dropout)
    optim = OPTIM.model_copy(update={"accumulation": accumulation})
    engine = Engine(system, optim, EngineConfig(zero=stage), micro_batch=12 // parts, total_steps=100)  # type: ignore[arg-type]
    n = 12 // parts
    losses: list[float] = []
    seen: list[Tensor] = []

    def loss_of(prediction: Prediction, part: Batch) -> Losses:
        seen.append(prediction.tasks["M"].detach().clone())
        return system.loss(prediction, part, targets_of(part))

    for step in range(steps):
        batch = global_batch(step)
        slices = [slice(i * n, (i + 1) * n) for i in range(rank * accumulation, (rank + 1) * accumulation)]
        torch.manual_seed(step)
        seen.clear()
        losses.append(engine.step([rows(batch, own, 11.0 / parts) for own in slices], loss_of).loss)
    engine.close()
    return losses, seen


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2), (1, 3)])
def test_ranks_and_micro_batches_are_the_joint_batch(ranks: Callable[..., Any], world: int, accumulation: int) -> None:
    """Law 1 for eq. 19, whose shares are no mean over micro-batches."""
    wanted = plain(8)
    for stage in (0, 3) if (world, accumulation) == (2, 2) else (1,):
        for losses, _ in ranks(stepped, world, stage, accumulation, 8):
            assert losses == pytest.approx(wanted, abs=1e-5), stage


def test_the_pass_before_the_step_draws_the_same_dropout(ranks: Callable[..., Any]) -> None:
    """Micro-batches are gone through twice: first for the shares, then to learn from; with the same units dropped."""
    _, seen = ranks(stepped, 1, 1, 2, 1, 0.5)[0]
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    calm = ranks(stepped, 1, 1, 2, 1, 0.0)[0][1]
    assert not torch.equal(seen[0], calm[0]), "dropout must matter here"


# Ablation switches -------------------------------------------------------------------------------------------------

SWITCHES: list[tuple[dict[str, Any], int, set[str]]] = [
    # what is set, how many vectors F holds, the terms of the loss
    ({}, 6, {"M", "T", "A", "V"}),
    ({"bi": False}, 3, {"M", "T", "A", "V"}),
    ({"uni": False}, 6, {"M", "T", "A", "V"}),
    ({"weight": False}, 6, {"M", "T", "A", "V"}),
    ({"bi": False, "uni": False, "weight": False}, 3, {"M", "T", "A", "V"}),
    ({"bi": False, "join": "concat"}, 3, {"M", "T", "A", "V"}),
    ({"join": "concat", "pooling": "mean"}, 6, {"M", "T", "A", "V"}),
    ({"subtasks": ("text",)}, 6, {"M", "T"}),
    ({"subtasks": ()}, 6, {"M"}),
]


@pytest.mark.parametrize(("values", "vectors", "terms"), SWITCHES, ids=[str(row[0]) for row in SWITCHES])
def test_a_switch_does_what_it_says(values: dict[str, Any], vectors: int, terms: set[str]) -> None:
    """F is as wide as it says, the loss has its terms; what is left learns, and padding is still nothing."""
    batch = ragged(size=12)
    system = build(Iam, spec_for(), width=5, **values)
    assert system.answer.first.in_features == 5 * vectors
    assert bool(system.join) == (values.get("join") == "concat" and values.get("bi", True))
    losses = system.loss(system(batch), batch, targets_of(batch))
    assert set(losses.parts) == terms
    losses.total.backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    more = padded(batch, {"text": 3, "audio": 5, "vision": 2}, None)
    torch.testing.assert_close(system(more).tasks["M"], system(batch).tasks["M"], atol=1e-6, rtol=0)


def test_without_uni_the_heads_read_h_n() -> None:
    batch = ragged(size=3)
    system = build(Iam, spec_for(), uni=False, width=5).eval()
    features = system(batch).features
    for row in range(3):
        _, vectors = states_of(system, batch, row)
        for name, task in TASK.items():
            np.testing.assert_allclose(features[task][row].detach(), vectors[name], atol=1e-5)


def test_without_bi_a_modality_knows_nothing_of_the_others() -> None:
    """The slope of the answer along audio does not hang on vision's steps once the ReLU is taken out."""
    batch = ragged(size=3)
    for bi, depends in ((False, False), (True, True)):
        system = build(Iam, spec_for(), bi=bi, width=5).eval()
        fused: list[Tensor] = []
        system.answer.register_forward_hook(lambda module, given, out, fused=fused: fused.append(given[0].detach()))
        system(batch)
        system(replace(batch, values={**batch.values, "vision": batch.values["vision"] + 1}))
        changed = (fused[0] != fused[1]).any(0)
        own = slice(-5, None)  # h_v stands last
        assert changed[own].all()
        assert changed[:-5].any().item() == depends


def test_without_weight_the_losses_are_added() -> None:
    batch = ragged(size=6)
    system = build(Iam, spec_for(), weight=False)
    prediction, targets = system(batch), targets_of(batch)
    losses = system.loss(prediction, batch, targets)
    wanted = losses_of(prediction.tasks, targets, batch.present)
    assert {task: part.item() for task, part in losses.parts.items()} == pytest.approx(wanted, rel=1e-5)
    assert losses.within is None and not system.weighs_terms


@pytest.mark.parametrize("modalities", [("text",), ("audio", "vision")])
def test_fewer_modalities(modalities: tuple[str, ...]) -> None:
    """One leaves nothing between modalities, two have one reading each."""
    system = build(Iam, spec_for(modalities), width=5)
    assert system.answer.first.in_features == {1: 5, 2: 20}[len(modalities)]
    prediction = system(ragged(modalities=modalities))
    assert set(prediction.tasks) == {"M", *(TASK[name] for name in modalities)}


def test_a_label_generator_reads_f_and_the_attended() -> None:
    """Eq. 16: F* for the answer, H_n for the modalities."""
    cls = get_system("iam")
    assert cls.labels == "ulgm"
    assert build(cls, spec_for(), width=5).feature_widths() == {"M": 30, "T": 5, "A": 5, "V": 5}
