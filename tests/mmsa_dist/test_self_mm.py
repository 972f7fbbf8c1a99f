"""Self-MM against its equations."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmsa_dist.config import TextConfig
from mmsa_dist.errors import ConfigError
from mmsa_dist.layers.heads import SequenceVector
from mmsa_dist.systems import DataSpec, SelfMM
from mmsa_dist.systems.self_mm import SelfMMConfig
from tests.mmsa_dist.batches import build, make_batch, ragged, spec_for, targets_of


def numpy_head(head: torch.nn.Module, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = {name: value.detach().numpy() for name, value in head.named_parameters()}
    feature = np.maximum(vector @ weights["first.weight"].T + weights["first.bias"], 0)
    hidden = np.maximum(feature @ weights["second.weight"].T + weights["second.bias"], 0)
    return (hidden @ weights["third.weight"].T + weights["third.bias"])[:, 0], feature


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_state(lstm: torch.nn.LSTM, values: np.ndarray) -> np.ndarray:
    """The last state of one sample (T, D), step by step from the LSTM's equations."""
    w = {name: value.detach().numpy() for name, value in lstm.named_parameters()}
    h = c = np.zeros(lstm.hidden_size)
    for x in values:
        gates = w["weight_ih_l0"] @ x + w["bias_ih_l0"] + w["weight_hh_l0"] @ h + w["bias_hh_l0"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    return h


def numpy_lstm(module: SequenceVector, values: np.ndarray) -> np.ndarray:
    """One sample (T, D): the LSTM, then the linear layer."""
    state = numpy_state(module.lstm, values)
    return module.linear.weight.detach().numpy() @ state + module.linear.bias.detach().numpy()


def test_the_network_is_the_papers() -> None:
    lengths = {"text": [3, 1], "audio": [2, 6], "vision": [5, 4]}
    batch = make_batch(lengths)
    system = build(SelfMM, spec_for()).eval()
    prediction = system(batch)
    vectors = {
        name: np.stack(
            [
                numpy_lstm(getattr(system, name), batch.values[name][row, : lengths[name][row]].numpy())
                for row in range(2)
            ]
        )
        for name in ("audio", "vision")
    }
    vectors["text"] = batch.values["text"][:, 0].numpy()  # [CLS], the first state
    fused = np.concatenate([vectors["text"], vectors["audio"], vectors["vision"]], axis=1)
    for task, vector in {"M": fused, "T": vectors["text"], "A": vectors["audio"], "V": vectors["vision"]}.items():
        answer, feature = numpy_head(system.heads[task], vector)
        np.testing.assert_allclose(prediction.tasks[task].detach().numpy(), answer, atol=1e-5)
        np.testing.assert_allclose(prediction.features[task].detach().numpy(), feature, atol=1e-5)


def test_mean_pooling_reads_real_steps_only() -> None:
    batch = make_batch({"text": [3, 1]})
    system = build(SelfMM, spec_for(["text"]), text_pooling="mean").eval()
    means = np.stack([batch.values["text"][0, :3].mean(0).numpy(), batch.values["text"][1, 0].numpy()])
    np.testing.assert_allclose(
        system(batch).tasks["M"].detach().numpy(), numpy_head(system.heads["M"], means)[0], atol=1e-6
    )


def test_the_loss_is_the_papers() -> None:
    """mean |ŷ_m - y_m| + Σ_s mean( tanh|y_s - y_m| · |ŷ_s - y_s| ), an absent modality left out of its term."""
    batch = ragged(size=7, absent={"vision": [2, 5]})
    system = build(SelfMM, spec_for()).eval()
    prediction, targets = system(batch), targets_of(batch)
    losses = system.loss(prediction, batch, targets)
    y = {task: value.numpy() for task, value in targets.items()}
    p = {task: value.detach().numpy() for task, value in prediction.tasks.items()}
    wanted = {"M": np.abs(p["M"] - y["M"]).mean()}
    for task in "TAV":
        terms = np.tanh(np.abs(y[task] - y["M"])) * np.abs(p[task] - y[task])
        wanted[task] = (terms * (batch.present["vision"].numpy() if task == "V" else 1)).sum() / 7
    assert {task: part.item() for task, part in losses.parts.items()} == pytest.approx(wanted, rel=1e-5)
    assert losses.total.item() == pytest.approx(sum(wanted.values()), rel=1e-5)


def test_in_the_first_epoch_the_subtasks_cost_nothing() -> None:
    """Labels start as y_m, where tanh|y_s - y_m| is exactly zero."""
    batch = ragged()
    system = build(SelfMM, spec_for())
    targets = dict.fromkeys("MTAV", batch.labels["M"])
    parts = system.loss(system(batch), batch, targets).parts
    assert [parts[task].item() for task in "TAV"] == [0, 0, 0]


def test_a_missing_label_is_left_out() -> None:
    batch = ragged()
    system = build(SelfMM, spec_for())
    targets = targets_of(batch)
    targets["A"] = targets["A"].clone()
    targets["A"][0] = torch.nan
    losses = system.loss(system(batch), batch, targets)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())


def test_subtasks_choose_the_heads() -> None:
    system = build(SelfMM, spec_for(), subtasks=("vision", "text"))
    assert system.feature_widths() == {"M": 128, "T": 32, "V": 32}
    assert set(system.loss(system(ragged()), ragged(), targets_of(ragged())).parts) == {"M", "T", "V"}
    with pytest.raises(ConfigError, match=r"model\.subtasks: 'audio' is not a modality in use"):
        build(SelfMM, spec_for(["text", "vision"]), subtasks=("audio",))
    with pytest.raises(ConfigError, match="names a modality twice"):
        build(SelfMM, spec_for(), subtasks=("audio", "audio"))


def test_a_task_without_labels_is_a_sentence() -> None:
    batch = ragged()
    system = build(SelfMM, spec_for())
    with pytest.raises(ConfigError, match=r"no labels for task T.*ulgm.*model\.subtasks"):
        system.loss(system(batch), batch, {"M": batch.labels["M"]})


def test_dropout_of_an_lstm_is_on_its_state() -> None:
    system = build(SelfMM, spec_for(), audio_dropout=0.5)
    batch = ragged(size=64)
    with torch.no_grad():
        once, again = system(batch).features["A"], system(batch).features["A"]
    assert not torch.equal(once, again)
    with torch.no_grad():
        assert torch.equal(system(batch).features["V"], system(batch).features["V"])


def test_size_is_the_published_one(bert_base: Path) -> None:
    """109 689 220 parameters on MOSI with BERT-base; within one percent (we build no pooler)."""
    spec = DataSpec(
        {"text": 768, "audio": 5, "vision": 20}, (-3, 3), ("M",), TextConfig(encoder=str(bert_base), pretrained=False)
    )
    with torch.device("meta"):
        system = SelfMM(SelfMMConfig(), spec)
    count = sum(parameter.numel() for parameter in system.parameters())
    assert count == pytest.approx(109_689_220, rel=0.01)


@pytest.fixture
def bert_base(tmp_path: Path) -> Path:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    return tmp_path


def test_weight_takes_part_once() -> None:
    """norm, not the number of rows, divides."""
    batch = ragged(size=4)
    system = build(SelfMM, spec_for())
    prediction, targets = system(batch), targets_of(batch)
    whole = system.loss(prediction, batch, targets).total.item()
    assert system.loss(prediction, replace(batch, norm=8.0), targets).total.item() == pytest.approx(whole / 2)
