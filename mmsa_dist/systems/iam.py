"""IAM (Zhou and Li): attention within and between modalities, one multimodal and three unimodal tasks.

Shapes: B batch, T time, L steps that ask, D width of a modality, d common width, n modalities.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmsa_dist.config import Strict, switch
from mmsa_dist.layers.attention import attend
from mmsa_dist.layers.pooling import masked_mean, zero_absent
from mmsa_dist.layers.recurrent import BiLSTM, last_states
from mmsa_dist.layers.text import text_reader
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, system, weighted_mean
from mmsa_dist.systems.subtasks import Modality, chosen_subtasks, distance_weighted
from shards.batch import Batch
from shards.utterance import UNIMODAL_TASK


class IamConfig(Strict):
    """Defaults: the paper's; where it gives none Self-MM's for MOSI, or ours."""

    width: int = Field(default=64, ge=1)
    """Common width d of all modalities."""
    audio_hidden: int = Field(default=16, ge=1)
    """Hidden units of the audio LSTM, in each direction."""
    vision_hidden: int = Field(default=32, ge=1)
    """Hidden units of the vision LSTM, in each direction."""
    lstm_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the LSTMs' states."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on what the heads read: F, and each H_n."""
    pooling: Literal["state", "mean"] = "state"
    """A modality's vector: [CLS] or the LSTM's last states; or the mean of all steps, with T x T attention."""
    join: Literal["sum", "concat"] = "sum"
    """How a modality's readings of the two others become H_n: added (eq. 12), or side by side into a linear layer."""
    subtasks: tuple[Modality, ...] | None = switch(None, table="-")
    """Modalities with a task of their own. Unset: all in use."""
    bi: bool = switch(True, table="5, 6")
    """Attention between modalities; without it F = [h_t, h_a, h_v]."""
    uni: bool = switch(True, table="5, 6")
    """Attention within a modality; without it the unimodal heads read h_n."""
    weight: bool = switch(True, table="5, 6")
    """Weigh each task's loss by its share of all tasks' (eq. 19); without it they are added."""


class Regressor(nn.Module):
    """linear -> ReLU -> linear, inside as wide as its input (eqs. 14 and 15)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, 1)

    def forward(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """vector (B, width) -> answer (B,) float32, ReLU's output (B, width)."""
        feature = self.first(vector).relu()
        return self.second(feature).squeeze(-1).float(), feature


@system("iam")
class Iam(System):
    """IAM.

    - Encoders: text states from its encoder (eq. 1), audio and vision from a bidirectional LSTM (2); a linear layer
      each to the common width d = h_n, (T_n, d). A modality's vector is [CLS], or the LSTM's last states.
    - Within a modality, for its task: H_n = softmax(h_n h_n^T) h_n (3-5). Linear -> ReLU -> linear = ŷ_n.
    - Between modalities, for the multimodal task: H_i = Σ_j softmax(h_i h_j^T) h_j over the two others (6-12).
    - F = [H_a, H_t, H_v, h_t, h_a, h_v] (13); linear -> ReLU = F* (14); linear = ŷ_m (15).
    - L_s = mean( tanh|y_s - y_m| · |ŷ_s - y_s| ) (17), L_m = mean |ŷ_m - y_m| (18). Each counts by its share of all:
      loss = Σ_s (L_s / Σ L) L_s over s in t, a, v, m (19); no gradient through the shares. The labels y_s come from
      ULGM, whose features are F* and the H_n (16).

    What the paper leaves open, and how it is settled here:

    - Eqs. 10 and 11 print A · h_t, which has the wrong shape unless the two modalities are equally long: it is
      attention over the other modality's steps.
    - Sequences and vectors. Eq. 1 keeps [CLS] alone, but attention is over steps: all token states are kept. F and the
      heads read vectors, so of each attention the row whose query is the modality's vector: row [CLS] of text, and for
      audio and vision a query made of the two directions' last states. The other rows are never read and not computed:
      O(T) a sample, not O(T^2). `pooling: mean` computes them all and reads their mean.
    - Eq. 12 says that the two readings are concatenated and prints their sum, the only size that fits W_1 of eq. 14,
      which has 2 (d_a + d_v + d_t) rows: sum. `join: concat` puts them side by side into a linear layer back to d.
    - Widths within the heads: W_2 of eq. 15 has 2 (d_a + d_v + d_t) rows and that of a unimodal head d_n: each is as
      wide inside as its input.
    - Σ L in eq. 19 is that of the step's *global* batch: a share made of a micro-batch's own losses would depend on the
      number of ranks. Ranks exchange the n + 1 losses before they learn from them; with `optim.accumulation` a pass
      without gradients goes before. So nothing is kept from step to step.
    - All losses zero: so is their weighted sum.
    - The dropout of 0.1 stands before every head, on F and on each H_n.

    With two modalities there is one reading each; with one there is nothing between, and F = h. A sample that lacks a
    modality reads nothing in it and with it, brings zeros for its vector, and has no part in its task.
    """

    paper = "Zhou and Li, Multimodal Emotion Analysis Model based on Interactive Attention Mechanism"
    Config = IamConfig
    labels = "ulgm"

    def __init__(self, config: IamConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        d, n = config.width, len(spec.widths)
        encoded: dict[str, int] = {}
        if "text" in spec.widths:
            self.text = text_reader(spec)
            encoded["text"] = self.text.width
        for name, hidden in (("audio", config.audio_hidden), ("vision", config.vision_hidden)):
            if name in spec.widths:
                self.add_module(name, BiLSTM(spec.widths[name], hidden))
                encoded[name] = 2 * hidden
        self.common = nn.ModuleDict({name: nn.Linear(encoded[name], d) for name in spec.widths})
        self.lstm_dropout = nn.Dropout(config.lstm_dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.subtasks = chosen_subtasks(config.subtasks, spec)
        self.pools, self.uni = config.pooling == "mean", config.uni
        self.bi = config.bi and n > 1
        concat = self.bi and config.join == "concat"
        self.join = nn.ModuleDict({name: nn.Linear((n - 1) * d, d) for name in spec.widths} if concat else {})
        self.answer = Regressor((2 if self.bi else 1) * n * d)
        self.heads = nn.ModuleDict({name: Regressor(d) for name in self.subtasks})
        self.weighs_terms = config.weight
        self._feature_widths = {"M": self.answer.first.out_features}
        self._feature_widths |= {UNIMODAL_TASK[name]: d for name in self.subtasks}

    def forward(self, batch: Batch) -> Prediction:
        masks = {name: batch.mask(name) for name in self.spec.widths}
        states, vectors = {}, {}
        for name, mask in masks.items():
            states[name], vectors[name] = self._encode(name, batch, mask)
        readings = self._readings(states, vectors, masks, batch.present)
        vectors = {name: zero_absent(vector, batch.present[name]) for name, vector in vectors.items()}
        fused = [self._joined(name, readings, batch.present) for name in masks] if self.bi else []
        answer, feature = self.answer(self.dropout(torch.cat([*fused, *vectors.values()], dim=-1)))
        tasks, features = {"M": answer}, {"M": feature}
        for name in self.subtasks:
            vector = readings[name, name] if self.uni else vectors[name]
            tasks[UNIMODAL_TASK[name]] = self.heads[name](self.dropout(vector))[0]
            features[UNIMODAL_TASK[name]] = vector
        return Prediction(tasks, features)

    def _encode(self, name: str, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A modality's states h_n (B, T, d), anything finite in padding, and its vector (B, d)."""
        common, lengths, dtype = self.common[name], batch.lengths[name], self.answer.first.weight.dtype
        if name == "text":
            states = common(self.text(batch).to(dtype))
            return states, masked_mean(states, mask) if self.pools else states[:, 0]
        hidden = self.get_submodule(name)(batch.values[name].to(dtype), lengths)
        hidden = self.lstm_dropout(hidden)
        states = common(hidden)
        return states, masked_mean(states, mask) if self.pools else common(last_states(hidden, lengths))

    def _readings(
        self,
        states: dict[str, Tensor],
        vectors: dict[str, Tensor],
        masks: dict[str, Tensor],
        present: dict[str, Tensor],
    ) -> dict[tuple[str, str], Tensor]:
        """(i, j) -> (B, d): what modality i finds in modality j, those pairs that are in use.

        softmax(h_i h_j^T) h_j, pooled over i; zero where a sample lacks either. One attention for each j, in which all
        queries stand side by side.
        """
        asking = {name: state if self.pools else vectors[name][:, None] for name, state in states.items()}
        found = {}
        for j, state in states.items():
            own = self.uni and j in self.subtasks
            queries = {i: query for i, query in asking.items() if (own if i == j else self.bi)}
            if not queries:
                continue
            query, key = torch.cat(list(queries.values()), dim=1)[:, None], state[:, None]
            read = attend(query, key, key, masks[j], scale=1.0)[:, 0]
            for i, part in zip(queries, read.split([q.shape[1] for q in queries.values()], dim=1), strict=True):
                pooled = masked_mean(part, masks[i]) if self.pools else part[:, 0]
                found[i, j] = zero_absent(pooled, present[i] & present[j])
        return found

    def _joined(self, name: str, readings: dict[tuple[str, str], Tensor], present: dict[str, Tensor]) -> Tensor:
        """H_n (B, d) of eq. 12: what a modality finds in the others."""
        found = [readings[name, other] for other in self.spec.widths if other != name]
        if not self.join:
            return torch.stack(found).sum(0)
        return zero_absent(self.join[name](torch.cat(found, dim=-1)), present[name])

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        terms = {"M": weighted_mean((prediction.tasks["M"] - targets["M"]).abs(), batch)}
        terms |= distance_weighted(self.subtasks, prediction, batch, targets)
        losses = torch.stack(list(terms.values()))
        if not self.weighs_terms:
            return Losses(losses.sum(), dict(zip(terms, losses.detach(), strict=True)))
        return by_share(list(terms), losses, losses.detach())

    def feature_widths(self) -> dict[str, int]:
        return dict(self._feature_widths)


def by_share(tasks: list[str], losses: Tensor, whole: Tensor) -> Losses:
    """Σ_s (L_s / Σ L) L_s, eq. 19; no gradient through the shares.

    Args:
        tasks: the tasks' names.
        losses: (n,) the L_s of a batch.
        whole: (n,) detached, the L_s of the step that the batch is part of, which make the shares.
    """
    share = whole / whole.sum().clamp(min=torch.finfo(whole.dtype).tiny)
    weighed = share * losses
    parts = dict(zip(tasks, weighed.detach(), strict=True))
    return Losses(weighed.sum(), parts, losses.detach(), lambda of_step: by_share(tasks, losses, of_step))
