"""TAM-ULAG against its equations, its ablation switches and its published size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmsa_dist.config import TextConfig
from mmsa_dist.label_generators import LabelGenerator, make_generator
from mmsa_dist.label_generators.base import WEIGHING
from mmsa_dist.layers.heads import SequenceVector
from mmsa_dist.layers.temporal_attention import AttendedVector, TemporalAttention
from mmsa_dist.recipe import Recipe, load_recipe
from mmsa_dist.session import data_spec, label_generator
from mmsa_dist.systems import DataSpec, SelfMM, System, TamUlag
from mmsa_dist.systems.tam_ulag import cross_features
from shards.batch import BatchSpec, collate
from shards.index import Index
from shards.read import ShardReader
from tests.mmsa_dist.batches import WIDTHS, build, make_batch, padded, ragged, rows, spec_for, targets_of
from tests.mmsa_dist.test_layers import affine
from tests.mmsa_dist.test_self_mm import numpy_head, numpy_state

LENGTHS = {"text": [3, 1], "audio": [2, 6], "vision": [5, 4]}


def gated(attention: TemporalAttention, state: np.ndarray) -> np.ndarray:
    """h · tanh(w_a·h + b_a) · tanhshrink(w_b·h + b_b) of one step (D,)."""
    (w_a, w_b), (b_a, b_b) = attention.gates.weight.detach().numpy(), attention.gates.bias.detach().numpy()
    x = w_b @ state + b_b
    return state * np.tanh(w_a @ state + b_a) * (x - np.tanh(x))


def numpy_vector(branch: SequenceVector, values: np.ndarray) -> np.ndarray:
    """One sample (T, D): every step of the LSTM gated, the last one taken, linear."""
    state = numpy_state(branch.lstm, values)
    return affine(branch.linear, gated(branch.attention, state) if isinstance(branch, AttendedVector) else state)


def numpy_vectors(system: Any, batch: Any) -> dict[str, np.ndarray]:
    """modality -> (B, D), each sample by itself over its own steps."""
    texts = batch.values["text"][:, 0].numpy()
    if system.text_attention is not None:
        texts = np.stack([gated(system.text_attention, state) for state in texts])
    found = {"text": texts}
    for name in ("audio", "vision"):
        samples = zip(batch.values[name].numpy(), batch.lengths[name].tolist(), strict=True)
        found[name] = np.stack([numpy_vector(getattr(system, name), values[:steps]) for values, steps in samples])
    return found


def numpy_cross(vectors: dict[str, np.ndarray]) -> np.ndarray:
    """The six cross features, element by element."""
    crossed = []
    for x in vectors:
        for y in vectors:
            if x != y:
                samples = zip(vectors[x], vectors[y], strict=True)
                crossed.append([[sum(one) * value for value in other] for one, other in samples])
    return np.concatenate(crossed, axis=1)


@pytest.mark.parametrize("open_start", [False, True])
def test_attention_gates_every_step_by_itself(open_start: bool) -> None:
    torch.manual_seed(0)
    attention = TemporalAttention(5, open_start)
    states = torch.randn(2, 4, 5)
    wanted = [[gated(attention, step) for step in sample] for sample in states.numpy()]
    np.testing.assert_allclose(attention(states).detach().numpy(), wanted, atol=1e-6)


def test_open_gates_pass_a_state_and_others_hardly_do() -> None:
    torch.manual_seed(0)
    small = torch.full((1, 8), 1e-4)
    torch.testing.assert_close(TemporalAttention(8, True)(small) / small, torch.ones(1, 8), atol=1e-3, rtol=0)
    assert (TemporalAttention(8, False)(small) / small).abs().max() < 0.02


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "no attention"])
@pytest.mark.parametrize("crossed", [True, False], ids=["fusion", "concatenation"])
def test_the_network_is_the_papers(attention: bool, crossed: bool) -> None:
    """TAM, the fusion per semantic dimension and the heads, with the ablations of both."""
    batch = make_batch(LENGTHS)
    system: Any = build(TamUlag, spec_for(), temporal_attention=attention, dimension_fusion=crossed).eval()
    prediction = system(batch)
    vectors = numpy_vectors(system, batch)
    fused = np.concatenate([*vectors.values(), *([numpy_cross(vectors)] if crossed else [])], axis=1)
    for task, vector in {"M": fused, "T": vectors["text"], "A": vectors["audio"], "V": vectors["vision"]}.items():
        answer, feature = numpy_head(system.heads[task], vector)
        np.testing.assert_allclose(prediction.tasks[task].detach().numpy(), answer, atol=1e-5)
        np.testing.assert_allclose(prediction.features[task].detach().numpy(), feature, atol=1e-5)


def test_cross_features_of_two_by_two() -> None:
    """(Σ x) · y by hand."""
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0, 5.0]])
    of_y, of_x = cross_features({"x": x, "y": y})
    assert of_y.tolist() == [[9, -3, 15]]
    assert of_x.tolist() == [[7, 14]]
    assert cross_features({"x": x}) == []


def test_the_fused_vector_is_three_times_as_wide() -> None:
    system: Any = build(TamUlag, spec_for())
    assert system.heads["M"].first.in_features == 3 * (WIDTHS["text"] + 16 + 32)
    assert build(TamUlag, spec_for(["text", "vision"])).heads["M"].first.in_features == 2 * (WIDTHS["text"] + 32)


def test_the_last_valid_step_is_read_not_the_last_of_the_batch() -> None:
    batch = make_batch(LENGTHS)
    system: Any = build(TamUlag, spec_for()).eval()
    for row in range(2):
        alone = rows(batch, slice(row, row + 1), 1.0)
        for name in ("audio", "vision"):
            steps = LENGTHS[name][row]
            vector = getattr(system, name)(batch.values[name], batch.lengths[name])[row]
            cut = getattr(system, name)(alone.values[name][:, :steps], alone.lengths[name])[0]
            torch.testing.assert_close(vector, cut)
            bias = getattr(system, name).linear.bias
            assert not torch.allclose(vector, bias), "index -1 of packed states is zero, and its vector the bias"


def test_the_loss_learns_targets_and_weighs_by_the_centre_distance_label() -> None:
    """Eq. 23: mean |ŷ_mm - y_mm| + Σ_s mean( tanh|y^c_s - y_mm| · |ŷ_s - target_s| ), target_s = ½ y^c_s + ½ y^f_s."""
    batch = ragged(size=7, absent={"vision": [2, 5]})
    system = build(TamUlag, spec_for()).eval()
    prediction, labels = system(batch), targets_of(batch)
    learned = {task: torch.linspace(-1, 1, 7) for task in "TAV"}
    targets = {"M": labels["M"]}
    for task in "TAV":
        targets |= {task: 0.5 * labels[task] + 0.5 * learned[task], WEIGHING + task: labels[task]}
    losses = system.loss(prediction, batch, targets)
    truth, said = labels["M"].numpy(), {task: answer.detach().numpy() for task, answer in prediction.tasks.items()}
    wanted = {"M": np.abs(said["M"] - truth).mean()}
    for task in "TAV":
        target = 0.5 * labels[task].numpy() + 0.5 * learned[task].numpy()
        terms = np.tanh(np.abs(labels[task].numpy() - truth)) * np.abs(said[task] - target)
        wanted[task] = (terms * (batch.present["vision"].numpy() if task == "V" else 1)).sum() / 7
    assert {task: part.item() for task, part in losses.parts.items()} == pytest.approx(wanted, rel=1e-5)


# Ablation switches: tables 6 and 7 ---------------------------------------------------------------------------------


def generator_for(name: str, system: System) -> LabelGenerator:
    """Over one training sample, which no test asks for."""
    widths = system.feature_widths()
    return make_generator(name, numbers=[99], ids=[0], labels=[1.0], widths=widths, label_range=(-3, 3))


ABLATIONS: list[tuple[dict[str, Any], set[str]]] = [
    # what is set, modules that must be gone
    ({"temporal_attention": False}, {"text_attention", "audio.attention", "vision.attention"}),
    ({"text_pooling": "mean"}, set()),
    ({"open_gates": False}, set()),
]


@pytest.mark.parametrize(("values", "gone"), ABLATIONS, ids=[str(row[0]) for row in ABLATIONS])
def test_a_switch_does_what_it_says(values: dict[str, Any], gone: set[str]) -> None:
    """The part is gone; what is left learns, and padding is still nothing. Subsets of tasks: `test_subtasks`."""
    batch = ragged(size=12)
    system = build(TamUlag, spec_for(), **values)
    full = [name for name, _ in build(TamUlag, spec_for()).named_parameters()]
    names = [name for name, _ in system.named_parameters()]
    assert {name for name in full if name.startswith(tuple(gone))} == set(full) - set(names)
    losses = system.loss(system(batch), batch, targets_of(batch))
    assert set(losses.parts) == set(system.feature_widths()) == {"M", "T", "A", "V"}
    losses.total.backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    more = padded(batch, {"text": 3, "audio": 5, "vision": 2}, None)
    torch.testing.assert_close(system(more).tasks["M"], system(batch).tasks["M"], atol=1e-6, rtol=0)


def recipe_of(index: Index, *words: str) -> Recipe:
    return load_recipe("tam_ulag", "mosi", ["--data", str(index.folder), *words])


def test_without_bert_the_given_features_are_read_and_nothing_else_is_other(
    index: Index, encoders: Callable[[str], Path]
) -> None:
    """Table 6, "w/o BERT": a recipe without `text.encoder`."""
    reads = ("--text.encoder", str(encoders("bert")))
    without, behind = (TamUlag(r.model, data_spec(r, index)) for r in (recipe_of(index), recipe_of(index, *reads)))
    assert without.spec.text is None and without.spec.widths["text"] == index.modalities["text"].width
    own, all_names = ({name for name, _ in system.named_parameters()} for system in (without, behind))
    assert own == {name for name in all_names if not name.startswith("text.")} != all_names
    assert not any(without.parameter_group(name) == "text" for name in own)


def test_without_bert_it_trains_on_labels_from_ulag(index: Index) -> None:
    """Table 6, "w/o BERT": eight epochs of one step each; every parameter learns, and the answers get nearer."""
    recipe = recipe_of(index)
    torch.manual_seed(0)
    system: Any = TamUlag(recipe.model, data_spec(recipe, index))
    generator = label_generator(recipe, index, system, torch.device("cpu"))
    system.attach(generator.layers)
    optimizer = torch.optim.Adam(system.parameters(), lr=1e-3)
    samples = ShardReader(index).samples(numbers := np.array(index.numbers("train")))
    batch = collate(samples, BatchSpec.of(index), numbers)
    errors = []
    for epoch in range(1, 9):
        prediction = system.train()(batch)
        losses = system.loss(prediction, batch, generator.targets(batch, prediction))
        assert losses.total.isfinite()
        optimizer.zero_grad()
        losses.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())
        optimizer.step()
        generator.observe(epoch, [batch], [prediction])
        generator.end_epoch()
        errors.append(losses.parts["M"].item())
    assert all(p.grad.any() for p in system.parameters())
    assert errors[-1] < errors[0]


def test_without_ulag_the_subtasks_learn_the_multimodal_label_at_full_weight() -> None:
    """Table 6, "w/o ULAG": y_s = y_mm, and yet not the multimodal task alone (table 7, M)."""
    batch = ragged(size=7, absent={"audio": [3]})
    system = build(TamUlag, spec_for()).eval()
    generator = make_generator(
        "multimodal",
        numbers=range(7),
        ids=range(7),
        labels=[0.0] * 7,
        widths=system.feature_widths(),
        label_range=(-3, 3),
    )
    prediction = system(batch)
    losses = system.loss(prediction, batch, generator.targets(batch, prediction))
    for task, name in zip("TAV", WIDTHS, strict=True):
        errors = (prediction.tasks[task] - batch.labels["M"]).abs() * batch.present[name]
        assert losses.parts[task].item() == pytest.approx(errors.sum().item() / 7, rel=1e-5)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())


def test_mean_pooling_means_the_gated_states() -> None:
    batch = make_batch({"text": [3, 1]})
    system: Any = build(TamUlag, spec_for(["text"]), text_pooling="mean").eval()
    states = [[gated(system.text_attention, state) for state in text] for text in batch.values["text"].numpy()]
    means = np.stack([np.mean(states[0], axis=0), states[1][0]])
    np.testing.assert_allclose(
        system(batch).tasks["M"].detach().numpy(), numpy_head(system.heads["M"], means)[0], atol=1e-6
    )


@pytest.mark.parametrize(
    ("words", "chosen"),
    [([], None), (["--model.subtasks"], ()), (["--model.subtasks", "vision", "text"], ("vision", "text"))],
    ids=["all", "none", "some"],
)
def test_subtasks_are_chosen_on_the_command_line(words: list[str], chosen: tuple[str, ...] | None) -> None:
    model: Any = load_recipe("tam_ulag", "mosi", words).model
    assert model.subtasks == chosen


# Size --------------------------------------------------------------------------------------------------------------

POOLER = 768 * 768 + 768
"""Parameters of BERT's pooler, which the public code carries and never reads."""


@pytest.fixture(scope="module")
def mosi(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """MOSI unaligned with a BERT-base-shaped encoder."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("bert")
    BertConfig().save_pretrained(folder)
    text = TextConfig(encoder=str(folder), pretrained=False)
    return DataSpec({"text": 768, "audio": 5, "vision": 20}, (-3, 3), ("M",), text)


def size(system: type[System], spec: DataSpec, **values: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in system(system.Config(**values), spec).parameters())


def test_size_is_the_published_one(mosi: DataSpec) -> None:
    """109 694 858 parameters within one percent, with the layers that make ULAG's confidence."""
    ulag = generator_for("ulag", build(TamUlag, spec_for()))
    assert ulag.layers is not None
    found = size(TamUlag, mosi) + sum(parameter.numel() for parameter in ulag.layers.parameters())
    assert found == pytest.approx(109_694_858, rel=0.01)


def test_without_cross_features_the_published_size_is_met_to_the_unit(mosi: DataSpec) -> None:
    """Table 8 counts the public code's default: no cross features, BERT's pooler, experts but no confidence layers."""
    experts = sum((width + 1) * 16 for width in (128, 64, 16, 32))
    assert size(TamUlag, mosi, dimension_fusion=False) + POOLER + experts == 109_694_858
    assert size(SelfMM, mosi, audio_hidden=32, vision_hidden=64, post_text_dim=64) + POOLER == 109_689_220
