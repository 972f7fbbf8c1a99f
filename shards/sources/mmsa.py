"""The feature pickle of the MMSA toolkit: ``{"train" | "valid" | "test": {"id", "text", "audio", "vision", …}}``.

MOSI, MOSEI, SIMS and SIMSv2 are published so, in two kinds: *aligned* (all modalities have one step a word piece; no
lengths on disk) and *unaligned* (own steps and ``audio_lengths``, ``vision_lengths``). Arrays are padded with zeros at
the end; the padding is left out.

Shapes: N samples, T padded steps, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.files import sha256_of
from shards.sources import fields, pickles
from shards.sources.generated import SYNTHETIC
from shards.sources.lengths import whole
from shards.sources.stamp import Stamp
from shards.suggest import nearest
from shards.utterance import MODALITIES, SPLITS, UNIMODAL_TASK, Utterance

_LABELS = {"M": "regression_labels", **{task: f"regression_labels_{task}" for task in UNIMODAL_TASK.values()}}


@dataclass
class _Split:
    """One split of the pickle, checked. All sequences have one entry a sample."""

    ids: list[str]
    raw_text: list[str] | None
    features: dict[str, Sequence[np.ndarray]]  # modality -> N of (T, D)
    steps: dict[str, int | None]  # modality -> T that all are padded to; None where they are ragged
    lengths: dict[str, np.ndarray]  # modality -> (N,) as the file tells them
    tokens: np.ndarray | None  # (N, 3, T): ids, mask, segment
    labels: dict[str, np.ndarray]  # task -> (N,) float32
    aligned: bool


class MmsaSource:
    """Reads one feature pickle. Its arrays stay in the file, which is mapped (see `pickles`).

    A copy that is sent to another process opens the file again: there it must have the same path.

    Args:
        path: the pickle.
        label_range: None takes -1..1 where the file has unimodal labels (SIMS), else -3..3 (MOSI, MOSEI).
        modalities: those to read; one that the file lacks altogether is absent.
        strict: a training set: all three splits, each with labels. Otherwise any split will do, labels or not.
        sha256: of the file, where it is known.

    Raises:
        DataError: not such a pickle; names file, split and key.
    """

    def __init__(
        self,
        path: Path,
        *,
        label_range: tuple[float, float] | None = None,
        modalities: Iterable[str] = MODALITIES,
        strict: bool = True,
        sha256: str | None = None,
    ) -> None:
        self.where = str(path)
        wanted = tuple(modalities)
        self._stamp = Stamp.of(path)  # before anything of it is read
        content = fields.splits(self.where, pickles.load(path))
        self._notes = fields.others(content)
        self._splits: dict[str, _Split] = {}
        for split in SPLITS:
            if split in content or strict:
                self._splits[split] = self._checked(split, content.pop(split, None), wanted, strict)
        first = next(iter(self._splits))
        self._check_alike(first)
        train = self._splits[first]
        parts = self._splits.values()
        self.widths = {m: fields.width(self.where, m, [part.features[m] for part in parts]) for m in train.features}
        self.classes: dict[str, int] = {}
        self.tasks = tuple(train.labels)
        self.label_range = label_range or ((-1.0, 1.0) if len(self.tasks) > 1 else (-3.0, 3.0))
        self.has_raw_text = any(part.raw_text and any(part.raw_text) for part in parts)
        self.has_tokens = train.tokens is not None
        self.synthetic = any(key.startswith(SYNTHETIC) for part in parts for key in part.ids)  # by our own unpack
        self.counts = {name: len(split.ids) for name, split in self._splits.items()}
        self.name = f"{path.parent.parent.name}-{path.stem}".lower() if path.parent.name == "Processed" else path.stem
        self.provenance: dict[str, Any] = {
            "format": "mmsa",
            "file": path.name,
            "sha256": sha256 or sha256_of(path),
            "aligned": train.aligned,
            "padded_to": {name: steps for name, steps in train.steps.items() if steps}
            | ({"text_bert": train.tokens.shape[-1]} if train.tokens is not None else {}),
        }
        self._reopened = partial(
            MmsaSource,
            path.resolve(),
            label_range=label_range,
            modalities=wanted,
            strict=strict,
            sha256=self.provenance["sha256"],
        )

    def __reduce__(self) -> tuple[Callable[[], "MmsaSource"], tuple[()]]:
        return self._reopened, ()

    def keys(self, split: str) -> Iterable[str]:
        return self._splits[split].ids

    def read(self, split: str, number: int) -> Utterance:
        part = self._splits[split]
        tokens = None if part.tokens is None else self._tokens(part, split, number)
        arrays = {name: part.features[name][number] for name in self.widths}
        lengths = {name: self._length(part, name, number, array) for name, array in arrays.items()}
        if part.aligned and arrays:
            # one length for all: an aligned step whose audio or vision is zero is silence, not padding
            together = min(len(a) for a in arrays.values())
            told = len(tokens) if tokens is not None else max(lengths.values())
            lengths = dict.fromkeys(arrays, min(together, told))
        return Utterance(
            key=part.ids[number],
            split=split,
            modalities={name: fields.float32(array[: lengths[name]]) for name, array in arrays.items()},
            labels={task: float(values[number]) for task, values in part.labels.items()},
            raw_text=part.raw_text[number] if part.raw_text and self.has_raw_text else None,
            tokens=tokens,
            remarks=tuple(
                f"{name}: {{:,}} samples say they are longer than the steps that are there; taken as they are"
                for name, array in arrays.items()
                if name in part.lengths and part.lengths[name][number] > len(array)
            ),
        )

    def notes(self) -> list[str]:
        return self._notes

    def unchanged(self) -> None:
        self._stamp.check()

    # --- one sample

    def _tokens(self, part: _Split, split: str, number: int) -> np.ndarray:
        """(T,) int32 ids up to the last step that the mask keeps."""
        assert part.tokens is not None
        ids, mask = part.tokens[number, 0], part.tokens[number, 1]
        kept = ids[: fields.real_steps(mask)[1]]
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
            return min(told, len(array))
        if name == "text" and part.tokens is not None and part.tokens.shape[-1] == len(array):
            mask: np.ndarray = part.tokens[number, 1]
            return fields.real_steps(mask)[1]
        if part.steps[name] is None:
            return len(array)  # ragged on disk: there is no padding to strip
        return fields.real_steps(array)[1]

    # --- the file

    def _checked(self, split: str, content: Any, wanted: tuple[str, ...], strict: bool) -> _Split:
        at = f"{self.where}: {split}"
        if content is None:
            raise DataError(f"{at} is missing; a training set needs {', '.join(SPLITS)}")
        if not isinstance(content, dict):
            raise DataError(f"{at} is {pickles.describe(content)}, expected a dict of arrays")
        needed = ["id", *(["regression_labels"] if strict else [])]
        for key in needed:
            if key not in content:
                of_mult = "labels" in content and "regression_labels" not in content
                mult = "; it is one of MulT: pack mult" if of_mult else ""
                raise DataError(f"{at} has no key {key!r}{mult or nearest(key, map(fields.shown, content))}")
        ids = [_key(value) for value in fields.rows(f"{at}.id", content["id"])]
        if not ids:
            raise DataError(
                f"{at} is empty: it has no samples; every split needs some (move a few there and pack again)"
            )
        if None in ids:
            raise DataError(f"{at}.id holds {pickles.describe(content['id'][ids.index(None)])}, expected strings")

        def column(key: str) -> Any:
            """The key's value with one entry a sample, or None where the file lacks it."""
            value = content.get(key)
            if value is not None and len(fields.rows(f"{at}.{key}", value)) != len(ids):
                raise DataError(f"{at}.{key} has {len(value)} rows, expected {len(ids)}, one for each id")
            return value

        there = [name for name in MODALITIES if name in wanted and column(name) is not None]
        read = {name: fields.features(f"{at}.{name}", column(name)) for name in there}
        features, steps = {m: samples for m, (samples, _) in read.items()}, {m: long for m, (_, long) in read.items()}
        raw = column("raw_text")
        texts = None if raw is None else [fields.text(value) for value in raw]
        if texts is not None and None in texts:
            raise DataError(f"{at}.raw_text of id {ids[texts.index(None)]!r} is not a string")
        tokens = column("text_bert")
        if tokens is not None:
            tokens = fields.array(f"{at}.text_bert", tokens)
            if tokens.ndim != 3 or tokens.shape[1] != 3 or tokens.dtype.kind not in "iuf":
                raise DataError(
                    f"{at}.text_bert is {pickles.describe(tokens)}, expected numbers (N, 3, T): ids, mask, segment"
                )
        if not features and texts is None and tokens is None:
            raise DataError(
                f"{at} has none of {', '.join([*MODALITIES, 'raw_text', 'text_bert'])}; "
                f"keys are {fields.listed(content)}"
            )
        lengths = {
            name: whole(f"{at}.{key}", fields.numbers(f"{at}.{key}", column(key)))
            for name, key in ((name, f"{name}_lengths") for name in features)
            if key in content
        }
        with np.errstate(over="ignore"):  # a label beyond float32 becomes infinite, which is out of any range
            labels = {
                task: fields.numbers(f"{at}.{key}", column(key)).astype(np.float32)
                for task, key in _LABELS.items()
                if key in content
            }
        aligned = not lengths and len(features) > 1 and len(set(steps.values())) == 1 and None not in steps.values()
        return _Split(ids, texts, features, steps, lengths, tokens, labels, aligned)  # type: ignore[arg-type]  # no None is left

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


def _key(value: object) -> str | None:
    """An id, also one that is told as its parts (video, clip)."""
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) > fields.MOST_PARTS:
            return None
        parts = [fields.text(part) for part in value]
        return None if None in parts else "$_$".join(map(str, parts))
    return fields.text(value)
