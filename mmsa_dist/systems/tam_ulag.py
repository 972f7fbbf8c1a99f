"""TAM-ULAG (Sun & Wang 2024): temporal attention, fusion per semantic dimension, unimodal labels from two sources.

Shapes: B batch, T time, D width of a modality.
"""

from collections.abc import Mapping
from itertools import permutations
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmsa_dist.config import Strict, switch
from mmsa_dist.layers.heads import SequenceVector
from mmsa_dist.layers.pooling import masked_mean, zero_absent
from mmsa_dist.layers.temporal_attention import AttendedVector, TemporalAttention
from mmsa_dist.layers.text import text_reader
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, system
from mmsa_dist.systems.subtasks import Modality, chosen_subtasks, multi_task_loss, predicted, regressors
from shards.batch import Batch


class TamUlagConfig(Strict):
    """Defaults: the values for MOSI. The ablation switches of the paper's tables 6 and 7 are here too."""

    text_pooling: Literal["cls", "mean"] = "cls"
    """A sentence's vector: its first state, or the mean of all."""
    temporal_attention: bool = switch(True, table="6")
    """Temporal attention; without it the states are read as they are."""
    open_gates: bool = True
    """Start temporal attention where it passes states unchanged; otherwise at PyTorch's start, nearly shut."""
    dimension_fusion: bool = switch(True, table="6")
    """Cross features of each pair of modalities beside their vectors; without it the vectors are only concatenated."""
    audio_hidden: int = Field(default=32, ge=1)
    """Hidden units of the audio LSTM."""
    vision_hidden: int = Field(default=64, ge=1)
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
    """Width of the fused feature F*_mm."""
    post_text_dim: int = Field(default=64, ge=1)
    """Width of the text feature F*_t."""
    post_audio_dim: int = Field(default=16, ge=1)
    """Width of the audio feature F*_a."""
    post_vision_dim: int = Field(default=32, ge=1)
    """Width of the vision feature F*_v."""
    post_fusion_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the fused head."""
    post_text_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the text head."""
    post_audio_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the audio head."""
    post_vision_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the vision head."""
    subtasks: tuple[Modality, ...] | None = switch(None, table="7")
    """Modalities with a task of their own. Unset: all in use; none named: the multimodal task alone."""


@system("tam_ulag")
class TamUlag(System):
    """TAM-ULAG.

    - Text: the encoder's states; audio, vision: LSTM. TAM multiplies every state h_j by two scalars of its own,
      alpha_j = tanh(w_a·h_j + b_a) and beta_j = tanhshrink(w_b·h_j + b_b). Text takes [CLS]; audio and vision the last
      *valid* step -> dropout -> linear. A gate reads its own step only, so only the step that is taken is multiplied.
    - Fusion per semantic dimension: for each ordered pair (x, y) of modality vectors the cross feature (Σ_k x_k) · y.
      t, a, v and the six cross features, 3 (d_t + d_a + d_v) wide, -> head M. Each vector -> its head T, A or V.
      A head: dropout -> linear -> ReLU = F*, which the label generator reads, -> linear -> ReLU -> linear.
    - Loss, eq. 23: mean |ŷ_mm - y_mm| + Σ_s mean( tanh|y^c_s - y_mm| · |ŷ_s - target_s| ), targets from ULAG:
      target_s = ½ y^c_s + ½ y^f_s.

    Ablations, table 6: without BERT, no ``text.encoder``; without temporal attention, `temporal_attention`; without
    multimodal fusion, `dimension_fusion`; without ULAG, label generator ``multimodal``; labels of ULGM and of SUGRM,
    label generators ``ulgm`` and ``sugrm``. Table 7: `subtasks`; for M alone `subtasks` empty, generator ``none``.

    Left open by the paper as available, and settled here:

    - Where the gates start. PyTorch's start is near zero, where tanhshrink(x) is about x³ / 3: of an audio or vision
      state 1e-4 passes. The biases start where alpha · beta = 1 instead, so that training starts from plain last states
      (`open_gates`; off, the start is the public code's).
    - Widths of vectors and heads, dropouts: those of the public code; with them and no cross features its parameters
      number 109 694 858, which is the size in table 8. The cross features add 0.2 %.
    - Without ULAG y_s = y_mm, and tanh|y_s - y_mm| = 0 would leave the multimodal task alone, whose results (table 7,
      M) are others: so the subtasks' losses weigh one there.

    A sample that lacks a modality brings zeros for its vector and so for its cross features, and has no part in that
    modality's term.

    Unlike the public code: the last valid step, not index -1 of the padded states; the layers that make ULAG's
    confidence learn; the text encoder has no pooler (its output is not read).
    """

    paper = (
        "Sun & Wang, Self-supervised Multimodal Emotion Recognition Combining Temporal Attention Mechanism and "
        "Unimodal Label Automatic Generation Strategy, Journal of Electronics & Information Technology 46(2), 2024"
    )
    Config = TamUlagConfig
    labels = "ulag"

    def __init__(self, config: TamUlagConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        widths: dict[str, int] = {}
        self.text_attention: TemporalAttention | None = None
        if "text" in spec.widths:
            self.text = text_reader(spec)
            widths["text"] = self.text.width
            if config.temporal_attention:
                self.text_attention = TemporalAttention(self.text.width, config.open_gates)
        for name in ("audio", "vision"):
            if name in spec.widths:
                self.add_module(name, _sequence(config, name, spec.widths[name]))
                widths[name] = getattr(config, f"{name}_out")
        self.pooling = config.text_pooling
        self.crosses = config.dimension_fusion
        self.subtasks = chosen_subtasks(config.subtasks, spec)
        fused = sum(widths.values()) * (len(widths) if self.crosses else 1)
        heads = regressors(config, fused, widths, self.subtasks)
        self.heads = nn.ModuleDict(heads)
        self._feature_widths = {task: head.first.out_features for task, head in heads.items()}

    def forward(self, batch: Batch) -> Prediction:
        vectors = {name: zero_absent(self._vector(name, batch), batch.present[name]) for name in self.spec.widths}
        parts = list(vectors.values()) + (cross_features(vectors) if self.crosses else [])
        return predicted(self.heads, self.subtasks, torch.cat(parts, dim=-1), vectors)

    def _vector(self, name: str, batch: Batch) -> Tensor:
        """(B, D) of one modality."""
        if name != "text":
            return self.get_submodule(name)(batch.values[name], batch.lengths[name])
        states = self.text(batch)
        read = states[:, 0] if self.pooling == "cls" else states
        if self.text_attention is not None:
            read = self.text_attention(read)
        return read if self.pooling == "cls" else masked_mean(read, batch.mask("text"))

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        return multi_task_loss(self.subtasks, prediction, batch, targets)

    def feature_widths(self) -> dict[str, int]:
        return dict(self._feature_widths)


def cross_features(vectors: Mapping[str, Tensor]) -> list[Tensor]:
    """(Σ_k x_k) · y of each ordered pair (x, y): modality -> (B, D) in; (B, D_y) each."""
    sums = {name: vector.sum(-1, keepdim=True) for name, vector in vectors.items()}
    return [sums[x] * vectors[y] for x, y in permutations(vectors, 2)]


def _sequence(config: TamUlagConfig, name: str, width: int) -> SequenceVector:
    """The audio or vision subnetwork."""
    hidden, layers = getattr(config, f"{name}_hidden"), getattr(config, f"{name}_layers")
    dropout, out = getattr(config, f"{name}_dropout"), getattr(config, f"{name}_out")
    if config.temporal_attention:
        return AttendedVector(width, hidden, layers, dropout, out, config.open_gates)
    return SequenceVector(width, hidden, layers, dropout, out)
