"""Finding and loading Hugging Face encoders: a local folder, a folder inside an installed package, or a hub name.

Everything that goes wrong here is said in one sentence. A name that the hub does not know and a hub that does not
answer are told apart before anything is downloaded, since the libraries' own retries take half a minute.
"""

import importlib.util
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmsa_dist.errors import ConfigError, TransientError

PACKAGE = "package:"
"""``package:some_package/folder`` names a folder inside an installed Python package: the same on every machine."""

HUB_TIMEOUT = 10.0
"""Seconds after which a hub that does not answer is given up."""


def locate(encoder: str) -> tuple[str, bool]:
    """Where `encoder` is: (folder or hub name, whether it is local).

    Raises:
        ConfigError: it reads as a folder and there is none, or the folder holds no Hugging Face model.
    """
    if encoder.startswith(PACKAGE):
        folder = _package_folder(encoder)
    elif Path(encoder).expanduser().is_dir():
        folder = Path(encoder).expanduser()
    elif encoder.startswith(("/", ".", "~")) or encoder.count("/") > 1:
        raise ConfigError(
            f"text.encoder: folder {encoder!r} does not exist; expected a Hugging Face model folder or a hub name"
        )
    else:
        return encoder, False
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"text.encoder: folder {encoder!r} has no config.json; expected a Hugging Face model folder "
            "(config.json, model.safetensors, tokenizer.json)"
        )
    return str(folder), True


def _package_folder(encoder: str) -> Path:
    package, _, inside = encoder.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"text.encoder: {encoder!r} names the Python package {package!r}, which is not installed here"
        )
    folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise ConfigError(f"text.encoder: {encoder!r}: the package {package!r} has no folder {inside!r}")
    return folder


def encoder_config(encoder: str) -> Any:
    """The encoder's configuration. Raises ConfigError, TransientError."""
    from transformers import AutoConfig

    config = _load(AutoConfig, encoder, "configuration")
    if config.is_encoder_decoder:
        raise ConfigError(
            f"text.encoder: {encoder} ({config.model_type}) is an encoder-decoder; choose a text encoder such as BERT"
        )
    return config


def load_encoder(encoder: str, pretrained: bool) -> Any:
    """The encoder in float32, without the pooler that nothing reads.

    Args:
        pretrained: load its weights; otherwise only its shape, weights random from PyTorch's generator.

    Raises:
        ConfigError, TransientError.
    """
    from transformers import MODEL_MAPPING, AutoModel

    config = encoder_config(encoder)
    if type(config) not in MODEL_MAPPING:
        raise ConfigError(f"text.encoder: {encoder} ({config.model_type}) is not a text encoder that can be loaded")
    options: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": "float32"}
    if "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters:
        options["add_pooling_layer"] = False
    if not pretrained:
        return AutoModel.from_config(config, **options)
    model, info = _load(AutoModel, encoder, "weights", use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"text.encoder: {encoder}: its weights lack {len(missing)} of the encoder's tensors (first: {missing[0]}); "
            "give a complete model, or set text.pretrained=false to train from random weights"
        )
    return model


def check_checkpointing(encoder: str) -> None:
    """Raises ConfigError where the encoder's architecture cannot compute its layers once more in the backward pass."""
    from transformers import MODEL_MAPPING

    config = encoder_config(encoder)
    if type(config) in MODEL_MAPPING and not MODEL_MAPPING[type(config)].supports_gradient_checkpointing:
        raise ConfigError(
            f"text.gradient_checkpointing: {encoder} ({config.model_type}) cannot compute its layers once more; leave "
            "it out, and save memory with --optim.accumulation or a smaller --batch-size"
        )


def checkpoint_layers(model: Any) -> None:
    """Makes each layer of an encoder keep its input alone for the backward pass, which computes the rest once more."""
    # two names of one thing: transformers 5.23 warns of the older
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.config.use_cache = False  # nothing is generated, and asking for a cache is warned of


def load_tokenizer(encoder: str) -> Any:
    """The Rust core of the encoder's fast tokenizer. Raises ConfigError, TransientError."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, encoder, "tokenizer")
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ConfigError(f"text.encoder: {encoder} has no fast tokenizer (tokenizer.json), which reading needs")
    known, wanted = core.get_vocab_size(), encoder_config(encoder).vocab_size
    if known < wanted // 2:  # a folder without one gives the architecture's own, empty but for special tokens
        raise ConfigError(
            f"text.encoder: {encoder}: its tokenizer knows {known} of the encoder's {wanted} tokens; "
            "expected the tokenizer.json that belongs to the encoder"
        )
    return core


def _load(loader: Any, encoder: str, what: str, **options: Any) -> Any:
    """``loader.from_pretrained`` whose complaints become one sentence."""
    place, local = locate(encoder)
    if not local and not _cached(place):
        _ask_hub(place)
    try:
        with _quiet():
            return loader.from_pretrained(place, local_files_only=local, **options)
    except Exception as error:  # whatever a foreign folder makes a foreign library raise
        raise ConfigError(f"text.encoder: {encoder}: its {what} cannot be loaded: {_first_line(error)}") from error


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _ask_hub(name: str) -> None:
    """Raises where the hub does not have `name` (ConfigError) or cannot be asked (TransientError)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"text.encoder: the Hugging Face hub has no model {name!r}, and there is no such folder; check the name"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ConfigError(
            f"text.encoder: {name!r} is not in the local cache and HF_HUB_OFFLINE is set; give the model's local folder"
        ) from error
    except Exception as error:  # the hub's client has its own zoo of network errors
        raise TransientError(
            f"text.encoder: {name!r} is neither a local folder nor cached, and the Hugging Face hub does not answer "
            f"({_first_line(error)}); give the model's local folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of the pooler that is left out, in this block only."""
    from transformers.utils import logging as transformers_logging

    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
