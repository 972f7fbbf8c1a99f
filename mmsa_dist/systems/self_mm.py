"""Self-MM (Yu et al., AAAI 2021): one fused and three unimodal regressors, the unimodal labels made while training.

Shapes: B batch, T time, D width of a modality.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmsa_dist.config import Strict, switch
from mmsa_dist.layers.heads import SequenceVector
from mmsa_dist.layers.pooling import masked_mean, zero_absent
from mmsa_dist.layers.text import text_reader
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, system
from mmsa_dist.systems.subtasks import Modality, chosen_subtasks, multi_task_loss, predicted, regressors
from shards.batch import Batch


class SelfMMConfig(Strict):
    """Defaults: MMSA's tuned values for MOSI."""

    text_pooling: Literal["cls", "mean"] = "cls"
    """A sentence's vector: its first state, or the mean of all."""
    audio_hidden: int = Field(default=16, ge=1)
    """Hidden units of the audio LSTM."""
    vision_hidden: int = Field(default=32, ge=1)
    """Hidden units of the vision LSTM."""
    audio_layers: int = Field(default=1, ge=1)
    """Layers of the audio LSTM."""
    vision_layers: int = Field(default=1, ge=1)
    """Layers of the vision LSTM."""
    audio_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the audio LSTM's state, and between its layers."""
    vision_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the vision LSTM's state, and between its layers."""
    audio_out: int = Field(default=16, ge=1)
    """Width of an utterance's audio vector."""
    vision_out: int = Field(default=32, ge=1)
    """Width of an utterance's vision vector."""
    post_fusion_dim: int = Field(default=128, ge=1)
    """Width of the fused feature F*_M."""
    post_text_dim: int = Field(default=32, ge=1)
    """Width of the text feature F*_T."""
    post_audio_dim: int = Field(default=16, ge=1)
    """Width of the audio feature F*_A."""
    post_vision_dim: int = Field(default=32, ge=1)
    """Width of the vision feature F*_V."""
    post_fusion_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the fused head."""
    post_text_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the text head."""
    post_audio_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the audio head."""
    post_vision_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the vision head."""
    subtasks: tuple[Modality, ...] | None = switch(None, table="-")
    """Modalities with a task of their own. Unset: all in use."""


@system("self_mm")
class SelfMM(System):
    """Self-MM.

    - Text: the encoder's states, pooled. Audio, vision: LSTM, state at the last *valid* step -> dropout -> linear.
    - Fusion: concatenation -> head M. Each modality's own vector -> its head T, A or V. A head's first layer gives F*,
      which the label generator reads.
    - Loss: mean |ŷ_m - y_m| + Σ_s mean( tanh|y_s - y_m| · |ŷ_s - y_s| ). The labels y_s are generated (ULGM) and start
      as y_m, so in the first epoch the subtasks' terms are exactly zero.

    A sample that lacks a modality brings zeros for its vector into the fusion and has no part in that modality's term.

    Unlike the public code: the text encoder has no pooler (its output is not read); lengths are those of the features,
    not a count of non-zero frames.
    """

    paper = "Yu et al., Learning Modality-Specific Representations with Self-Supervised Multi-Task Learning, AAAI 2021"
    Config = SelfMMConfig
    labels = "ulgm"

    def __init__(self, config: SelfMMConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        widths: dict[str, int] = {}
        if "text" in spec.widths:
            self.text = text_reader(spec)
            widths["text"] = self.text.width
        for name in ("audio", "vision"):
            if name in spec.widths:
                widths[name] = getattr(config, f"{name}_out")
                hidden, layers = getattr(config, f"{name}_hidden"), getattr(config, f"{name}_layers")
                dropout = getattr(config, f"{name}_dropout")
                self.add_module(name, SequenceVector(spec.widths[name], hidden, layers, dropout, widths[name]))
        self.pooling = config.text_pooling
        self.subtasks = chosen_subtasks(config.subtasks, spec)
        heads = regressors(config, sum(widths.values()), widths, self.subtasks)
        self.heads = nn.ModuleDict(heads)
        self._feature_widths = {task: head.first.out_features for task, head in heads.items()}

    def forward(self, batch: Batch) -> Prediction:
        vectors = {name: zero_absent(self._vector(name, batch), batch.present[name]) for name in self.spec.widths}
        return predicted(self.heads, self.subtasks, torch.cat(list(vectors.values()), dim=-1), vectors)

    def _vector(self, name: str, batch: Batch) -> Tensor:
        """(B, D) of one modality."""
        if name != "text":
            return self.get_submodule(name)(batch.values[name], batch.lengths[name])
        states = self.text(batch)
        return states[:, 0] if self.pooling == "cls" else masked_mean(states, batch.mask("text"))

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        return multi_task_loss(self.subtasks, prediction, batch, targets)

    def feature_widths(self) -> dict[str, int]:
        return dict(self._feature_widths)
