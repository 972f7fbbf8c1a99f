"""A text encoder that computes no padding: the tokens of a whole batch as one row, and only attention sample by sample.

Transcripts are ragged: of a batch padded to its longest, two thirds are padding. What an encoder does to each token by
itself, nearly all of its work, is done for real tokens only; its attention looks at them as a padded batch. That takes
two things of an architecture, which is why `KINDS` is short: that positions can be given, and that it hands keyword
arguments on to its attention.

Shapes: B batch, T tokens of the longest, N real tokens of all, H heads, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("bert",)
"""Architectures (``model_type`` of a Hugging Face configuration) that compute exactly the same this way."""

NAME = "mmsa_ragged"


class Places:
    """Where the N real tokens stand in the padded batch.

    Args:
        mask: (B, T) bool, True on real tokens.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.flat = mask.flatten().nonzero()[:, 0]
        self.steps = self.flat % mask.shape[1]

    def gather(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...)."""
        return padded.flatten(0, 1)[self.flat]

    def spread(self, tokens: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), zeros in padding."""
        padded = tokens.new_zeros(self.mask.numel(), *tokens.shape[1:])
        return padded.index_copy(0, self.flat, tokens).unflatten(0, self.mask.shape)


def make_ragged(model: Any) -> bool:
    """Makes `ragged_states` possible for `model`, a Hugging Face encoder; whether it is of one of `KINDS`."""
    if model.config.model_type not in KINDS:
        return False
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])  # called with a padded batch
    model.set_attn_implementation(NAME)
    return True


def ragged_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (B, T, D) of ids (B, T) with mask (B, T) bool; zeros in padding.

    Steps that no sample has are taken away before: attention sums in blocks, which a longer row would cut otherwise.
    """
    real = mask.any(0).nonzero()
    longest = int(real[-1]) + 1 if len(real) else 1
    places = Places(mask[:, :longest])
    words = model.get_input_embeddings()(places.gather(ids[:, :longest]))
    states = model(inputs_embeds=words[None], position_ids=places.steps[None], ragged=places).last_hidden_state
    return F.pad(places.spread(states[0]), (0, 0, 0, mask.shape[1] - longest))


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ragged: Places | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` asks for it: query, key, value (1, H, N, D / H) -> (1, N, H, D / H).

    Without `ragged`, of an ordinary padded batch: (B, H, T, D / H) -> (B, T, H, D / H).
    """
    if ragged is not None:
        query, key, value = (ragged.spread(part[0].transpose(0, 1)).transpose(1, 2) for part in (query, key, value))
        attention_mask = ragged.mask[:, None, None, :]
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    seen = seen.transpose(1, 2)
    return (seen if ragged is None else ragged.gather(seen)[None]), None
