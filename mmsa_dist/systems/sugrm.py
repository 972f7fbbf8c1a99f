"""SUGRM (Hwang & Kim, EACL Findings 2023): recalibrated modalities, and the features of all tasks in one space.

Shapes: B batch, T time, D width of a modality.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmsa_dist.config import Strict, switch
from mmsa_dist.layers.heads import Head, SequenceVector
from mmsa_dist.layers.pooling import masked_mean, zero_absent
from mmsa_dist.layers.recalibration import Recalibration
from mmsa_dist.layers.text import text_reader
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, system
from mmsa_dist.systems.subtasks import Modality, chosen_subtasks, multi_task_loss, predicted
from shards.batch import Batch
from shards.utterance import UNIMODAL_TASK


class SugrmConfig(Strict):
    """Defaults: the values for MOSI."""

    text_pooling: Literal["cls", "mean"] = "cls"
    """A sentence's vector: its first state, or the mean of all."""
    recalibrate: bool = switch(True, table="-")
    """Recalibration; without it the modalities are read as they are."""
    audio_hidden: int = Field(default=16, ge=1)
    """Hidden units of the audio LSTM."""
    vision_hidden: int = Field(default=32, ge=1)
    """Hidden units of the vision LSTM."""
    common_dim: int = Field(default=32, ge=1)
    """Width of the space that the features F* of all tasks share; also of the audio and the vision vector."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    """Dropout before each head."""
    subtasks: tuple[Modality, ...] | None = switch(None, table="-")
    """Modalities with a task of their own. Unset: all in use; none named: the multimodal task alone."""


@system("sugrm")
class Sugrm(System):
    """SUGRM.

    - Recalibration: the mean s_m of each modality over its real steps; z = ReLU(W [s_t; s_a; s_v] + b), a quarter
      as wide; every step of modality m times 2 σ(W_m z + b_m).
    - Text: [CLS] of the recalibrated states. Audio, vision: LSTM over the recalibrated steps, state at the last *valid*
      one -> linear. Concatenated -> head M; each vector -> its head T, A or V. A head: dropout -> linear -> ReLU = F*,
      as wide for all tasks, since the label generator measures distances between them -> linear -> ReLU -> linear.
    - Loss: mean |ŷ_m - y_m| + Σ_s mean( tanh|y_s - y_m| · |ŷ_s - y_s| ), the labels y_s from SUGRM's generator.

    `recalibrate` off is the ablation of the recalibration; `subtasks` chooses the unimodal tasks.

    A sample that lacks a modality brings zeros for it into the squeeze and for its vector, and has no part in its term.

    Left open, since the paper's text was not at hand, and settled here: sequences go through Self-MM's encoders and
    heads. The public code has a sparse phased Transformer (Cheng et al. 2021) instead, whose last step it reads,
    padding or not, and takes F* of the second layer, without ReLU, its dropout between the two layers.

    Unlike the public code too: means are over real steps, where it counts padding; the text encoder has no pooler.
    """

    paper = (
        "Hwang & Kim, Self-Supervised Unimodal Label Generation Strategy Using Recalibrated Modality Representations "
        "for Multimodal Sentiment Analysis, Findings of EACL 2023"
    )
    Config = SugrmConfig
    labels = "sugrm"

    def __init__(self, config: SugrmConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        d = self.common_dim = config.common_dim
        read: dict[str, int] = dict(spec.widths)
        vectors = dict.fromkeys(spec.widths, d)
        if "text" in spec.widths:
            self.text = text_reader(spec)
            read["text"] = vectors["text"] = self.text.width
        self.recalibration = Recalibration(read) if config.recalibrate else None
        for name in ("audio", "vision"):
            if name in spec.widths:
                hidden = getattr(config, f"{name}_hidden")
                self.add_module(name, SequenceVector(spec.widths[name], hidden, 1, 0.0, d))
        self.pooling = config.text_pooling
        self.subtasks = chosen_subtasks(config.subtasks, spec)
        heads = {"M": Head(sum(vectors.values()), d, config.dropout)}
        heads |= {UNIMODAL_TASK[name]: Head(vectors[name], d, config.dropout) for name in self.subtasks}
        self.heads = nn.ModuleDict(heads)

    def forward(self, batch: Batch) -> Prediction:
        values = {name: self.text(batch) if name == "text" else batch.values[name] for name in self.spec.widths}
        masks = {name: batch.mask(name) for name in values}
        if self.recalibration is not None:
            values = self.recalibration(values, masks, batch.present)
        vectors = {
            name: zero_absent(self._vector(name, values[name], batch.lengths[name], masks[name]), batch.present[name])
            for name in values
        }
        return predicted(self.heads, self.subtasks, torch.cat(list(vectors.values()), dim=-1), vectors)

    def _vector(self, name: str, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """(B, D) of one modality's recalibrated steps (B, T, D)."""
        if name != "text":
            return self.get_submodule(name)(values, lengths)
        return values[:, 0] if self.pooling == "cls" else masked_mean(values, mask)

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        return multi_task_loss(self.subtasks, prediction, batch, targets)

    def feature_widths(self) -> dict[str, int]:
        return dict.fromkeys(self.heads, self.common_dim)
