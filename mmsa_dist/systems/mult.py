"""MulT (Tsai et al., ACL 2019): each modality enriched by every other through crossmodal transformers.

Shapes: B batch, T time, N packed steps of a modality, d common width, n modalities (`layers.packed`).
"""

from itertools import permutations
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmsa_dist.config import Strict
from mmsa_dist.layers.packed import Steps
from mmsa_dist.layers.pooling import zero_absent
from mmsa_dist.layers.text import text_reader
from mmsa_dist.layers.transformer import Dropouts, Stack, StepProjection, check_shape
from mmsa_dist.systems.answers import Answer, answer_loss
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, system
from shards.batch import Batch


class MulTConfig(Strict):
    """Defaults: MMSA's tuned values for MOSI."""

    width: int = Field(default=50, ge=2)
    """Common width d of the modalities; divisible by `heads`."""
    heads: int = Field(default=10, ge=1)
    """Attention heads of every layer."""
    layers: int = Field(default=4, ge=1)
    """Layers of each crossmodal transformer; those of self-attention have as many, and at least 3."""
    text_kernel: int = Field(default=5, ge=1)
    """Steps of text that the first convolution sees; odd."""
    audio_kernel: int = Field(default=5, ge=1)
    """Steps of audio that the first convolution sees; odd."""
    vision_kernel: int = Field(default=5, ge=1)
    """Steps of vision that the first convolution sees; odd."""
    positions: bool = True
    """Sinusoidal positions; MMSA's code leaves them out."""
    future_mask: bool = True
    """Hide the keys of a step's future."""
    text_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Dropout on the text's features."""
    attention_dropout: float = Field(default=0.3, ge=0, lt=1)
    """Dropout on the weights of attention to text, and of self-attention."""
    audio_attention_dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout on the weights of attention to audio."""
    vision_attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the weights of attention to vision."""
    relu_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the feed-forward networks' hidden units."""
    residual_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on what attention and feed-forward networks add."""
    embedding_dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout on the input of each transformer."""
    output_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Dropout in the block before the output."""

    @model_validator(mode="after")
    def _fits_together(self) -> "MulTConfig":
        kernels = {f"{name}_kernel": getattr(self, f"{name}_kernel") for name in ("text", "audio", "vision")}
        check_shape(self.width, self.heads, kernels)
        return self


@system("mult")
class MulT(System):
    """MulT.

    - X̂_a = Conv1D(X_a) of width d (eq. 1); Z_a = X̂_a + PE (eq. 2).
    - Crossmodal transformer b→a, for each ordered pair (eqs. 3, 4), of D layers:
      Z ← CM(LN(Z), LN(Z_b)) + Z with CM(X_a, X_b) = softmax(X_a W_Q W_K' X_b' / sqrt(d_k)) X_b W_V, multi-head;
      Z ← FFN(LN(Z)) + Z. The source stays the low-level Z_b in every layer.
    - Z_a = [Z_{b→a}; Z_{c→a}] of width (n - 1) d -> transformer of self-attention -> its last step.
    - The modalities' last steps, side by side -> a residual block -> linear = the answer. Loss: L1; where labels are
      classes two logits a task and the mean cross-entropy.

    As the authors' public code has it, where the paper is silent: a transformer takes sqrt(d) X̂ plus positions, and
    ends with a norm; LN is one for target and source; transformers of self-attention have at least 3 layers; attention
    has a future mask (`layers.sight`), which here goes by each sample's own lengths.

    Differences from that code, and from MMSA's: no step of padding is ever seen (there, padding is data like any
    other); the last step is the last *valid* one; convolution keeps the number of steps, as eq. 1 has it; keys and
    values share one embedding dropout (there, each draws its own); positions count steps from 1 (there, steps whose
    first feature is zero have none; MMSA leaves out positions altogether: set `positions` to false). The last layer of
    self-attention is computed for the last step alone, which is all that is read.

    Fewer modalities: two make two crossmodal transformers, one makes none and has its self-attention alone.
    An absent modality adds nothing to the others (its part of a residual sum is zero) and zeros to the last vector.
    """

    paper = "Tsai et al., Multimodal Transformer for Unaligned Multimodal Language Sequences, ACL 2019"
    Config = MulTConfig
    labels = "none"
    classifies: ClassVar[bool] = True

    def __init__(self, config: MulTConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        width, names = config.width, tuple(spec.widths)
        if "text" in spec.widths:
            self.text = text_reader(spec)
            self.text_projection = StepProjection(self.text.width, width, config.text_kernel)
        for name in ("audio", "vision"):
            if name in spec.widths:
                self.add_module(name, StepProjection(spec.widths[name], width, getattr(config, f"{name}_kernel")))
        self.text_dropout = nn.Dropout(config.text_dropout)
        looks_at = {
            "text": config.attention_dropout,
            "audio": config.audio_attention_dropout,
            "vision": config.vision_attention_dropout,
        }

        def stack(width: int, layers: int, attention_dropout: float) -> Stack:
            dropouts = Dropouts(
                attention_dropout, config.relu_dropout, config.residual_dropout, config.embedding_dropout
            )
            options = {"positions": config.positions, "future": config.future_mask}
            return Stack(width, config.heads, layers, dropouts, **options)

        pairs = permutations(names, 2)
        self.crossmodal = nn.ModuleDict({f"{a}_{b}": stack(width, config.layers, looks_at[b]) for a, b in pairs})
        joint = max(1, len(names) - 1) * width
        deep = max(config.layers, 3)
        self.memory = nn.ModuleDict({name: stack(joint, deep, config.attention_dropout) for name in names})
        self.answer = Answer(len(names) * joint, config.output_dropout, spec)

    def forward(self, batch: Batch) -> Prediction:
        steps = {name: Steps.of_modality(batch, name) for name in self.spec.widths}
        values = {name: steps[name].pack(self._projected(name, batch)) for name in steps}
        last = []
        for a in steps:
            found = [self.crossmodal[f"{a}_{b}"](values[a], steps[a], values[b], steps[b]) for b in steps if b != a]
            joint = torch.cat(found, -1) if found else values[a]
            memory: Stack = self.memory.get_submodule(a)  # type: ignore[assignment]
            last.append(zero_absent(memory.last(joint, steps[a]), steps[a].there))
        return Prediction(self.answer(torch.cat(last, -1)))

    def _projected(self, name: str, batch: Batch) -> Tensor:
        """X̂ (B, T, d) of one modality."""
        mask, present = batch.mask(name), batch.present[name]
        if name == "text":
            return self.text_projection(self.text_dropout(self.text(batch)), mask, present)
        return self.get_submodule(name)(batch.values[name], mask, present)

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        return answer_loss(self.spec, prediction, batch, targets)
