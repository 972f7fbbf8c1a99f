"""The npz of a table: arrays of features, found by id.

An array is one of

* (N, D): one vector an utterance, stored as one step;
* (N, T, D): sequences padded with zeros at the end, or as long as a lengths array (N,) says;
* (S, D) with a lengths array (N,) that sums to S: all sequences one after another.

Shapes: N rows of the npz, T steps, D width, S steps of all utterances together.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ConfigError, DataError
from shards.files import sha256_of
from shards.sources.columns import Columns, feature_names, feature_option
from shards.sources.lengths import whole
from shards.sources.pickles import describe
from shards.sources.stamp import Stamp
from shards.suggest import nearest, was
from shards.utterance import MODALITIES

DAMAGE = (OSError, ValueError, EOFError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a file that is no array, or has pickled objects."""


def loaded(load: Callable[[], Any]) -> Any:
    """What numpy loads.

    Raises:
        ValueError: it is damaged or encrypted: numpy says so in the words of Python's parser, or of whatever it met.
        OSError, EOFError, …: see `DAMAGE`.
    """
    try:
        return load()
    except (SyntaxError, TypeError, LookupError, ArithmeticError, RuntimeError, tokenize.TokenError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


class Arrays:
    """The npz: named arrays, found by id."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        id_array = columns.id_array or "id"
        self.stamps = [Stamp.of(path, "an .npz of features")]  # before anything of it is read
        try:
            archive = loaded(lambda: np.load(path, allow_pickle=False))
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            with archive:
                self._names = list(archive.files)
                ids = _ids(f"{path}: {id_array}", self._array(archive, id_array, "--id-array"))
                self._rows = {value: row for row, value in enumerate(ids)}
                if len(self._rows) != len(ids):
                    raise DataError(f"{path}: {id_array} names {len(ids) - len(self._rows)} ids more than once")
                wanted = feature_names(columns)
                if not any(wanted.values()):
                    raise ConfigError(
                        f"{path} is given, but no array of it is named; add --audio, --vision or --text-features "
                        f"(it has {', '.join(sorted(set(self._names) - {id_array}))})"
                    )
                self._sequences = {m: self._sequence(archive, m, wanted[m], len(ids)) for m in MODALITIES if wanted[m]}
        except DAMAGE as error:
            raise DataError(f"{path}: cannot be read as an .npz without pickled objects: {error}") from error
        self.widths = {m: int(values.shape[-1]) for m, (values, _, _) in self._sequences.items()}
        self.provenance: dict[str, Any] = {"features_file": path.name, "features_sha256": sha256_of(path)}
        self._used = len(self._rows)
        taken = {name for spec in wanted.values() for name in (spec or "").split(":")}
        self._left_out = sorted(set(self._names) - taken - {id_array})

    def check_all_there(self, ids: list[str], table: Path) -> None:
        """Raises DataError for an id of the table that the npz lacks."""
        missing = [key for key in ids if key not in self._rows]
        if missing:
            raise DataError(
                f"{self._path}: has no row for id {missing[0]!r} of {table} ({len(missing)} of {len(ids)} ids are "
                f"missing, its own look like {next(iter(self._rows), '')!r}); see --id, or add rows of NaN, which are "
                "taken as absent"
            )
        self._used = len(ids)

    def read(self, key: str) -> dict[str, np.ndarray]:
        """modality -> (T, D) float32 of the utterance, without padding."""
        row = self._rows[key]
        found = {}
        for name, (values, starts, lengths) in self._sequences.items():
            if starts is not None and lengths is not None:
                array = values[starts[row] : starts[row] + lengths[row]]
            else:
                array = values[row] if lengths is None else values[row, : lengths[row]]
                if lengths is None and len(array) > 1:
                    steps = np.flatnonzero(array.any(axis=1))
                    array = array[: steps[-1] + 1 if len(steps) else 0]
            with np.errstate(over="ignore"):
                found[name] = np.asarray(array, dtype=np.float32)
        return found

    def notes(self) -> list[str]:
        told, left = [], len(self._rows) - self._used
        if left:
            told.append(f"{left:,} of the {len(self._rows):,} ids of {self._path.name} are not in the table; left out")
        if self._left_out:
            told.append(
                f"{', '.join(self._left_out)} of {self._path.name} {was(len(self._left_out))} not taken: "
                "--text-features, --audio and --vision name what is"
            )
        return told

    def _array(self, archive: Mapping[str, np.ndarray], name: str, option: str) -> np.ndarray:
        if name not in self._names:
            raise DataError(f"{self._path}: there is no array {name!r} ({option}){nearest(name, self._names)}")
        found = loaded(lambda: archive[name])
        if not isinstance(found, np.ndarray):  # whatever else lies in the zip file
            raise DataError(f"{self._path}: {name} ({option}) is no array; write the file anew with np.savez")
        return found

    def _sequence(
        self, archive: Mapping[str, np.ndarray], modality: str, spec: str | None, count: int
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(values, starts, lengths): (N, T, D) with starts None, or (S, D) with both; lengths None strips zeros."""
        name, _, lengths_name = (spec or "").partition(":")
        option = feature_option(modality)
        values = self._array(archive, name, option)
        if values.dtype.kind not in "iuf" or values.ndim not in (2, 3):
            raise DataError(
                f"{self._path}: {name} is {values.dtype} {values.shape}, expected numbers (N, D) or (N, T, D)"
            )
        lengths = None
        if lengths_name:
            lengths = self._lengths(self._array(archive, lengths_name, option), lengths_name, count)
            steps = values.shape[values.ndim - 2]
            if lengths.max(initial=0) > steps:
                raise DataError(
                    f"{self._path}: {lengths_name} goes up to {lengths.max():,}, but {name} has {steps:,} steps"
                )
        if values.ndim == 2 and lengths is not None:
            if lengths.sum() != len(values):
                raise DataError(
                    f"{self._path}: {lengths_name} sums to {lengths.sum():,}, but {name} has {len(values):,} steps"
                )
            return values, np.cumsum(lengths) - lengths, lengths
        if len(values) != count:
            hint = f"; if these are steps of all utterances, say {name}:LENGTHS" if values.ndim == 2 else ""
            raise DataError(f"{self._path}: {name} has {len(values):,} rows, expected {count:,}, one an id{hint}")
        return (values[:, None] if values.ndim == 2 else values), None, lengths

    def _lengths(self, told: np.ndarray, name: str, count: int) -> np.ndarray:
        if told.shape != (count,) or told.dtype.kind not in "iuf":
            raise DataError(f"{self._path}: {name} is {describe(told)}, expected ({count},) lengths, one an id")
        return whole(f"{self._path}: {name}", told)


def _ids(at: str, ids: np.ndarray) -> list[str]:
    """Ids (N,) as strings, whichever way the npz holds them."""
    if ids.ndim != 1:
        raise DataError(f"{at} is {describe(ids)}, expected ids (N,), one an utterance")
    return [value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value) for value in ids]
