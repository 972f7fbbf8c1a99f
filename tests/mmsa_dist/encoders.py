"""Tiny text encoders in folders, as `save_pretrained` writes them, and the data they belong to."""

from pathlib import Path
from typing import Any

import torch

from mmsa_dist.config import TextConfig
from mmsa_dist.layers.text import encoder_width
from mmsa_dist.systems import DataSpec
from tests.mmsa_dist.batches import WIDTHS

ARCHITECTURES = ("bert", "roberta", "distilbert")
"""On a CPU the first computes no padding, the others take a batch in parts."""

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "very", *(f"other{n}" for n in range(12))]


def config_of(architecture: str, dropout: float = 0.1) -> Any:
    import transformers

    small: dict[str, Any] = {"vocab_size": len(WORDS), "max_position_embeddings": 130}
    if architecture == "distilbert":
        drops = {"dropout": dropout, "attention_dropout": dropout}
        return transformers.DistilBertConfig(**small, **drops, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    small |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    small |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.BertConfig(**small) if architecture == "bert" else transformers.RobertaConfig(**small)


def write_encoder(folder: Path, architecture: str, dropout: float) -> Path:
    """A model folder with random weights and a tokenizer of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModel.from_config(config_of(architecture, dropout)).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def spec_of(encoder: str | Path, modalities: tuple[str, ...] = ("text", "audio"), **values: Any) -> DataSpec:
    """Data whose text `encoder` reads; `values` are `TextConfig`'s."""
    text = TextConfig(encoder=str(encoder), **values)
    widths = {name: encoder_width(text) if name == "text" else WIDTHS[name] for name in modalities}
    return DataSpec(widths, (-3.0, 3.0), ("M",), text)
