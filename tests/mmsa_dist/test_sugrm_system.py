"""SUGRM's network against its equations, and its ablation switches."""

from typing import Any

import numpy as np
import pytest
import torch

from mmsa_dist.layers.recalibration import Recalibration
from mmsa_dist.systems import Sugrm
from shards.batch import Batch
from tests.mmsa_dist.batches import WIDTHS, build, make_batch, padded, ragged, spec_for, targets_of
from tests.mmsa_dist.test_layers import affine
from tests.mmsa_dist.test_self_mm import numpy_head, numpy_lstm, sigmoid


def numpy_recalibrated(layer: Recalibration, batch: Batch) -> list[dict[str, np.ndarray]]:
    """Sample by sample: modality -> its real steps (T, D), gated. An absent modality has none, and a mean of zero."""
    found = []
    for row in range(batch.size):
        steps = {
            name: batch.values[name][row, : int(batch.lengths[name][row]) * bool(batch.present[name][row])].numpy()
            for name in layer.gates
        }
        means = [x.mean(0) if len(x) else np.zeros(x.shape[1], np.float32) for x in steps.values()]
        z = np.maximum(affine(layer.squeeze, np.concatenate(means)), 0)
        found.append({name: x * 2 * sigmoid(affine(layer.gates[name], z)) for name, x in steps.items()})
    return found


def recalibrated(layer: Recalibration, batch: Batch) -> dict[str, torch.Tensor]:
    return layer(batch.values, {name: batch.mask(name) for name in batch.values}, batch.present)


def test_recalibration_is_the_equation() -> None:
    """Means over real steps only, an absent modality as zeros, a gate per column on every step."""
    torch.manual_seed(0)
    batch = ragged(size=5, absent={"audio": [1], "text": [3]})
    layer = Recalibration(WIDTHS)
    found = recalibrated(layer, padded(batch, {"text": 2, "vision": 4}, None))
    for row, wanted in enumerate(numpy_recalibrated(layer, batch)):
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name][row, : len(values)].detach().numpy(), values, atol=1e-6)


def test_the_squeeze_is_a_quarter_as_wide() -> None:
    layer = Recalibration({"text": 768, "audio": 5, "vision": 20})
    assert (layer.squeeze.in_features, layer.squeeze.out_features) == (793, 198)
    assert {name: gate.out_features for name, gate in layer.gates.items()} == {"text": 768, "audio": 5, "vision": 20}
    assert Recalibration({"vision": 2}).squeeze.out_features == 1


def test_one_modality_weighs_the_others() -> None:
    """What distinguishes it from a gate of each modality's own."""
    torch.manual_seed(0)
    layer = Recalibration(WIDTHS)
    batch = ragged(size=3)
    louder = {**batch.values, "audio": batch.values["audio"] + 5}
    masks = {name: batch.mask(name) for name in WIDTHS}
    before, after = layer(batch.values, masks, batch.present), layer(louder, masks, batch.present)
    assert not torch.allclose(before["text"], after["text"])
    gates = after["vision"] / batch.values["vision"]
    assert (gates[batch.mask("vision")] > 0).all() and (gates[batch.mask("vision")] < 2).all()


@pytest.mark.parametrize("recalibrate", [True, False])
def test_the_network_is_the_papers(recalibrate: bool) -> None:
    batch = make_batch({"text": [3, 1], "audio": [2, 6], "vision": [5, 4]})
    system: Any = build(Sugrm, spec_for(), recalibrate=recalibrate).eval()
    prediction = system(batch)
    if recalibrate:
        read = numpy_recalibrated(system.recalibration, batch)
    else:
        steps = [{name: int(batch.lengths[name][row]) for name in WIDTHS} for row in range(2)]
        read = [{name: batch.values[name][row, :n].numpy() for name, n in steps[row].items()} for row in range(2)]
    vectors = {
        "T": np.stack([sample["text"][0] for sample in read]),
        "A": np.stack([numpy_lstm(system.audio, sample["audio"]) for sample in read]),
        "V": np.stack([numpy_lstm(system.vision, sample["vision"]) for sample in read]),
    }
    for task, vector in {"M": np.concatenate(list(vectors.values()), axis=1), **vectors}.items():
        answer, feature = numpy_head(system.heads[task], vector)
        np.testing.assert_allclose(prediction.tasks[task].detach().numpy(), answer, atol=1e-5)
        np.testing.assert_allclose(prediction.features[task].detach().numpy(), feature, atol=1e-5)


def test_all_features_share_one_space() -> None:
    assert build(Sugrm, spec_for()).feature_widths() == dict.fromkeys("MTAV", 32)
    assert build(Sugrm, spec_for(), common_dim=8).feature_widths() == dict.fromkeys("MTAV", 8)


def test_the_loss_is_the_papers() -> None:
    """mean |ŷ_m - y_m| + Σ_s mean( tanh|y_s - y_m| · |ŷ_s - y_s| ), an absent modality left out of its term."""
    batch = ragged(size=7, absent={"audio": [2, 5]})
    system = build(Sugrm, spec_for()).eval()
    prediction, targets = system(batch), targets_of(batch)
    y = {task: value.numpy() for task, value in targets.items()}
    p = {task: value.detach().numpy() for task, value in prediction.tasks.items()}
    wanted = {"M": np.abs(p["M"] - y["M"]).mean()}
    for task in "TAV":
        terms = np.tanh(np.abs(y[task] - y["M"])) * np.abs(p[task] - y[task])
        wanted[task] = (terms * (batch.present["audio"].numpy() if task == "A" else 1)).sum() / 7
    parts = system.loss(prediction, batch, targets).parts
    assert {task: part.item() for task, part in parts.items()} == pytest.approx(wanted, rel=1e-5)


ABLATIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({"recalibrate": False}, {"recalibration."}),
    ({"subtasks": ("audio",)}, {"heads.T", "heads.V"}),
    ({"subtasks": ()}, {"heads.T", "heads.A", "heads.V"}),
    ({"text_pooling": "mean"}, set()),
]


@pytest.mark.parametrize(("values", "gone"), ABLATIONS, ids=[str(row[0]) for row in ABLATIONS])
def test_a_switch_does_what_it_says(values: dict[str, Any], gone: set[str]) -> None:
    """The part is gone, with its loss; what is left learns, and padding is still nothing."""
    batch = ragged(size=12)
    system = build(Sugrm, spec_for(), **values)
    full = [name for name, _ in build(Sugrm, spec_for()).named_parameters()]
    names = [name for name, _ in system.named_parameters()]
    assert {name for name in full if name.startswith(tuple(gone))} == set(full) - set(names)
    losses = system.loss(system(batch), batch, targets_of(batch))
    assert set(losses.parts) == {"M"} | {task for task in "TAV" if f"heads.{task}" not in gone}
    losses.total.backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    more = padded(batch, {"text": 3, "audio": 5, "vision": 2}, None)
    torch.testing.assert_close(system(more).tasks["M"], system(batch).tasks["M"], atol=1e-6, rtol=0)


def test_mean_pooling_reads_real_steps_only() -> None:
    batch = make_batch({"text": [3, 1]})
    system: Any = build(Sugrm, spec_for(["text"]), text_pooling="mean").eval()
    means = np.stack([sample["text"].mean(0) for sample in numpy_recalibrated(system.recalibration, batch)])
    np.testing.assert_allclose(
        system(batch).tasks["M"].detach().numpy(), numpy_head(system.heads["M"], means)[0], atol=1e-6
    )
