"""PMR (Lv et al., CVPR 2021): modalities reinforced again and again through a message hub that they update.

Shapes: B batch, T time, d common width; packed steps: N of a target, M of a source, N_C of the hub (`layers.packed`).
"""

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmsa_dist.config import Strict
from mmsa_dist.layers.packed import Steps, join
from mmsa_dist.layers.positions import sinusoids
from mmsa_dist.layers.sight import Sight
from mmsa_dist.layers.text import text_reader
from mmsa_dist.layers.transformer import (
    Dropouts,
    FeedForward,
    PackedAttention,
    StepProjection,
    TransformerLayer,
    check_shape,
    linear,
)
from mmsa_dist.systems.answers import Answer, answer_loss
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, system
from shards.batch import Batch


class PMRConfig(Strict):
    """Defaults: for MOSI, within the ranges that the paper's values lie in."""

    width: int = Field(default=40, ge=2)
    """Common width d of the modalities; divisible by `heads`."""
    heads: int = Field(default=5, ge=1)
    """Attention heads."""
    layers: int = Field(default=2, ge=1)
    """Reinforcement layers D."""
    text_kernel: int = Field(default=3, ge=1)
    """Steps of text that the first convolution sees; odd."""
    audio_kernel: int = Field(default=3, ge=1)
    """Steps of audio that the first convolution sees; odd."""
    vision_kernel: int = Field(default=3, ge=1)
    """Steps of vision that the first convolution sees; odd."""
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the weights of attention."""
    relu_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the feed-forward networks' hidden units."""
    residual_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on what feed-forward networks and the last layer's attention add."""
    embedding_dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout on the modalities' projected steps."""
    output_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout in the block before the output."""

    @model_validator(mode="after")
    def _fits_together(self) -> "PMRConfig":
        kernels = {f"{name}_kernel": getattr(self, f"{name}_kernel") for name in ("text", "audio", "vision")}
        check_shape(self.width, self.heads, kernels)
        return self

    @property
    def dropouts(self) -> Dropouts:
        return Dropouts(self.attention_dropout, self.relu_dropout, self.residual_dropout, self.embedding_dropout)


class ReinforcementUnit(nn.Module):
    """MRU_{s→t}: what target t finds in itself and in source s, mixed by a dynamic filter, then a feed-forward network.

    Z_{s→t} = CA(LN(Z_s), LN(Z_t)), Z_t = SA(LN(Z_t)), G = sigmoid(Z_t W_1 + Z_{s→t} W_2 + b),
    Z_t = G ⊙ Z_t + (1 - G) ⊙ Z_{s→t}.
    """

    def __init__(self, width: int, heads: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.target_norm = nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width)
        self.across = PackedAttention(width, heads, dropouts.attention)
        self.within = PackedAttention(width, heads, dropouts.attention)
        self.within_gate = linear(width, width)
        self.across_gate = linear(width, width, bias=False)
        self.feedforward = FeedForward(width, dropouts)

    def forward(self, source: Tensor, target: Tensor, across: Sight, within: Sight) -> Tensor:
        """source (M, d), target (N, d), across: target sees source, within: target sees itself -> (N, d)."""
        query = self.target_norm(target)
        found = self.across(query, self.source_norm(source), across)
        own = self.within(query, query, within)
        gate = (self.within_gate(own) + self.across_gate(found)).sigmoid()
        return self.feedforward(torch.lerp(found, own, gate))


class MessageUpdate(nn.Module):
    """MUM: the hub as each modality reinforces it, Z_{m→C} = MRU_{m→C}(Z_m, Z_C), weighed by attention over them.

    µ_m = mean over steps of U' tanh(W_m z + b_m), alpha = softmax of µ over m, Z_C = Σ_m alpha_m Z_{m→C}; then a
    feed-forward network. A modality that a sample lacks has no weight. One modality alone needs none, and has none.
    """

    def __init__(self, names: tuple[str, ...], width: int, heads: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.units = nn.ModuleDict({name: ReinforcementUnit(width, heads, dropouts) for name in names})
        several = names if len(names) > 1 else ()
        self.scorers = nn.ModuleDict({name: linear(width, width) for name in several})
        self.score = linear(width, 1, bias=False) if several else None
        self.feedforward = FeedForward(width, dropouts)

    def forward(self, values: dict[str, Tensor], hub: Tensor, sights: "Sights") -> Tensor:
        """values (N, d) of each modality, hub (N_C, d) -> (N_C, d)."""
        within = sights.hub_within
        candidates = {name: unit(values[name], hub, sights.to_hub[name], within) for name, unit in self.units.items()}
        if self.score is None:
            (message,) = candidates.values()
        else:
            weights = self.weights(candidates, sights)[sights.hub.sample]  # (N_C, n)
            message = (torch.stack(list(candidates.values()), -1) * weights[:, None]).sum(-1)
        return self.feedforward(message)

    def weights(self, candidates: dict[str, Tensor], sights: "Sights") -> Tensor:
        """alpha (B, n) of candidates (N_C, d)."""
        assert self.score is not None
        scores = [self.score(self.scorers[name](value).tanh()) for name, value in candidates.items()]
        pooled = sights.hub.mean(torch.cat(scores, -1))
        there = torch.stack([sights.steps[name].there for name in candidates], -1)
        absent = ~there & there.any(-1, keepdim=True)  # a sample without any weighs them all, and finds zeros
        return pooled.masked_fill(absent, -torch.inf).softmax(-1)


class Sights:
    """Who sees whom, the same in every layer."""

    def __init__(self, steps: dict[str, Steps]) -> None:
        self.steps = steps
        self.hub, self.hub_order = join(list(steps.values()))
        self.within = {name: Sight(own, own) for name, own in steps.items()}
        self.from_hub = {name: Sight(own, self.hub) for name, own in steps.items()}
        self.to_hub = {name: Sight(self.hub, own) for name, own in steps.items()}
        self.hub_within = Sight(self.hub, self.hub)


class ReinforcementLayer(nn.Module):
    """Every modality reinforced by the hub, then the hub updated by the modalities."""

    def __init__(self, names: tuple[str, ...], width: int, heads: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.units = nn.ModuleDict({name: ReinforcementUnit(width, heads, dropouts) for name in names})
        self.update = MessageUpdate(names, width, heads, dropouts)

    def forward(self, values: dict[str, Tensor], hub: Tensor, sights: Sights) -> tuple[dict[str, Tensor], Tensor]:
        """values (N, d) of each modality, hub (N_C, d) -> the same, reinforced."""
        values = {
            name: unit(hub, values[name], sights.from_hub[name], sights.within[name])
            for name, unit in self.units.items()
        }
        return values, self.update(values, hub, sights)


@system("pmr")
class PMR(System):
    """PMR.

    - Z_m = Conv1D(X_m) + positions, of width d; the message hub Z_C = [Z_L, Z_V, Z_A], one behind the other in time.
    - D reinforcement layers: Z_m ← MRU_{C→m}(Z_C, Z_m) for each modality, then Z_C ← MUM(Z_V, Z_L, Z_A, Z_C), whose
      weights are the layer's own and learn.
    - [Z_C, Z_L, Z_V, Z_A] in time -> one transformer layer -> mean over steps -> residual block -> linear = the answer.
      Loss: L1; where labels are classes two logits a task and the mean cross-entropy.

    What the paper leaves open, or was changed, and how it is settled here:

    - MUM's scores. The paper flattens Z_{m→C} to one vector of T_C d numbers, which ties W_m, (T_C d)² large, to one
      length. Here a step is scored by itself and the scores are averaged over real steps; there is no flattened form.
    - How the last layer's steps become one vector: their mean.
    - An MRU has no residual sum around its attention (its filter mixes the two branches); its feed-forward network has
      one, with the norm before it. Source and target have norms of their own.
    - Order of modalities in the hub: it reaches nothing, since positions are added before.

    An absent modality is in no message: its steps are never seen, and its candidate for the hub has no weight. With one
    modality the hub begins as that modality.
    """

    paper = (
        "Lv et al., Progressive Modality Reinforcement for Human Multimodal Emotion Recognition from Unaligned "
        "Multimodal Sequences, CVPR 2021"
    )
    Config = PMRConfig
    labels = "none"
    classifies: ClassVar[bool] = True

    def __init__(self, config: PMRConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        width, heads, names = config.width, config.heads, tuple(spec.widths)
        if "text" in spec.widths:
            self.text = text_reader(spec)
            self.text_projection = StepProjection(self.text.width, width, config.text_kernel)
        for name in ("audio", "vision"):
            if name in spec.widths:
                self.add_module(name, StepProjection(spec.widths[name], width, getattr(config, f"{name}_kernel")))
        self.dropout = nn.Dropout(config.embedding_dropout)
        layers = [ReinforcementLayer(names, width, heads, config.dropouts) for _ in range(config.layers)]
        self.reinforcement = nn.ModuleList(layers)
        self.transformer = TransformerLayer(width, heads, config.dropouts)
        self.answer = Answer(width, config.output_dropout, spec)

    def forward(self, batch: Batch) -> Prediction:
        steps = {name: Steps.of_modality(batch, name) for name in self.spec.widths}
        values = {name: self._embedded(name, batch, steps[name]) for name in steps}
        sights = Sights(steps)
        hub = torch.cat(list(values.values()))[sights.hub_order]
        for layer in self.reinforcement:
            values, hub = layer(values, hub, sights)
        everything, order = join([sights.hub, *steps.values()])
        joint = torch.cat([hub, *values.values()])[order]
        joint = self.transformer(joint, None, Sight(everything, everything))
        return Prediction(self.answer(everything.mean(joint)))

    def _embedded(self, name: str, batch: Batch, steps: Steps) -> Tensor:
        """Z_m (N, d) of one modality."""
        mask, present = batch.mask(name), batch.present[name]
        if name == "text":
            projected = self.text_projection(self.text(batch), mask, present)
        else:
            projected = self.get_submodule(name)(batch.values[name], mask, present)
        places = sinusoids(steps.longest, projected.shape[-1], projected.device).to(projected.dtype)
        return self.dropout(steps.pack(projected) + places[steps.position])

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        return answer_loss(self.spec, prediction, batch, targets)
