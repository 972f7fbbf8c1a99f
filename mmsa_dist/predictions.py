"""Predictions as a file: .csv, .parquet or .jsonl, written a batch at a time, there whole or not at all."""

import csv
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from mmsa_dist.errors import ConfigError, TransientError

FORMATS = (".csv", ".parquet", ".jsonl")

LASTING = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
"""Failures that come again however often one tries: the place is wrong."""


def check_out(path: Path) -> None:
    """Says before any work that `path` cannot be written.

    Raises:
        ConfigError: an unknown format, or a folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--out {path}: unknown format {path.suffix or 'without suffix'!r}; end it in {', '.join(FORMATS)}"
        )
    if os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises where the name is too long
        raise ConfigError(f"--out {path}: is a folder; give a file's name ending in {', '.join(FORMATS)}")


class Writer:
    """Rows of predictions into a file that takes its name only when all are there.

    Args:
        columns: of numbers, after each sample's key and split.

    Attributes:
        rows: written so far.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.rows = 0
        self._columns = tuple(columns)
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Self:
        kinds: dict[str, type[_Format]] = {".csv": _Csv, ".parquet": _Parquet, ".jsonl": _JsonLines}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._format = kinds[self.path.suffix.lower()](self._partial, self._columns)
        except OSError as error:
            raise failed(self.path, error) from error
        return self

    def write(self, keys: Sequence[str], split: str, values: Mapping[str, np.ndarray]) -> None:
        """Adds rows.

        Args:
            keys: B of them.
            values: column -> (B,) numbers; NaN where there is none, of a label say.

        Raises:
            TransientError: the file cannot be written, from a full disk say. ConfigError: not there at all.
        """
        try:
            self._format.write(keys, split, values)
        except OSError as error:
            raise failed(self.path, error) from error
        self.rows += len(keys)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._format.close()
            if kind is None:
                with self._partial.open("rb") as file:
                    os.fsync(file.fileno())
                self._partial.replace(self.path)
        except OSError as error:
            if kind is None:
                raise failed(self.path, error) from error
        finally:
            self._partial.unlink(missing_ok=True)


def failed(path: Path, error: OSError) -> ConfigError | TransientError:
    """What it means that `path` cannot be written: that it is the wrong place, or that trying again may help."""
    said = f"{path}: predictions cannot be written ({error.strerror or error}); nothing was left there: "
    if error.errno in LASTING:
        return ConfigError(f"{said}choose another --out")
    return TransientError(f"{said}free space or choose another --out")


class _Format(Protocol):
    def __init__(self, path: Path, columns: tuple[str, ...]) -> None: ...
    def write(self, keys: Sequence[str], split: str, values: Mapping[str, np.ndarray]) -> None: ...
    def close(self) -> None: ...


class _Csv:
    """Numbers with as many digits as float32 has; none is an empty cell."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._columns = columns
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["key", "split", *columns])

    def write(self, keys: Sequence[str], split: str, values: Mapping[str, np.ndarray]) -> None:
        numbers = [[_plain(v) for v in values[name]] for name in self._columns]
        self._writer.writerows(zip(keys, [split] * len(keys), *numbers, strict=True))

    def close(self) -> None:
        self._file.close()


class _JsonLines:
    """One object a line; no number is null."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._columns = columns
        self._file = path.open("w", encoding="utf-8")

    def write(self, keys: Sequence[str], split: str, values: Mapping[str, np.ndarray]) -> None:
        for row, key in enumerate(keys):
            numbers = {name: _plain(values[name][row]) for name in self._columns}
            self._file.write(json.dumps({"key": key, "split": split, **numbers}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """float32 columns; no number is null."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._columns = columns
        fields = [
            ("key", pa.string()),
            ("split", pa.string()),
            *((name, pa.float32()) for name in columns),
        ]
        self._schema = pa.schema(fields)
        self._writer = pq.ParquetWriter(path, self._schema)

    def write(self, keys: Sequence[str], split: str, values: Mapping[str, np.ndarray]) -> None:
        import pyarrow as pa

        arrays: list[Any] = [pa.array(keys, pa.string()), pa.array([split] * len(keys), pa.string())]
        arrays += [
            pa.array(v.astype(np.float32), pa.float32(), from_pandas=True)
            for v in map(values.__getitem__, self._columns)
        ]
        self._writer.write_table(pa.table(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _plain(value: Any) -> float | None:
    """The shortest number that is this float32; None where it is NaN."""
    return None if math.isnan(value) else float(str(np.float32(value)))
