"""ULAG against its definition, its layers in training, and laws 1 and 3 with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mmsa_dist import checkpoint, run_folder
from mmsa_dist.label_generators import ULAG
from mmsa_dist.label_generators.base import WEIGHING
from mmsa_dist.label_generators.ulag import Confidence
from mmsa_dist.recipe import Recipe
from mmsa_dist.systems import get_system
from mmsa_dist.systems.base import LABEL_LAYERS
from tests.data import packed
from tests.mmsa_dist.batches import build, ragged, spec_for
from tests.mmsa_dist.label_references import LearnedRun, UlagReference, expected, generator_of
from tests.mmsa_dist.test_laws import recipe_for, train
from tests.mmsa_dist.ulgm_reference import WIDTHS

Ranks = Callable[..., list[Any]]


# --- the definition


def said(run: LearnedRun, epoch: int, seen: dict[str, dict[int, np.ndarray]]) -> dict[str, dict[int, float]]:
    """task -> sample number -> c_s, of the samples of a step that have the modality."""
    return {
        s: dict(zip(vectors, run.confidences(epoch, s)[[n - run.first for n in vectors]].tolist(), strict=True))
        for s, vectors in seen.items()
        if s != "M"
    }


def follow(run: LearnedRun, epochs: int, accumulation: int = 1) -> int:
    """Checks targets, what weighs them and the state at every step; gives how many targets were compared."""
    generator = generator_of("ulag", run)
    reference = UlagReference(run.truth_by_number(), run.label_range, run.widths)
    compared = 0
    for epoch in range(1, epochs + 1):
        for step, (batches, predictions) in enumerate(run.steps(epoch, accumulation=accumulation)):
            seen = run.seen(epoch, step)
            confidences = said(run, epoch, seen)
            for batch, prediction in zip(batches, predictions, strict=True):
                targets = generator.targets(batch, prediction)
                for s, by_number in confidences.items():
                    for row, number in enumerate(batch.numbers.tolist()):
                        if number not in by_number:
                            continue
                        y_c = reference.labels[s][number]
                        y_f = (
                            reference.similar(number, by_number[number]) if epoch > 1 else run.truth_by_number()[number]
                        )
                        assert targets[s][row].item() == pytest.approx(0.5 * y_c + 0.5 * y_f, abs=1e-5)
                        assert targets[WEIGHING + s][row].item() == pytest.approx(y_c, abs=1e-6)
                        compared += 1
            generator.observe(epoch, batches, predictions)
            reference.step(epoch, seen)
            reference.learn(epoch, confidences)
            state = generator.state_dict()
            for s in confidences:
                y_c, y_f = (np.array(expected(v[s], run.numbers)) for v in (reference.labels, reference.similarity))
                np.testing.assert_allclose(state[f"label.{s}"], y_c, atol=1e-6, rtol=0)
                np.testing.assert_allclose(state[f"similarity.{s}"], y_f, atol=1e-5, rtol=0)
                np.testing.assert_allclose(ULAG.labels_in(state)[s], 0.5 * y_c + 0.5 * y_f, atol=1e-5, rtol=0)
        generator.end_epoch()
    return compared


@settings(max_examples=20, deadline=None)
@given(
    samples=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    global_batch=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    absent=st.sampled_from([0.0, 0.3]),
    widths=st.sampled_from([WIDTHS, {"M": 2, "T": 4}]),
)
def test_equals_the_definition(
    samples: int, seed: int, global_batch: int, accumulation: int, absent: float, widths: dict[str, int]
) -> None:
    follow(LearnedRun(samples, seed, global_batch, absent=absent, widths=widths), 3, accumulation)


def test_equals_the_definition_over_hundreds_of_steps() -> None:
    assert follow(LearnedRun(samples=37, seed=3, global_batch=4, absent=0.2), 20) > 1500  # 10 steps each


def test_the_layers_by_the_papers_equations() -> None:
    torch.manual_seed(0)
    layers = Confidence(WIDTHS)
    rng = np.random.default_rng(0)
    features = {k: np.maximum(rng.normal(size=(6, d)), 0) for k, d in WIDTHS.items()}
    w = {name: tensor.double().numpy() for name, tensor in layers.state_dict().items()}
    e = {k: np.maximum(f @ w[f"experts.{k}.weight"].T, 0) for k, f in features.items()}
    found = layers({k: torch.from_numpy(f).float() for k, f in features.items()})
    assert set(found) == {"T", "A", "V"}
    for s, c in found.items():
        for row in range(6):
            m = sum((e[s][row] @ e[k][row]) * e[k][row] for k in WIDTHS)
            inner = w[f"confidence.{s}.0.weight"] @ m + w[f"confidence.{s}.0.bias"]
            wanted = w[f"confidence.{s}.1.weight"] @ inner + w[f"confidence.{s}.1.bias"]
            assert c[row].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    assert all(tensor.shape[0] == 16 for name, tensor in w.items() if not name.endswith(("1.weight", "1.bias")))


# --- in a system


def attached(**of_batch: Any) -> tuple[Any, Any, Any]:
    """Self-MM with ULAG's layers, the generator, and a batch of its training samples."""
    batch = ragged(size=8, **of_batch)
    system = build(get_system("self_mm"), spec_for())
    run = LearnedRun(samples=8, seed=1, global_batch=8, widths=system.feature_widths())
    run.truth = batch.labels["M"].numpy()
    generator = generator_of("ulag", run)
    system.attach(generator.layers)
    return system, generator, batch


def learn(system: Any, generator: Any, batch: Any, epoch: int) -> tuple[Any, Any]:
    """A step's gradients, and its losses and targets; then the labels move on."""
    system.zero_grad()
    prediction = system.train()(batch)
    targets = generator.targets(batch, prediction)
    losses = system.loss(prediction, batch, targets)
    losses.total.backward()
    generator.observe(epoch, [batch], [prediction])
    generator.end_epoch()
    return losses, targets


def own(system: Any) -> dict[str, Tensor]:
    return {name: p for name, p in system.named_parameters() if name.startswith(LABEL_LAYERS)}


def test_layers_learn_from_the_second_epoch_on() -> None:
    system, generator, batch = attached()
    losses, targets = learn(system, generator, batch, 1)
    assert all(losses.parts[s].item() == 0 and torch.equal(targets[s], batch.labels["M"]) for s in "TAV")
    assert all(p.grad is not None and not p.grad.any() for p in own(system).values()), "zero, but there"
    learn(system, generator, batch, 2)  # y^c is still y_m, which weighs nothing
    losses, targets = learn(system, generator, batch, 3)
    assert all(losses.parts[s].item() > 0 and targets[s].requires_grad for s in "TAV")
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert {system.parameter_group(name) for name in own(system)} == {"rest"}


def test_the_gradient_flows_through_the_confidence_and_not_through_the_weight() -> None:
    system, generator, batch = attached()
    for epoch in (1, 2):
        learn(system, generator, batch, epoch)
    targets = generator.targets(batch, system.train()(batch))
    assert all(targets[s].requires_grad and not targets[WEIGHING + s].requires_grad for s in "TAV")
    # y^c apart, the target is y_m / 2 (2 sigmoid(c) - 1): never further from zero than y_m / 2
    for s in "TAV":
        assert ((targets[s] - 0.5 * targets[WEIGHING + s]).abs() <= 0.5 * batch.labels["M"].abs() + 1e-6).all()


def test_an_absent_modality_has_no_part_in_the_mixture_of_the_others() -> None:
    system, _, batch = attached(absent={"audio": [2, 5]})
    seen = {}
    system.label_layers.register_forward_hook(lambda _, arguments, out: seen.update(arguments[0]))
    prediction = system.train()(batch)
    assert not seen["A"][[2, 5]].any() and seen["A"][[0, 1, 3]].any() and seen["T"][[2, 5]].any()
    without = {k: features for k, features in seen.items() if k != "A"}
    narrow = Confidence({k: f.shape[1] for k, f in without.items()})
    narrow.load_state_dict({k: v for k, v in system.label_layers.state_dict().items() if ".A." not in k})
    for s in "TV":
        torch.testing.assert_close(narrow(without)[s][[2, 5]], prediction.learned[s][[2, 5]])


def test_nothing_is_learned_of_where_nothing_is_trained() -> None:
    system, generator, batch = attached()
    prediction = system.eval()(batch)
    assert prediction.learned == {}
    assert set(generator.targets(batch, prediction)) == {"M", *"TAV", *(WEIGHING + s for s in "TAV")}


def test_layers_answer_in_float32_where_the_model_is_narrower() -> None:
    system, generator, batch = attached()
    prediction = system.bfloat16().train()(batch)
    assert all(c.dtype == torch.float32 and c.isfinite().all() for c in prediction.learned.values())
    assert all(t.isfinite().all() for t in generator.targets(batch, prediction).values())


# --- laws 1 and 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("ulag"), samples=60)


def ulag_recipe(data: Path, **changes: Any) -> Recipe:
    return recipe_for("self_mm", data, **{"labels": {"generator": "ulag"}, **changes})


def test_two_ranks_equal_one_and_its_layers_are_in_the_checkpoint(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    """Law 1, at the stage that partitions the layers too; and a predictor goes without them."""
    from mmsa_dist.predictor import Predictor
    from mmsa_dist.session import open_index, write_description

    changes: dict[str, Any] = {"train": {"epochs": 3}, "checkpoint": {"keep": 3}}
    recipe = ulag_recipe(data, **changes)
    one = ranks(train, 1, tmp_path / "one", recipe.dump())[0]
    for of_rank in ranks(train, 2, tmp_path / "two", ulag_recipe(data, **changes, engine={"zero": 3}).dump()):
        assert of_rank["losses"] == pytest.approx(one["losses"], abs=1e-5)
        for name, value in one["labels"].items():
            assert torch.allclose(of_rank["labels"][name].float(), value.float(), atol=1e-3), name
    paths = checkpoint.saved(tmp_path / "one" / "checkpoints")
    first, last = (load_file(path / "weights.safetensors") for path in (paths[0], paths[-1]))
    layers = [name for name in last if name.startswith(LABEL_LAYERS)]
    assert len(layers) == 4 + 3 * 4
    assert all(not torch.equal(first[name], last[name]) for name in layers), "they learn"

    run_folder.write_text(tmp_path / "one" / "recipe.yaml", yaml.safe_dump(recipe.dump()))
    write_description(tmp_path / "one", recipe, open_index(recipe))
    predictor = Predictor.load(tmp_path / "one")
    assert not any(name.startswith(LABEL_LAYERS) for name in predictor.system.state_dict())
    answer = predictor.predict([predictor.utterance(predictor.example(), "example")])
    assert all(np.isfinite(values).all() for values in answer.values())


def test_a_restart_is_invisible(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    """Law 3: stopped in mid-epoch, in the third."""
    recipe = ulag_recipe(data, engine={"zero": 2}, checkpoint={"every_steps": 2}, train={"epochs": 4}).dump()
    whole = ranks(train, 2, tmp_path / "whole", recipe)[0]
    per_epoch = len(whole["losses"]) // 4
    ranks(train, 2, tmp_path / "cut", recipe, 2 * per_epoch + per_epoch - 1)
    again = ranks(train, 2, tmp_path / "cut", recipe)[0]
    assert len(again["losses"]) % per_epoch, "it went on from mid-epoch"
    assert again["losses"] == whole["losses"][-len(again["losses"]) :]
    assert again["result"] == whole["result"]
    for name, value in whole["labels"].items():
        assert torch.equal(again["labels"][name], value), name
