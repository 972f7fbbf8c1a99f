"""Which member of a sample is what: as the options say, or by the usual names."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import ConfigError, DataError
from shards.foreign.arrays import UnfitError, located, refuse
from shards.foreign.dots import check_dots
from shards.foreign.samples import LARGEST_JSON, LARGEST_TENSORS, samples
from shards.utterance import MODALITIES

FEATURES = (*MODALITIES, "tokens")
LABELS = {"label": "M", "label_text": "T", "label_audio": "A", "label_vision": "V"}
"""Options of labels, and their tasks."""
LENGTHS = tuple(f"{modality}_length" for modality in MODALITIES)
OTHERS = (*LABELS, *LENGTHS, "raw_text", "split")
NONE = "none"
"""What an option says to leave something out that would be found by its usual name."""

_SURVEYED = 64
"""Samples whose members are looked at for the usual names."""

_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "language"),
    "audio": ("audio", "acoustic"),
    "vision": ("vision", "visual", "video"),
    "tokens": ("tokens", "input_ids"),
    "label": ("label", "labels.M", "label_M", "sentiment"),
    "label_text": ("label_text", "labels.T", "label_T"),
    "label_audio": ("label_audio", "labels.A", "label_A"),
    "label_vision": ("label_vision", "labels.V", "label_V"),
    **{length: (length, f"{length}s") for length in LENGTHS},
    "raw_text": ("raw_text", "text", "transcript"),
    "split": ("split", "mode"),
}
"""The usual names: of a member before its type, of a tensor, of a field in the JSON member."""

_TEXTS = ("txt", "cls")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands in each sample.

    Attributes:
        member: suffix of the member, as WebDataset names it: what follows the first dot of the file's name.
        field: in it: of a JSON object (dots lead into nested ones), or a tensor; '' for the member as a whole.
    """

    member: str
    field: str = ""

    def __str__(self) -> str:
        return f"{self.member}:{self.field}" if self.field else self.member

    @property
    def kind(self) -> str:
        """The member's type: the last part of its suffix."""
        return self.member.rpartition(".")[2]

    @classmethod
    def parse(cls, option: str, value: str, feature: bool) -> "Place":
        """``MEMBER`` or ``MEMBER:FIELD``.

        Raises:
            ConfigError: it is something else, or cannot hold what the option is for.
        """
        member, _, name = value.partition(":")
        place = cls(member.lower().removeprefix("."), name)
        if not place.member or (":" in value and not name) or re.search(r"[/\s]", place.member):
            raise ConfigError(f"{_flag(option)} {value}: expected MEMBER or MEMBER:FIELD, e.g. audio.npy or json:label")
        if feature:
            try:
                refuse(place.member)
            except UnfitError as error:
                raise ConfigError(
                    f"{_flag(option)} {value}: such a member {error}; read in place are .npy, .npz (np.savez) and "
                    ".safetensors: write the shards anew with these, or mmsa-dist pack the source"
                ) from error
            if place.kind != "npy" and not name:
                raise ConfigError(f"{_flag(option)} {value}: say which tensor of it, e.g. {value}:audio")
        elif place.kind not in ("json", *_TEXTS):
            raise ConfigError(f"{_flag(option)} {value}: expected a .json, .txt or .cls member, e.g. json:label")
        if place.kind in ("npy", *_TEXTS) and name:
            raise ConfigError(f"{_flag(option)} {value}: a .{place.kind} member has no fields; leave out :{name}")
        return place


@dataclass(frozen=True)
class Layout:
    """Where everything stands that is used.

    Attributes:
        places: one of `FEATURES` and `OTHERS` -> its place.
    """

    places: dict[str, Place]

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(m for m in MODALITIES if m in self.places)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for option, task in LABELS.items() if option in self.places)

    @property
    def members(self) -> dict[str, int]:
        """Suffixes of the members that are read -> bytes that they may have."""
        return {
            place.member: LARGEST_TENSORS if what in FEATURES else LARGEST_JSON for what, place in self.places.items()
        }

    @property
    def words(self) -> frozenset[str]:
        """First parts of suffixes that say what a member is: usual ones, and those of the places."""
        usual = (name for names in _NAMES.values() for name in names)
        used = (place.member for place in self.places.values())
        return frozenset(name.partition(".")[0] for name in (*usual, *used))

    def dump(self) -> dict[str, str]:
        """As the index keeps it."""
        return {what: str(place) for what, place in self.places.items()}


def layout(tars: Iterable[Path], options: Mapping[str, str | None]) -> Layout:
    """The layout that the options give; what they do not say, by the usual names in the first samples of the tars.

    Raises:
        ConfigError: an option names what cannot be, or nothing has the usual name.
        DataError: the first tar is damaged, or its keys seem to contain dots.
    """
    given = {
        what: Place.parse(what, value, what in FEATURES) for what, value in options.items() if value and value != NONE
    }
    open_ = [what for what in (*FEATURES, *OTHERS) if options.get(what) is None]
    seen = _Seen.of(next(iter(tars)), Layout(given).words)
    places = given | {what: place for what in open_ if (place := seen.find(what))}
    if not any(what in places for what in (*FEATURES, "raw_text")):
        raise ConfigError(
            f"{seen.where}: nothing in its samples has a usual name (text.npy, audio.npy, vision.npy, "
            f"features.npz:audio, …); they have {seen.told()}: say what is what with --text, --audio, --vision"
        )
    if "label" not in places and options.get("label") != NONE:
        raise ConfigError(
            f"{seen.where}: no label has a usual name (json:label, cls, label.txt, …); the samples have "
            f"{seen.told()}: say where it is, e.g. --label json:score, or --label none"
        )
    order = [what for what in (*FEATURES, *OTHERS) if what in places]
    return Layout({what: places[what] for what in order})


@dataclass
class _Seen:
    """What the first samples of a tar hold.

    Attributes:
        arrays: places of arrays.
        fields: places of plain values: fields of JSON members, and text members.
        unfit: suffix -> why the arrays that it may hold cannot be read.
    """

    where: Path
    arrays: dict[Place, None] = field(default_factory=dict)
    fields: dict[Place, None] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, words: frozenset[str]) -> "_Seen":
        seen, number = cls(path), 0
        limits = {"json": LARGEST_JSON, "npz": LARGEST_TENSORS, "safetensors": LARGEST_TENSORS, "npy": 0}
        for sample in samples(path, lambda suffix: limits.get(suffix.rpartition(".")[2])):
            check_dots(path, sample.key, {*sample.payloads, *sample.others}, words)
            for suffix, payload in sample.payloads.items():
                seen._look(suffix, payload)
            for suffix in sample.others:
                seen._name(suffix)
            number += 1
            if number == _SURVEYED:
                break
        if not number:
            raise DataError(f"{path}: holds no samples (files called KEY.SUFFIX)")
        return seen

    def find(self, what: str) -> Place | None:
        """The one place with a usual name; None where there is none.

        Raises:
            ConfigError: there are several, or it is of a kind that is not read.
        """
        names = _NAMES[what]
        among = self.arrays if what in FEATURES else self.fields
        found = [place for name in names for place in among if _name_of(place) == name]
        if not found and what == "label":
            found = [place for place in among if str(place) == "cls"]
        if not found and what == "raw_text":
            found = [place for place in among if str(place) == "txt"]
        if len(found) > 1 and what in FEATURES:
            raise ConfigError(
                f"{self.where}: {what} may be {' or '.join(map(str, found))}; choose with {_flag(what)}, or "
                f"{_flag(what)} none"
            )
        if not found and what in FEATURES:
            for suffix, why in self.unfit.items():
                if suffix.partition(".")[0] in names:
                    raise ConfigError(
                        f"{self.where}: {what} seems to be in the members .{suffix}, but that {why}; read in place are "
                        ".npy, .npz (np.savez) and .safetensors: write the shards anew with these, or leave it out "
                        f"with {_flag(what)} none"
                    )
        return found[0] if found else None

    def told(self) -> str:
        """What there is, for a message."""
        names = [str(place) for place in (*self.arrays, *self.fields)]
        names += [f"{suffix} (which {why})" for suffix, why in self.unfit.items()]
        return (", ".join(names[:12]) + (", …" if len(names) > 12 else "")) or "nothing that is read"

    def _look(self, suffix: str, payload: bytes) -> None:
        kind = suffix.rpartition(".")[2]
        if kind == "json":
            for name in _fields(payload):
                self.fields[Place(suffix, name)] = None
            return
        try:
            for name in located(suffix, payload):
                self.arrays[Place(suffix, name)] = None
        except UnfitError as error:
            self.unfit[suffix] = str(error)

    def _name(self, suffix: str) -> None:
        kind = suffix.rpartition(".")[2]
        if kind == "npy":
            self.arrays[Place(suffix)] = None
        elif kind in _TEXTS:
            self.fields[Place(suffix)] = None
        elif kind not in ("json", "npz", "safetensors"):
            try:
                refuse(suffix)
            except UnfitError as error:
                self.unfit[suffix] = str(error)


def _fields(payload: bytes) -> list[str]:
    """Names of the fields of a JSON object, and of the objects in it; '' for one that is a plain value."""
    try:
        content: Any = json.loads(payload)
    except (ValueError, RecursionError):
        return []
    if not isinstance(content, dict):
        return [""]
    names = list(content)
    return names + [f"{name}.{inner}" for name in names if isinstance(content[name], dict) for inner in content[name]]


def _name_of(place: Place) -> str:
    """What the place is called: its field, else the member without its type."""
    return place.field or place.member.rpartition(".")[0]


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
