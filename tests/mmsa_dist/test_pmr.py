"""PMR against its equations."""

from typing import Any

import numpy as np
import pytest
import torch

from mmsa_dist.layers.sight import Sight
from mmsa_dist.layers.transformer import Dropouts
from mmsa_dist.systems import PMR
from mmsa_dist.systems.pmr import MessageUpdate, PMRConfig, ReinforcementLayer, ReinforcementUnit, Sights
from shards.utterance import EMOTIONS
from tests.mmsa_dist.batches import build, loss_of, ragged, spec_for
from tests.mmsa_dist.test_layers import affine, softmax
from tests.mmsa_dist.test_mult import attention, emotions, feedforward, layer_norm
from tests.mmsa_dist.test_packed import steps

SMALL: dict[str, Any] = {"width": 8, "heads": 2, "layers": 1}


def unit(layer: ReinforcementUnit, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """MRU of one sample."""
    query = layer_norm(target, layer.target_norm)
    across = attention(layer.across, query, layer_norm(source, layer.source_norm))
    within = attention(layer.within, query, query)
    gate = 1 / (1 + np.exp(-(affine(layer.within_gate, within) + affine(layer.across_gate, across))))
    return feedforward(layer.feedforward, gate * within + (1 - gate) * across)


def message(update: Any, values: dict[str, np.ndarray], hub: np.ndarray) -> np.ndarray:
    """MUM of one sample, over the modalities that it has."""
    candidates = [unit(update.units[name], z, hub) for name, z in values.items()]
    scored = zip(values, candidates, strict=True)
    scores = [affine(update.score, np.tanh(affine(update.scorers[name], z))).mean() for name, z in scored]
    weights = softmax(np.array(scores))
    return feedforward(update.feedforward, sum(a * z for a, z in zip(weights, candidates, strict=True)))


def reinforced(layer: Any, values: dict[str, np.ndarray], hub: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Z^[i+1] of each modality from the hub as it was, and then the hub from Z^[i+1]."""
    values = {name: unit(layer.units[name], hub, z) for name, z in values.items()}
    return values, message(layer.update, values, hub)


def embedded(projection: Any, x: np.ndarray) -> np.ndarray:
    """Conv1D of x (T, D), zeros beyond both ends, plus positions: step t from 1, sines in the first half."""
    weight = projection.conv.weight.detach().numpy()  # (d, D, K)
    width, _, kernel = weight.shape
    wide = np.pad(x, ((kernel // 2, kernel // 2), (0, 0)))
    steps = range(1, len(x) + 1)
    z = np.stack([np.einsum("dik,ki->d", weight, wide[t - 1 : t - 1 + kernel]) for t in steps])
    angles = np.outer(steps, 10_000.0 ** -np.linspace(0, 1, width // 2))
    return z + np.concatenate([np.sin(angles), np.cos(angles)], 1)


def answer(system: Any, modalities: dict[str, np.ndarray]) -> float:
    """The whole of PMR on one sample, from the features (T, D) of the modalities that it has."""
    projections = {"text": system.text_projection, "audio": system.audio, "vision": system.vision}
    values = {name: embedded(projections[name], x) for name, x in modalities.items()}
    hub = np.concatenate(list(values.values()))
    for layer in system.reinforcement:
        values, hub = reinforced(layer, values, hub)
    joint, last = np.concatenate([hub, *values.values()]), system.transformer
    joint = joint + attention(last.attention, layer_norm(joint, last.norm), layer_norm(joint, last.norm))
    vector, out = feedforward(last.feedforward, joint).mean(0), system.answer
    return affine(out.out, vector + affine(out.second, np.maximum(affine(out.first, vector), 0))).item()


def pieces(values: dict[str, torch.Tensor], sights: Sights) -> list[dict[str, np.ndarray]]:
    """Packed steps of each modality -> of each sample, modality -> (T, d); a stand-in is a step of its own."""
    cut = {name: z.detach().split(sights.steps[name].lengths.tolist()) for name, z in values.items()}
    return [dict(zip(cut, (z.numpy() for z in row), strict=True)) for row in zip(*cut.values(), strict=True)]


def shaken(seed: int, module: Any) -> Any:
    """Biases and norms away from where they begin, at zero and one, where some mistakes would not show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def test_a_reinforcement_unit_is_the_equations() -> None:
    torch.manual_seed(0)
    layer = ReinforcementUnit(6, 1, Dropouts())
    torch.nn.init.normal_(layer.within_gate.bias)
    source, target = torch.randn(4 + 2, 6), torch.randn(3 + 5, 6)
    of, to = steps([4, 2]), steps([3, 5])
    found = layer(source, target, Sight(to, of), Sight(to, to)).detach().numpy()
    for s, t, out in (
        (source[:4], target[:3], found[:3]),
        (source[4:], target[3:], found[3:]),
    ):
        np.testing.assert_allclose(out, unit(layer, s.numpy(), t.numpy()), atol=1e-5)


def test_the_hub_is_updated_by_attention_over_what_each_modality_makes_of_it() -> None:
    """The second sample lacks audio: its candidate has no weight, and its stand-in no part in any mean."""
    torch.manual_seed(0)
    names = ("text", "audio", "vision")
    layer = MessageUpdate(names, 6, 1, Dropouts())
    assert layer.score is not None
    for scorer in layer.scorers.values():
        torch.nn.init.normal_(scorer.bias)
    sights = Sights({"text": steps([2, 3]), "audio": steps([4, 1], absent=(1,)), "vision": steps([1, 2])})
    values = {name: torch.randn(len(where.sample), 6) for name, where in sights.steps.items()}
    hub = torch.randn(13, 6)
    found = layer(values, hub, sights).detach().numpy()
    own = pieces(values, sights)
    for row, there in enumerate([names, ("text", "vision")]):
        keep = (sights.hub.real & (sights.hub.sample == row)).numpy()
        wanted = message(layer, {name: own[row][name] for name in there}, hub.numpy()[keep])
        np.testing.assert_allclose(found[keep], wanted, atol=1e-5)


def test_a_layer_updates_the_hub_from_the_modalities_as_it_has_just_reinforced_them() -> None:
    """Those from the hub as it was before. The second sample lacks audio."""
    layer = shaken(0, ReinforcementLayer(names := ("text", "audio", "vision"), 6, 2, Dropouts()))
    sights = Sights({"text": steps([2, 3]), "audio": steps([4, 1], absent=(1,)), "vision": steps([1, 2])})
    values = {name: torch.randn(len(where.sample), 6) for name, where in sights.steps.items()}
    hub = torch.randn(13, 6)
    found, found_hub = layer(values, hub, sights)
    own, own_found = pieces(values, sights), pieces(found, sights)
    for row, there in enumerate([names, ("text", "vision")]):
        keep = (sights.hub.real & (sights.hub.sample == row)).numpy()
        wanted, wanted_hub = reinforced(layer, {name: own[row][name] for name in there}, hub.numpy()[keep])
        for name in there:
            np.testing.assert_allclose(own_found[row][name], wanted[name], atol=1e-5)
        np.testing.assert_allclose(found_hub.detach().numpy()[keep], wanted_hub, atol=1e-5)


def test_steps_are_convolved_and_told_their_places() -> None:
    """What the first layer gets of each modality; kernels of 1, 3 and 5 steps."""
    batch = ragged(size=4)
    system: Any = build(PMR, spec_for(), **SMALL, text_kernel=1, vision_kernel=5).eval()
    seen: list[Any] = []
    system.reinforcement[0].register_forward_pre_hook(lambda module, given: seen.append(given))
    system(batch)
    (values, _, sights), *_ = seen
    projections = {"text": system.text_projection, "audio": system.audio, "vision": system.vision}
    for row, found in enumerate(pieces(values, sights)):
        for name, z in found.items():
            x = batch.values[name][row, : batch.lengths[name][row]].numpy()
            np.testing.assert_allclose(z, embedded(projections[name], x), atol=1e-5)


def test_the_network_is_the_papers() -> None:
    """From features to the answer, two layers, every sample by itself; one lacks audio, one has text alone."""
    batch = ragged(size=5, absent={"audio": [1, 3], "vision": [3]})
    system = shaken(0, build(PMR, spec_for(), **{**SMALL, "layers": 2}, text_kernel=1, vision_kernel=5)).eval()
    found = system(batch).tasks["M"].detach().numpy()
    for row in range(batch.size):
        there = [name for name in batch.values if batch.present[name][row]]
        modalities = {name: batch.values[name][row, : batch.lengths[name][row]].numpy() for name in there}
        assert found[row] == pytest.approx(answer(system, modalities), abs=1e-5), row


def test_the_weights_over_candidates_are_parameters_and_learn() -> None:
    batch = ragged(size=9)
    system = build(PMR, spec_for(), **SMALL)
    update = system.reinforcement[0].update
    mine = {id(p) for p in [*update.scorers.parameters(), *update.score.parameters()]}
    assert mine <= {id(p) for p in system.parameters()}
    assert {system.parameter_group(n) for n, p in system.named_parameters() if id(p) in mine} == {"rest"}
    before = update.score.weight.clone()
    optimizer = torch.optim.SGD(system.parameters(), lr=0.1)
    loss_of(system, batch).backward()
    optimizer.step()
    assert not torch.equal(before, update.score.weight)


def test_one_modality_needs_no_weights_over_candidates() -> None:
    update = build(PMR, spec_for(["text"]), **SMALL).reinforcement[0].update
    assert update.score is None
    assert not list(update.scorers.parameters())
    assert set(update.units) == {"text"}


def test_the_answer_is_the_mean_of_hub_and_modalities_after_one_more_layer() -> None:
    """The hub of the first layer is the modalities one behind the other; in the end both go in, twice as many steps."""
    batch = ragged(size=4)
    system = build(PMR, spec_for(), **SMALL).eval()
    seen: dict[str, Any] = {}
    system.reinforcement[0].register_forward_pre_hook(lambda module, given: seen.update(layer=given))
    system.transformer.register_forward_hook(lambda module, given, out: seen.update(steps=given[2].query, out=out))
    system.answer.register_forward_pre_hook(lambda module, given: seen.update(vector=given[0]))
    system(batch)
    values, hub, sights = seen["layer"]
    for row in range(4):
        own = [z[sights.steps[name].sample == row] for name, z in values.items()]
        assert torch.equal(hub[sights.hub.sample == row], torch.cat(own))
    total = sum(batch.lengths.values())
    assert torch.equal(seen["steps"].lengths, 2 * total)
    means = torch.stack([part.mean(0) for part in seen["out"].split((2 * total).tolist())])
    torch.testing.assert_close(seen["vector"], means, atol=1e-5, rtol=1e-5)


def test_layers_are_as_many_as_asked_for_and_differ() -> None:
    system = build(PMR, spec_for(), **{**SMALL, "layers": 3})
    assert len(system.reinforcement) == 3
    weights = [layer.units["text"].across.query.weight for layer in system.reinforcement]
    assert not torch.equal(weights[0], weights[1])


def test_emotions_are_decided_each_by_itself() -> None:
    batch = ragged(size=5)
    system = build(PMR, emotions(), **SMALL)
    assert system.classifies
    prediction = system(batch)
    assert tuple(prediction.tasks) == EMOTIONS
    targets = {name: torch.ones(5) for name in EMOTIONS}
    losses = system.loss(prediction, batch, targets)
    wanted = torch.stack([(1 + (-prediction.tasks[name]).exp()).log().mean() for name in EMOTIONS]).mean()
    assert losses.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())


def test_defaults_are_within_the_ranges_of_the_paper() -> None:
    config = PMRConfig()
    assert config.layers in range(1, 7)
    assert config.width in (30, 40, 64)
    assert config.heads in (5, 8, 10)
    assert {config.text_kernel, config.audio_kernel, config.vision_kernel} <= {1, 3, 5}
