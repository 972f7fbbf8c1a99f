"""The feature pickle of the MMSA toolkit: ``{"train" | "valid" | "test": {"id", "text", "audio", "vision", …}}``.

Both of its kinds: *aligned* (all modalities have one step a word piece; no lengths on disk) and *unaligned* (own steps
and ``audio_lengths``, ``vision_lengths``). Arrays are padded with zeros at the end; the padding is left out.

Shapes: N samples, T padded steps, D width.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.files import sha256_of
from shards.sources import pickles
from shards.sources.lengths import whole
from shards.suggest import nearest
from shards.utterance import MODALITIES, SPLITS, UNIMODAL_TASK, Utterance

_LABELS = {"M": "regression_labels", **{task: f"regression_labels_{task}" for task in UNIMODAL_TASK.values()}}


@dataclass
class _Split:
    """One split of the pickle, checked. All sequences have one entry a sample."""

    ids: list[str]
    raw_text: list[str] | None
    features: dict[str, Any]  # modality -> (N, T, D), or a list of (T_i, D)
    lengths: dict[str, np.ndarray]  # modality -> (N,) as the file tells them
    tokens: np.ndarray | None  # (N, 3, T): ids, mask, segment
    labels: dict[str, np.ndarray]  # task -> (N,) float32
    aligned: bool


class MmsaSource:
    """Reads one feature pickle. It is held in memory whole, as its format asks.

    Args:
        path: the pickle.
        label_range: None takes -1..1 where the file has unimodal labels (SIMS), else -3..3 (MOSI, MOSEI).
        modalities: those to read; one that the file lacks altogether is absent.
        strict: a training set: all three splits, each with labels. Otherwise any split will do, labels or not.

    Raises:
        DataError: not such a pickle; names file, split and key.
    """

    synthetic = False

    def __init__(
        self,
        path: Path,
        *,
        label_range: tuple[float, float] | None = None,
        modalities: Iterable[str] = MODALITIES,
        strict: bool = True,
    ) -> None:
        self.where = str(path)
        wanted = set(modalities)
        content = pickles.load(path)
        if not isinstance(content, dict) or not set(content) & set(SPLITS):
            raise DataError(
                f"{path}: holds {pickles.describe(content)}"
                + (f" with keys {_listed(content)}" if isinstance(content, dict) else "")
                + f", expected a dict with the splits {', '.join(SPLITS)}"
            )
        self._splits: dict[str, _Split] = {}
        for split in SPLITS:
            if split in content or strict:
                self._splits[split] = self._checked(split, content.pop(split, None), wanted, strict)
        first = next(iter(self._splits))
        self._check_alike(first)
        train = self._splits[first]
        self.widths = {name: self._width(name) for name in MODALITIES if name in train.features}
        self.classes: dict[str, int] = {}
        self.tasks = tuple(train.labels)
        self.label_range = label_range or ((-1.0, 1.0) if len(self.tasks) > 1 else (-3.0, 3.0))
        self.has_raw_text = train.raw_text is not None
        self.has_tokens = train.tokens is not None
        self.counts = {name: len(split.ids) for name, split in self._splits.items()}
        self.name = f"{path.parent.parent.name}-{path.stem}".lower() if path.parent.name == "Processed" else path.stem
        self.provenance = {"format": "mmsa", "file": path.name, "sha256": sha256_of(path), "aligned": train.aligned}
        self._cut: dict[str, int] = dict.fromkeys(MODALITIES, 0)

    def keys(self, split: str) -> Iterable[str]:
        return self._splits[split].ids

    def read(self, split: str, number: int) -> Utterance:
        part = self._splits[split]
        tokens = None if part.tokens is None else self._tokens(part, split, number)
        arrays = {name: np.asarray(part.features[name][number]) for name in self.widths}
        lengths = {name: self._length(part, name, number, array) for name, array in arrays.items()}
        if part.aligned and arrays:
            # one length for all: an aligned step whose audio or vision is zero is silence, not padding
            together = min(len(a) for a in arrays.values())
            told = len(tokens) if tokens is not None else max(lengths.values())
            lengths = dict.fromkeys(arrays, min(together, told))
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is then counted as such
            modalities = {name: np.asarray(a[: lengths[name]], dtype=np.float32) for name, a in arrays.items()}
        return Utterance(
            key=part.ids[number],
            split=split,
            modalities=modalities,
            labels={task: float(values[number]) for task, values in part.labels.items()},
            raw_text=None if part.raw_text is None else part.raw_text[number],
            tokens=tokens,
        )

    def notes(self) -> list[str]:
        return [
            f"{name}: {count:,} samples say they are longer than the steps that are there; taken as they are"
            for name, count in self._cut.items()
            if count
        ]

    # --- one sample

    def _tokens(self, part: _Split, split: str, number: int) -> np.ndarray:
        """(T,) int32 ids up to the last step that the mask keeps."""
        assert part.tokens is not None
        ids, mask = part.tokens[number, 0], part.tokens[number, 1]
        kept = ids[: _last(mask)]
        with np.errstate(invalid="ignore"):  # of what no int32 holds, which is said below
            tokens = kept.astype(np.int32)
        if not np.array_equal(tokens, kept) or (tokens < 0).any():
            raise DataError(
                f"{self.where}: {split}, id {part.ids[number]!r}: text_bert has ids that are not whole numbers"
            )
        return tokens

    def _length(self, part: _Split, name: str, number: int, array: np.ndarray) -> int:
        """Steps of `array` (T, D) that are not padding."""
        if name in part.lengths:
            told = int(part.lengths[name][number])
            self._cut[name] += told > len(array)
            return min(told, len(array))
        if name == "text" and part.tokens is not None and part.tokens.shape[-1] == len(array):
            mask: np.ndarray = part.tokens[number, 1]
            return _last(mask)
        if isinstance(part.features[name], list):
            return len(array)  # ragged on disk: there is no padding to strip
        return _last(np.asarray(array.any(axis=1)))

    # --- the file

    def _checked(self, split: str, content: Any, wanted: set[str], strict: bool) -> _Split:
        at = f"{self.where}: {split}"
        if content is None:
            raise DataError(f"{at} is missing; a training set needs {', '.join(SPLITS)}")
        if not isinstance(content, dict):
            raise DataError(f"{at} is {pickles.describe(content)}, expected a dict of arrays")
        needed = ["id", *(["regression_labels"] if strict else [])]
        for key in needed:
            if key not in content:
                raise DataError(f"{at} has no key {key!r}{nearest(key, map(str, content))}")
        ids = [_text(value) for value in _rows(f"{at}.id", content["id"])]
        if not ids:
            raise DataError(
                f"{at} is empty: it has no samples; every split needs some (move a few there and pack again)"
            )
        if None in ids:
            raise DataError(f"{at}.id holds {pickles.describe(content['id'][ids.index(None)])}, expected strings")

        def column(key: str) -> Any:
            """The key's value with one entry a sample, or None where the file lacks it."""
            value = content.get(key)
            if value is not None and len(_rows(f"{at}.{key}", value)) != len(ids):
                raise DataError(f"{at}.{key} has {len(value)} rows, expected {len(ids)}, one for each id")
            return value

        features = {name: _features(f"{at}.{name}", column(name)) for name in MODALITIES if name in wanted}
        features = {name: value for name, value in features.items() if value is not None}
        raw = column("raw_text")
        texts = None if raw is None else [_text(value) for value in raw]
        if texts is not None and None in texts:
            raise DataError(f"{at}.raw_text of id {ids[texts.index(None)]!r} is not a string")
        tokens = column("text_bert")
        if tokens is not None:
            tokens = _array(f"{at}.text_bert", tokens)
            if tokens.ndim != 3 or tokens.shape[1] != 3 or tokens.dtype.kind not in "iuf":
                raise DataError(
                    f"{at}.text_bert is {pickles.describe(tokens)}, expected numbers (N, 3, T): ids, mask, segment"
                )
        if not features and texts is None and tokens is None:
            raise DataError(
                f"{at} has none of {', '.join([*MODALITIES, 'raw_text', 'text_bert'])}; keys are {_listed(content)}"
            )
        lengths = {
            name: whole(f"{at}.{key}", _numbers(f"{at}.{key}", column(key)))
            for name, key in ((name, f"{name}_lengths") for name in features)
            if key in content
        }
        with np.errstate(over="ignore"):  # a label beyond float32 becomes infinite, which is out of any range
            labels = {
                task: _numbers(f"{at}.{key}", column(key)).astype(np.float32)
                for task, key in _LABELS.items()
                if key in content
            }
        steps = {value.shape[1] if isinstance(value, np.ndarray) else -1 for value in features.values()}
        aligned = not lengths and len(features) > 1 and len(steps) == 1 and -1 not in steps
        return _Split(ids, texts, features, lengths, tokens, labels, aligned)  # type: ignore[arg-type]  # no None is left

    def _check_alike(self, first: str) -> None:
        """Every split has what the first has."""
        for name, part in self._splits.items():
            for kind, mine, its in (
                ("modalities", list(self._splits[first].features), list(part.features)),
                ("labels", list(self._splits[first].labels), list(part.labels)),
                ("raw_text", self._splits[first].raw_text is None, part.raw_text is None),
                ("text_bert", self._splits[first].tokens is None, part.tokens is None),
            ):
                if mine != its:
                    said = (
                        f"has {kind} {its}, {first} has {mine}"
                        if isinstance(mine, list)
                        else f"and {first} differ in {kind}"
                    )
                    raise DataError(f"{self.where}: {name} {said}; every split needs the same")

    def _width(self, name: str) -> int:
        for part in self._splits.values():
            for array in part.features[name]:
                if len(array):
                    return int(np.asarray(array).shape[-1])
        raise DataError(f"{self.where}: {name} has length zero in every sample; leave it out with --modalities")


def _last(kept: np.ndarray) -> int:
    """1 + the last position where `kept` (T,) is not zero; 0 where there is none."""
    where = np.flatnonzero(kept)
    return int(where[-1]) + 1 if len(where) else 0


def _text(value: object) -> str | None:
    """A string of any of the kinds that pickles hold; None for anything else."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, str | int | np.integer):
        return str(value)
    return None


def _listed(content: dict[Any, Any]) -> str:
    return ", ".join(sorted(map(str, content))[:20])


def _rows(at: str, value: Any) -> Any:
    """`value`, which has one entry a sample. A string has letters, a dict has keys: neither are entries."""
    if not isinstance(value, list | tuple) and not (isinstance(value, np.ndarray) and value.ndim):
        raise DataError(f"{at} is {pickles.describe(value)}, expected a list or an array with one entry a sample")
    return value


def _array(at: str, value: Any) -> np.ndarray:
    """`value` as an array."""
    try:
        return np.asarray(value)
    except (ValueError, RecursionError) as error:  # a list may hold itself
        raise DataError(
            f"{at} is {pickles.describe(value)} whose entries differ in length or depth, expected an array"
        ) from error


def _numbers(at: str, value: Any) -> np.ndarray:
    """(N,) numbers from a list or an array, whatever its unit dimensions."""
    if value is None:
        raise DataError(f"{at} is None; leave the key out or fill it")
    array = _array(at, value)
    if array.dtype == object:
        with suppress(TypeError, ValueError, OverflowError):
            array = array.astype(np.float64)
    if array.dtype.kind not in "iufb" or array.size != len(value):
        raise DataError(f"{at} is {pickles.describe(array)}, expected one number a sample")
    return array.reshape(-1)


def _features(at: str, value: Any) -> np.ndarray | list[np.ndarray] | None:
    """(N, T, D) numbers, or a list of (T_i, D) where the samples differ in length."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype == object:
        arrays = [_array(f"{at}[{number}]", item) for number, item in enumerate(value)]
        if len({a.shape for a in arrays}) > 1:
            for number, array in enumerate(arrays):
                if array.size and (array.ndim != 2 or array.dtype.kind not in "iuf"):
                    raise DataError(f"{at}[{number}] is {pickles.describe(array)}, expected numbers (steps, width)")
            return arrays
        value = _array(at, arrays)
    if value.ndim == 2:
        value = value[:, None]  # one vector a sample is one step
    if value.ndim != 3 or value.dtype.kind not in "iuf":
        raise DataError(f"{at} is {pickles.describe(value)}, expected numbers (N, T, D)")
    return np.asarray(value)
