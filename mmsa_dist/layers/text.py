"""How a system reads text: the data set's own features, or a Hugging Face encoder over token ids.

Nothing is fetched for a local folder, and only safetensors weights are loaded. `transformers` is imported where an
encoder is used, nowhere else.

Shapes: B batch, T tokens or steps, D width.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmsa_dist.config import TextConfig
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.layers.hub import checkpoint_layers, encoder_config, load_encoder, load_tokenizer
from mmsa_dist.layers.ragged import make_ragged, ragged_states
from shards.batch import Batch
from shards.utterance import Utterance

TokenIds = Callable[[list[Utterance]], list[np.ndarray]]
"""Utterances -> (T,) int64 token ids of each; empty where it has no text."""

NO_TEXT = np.zeros(0, dtype=np.int64)


class TextSpec(Protocol):
    """The part of `systems.DataSpec` that a text reader needs."""

    @property
    def widths(self) -> Any: ...
    @property
    def text(self) -> TextConfig | None: ...


class HasText(Protocol):
    """The part of `shards.index.Index` that says what text there is."""

    @property
    def name(self) -> str: ...
    @property
    def has_raw_text(self) -> bool: ...
    @property
    def has_tokens(self) -> bool: ...


class TextReader(nn.Module):
    """Gives a system its text: a Batch -> (B, T, `width`)."""

    width: int


def text_reader(spec: TextSpec) -> TextReader:
    """The reader that `spec` asks for.

    Raises:
        ConfigError: the encoder cannot be loaded; says why.
    """
    if spec.text is None or spec.text.encoder is None:
        return TextFeatures(spec.widths["text"])
    return TextEncoder(spec.text)


class TextFeatures(TextReader):
    """The data set's own text features, as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, batch: Batch) -> Tensor:
        return batch.values["text"]


class TextEncoder(TextReader):
    """A Hugging Face encoder: token ids to its last layer's states.

    Its pooler, which nothing here reads, is not built. Frozen, it stays in evaluation mode and keeps no graph.
    With ``gradient_checkpointing`` each layer keeps its input alone and is computed once more in the backward pass,
    its dropout drawn as it was.

    On the CPU it computes no padding, whose states are zero (`layers.ragged`); an architecture that cannot takes a
    batch in `PARTS` parts of samples of similar length, each trimmed to its own longest. The result is the same.
    """

    PARTS = 4
    """Calls of the encoder a batch, fewer where it has fewer samples: under ZeRO-3 all ranks must call equally often,
    so the number depends on the batch's size alone."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        assert config.encoder is not None
        self.finetune = config.finetune
        self.model = load_encoder(config.encoder, config.pretrained)
        self.model.requires_grad_(config.finetune)
        self.width = hidden_size(self.model.config, config.encoder)
        self.ragged = make_ragged(self.model)
        if config.gradient_checkpointing and config.finetune:  # frozen, it keeps nothing for a backward pass
            checkpoint_layers(self.model)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TextEncoder":
        super().train(mode)
        self.model.train(mode and self.finetune)
        return self

    def forward(self, batch: Batch) -> Tensor:
        ids, mask = batch.values["text"], batch.mask("text")
        with nullcontext() if self.finetune else torch.no_grad():
            if ids.device.type != "cpu":  # more kernels to launch cost more there than padding does
                return self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.ragged:
                return ragged_states(self.model, ids, mask)
            return self._in_parts(ids, mask, batch.lengths["text"])

    def _in_parts(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(stable=True)
        parts = []
        # looked up once: the gradient of the table is as large as the table, whatever the number of words
        words = self.model.get_input_embeddings()(ids)
        for rows in order.chunk(self.PARTS):
            longest = int(lengths[rows[-1]])
            part = self.model(inputs_embeds=words[rows, :longest], attention_mask=mask[rows, :longest])
            parts.append(functional.pad(part.last_hidden_state, (0, 0, 0, ids.shape[1] - longest)))
        return torch.cat(parts)[order.argsort()]


def encoder_width(text: TextConfig) -> int:
    """D of the encoder that `text` names; reads its configuration only.

    Raises:
        ConfigError: no such encoder.
    """
    assert text.encoder is not None
    return hidden_size(encoder_config(text.encoder), text.encoder)


def hidden_size(config: Any, encoder: str) -> int:
    """D from a Hugging Face configuration, under whichever name its architecture gives it."""
    for name in ("hidden_size", "d_model", "dim", "n_embd"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    raise ConfigError(
        f"text.encoder: {encoder} ({config.model_type}) does not say its width; choose a text encoder such as BERT"
    )


def text_ids(text: TextConfig, index: HasText) -> TokenIds:
    """What turns utterances into token ids: a tokenizer over transcripts, or the data set's stored ids.

    Raises:
        ConfigError: the data has neither, or not the one that ``text.input`` asks for, or the encoder has no tokenizer.
    """
    assert text.encoder is not None
    has = {"raw": index.has_raw_text, "tokens": index.has_tokens}
    wanted = text.input if text.input != "auto" else "raw" if index.has_raw_text else "tokens"
    if not has[wanted]:
        needed = (
            "a transcript or token ids"
            if text.input == "auto"
            else {"raw": "a transcript", "tokens": "token ids"}[wanted]
        )
        other = next((name for name, there in has.items() if there), None)
        remedy = f"set text.input={other}" if other else "unset text.encoder to use the data set's text features"
        raise ConfigError(f"text.encoder: {text.encoder} needs {needed}, which data set {index.name!r} lacks; {remedy}")
    config = encoder_config(text.encoder)
    limit = positions(config)
    if limit is not None and text.max_tokens > limit:
        raise ConfigError(
            f"text.max_tokens: {text.max_tokens} is more than the {limit} positions of {text.encoder}; lower it"
        )
    if wanted == "tokens":
        return StoredIds(text.max_tokens, config.vocab_size, text.encoder)
    return Tokenizer(text.encoder, text.max_tokens)


def positions(config: Any) -> int | None:
    """Longest input of an encoder, None where its architecture sets no bound."""
    bound = getattr(config, "max_position_embeddings", None)
    if not isinstance(bound, int) or bound <= 0:
        return None
    # RoBERTa and its kin number positions from pad_token_id + 1
    offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return bound - offset


class StoredIds:
    """The token ids that the data set came with."""

    def __init__(self, max_tokens: int, vocabulary: int, encoder: str) -> None:
        self.max_tokens = max_tokens
        self.vocabulary = vocabulary
        self.encoder = encoder

    def __call__(self, utterances: list[Utterance]) -> list[np.ndarray]:
        """Raises DataError for an id that the encoder's vocabulary does not have."""
        return [self._ids(utterance) for utterance in utterances]

    def _ids(self, utterance: Utterance) -> np.ndarray:
        if utterance.tokens is None or not len(utterance.tokens):
            return NO_TEXT
        ids = utterance.tokens.astype(np.int64)
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            wrong = ids[(ids < 0) | (ids >= self.vocabulary)][0]
            raise DataError(
                f"{utterance.key}: token id {wrong} is not among the {self.vocabulary} of {self.encoder}; "
                "name the encoder whose tokenizer made the ids, or set text.input=raw"
            )
        if len(ids) > self.max_tokens:
            ids = np.append(ids[: self.max_tokens - 1], ids[-1])  # keeps the closing special token
        return ids


class Tokenizer:
    """Transcripts to token ids with the encoder's own fast tokenizer.

    It goes through the tokenizer's Rust core, set up once: the Python layer above changes that core's state on every
    call, which fails when several reading threads share it.
    """

    def __init__(self, encoder: str, max_tokens: int) -> None:
        # a rank has the threads it was given; a second pool per rank would fight for the same cores
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.core = load_tokenizer(encoder)
        self.core.no_padding()
        self.core.enable_truncation(max_length=max_tokens)

    def __call__(self, utterances: list[Utterance]) -> list[np.ndarray]:
        texts = [utterance.raw_text for utterance in utterances]
        codes = iter(self.core.encode_batch([text for text in texts if text is not None]))
        return [NO_TEXT if text is None else np.asarray(next(codes).ids, dtype=np.int64) for text in texts]
