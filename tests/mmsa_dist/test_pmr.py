"""PMR against its equations."""

from typing import Any

import numpy as np
import pytest
import torch

from mmsa_dist.layers.sight import Sight
from mmsa_dist.layers.transformer import Dropouts
from mmsa_dist.systems import PMR
from mmsa_dist.systems.pmr import MessageUpdate, PMRConfig, ReinforcementUnit, Sights
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
    begin = dict.fromkeys(names, 0)
    for row, there in enumerate([names, ("text", "vision")]):
        mine = sights.hub.sample == row
        keep = (sights.hub.real & mine).numpy()
        lengths = {name: int(where.lengths[row]) for name, where in sights.steps.items()}
        candidates, scores = [], []
        for name in there:
            z = values[name][begin[name] : begin[name] + lengths[name]].numpy()
            z = unit(layer.units[name], z, hub.numpy()[keep])
            mu = affine(layer.score, np.tanh(affine(layer.scorers[name], z)))
            candidates.append(z)
            scores.append(mu.mean())
        message = sum(a * z for a, z in zip(softmax(np.array(scores)), candidates, strict=True))
        np.testing.assert_allclose(found[keep], feedforward(layer.feedforward, message), atol=1e-5)
        begin = {name: begin[name] + lengths[name] for name in names}


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
