"""UFEN-MTFN (Cai et al., Scientific Reports 2025): multi-layer unimodal features, fused by multi-task learning.

Shapes: B batch, T time, D width of a modality, d common width (the paper's d_m), P ordered pairs of modalities.
"""

from itertools import permutations
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmsa_dist.config import Strict, switch
from mmsa_dist.errors import ConfigError
from mmsa_dist.layers.attention import MultiHeadAttention, SelfAttention
from mmsa_dist.layers.pooling import masked_mean, zero_absent
from mmsa_dist.layers.recurrent import BiGRU
from mmsa_dist.layers.text import text_reader
from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, system, weighted_mean
from mmsa_dist.systems.subtasks import Modality, chosen_subtasks, target_of, where_labelled
from shards.batch import Batch
from shards.utterance import UNIMODAL_TASK


class UfenMtfnConfig(Strict):
    """The ablation switches of the paper's tables 7-9 are here too."""

    width: int = Field(default=32, ge=2)
    """Common width d_m; divisible by `heads` and by 2 (the two directions of the GRU)."""
    layers: int = switch(2, table="7", ge=1, le=4)
    """Layers of convolution and self-attention in each unimodal network."""
    filters: int = Field(default=32, ge=1)
    """Filters of each convolution."""
    kernel: int = Field(default=3, ge=1)
    """Steps that a convolution sees; odd."""
    conv_stride: int = Field(default=2, ge=1)
    """Steps that a convolution moves on: each layer is that many times shorter than the one before."""
    heads: int = Field(default=2, ge=1)
    """Heads of the cross-modal attention and of the encoder-decoder; on a CPU heads under 16 wide are slow."""
    feedforward: int = Field(default=64, ge=1)
    """Hidden units of the encoder-decoder's feed-forward networks."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the unimodal and on the fused vectors, and in the feed-forward networks."""
    subtasks: tuple[Modality, ...] | None = switch(None, table="8")
    """Modalities with a task of their own. Unset: all in use."""
    unimodal_targets: Literal["multimodal", "own"] = "multimodal"
    """What the unimodal tasks learn: the multimodal label, or labels of their own: the data's (CH-SIMS), or those that
    a label generator makes of the pooled X^fusion and of what the answer is read from. The error is not weighed by how
    far such a label lies from the multimodal one."""
    use_gru: bool = switch(True, table="9")
    """Bi-GRU; without it the features are only projected."""
    use_conv: bool = switch(True, table="9")
    """Convolutions; without them each layer attends over the Bi-GRU's output."""
    use_attention: bool = switch(True, table="9")
    """Self-attention over each layer's output."""
    cross_attention: bool = switch(True, table="9")
    """Cross-modal attention; without it the pooled unimodal features are fused as they are."""
    encoder_decoder: bool = switch(True, table="9")
    """Encoder-decoder; without it the answer is read from the fused features."""
    multi_task: bool = switch(True, table="9")
    """Unimodal and fusion tasks beside the final one."""

    @model_validator(mode="after")
    def _fits_together(self) -> "UfenMtfnConfig":
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads} and by 2")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} must be odd, so that its centre is a step")
        if not self.multi_task and self.subtasks:
            raise ValueError("subtasks are asked for, but multi_task is off; set only one of them")
        return self


class UfenLayer(nn.Module):
    """Convolution over the layer before, self-attention over its output, and the linear part of the up-sampling."""

    def __init__(self, width: int, config: UfenMtfnConfig) -> None:
        super().__init__()
        filters = config.filters
        self.stride = config.conv_stride if config.use_conv else 1
        self.conv = (
            nn.Conv1d(width, filters, config.kernel, stride=self.stride, padding=config.kernel // 2)
            if config.use_conv
            else None
        )
        self.out_width = filters if config.use_conv else width
        self.attention = SelfAttention(self.out_width, filters) if config.use_attention else None
        self.up = nn.Linear(filters, config.width)

    def forward(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values (B, T, width), mask (B, T) -> the next layer's input (B, T', F), its mask, and the part (B, T', d)."""
        if self.conv is not None:
            real = values.masked_fill(~mask[..., None], 0.0)  # a filter at the end reads over the edge
            values = self.conv(real.transpose(1, 2)).transpose(1, 2)
            mask = mask[:, :: self.stride]  # an output step is real where the step at its centre is
        seen = values if self.attention is None else self.attention(values, mask)
        return values, mask, self.up(seen)


class Ufen(nn.Module):
    """Unimodal feature extraction network of one modality."""

    def __init__(self, width: int, config: UfenMtfnConfig) -> None:
        super().__init__()
        self.gru = BiGRU(width, config.width // 2) if config.use_gru else None
        self.project = nn.Linear(config.width if config.use_gru else width, config.width)
        self.stride = config.conv_stride if config.use_conv else 1
        self.layers = nn.ModuleList()
        if config.use_conv or config.use_attention:
            below = config.width
            for _ in range(config.layers):
                layer = UfenLayer(below, config)
                self.layers.append(layer)
                below = layer.out_width

    def forward(self, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """values (B, T, D), lengths (B,) on the CPU, mask (B, T) -> X^fusion (B, T, d), anything finite in padding."""
        values = values.to(self.project.weight.dtype)
        fused = output = self.project(values if self.gru is None else self.gru(values, lengths))
        for depth, layer in enumerate(self.layers, start=1):
            output, mask, part = layer(output, mask)
            fused = fused + upsample(part, self.stride**depth, values.shape[1])
        return fused


def upsample(values: Tensor, factor: int, steps: int) -> Tensor:
    """Nearest neighbour in time: values (B, T', d) -> (B, steps, d); step t reads t // factor."""
    if factor == 1:
        return values
    return values[:, :, None].expand(-1, -1, factor, -1).flatten(1, 2)[:, :steps]


class CrossModal(nn.Module):
    """What modality i (the query) finds in modality j, pooled over i's steps.

    Where a sample lacks j, its query passes as it is: the sample still brings what it has.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, query: Tensor, query_mask: Tensor, key: Tensor, key_mask: Tensor, key_present: Tensor) -> Tensor:
        """query (B, T_i, d), key (B, T_j, d), masks (B, T), key_present (B,) -> (B, d)."""
        found = self.attention(query, key, key_mask)
        return masked_mean(self.norm(torch.where(key_present[:, None, None], found, query)), query_mask)


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class EncoderDecoder(nn.Module):
    """A Transformer encoder layer, and a decoder layer that rebuilds the fused features from them and its output."""

    def __init__(self, config: UfenMtfnConfig) -> None:
        super().__init__()
        d, heads = config.width, config.heads
        self.encoder_attention = MultiHeadAttention(d, heads)
        self.encoder_feedforward = FeedForward(d, config.feedforward, config.dropout)
        self.decoder_attention = MultiHeadAttention(d, heads)
        self.memory_attention = MultiHeadAttention(d, heads)
        self.decoder_feedforward = FeedForward(d, config.feedforward, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(5))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, P, d), mask (B, P) bool -> (B, P, d)."""
        encoded = self.norms[0](tokens + self.encoder_attention(tokens, tokens, mask))
        encoded = self.norms[1](encoded + self.encoder_feedforward(encoded))
        decoded = self.norms[2](tokens + self.decoder_attention(tokens, tokens, mask))
        decoded = self.norms[3](decoded + self.memory_attention(decoded, encoded, mask))
        return self.norms[4](decoded + self.decoder_feedforward(decoded))


@system("ufen_mtfn")
class UfenMtfn(System):
    """UFEN-MTFN.

    - UFEN, per modality: Bi-GRU -> linear = X^GRU; then per layer a convolution over the layer before and
      self-attention over its output, up-sampled; X^fusion is the sum of all. Linear on its mean -> Y_i, task T, A or V.
    - MTFN: multi-head attention for each ordered pair of modalities -> layer norm -> mean over the query's steps. The
      pairs' vectors are Input; linear -> Y_m, task F. Encoder-decoder; linear on the decoder's output -> Y_m', task M,
      which is the answer.
    - Loss: the sum of the mean squared errors of all tasks against the multimodal label.

    What the paper leaves open, and how it is settled here:

    - The convolution's stride. "Up-sampling to align dimensions" implies that convolution shortens time: stride 2, and
      step t of X^fusion reads step t // 2^layer of a layer. With stride 1 only the width is aligned.
    - Over which axis the encoder-decoder attends. Input is (batch, 6 d), one vector a sample, and attention over a
      sequence of one is void: it attends over the pairs, P tokens of width d. The linear layers read all P d numbers.
    - What a layer's convolution reads: the convolution of the layer before, not its attention. All layers have as many
      filters.
    - Residual connections: in the encoder-decoder as in the Transformer that it is; none around cross-modal attention.
    - Fewer modalities. Two make two pairs. One makes none and leaves nothing to fuse: Input is its pooled X^fusion and
      the answer is read from there; `cross_attention` and `encoder_decoder` change nothing then. (Pooled X^fusion is
      also what is fused without cross-modal attention.)

    A sample that lacks modality i has no pair i->j (its token is masked) and no part in task i; in j->i modality j
    passes as it is.
    """

    paper = (
        "Cai et al., Multimodal sentiment analysis based on multi-layer feature fusion and multi-task learning, "
        "Scientific Reports 15:2126, 2025"
    )
    Config = UfenMtfnConfig
    labels = "none"

    def __init__(self, config: UfenMtfnConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        d = config.width
        if "text" in spec.widths:
            self.text = text_reader(spec)
            self.text_branch = Ufen(self.text.width, config)  # group `rest`: `text` is the encoder's
        for name in ("audio", "vision"):
            if name in spec.widths:
                self.add_module(name, Ufen(spec.widths[name], config))
        self.subtasks = chosen_subtasks(config.subtasks, spec) if config.multi_task else ()
        self.own_targets = config.unimodal_targets == "own"
        if self.own_targets and not self.subtasks:
            raise ConfigError("model.unimodal_targets: own needs a unimodal task; set it to multimodal")
        self.heads = nn.ModuleDict({name: nn.Linear(d, 1) for name in self.subtasks})
        pairs = permutations(spec.widths, 2) if config.cross_attention else ()
        self.pairs = nn.ModuleDict({f"{i}_{j}": CrossModal(d, config.heads) for i, j in pairs})
        tokens = len(self.pairs) or len(spec.widths)
        rebuilds = config.encoder_decoder and tokens > 1  # attention over a single token is void
        self.dropout = nn.Dropout(config.dropout)
        self.fusion_head = nn.Linear(tokens * d, 1) if config.multi_task or not rebuilds else None
        self.encoder_decoder = EncoderDecoder(config) if rebuilds else None
        self.answer_head = nn.Linear(tokens * d, 1) if rebuilds else None
        widths = {"M": tokens * d} | {UNIMODAL_TASK[name]: d for name in self.subtasks}
        self._feature_widths = widths if self.own_targets else {}

    def forward(self, batch: Batch) -> Prediction:
        masks = {name: batch.mask(name) for name in self.spec.widths}
        fused = {name: zero_absent(self._branch(name, batch, masks[name]), batch.present[name]) for name in masks}
        pooled = {name: masked_mean(fused[name], masks[name]) for name in masks}
        tasks = {UNIMODAL_TASK[name]: head(self.dropout(pooled[name])) for name, head in self.heads.items()}

        tokens, present = self._tokens(fused, pooled, masks, batch.present)
        tokens = self.dropout(tokens)
        if self.fusion_head is not None:
            tasks["F"] = self.fusion_head(tokens.flatten(1))
        if self.encoder_decoder is not None and self.answer_head is not None:
            tokens = self.encoder_decoder(tokens, present)
            tasks["M"] = self.answer_head(tokens.flatten(1))
        else:
            tasks["M"] = tasks.pop("F")
        features = {"M": tokens.flatten(1)} | {UNIMODAL_TASK[name]: pooled[name] for name in self.subtasks}
        return Prediction(
            {task: answer.squeeze(-1).float() for task, answer in tasks.items()},
            {task: features[task] for task in self._feature_widths},
        )

    def _branch(self, name: str, batch: Batch, mask: Tensor) -> Tensor:
        """X^fusion (B, T, d) of one modality."""
        if name == "text":
            return self.text_branch(self.text(batch), batch.lengths[name], mask)
        return self.get_submodule(name)(batch.values[name], batch.lengths[name], mask)

    def _tokens(
        self, fused: dict[str, Tensor], pooled: dict[str, Tensor], masks: dict[str, Tensor], present: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The vectors that are fused, (B, P, d), and which of them a sample has, (B, P)."""
        if self.pairs:
            pairs = list(permutations(fused, 2))
            vectors = [self.pairs[f"{i}_{j}"](fused[i], masks[i], fused[j], masks[j], present[j]) for i, j in pairs]
            there = torch.stack([present[i] for i, _ in pairs], 1)
        else:
            vectors, there = list(pooled.values()), torch.stack([present[name] for name in pooled], 1)
        tokens = torch.stack(vectors, 1).masked_fill(~there[..., None], 0.0)
        # a sample without any modality would leave attention nothing to look at: it may look at the zeros
        return tokens, there | ~there.any(1, keepdim=True)

    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        parts: dict[str, Tensor] = {}
        for task in ("M", "F"):
            if task in prediction.tasks:
                parts[task] = weighted_mean(_squared_error(prediction.tasks[task], targets["M"]), batch)
        for name in self.subtasks:
            task = UNIMODAL_TASK[name]
            answer, takes_part = prediction.tasks[task], batch.present[name]
            label = targets["M"]
            if self.own_targets:
                label, takes_part = where_labelled(target_of(name, targets), answer, takes_part)
            parts[task] = weighted_mean(_squared_error(answer, label), batch, takes_part)
        total = torch.stack(list(parts.values())).sum()
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def feature_widths(self) -> dict[str, int]:
        return dict(self._feature_widths)


def _squared_error(answer: Tensor, label: Tensor) -> Tensor:
    return F.mse_loss(answer, label, reduction="none")
