"""What one sample holds: its values where the layout says, each checked. What is wrong is said with file and key.

Shapes: T steps, D width.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.foreign.arrays import FLOATS, INTEGERS, Array, UnfitError, located
from shards.foreign.fields import field_of
from shards.foreign.mapping import LABELS, Layout, Place
from shards.foreign.samples import Sample
from shards.tar import escape_key


@dataclass(frozen=True)
class Rules:
    """How samples are read.

    Attributes:
        layout: where what stands.
        label_range: lowest and highest possible label.
        allow_absent: a sample may lack a modality or its transcript.
        strip_padding: steps at the end that are all zero are no steps.
    """

    layout: Layout
    label_range: tuple[float, float]
    allow_absent: bool = False
    strip_padding: bool = False


class Reading:
    """One sample being read.

    Attributes:
        key: its id.

    Raises:
        DataError: in any method: something is not as it should be.
    """

    def __init__(self, path: Path, rules: Rules, sample: Sample) -> None:
        self._path, self._rules, self._sample = path, rules, sample
        self.places = rules.layout.places
        self._parsed: dict[str, Any] = {}
        self.key = self._own_key()

    def wrong(self, what: str) -> NoReturn:
        raise DataError(f"{self._path}: sample {self._sample.key!r} {what}")

    def offset(self, what: str) -> int:
        """Where the member begins that holds it."""
        return self._sample.offsets[self.places[what].member]

    def value(self, what: str) -> Any:
        """A plain value: of a JSON field, or a text member; None where there is none."""
        place = self.places[what]
        if place.member not in self._sample.payloads:
            return None
        content = self._content(place)
        if place.kind != "json":
            return content
        return field_of(content, place.field)

    def label(self, option: str) -> float:
        """NaN where a unimodal label is missing.

        Raises:
            DataError: the multimodal one is missing, or a label is out of range or no number.
        """
        told, at = self.value(option), f"label {LABELS[option]} ({self.places[option]})"
        if told is None and option != "label":
            return math.nan
        if told is None:
            self.wrong(f"has no {at}; correct it, or leave labels out with --label none")
        try:
            label = float(told) if isinstance(told, int | float | str) and not isinstance(told, bool) else None
        except (ValueError, OverflowError):
            label = None
        if label is None:
            self.wrong(f"has {str(told)[:60]!r} as {at}, expected a number")
        low, high = self._rules.label_range
        if math.isnan(label) and option != "label":
            return label
        if not low <= label <= high:
            self.wrong(
                f"has {label:g} as {at}, expected {low:g}..{high:g}; correct it, or tell the range with --label-range"
            )
        return label

    def feature(self, modality: str) -> tuple[Array, NDArray[Any]] | tuple[None, None]:
        """Where the modality stands and its values (T, D); a vector (D,) is one step. (None, None) where absent."""
        array = self._array(modality)
        if array is None:
            return None, None
        if array.dtype not in FLOATS:
            hint = f"; token ids are given with --tokens {self.places[modality]}" if modality == "text" else ""
            self.wrong(f"has {modality} of type {array.dtype}, expected {', '.join(FLOATS)}{hint}")
        values = array.view(self._sample.payloads[self.places[modality].member])
        if values.ndim == 1:
            values = values[None, :]
        if values.ndim != 2:
            self.wrong(f"has {modality} of shape {array.shape}, expected (steps, width)")
        return array, values

    def steps(self, modality: str, values: NDArray[Any]) -> int:
        """How many steps are real."""
        told = self.value(f"{modality}_length") if f"{modality}_length" in self.places else None
        steps = len(values)
        if told is not None:
            given = int(told) if isinstance(told, int) or (isinstance(told, str) and told.isdecimal()) else -1
            if not 0 <= given <= steps:
                at = self.places[f"{modality}_length"]
                self.wrong(f"has {str(told)[:60]!r} as length of {modality} ({at}), expected 0 to {steps}")
            steps = given
        if self._rules.strip_padding:
            real = np.flatnonzero(values[:steps].any(axis=1))
            steps = int(real[-1]) + 1 if len(real) else 0
        return steps

    def tokens(self) -> dict[str, Any]:
        array = self._array("tokens")
        if array is None or not math.prod(array.shape):
            return {}
        if array.dtype not in INTEGERS or len(array.shape) != 1:
            self.wrong(f"has token ids of type {array.dtype} and shape {array.shape}, expected int32 or int64 (steps,)")
        values = array.view(self._sample.payloads[self.places["tokens"].member])
        if not 0 <= values.min() <= values.max() < 1 << 31:
            self.wrong(f"has token ids from {values.min()} to {values.max()}, expected 0 or more")
        return {
            "n_tokens": len(values),
            "offset_tokens": self.offset("tokens") + array.offset,
            "dtype_tokens": array.dtype,
        }

    def text(self) -> dict[str, Any]:
        """Where the transcript stands, once it is known to be one."""
        place = self.places["raw_text"]
        told = self.value("raw_text")
        if told is None and self._rules.allow_absent:
            return {}
        if not isinstance(told, str):
            found = "no transcript" if told is None else f"a transcript that is a {type(told).__name__}"
            remedy = "; if samples may lack it: --allow-absent" if told is None else ""
            self.wrong(f"has {found} ({place}), expected text{remedy}")
        try:
            told.encode()
        except UnicodeEncodeError:
            self.wrong(f"has a transcript ({place}) that is not valid unicode; correct it")
        return {"json_offset": self.offset("raw_text"), "json_size": len(self._sample.payloads[place.member])}

    def _array(self, what: str) -> Array | None:
        """Where the numbers stand in the member.

        Raises:
            DataError: they are missing and may not be, or cannot be read in place.
        """
        place = self.places[what]
        payload = self._sample.payloads.get(place.member)
        try:
            array = located(place.member, payload, place.field).get(place.field) if payload is not None else None
        except UnfitError as error:
            self.wrong(
                f"has {what} ({place}) that {error}: it cannot be read in place; write the shards anew with plain "
                ".npy, .npz or .safetensors, or mmsa-dist pack the source"
            )
        if array is None and not self._rules.allow_absent:
            self.wrong(f"has no {what} ({place}); if samples may lack it: --allow-absent")
        return array

    def _content(self, place: Place) -> Any:
        if place.member not in self._parsed:
            payload = self._sample.payloads[place.member]
            try:
                text = payload.decode()
                self._parsed[place.member] = json.loads(text) if place.kind == "json" else text.strip()
            except (ValueError, RecursionError) as error:
                self.wrong(f"has a member .{place.member} that does not parse ({str(error)[:100]}); correct it")
        return self._parsed[place.member]

    def _own_key(self) -> str:
        """The member's name; of a shard that this tool wrote, the key that it was made of."""
        for place in self.places.values():
            if place.kind == "json" and place.member in self._sample.payloads:
                told = field_of(self._content(place), "key")
                with_key = isinstance(told, str) and 0 < len(told) <= len(self._sample.key)
                if with_key and _escaped(told) == self._sample.key:
                    return str(told)
        return self._sample.key


def _escaped(key: str) -> str | None:
    try:
        return escape_key(key)
    except DataError:
        return None
