"""A trained system that answers: weights, recipe and data card in, predictions out.

Knows nothing of training: no DeepSpeed, no Ray, no MLflow. It runs inside a served model, where this package may not be
installed, so it imports little.

A *model folder* is ``{weights.safetensors, recipe.yaml, data.json, encoder/}``; the last only where text goes through
an encoder, and without its weights, which are among the system's. A run folder holds the same, the weights in
``best/``.

Shapes: B samples, T steps, D width.
"""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mmsa_dist.config import TextConfig
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import DataError
from mmsa_dist.recipe import Recipe, read_recipe
from shards.batch import BatchSpec, Standard, collate
from shards.utterance import Utterance

_Item = TypeVar("_Item")

WEIGHTS = "weights.safetensors"
RECIPE = "recipe.yaml"
ENCODER = "encoder"


class Predictor:
    """Predictions for utterances.

    Attributes:
        recipe: of the run that trained the system.
        card: of the data set it was trained on.
        system: the network, in evaluation mode.
        text: how text is read, the encoder's folder included; None where text features are.
    """

    def __init__(self, recipe: Recipe, card: DataCard, system: nn.Module, text: TextConfig | None) -> None:
        self.recipe = recipe
        self.card = card
        self.system = system.eval()
        self.text = text
        self._spec = _batch_spec(card, text)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Predictor":
        """The system of a model folder or of a run folder, on `device`.

        Raises:
            DataError: a file is missing or does not fit the others.
            ConfigError: the recipe names a system that is not here, or cannot be built.
        """
        from mmsa_dist.systems import make_system

        check_whole(folder, "export the model again, or take another version of it")
        recipe = read_recipe(_present(folder / RECIPE))
        card = DataCard.load(folder)
        text = _text(card, folder)
        system = make_system(recipe.system, recipe.model, card.spec(text))
        _load_weights(system, weights_path(folder))
        return cls(recipe, card, system.to(device), text)

    @property
    def device(self) -> torch.device:
        return next(self.system.parameters()).device

    @property
    def columns(self) -> tuple[str, ...]:
        """What a record must hold: ``raw_text`` or ``tokens`` or ``text``; ``audio``; ``vision``."""
        text = "text" if self.text is None else "tokens" if self.card.reads_tokens else "raw_text"
        return tuple(text if name == "text" else name for name in self.card.widths)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the system answers, those it is judged by first: M, or each class."""
        found = self.predict([self.utterance(self.example(), "example")])
        return (*self.card.judged, *(task for task in found if task not in self.card.judged))

    def example(self) -> dict[str, Any]:
        """A made-up record with every column; nothing of the training data, which may be private."""
        rng = np.random.default_rng(0)
        made: dict[str, Any] = {"raw_text": "I REALLY ENJOYED THIS FILM, THE CAST IS WONDERFUL", "tokens": [1, 2, 3, 4]}
        return {
            column: made[column]
            if column in made
            else rng.standard_normal((3, self.card.widths[name])).round(2).tolist()
            for name, column in zip(self.card.widths, self.columns, strict=True)
        }

    @torch.no_grad()
    def predict(self, utterances: Sequence[Utterance]) -> dict[str, np.ndarray]:
        """task -> (B,) float32 predictions in label units, ``M`` is the answer; of classes log-odds (see `readable`).

        Raises:
            DataError: an utterance has another width, or is answered with what is no finite number.
        """
        for utterance in utterances:
            for name, array in utterance.modalities.items():
                if name in self.columns:
                    check_width(f"sample {utterance.key!r}", name, array.shape[-1], self.card.widths[name])
        prediction = self.system(collate(utterances, self._spec).to(self.device))
        answers = {task: values.float().cpu().numpy() for task, values in prediction.tasks.items()}
        for values in (answers[task] for task in self.card.judged):
            if len(wrong := np.flatnonzero(~np.isfinite(values))):
                raise DataError(
                    f"sample {utterances[wrong[0]].key!r}: the model's answer is {values[wrong[0]]}; "
                    "are its features extracted as those of the training data?"
                )
        return answers

    @torch.no_grad()
    def fused(self, utterances: Sequence[Utterance]) -> np.ndarray | None:
        """(B, d) float32 features that the answer is made of, where the system names them: those of task ``M``, which a
        label generator reads."""
        found = self.system(collate(utterances, self._spec).to(self.device)).features.get("M")
        return None if found is None else found.float().cpu().numpy()

    def readable(self, answers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answers of `predict` for people: intensities as they are; of a class the probability, 0 to 1, that it is
        there, which is the sigmoid of its log-odds."""
        return {
            task: torch.from_numpy(values).sigmoid().numpy() if task in self.card.classes else values
            for task, values in answers.items()
        }

    def reads(self, utterance: Utterance) -> bool:
        """Whether `utterance` has anything that the system reads; a sample of a data set may lack it all."""
        held = {"raw_text": utterance.raw_text, "tokens": utterance.tokens, **utterance.modalities}
        return any((value := held.get(column)) is not None and len(value) > 0 for column in self.columns)

    def utterance(self, record: Mapping[str, Any], key: str) -> Utterance:
        """A record of plain values (JSON) as an utterance.

        Args:
            record: column -> value: ``raw_text`` a string, ``tokens`` (T,) integers, features (T, D) numbers, or (D,)
                for one step, or a .npy file of them in base64. None, NaN and an empty list mean that the sample lacks
                it.
            key: what to call it in messages.

        Raises:
            DataError: a value is not what its column holds, or every column is missing.
        """
        modalities: dict[str, np.ndarray] = {}
        raw_text, tokens = None, None
        for name, column in zip(self.card.widths, self.columns, strict=True):
            value = record.get(column)
            if _is_missing(value):
                continue
            if column == "raw_text":
                if not isinstance(value, str):
                    raise DataError(f"sample {key!r}: raw_text is {_shown(value)}, expected a string")
                raw_text = value
            elif column == "tokens":
                tokens = _tokens(value, key)
            else:
                modalities[name] = _features(value, key, name, self.card.widths[name])
        utterance = Utterance(key, "test", modalities, {}, raw_text, tokens)
        if not self.reads(utterance):
            raise DataError(f"sample {key!r}: has none of {', '.join(self.columns)}, which the model reads; give one")
        return utterance


def weights_path(folder: Path) -> Path:
    """The weights of a model folder, else the best ones of a run folder.

    Raises:
        DataError: there are none, or the best ones are damaged.
    """
    own = folder / WEIGHTS
    if own.is_file():
        return own
    best = _present(folder / "best" / WEIGHTS)
    check_whole(best.parent, "take the registered model, or train the run again")
    return best


def check_whole(folder: Path, remedy: str) -> None:
    """Raises DataError where a file in `folder` is not what its manifest says; older versions wrote none in ``best/``
    and in MLflow's model folders."""
    from mmsa_dist.checkpoint import damage

    if (folder / "manifest.json").is_file() and (fault := damage(folder, None)) is not None:
        raise DataError(f"{folder}: {fault}; {remedy}")


def check_width(where: str, name: str, found: int, wanted: int) -> None:
    """Raises DataError where features are not as wide as the model's."""
    if found != wanted:
        raise DataError(
            f"{where}: {name} has {found} features a step, the model was trained on {wanted}; "
            "extract the features as for the training data, or train a model on these"
        )


def chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def _text(card: DataCard, folder: Path) -> TextConfig | None:
    """The encoder's shape and tokenizer come from the model folder where it has them; its weights are the system's."""
    if card.text is None:
        return None
    own = folder / ENCODER
    encoder = str(own) if own.is_dir() else card.text.encoder
    return card.text.model_copy(update={"encoder": encoder, "pretrained": False})


def _batch_spec(card: DataCard, text: TextConfig | None) -> BatchSpec:
    ids = None
    if text is not None:
        from mmsa_dist.layers.text import text_ids

        ids = text_ids(text, card)
    widths = {name: None if name == "text" and ids else width for name, width in card.widths.items()}
    standard = {name: Standard.of(values.model_dump()) for name, values in card.statistics.items()}
    return BatchSpec(widths, card.tasks, ids, standard)


def _load_weights(system: nn.Module, path: Path) -> None:
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}); copy it again or train again") from error
    from mmsa_dist.systems.base import LABEL_LAYERS

    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(LABEL_LAYERS)}
    own = system.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - weights.keys()]
    wrong += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        raise DataError(
            f"{path}: does not fit {type(system).__name__} of this version: {sorted(wrong)[0]}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            + "; use the version that trained it (environment.json of the run) or train again"
        )
    system.load_state_dict(weights)


def _present(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: is missing; expected a model folder, or the folder of a run that finished an epoch (runs/…)"
        )
    return path


_LISTS = (list, tuple, np.ndarray)


def _is_missing(value: Any) -> bool:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return True
    return isinstance(value, _LISTS) and len(value) == 0


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'…' if len(text) > 40 else ''}"


def _tokens(value: Any, key: str) -> np.ndarray:
    try:
        tokens = np.asarray(value)
    except ValueError:
        tokens = np.asarray("ragged")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"sample {key!r}: tokens are {_shown(value)}, expected a list of integers")
    return tokens.astype(np.int32)


def _features(value: Any, key: str, name: str, width: int) -> np.ndarray:
    """(T, D) float32 from nested lists, or from a .npy file in base64; what is flat is one step."""
    if isinstance(value, str):
        return _sound(np.atleast_2d(_array(value, key, name, width)), key, name, width)
    if not isinstance(value, _LISTS):
        raise DataError(f"sample {key!r}: {name} is {_shown(value)}, expected a list of steps of {width} numbers each")
    rows = list(value)
    if not isinstance(rows[0], _LISTS):
        rows = [rows]
    for step, row in enumerate(rows):
        if not isinstance(row, _LISTS):
            raise DataError(f"sample {key!r}: {name} step {step} is {_shown(row)}, expected a list of {width} numbers")
        check_width(f"sample {key!r}, step {step}", name, len(row), width)
    try:
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is said below
            array = np.asarray(rows, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"sample {key!r}: {name} holds what is not a number ({error}); expected {width} a step"
        ) from error
    return _sound(array, key, name, width)


def _sound(array: np.ndarray, key: str, name: str, width: int) -> np.ndarray:
    """The same (T, D) float32 features.

    Raises:
        DataError: they are of another shape, or not all finite.
    """
    if array.ndim != 2:
        raise DataError(f"sample {key!r}: {name} has {array.ndim} dimensions, expected 2: steps x {width} numbers")
    check_width(f"sample {key!r}", name, array.shape[1], width)
    if not np.isfinite(array).all():
        step, feature = np.argwhere(~np.isfinite(array))[0]
        raise DataError(
            f"sample {key!r}: {name} step {step}, feature {feature} is {array[step, feature]}, expected a finite number"
        )
    return array


def _array(value: str, key: str, name: str, width: int) -> np.ndarray:
    """float32 of a .npy file in base64, whose header is believed only where the bytes behind it are as many."""
    try:
        content = base64.b64decode(value, validate=True)
        file = io.BytesIO(content)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        shape, fortran, dtype = read(file)
        if dtype.kind not in "fiu":
            raise ValueError(f"it holds {dtype}")
        if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
            raise ValueError(f"it has {len(content) - file.tell()} bytes for the shape {shape}")
        array = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is said
            return array.astype(np.float32)
    except Exception as error:  # whatever its reader makes of a header that is none
        raise DataError(
            f"sample {key!r}: {name} is {_shown(value)}, expected a list of steps of {width} numbers each, or a .npy "
            f"file of them in base64 ({' '.join(str(error).split())[:80]})"
        ) from error
