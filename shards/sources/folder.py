"""A csv with one row an utterance, and a folder with features in files of their own: the layout of MMSA's raw sets.

A file is a ``.npy`` of one modality, or a ``.npz`` with an array a modality; a pattern says where it is. Its array is
(T, D), of any length, or (D,) or (1, T, D). Files are read one at a time; none is kept.

Shapes: T steps, D width.
"""

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ConfigError, DataError
from shards.files import sha256_of
from shards.sources.arrays import DAMAGE, loaded
from shards.sources.columns import FileColumns, feature_names, feature_option
from shards.sources.pickles import describe
from shards.sources.rows import Rows
from shards.sources.stamp import Stamp
from shards.sources.table import CsvSource, Features
from shards.suggest import counted, has


class FolderSource(CsvSource):
    """A csv, and a folder of features.

    Args:
        table: the csv.
        folder: where the patterns of `columns` begin.
        columns: what is what.
        strict: a file that is missing is an error. Otherwise the utterance lacks the modality, which is counted.
        label_range: as `CsvSource`, and the others too.
    """

    kind = "folder"

    def __init__(
        self,
        table: Path,
        folder: Path,
        columns: FileColumns | None = None,
        *,
        strict: bool = False,
        label_range: tuple[float, float] | None = None,
        hold_out_valid: int = 0,
        seed: int = 0,
    ) -> None:
        columns = columns or FileColumns()
        rows = Rows(table)

        def files(ids: list[str]) -> Features:
            return Files(folder, _paths(rows, ids, columns), columns, strict)

        super().__init__(table, rows, columns, files, label_range=label_range, hold_out_valid=hold_out_valid, seed=seed)

    @property
    def files_missing(self) -> dict[str, int]:
        """modality -> utterances without a file, as `notes` tells them."""
        assert isinstance(self._features, Files)
        return self._features.missing


class Files:
    """Features in files of their own.

    Args:
        folder: where they are.
        paths: modality -> id -> path in the folder, whether or not there is such a file.
        columns: how the modalities are called.
        strict: every file must be there.

    Attributes:
        missing: modality -> utterances without a file, where there are any.
    """

    def __init__(
        self, folder: Path, paths: Mapping[str, Mapping[str, str]], columns: FileColumns, strict: bool
    ) -> None:
        self._folder = folder
        self._names = feature_names(columns)
        # modality -> id -> path, of those that are there
        self._there = {m: {key: path for key, path in its.items() if self._has(path, m)} for m, its in paths.items()}
        # without features of text its transcripts may do; without a file of audio or vision somebody forgot a folder
        told = _asked(columns) | ({"audio", "vision"} if strict else set())
        wanted = [m for m in paths if self._there[m] or m in told]
        missing = {m: [path for key, path in paths[m].items() if key not in self._there[m]] for m in wanted}
        if not any(self._there.values()):
            raise DataError(f"{folder}: {self._nothing(paths)}")
        for modality in wanted:
            if missing[modality] and (strict or not self._there[modality]):
                raise DataError(
                    f"{folder}: {modality} of {counted(len(missing[modality]), 'utterance')} is missing, e.g. "
                    f"{missing[modality][0]}"
                    + ("; leave --strict out where that may be" if strict and self._there[modality] else "")
                    + ("" if self._there[modality] else f"; {feature_option(modality)} none where there is to be none")
                )
        self.missing = {modality: len(files) for modality, files in missing.items() if files}
        self._notes = [
            f"{m}: {n:,} of {counted(len(paths[m]), 'utterance')} {has(n)} no file, e.g. {missing[m][0]}"
            for m, n in self.missing.items()
        ] + [
            f"{m}: no utterance has a file, e.g. {next(iter(paths[m].values()))}: left out "
            f"({feature_option(m)} none says so)"
            for m in paths
            if m not in wanted and m != "text"
        ]
        for m in wanted:
            if alike := {path: n for path, n in Counter(self._there[m].values()).items() if n > 1}:
                self._notes.append(
                    f"{m}: {sum(alike.values()):,} utterances share their file with others, e.g. {next(iter(alike))}; "
                    "see --files"
                )
        files = sorted({path for its in self._there.values() for path in its.values()})
        self.stamps = [Stamp.of(folder / path) for path in files]
        self.widths = {modality: self._width(modality) for modality in wanted}
        self.provenance: dict[str, Any] = {"features_folder": folder.name, "features_sha256": self._digest(files)}

    def read(self, key: str) -> dict[str, np.ndarray]:
        """modality -> (T, D) float32 of the utterance; one without a file is absent."""
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is then counted
            return {
                modality: np.array(self._of_width(width, modality, self._there[modality][key]), np.float32)
                for modality, width in self.widths.items()
                if key in self._there[modality]
            }

    def notes(self) -> list[str]:
        return list(self._notes)

    # --- one file

    def _has(self, path: str, modality: str) -> bool:
        """The file is there and, if it is an npz, has the modality."""
        file = self._folder / path
        try:
            if not file.is_file():
                return False
        except OSError as error:
            raise DataError(
                f"{file}: cannot be looked at ({error.strerror}); let this user read the folder, or correct that row "
                "of the csv"
            ) from error
        if file.suffix == ".npy":
            return True
        try:
            with zipfile.ZipFile(file) as archive:
                return f"{self._names[modality]}.npy" in archive.namelist()
        except DAMAGE as error:
            raise _unreadable(file, error) from error

    def _array(self, path: str, modality: str) -> np.ndarray:
        """(T, D) numbers."""
        file = self._folder / path
        at = str(file)
        try:
            if file.suffix == ".npy":
                # mapped, so that a header which claims more than the file holds is an error and no allocation
                array = loaded(lambda: np.load(file, mmap_mode="r", allow_pickle=False))
            else:
                at += f": {self._names[modality]}"
                with np.load(file, allow_pickle=False) as archive:
                    array = loaded(lambda: archive[self._names[modality]])
        except DAMAGE as error:
            raise _unreadable(file, error) from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf" or array.ndim not in (1, 2, 3):
            raise DataError(f"{at} is {describe(array)}, expected numbers (steps, width)")
        if array.ndim == 3 and len(array) != 1:
            raise DataError(f"{at} is {describe(array)}, expected one utterance: numbers (steps, width)")
        return array.reshape(1, -1) if array.ndim == 1 else array.reshape(array.shape[-2:])

    def _of_width(self, width: int, modality: str, path: str) -> np.ndarray:
        """(T, width) numbers."""
        array = self._array(path, modality)
        if len(array) and array.shape[1] != width:
            raise DataError(
                f"{self._folder / path}: {modality} is {describe(array)}, expected (steps, {width}) as in "
                f"{next(iter(self._there[modality].values()))}; correct it, or remove its row from the csv"
            )
        return array

    def _width(self, modality: str) -> int:
        for path in self._there[modality].values():
            array = self._array(path, modality)
            if len(array):
                return int(array.shape[1])
        raise DataError(f"{self._folder}: {modality} has length zero in every file; leave it out, or extract it again")

    # --- all of them

    def _digest(self, files: list[str]) -> str:
        """sha256 of all names and contents."""
        digest = hashlib.sha256()
        for path in files:
            try:
                digest.update(f"{path}\0{sha256_of(self._folder / path)}\n".encode())
            except OSError as error:
                raise _unreadable(self._folder / path, error) from error
        return digest.hexdigest()

    def _nothing(self, paths: Mapping[str, Mapping[str, str]]) -> str:
        """What is wrong where not one file was found."""
        if not self._folder.is_dir():
            return "no such folder; expected one of .npy or .npz files"
        first = list(dict.fromkeys(next(iter(its.values())) for its in paths.values()))
        looked = f"neither {' nor '.join(first)}, nor those" if len(first) > 1 else f"no {first[0]}, nor any"
        there = next(_some(self._folder), "nothing of the kind")
        return f"holds no features for any row: {looked} of the others; it has {there}: see --files"


def _paths(rows: Rows, ids: list[str], columns: FileColumns) -> dict[str, dict[str, str]]:
    """modality -> id -> path in the folder, as the pattern says.

    Raises:
        ConfigError: no such pattern.
        DataError: a path leaves the folder.
    """
    pattern, suffix = columns.files, Path(columns.files).suffix
    expected = ".npy" if "{modality}" in pattern else ".npz"
    if suffix != expected:
        raise ConfigError(
            f"--files {pattern}: ends in {suffix or 'no suffix'}, expected {expected}: "
            "a .npy for each {modality}, or a .npz with all of them"
        )
    found: dict[str, dict[str, str]] = {}
    for modality, name in feature_names(columns).items():
        if name != "none":
            paths = rows.filled(pattern.replace("{modality}", str(name)), "--files")
            found[modality] = dict(zip(ids, paths, strict=True))
            for path in paths:
                if Path(path).is_absolute() or ".." in Path(path).parts:
                    raise DataError(f"--files {pattern}: {path!r} leaves the folder; correct that row of the csv")
    if not found:
        raise ConfigError("every modality is called none; without features use: mmsa-dist pack table FILE.csv")
    return found


def _asked(columns: FileColumns) -> set[str]:
    """Modalities that are named by an option, and so must be there."""
    return {modality for modality, name in feature_names(columns).items() if name not in (modality, "none")}


def _some(folder: Path) -> Iterator[str]:
    """Paths of features in the folder, as examples."""
    for where, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.endswith((".npy", ".npz")):
                yield str((Path(where) / name).relative_to(folder))


def _unreadable(file: Path, error: BaseException) -> DataError:
    return DataError(
        f"{file}: cannot be read as numbers without pickled objects: {' '.join(str(error).split())}; "
        "it may be cut short: copy it again, or write it again with np.save"
    )
