"""The csv of a table: one row an utterance."""

import csv
import math
import re
from pathlib import Path

from shards.errors import ConfigError, DataError
from shards.sources.columns import CsvColumns
from shards.sources.stamp import Stamp
from shards.suggest import nearest
from shards.utterance import SPLITS, TASKS

SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "training": "train",
    "val": "valid",
    "dev": "valid",
    "validation": "valid",
    "testing": "test",
}


class Rows:
    """The csv: a list of rows, and the columns that options name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stamp = Stamp.of(path, "a csv with one row an utterance")  # before anything of it is read
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                self._header = next(reader, [])
                self._rows = [(reader.line_num, row) for row in reader if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read as csv in UTF-8: {error}") from error
        for line, row in self._rows:
            if len(row) != len(self._header):
                raise DataError(
                    f"{path} line {line}: has {len(row)} fields, the header has {len(self._header)}; "
                    "quote texts that hold commas"
                )
        if not self._rows:
            raise DataError(f"{path}: has no rows; expected a header and one row an utterance")

    def ids(self, wanted: tuple[str, ...]) -> list[str]:
        """
        Raises:
            DataError: one occurs twice; names the lines.
        """
        if len(wanted) == 1 and "{" in wanted[0]:
            found = self.filled(wanted[0], "--id")
        else:
            columns = [self._column(name, "--id") for name in wanted or self._usual(("video_id", "clip_id"), ("id",))]
            found = ["_".join(parts) for parts in zip(*columns, strict=True)]
        lines: dict[str, int] = {}
        for (line, _), own in zip(self._rows, found, strict=True):
            if (first := lines.setdefault(own, line)) != line:
                raise DataError(f"{self._path} line {line}: id {own!r} is that of line {first} too; ids must be unique")
        return found

    def filled(self, pattern: str, option: str) -> list[str]:
        """The pattern with each row's values: ``{video_id}[{clip_id}]`` becomes ``a[3]``."""
        values = {name: self._column(name, option) for name in re.findall(r"\{([^{}]*)\}", pattern)}
        return [
            re.sub(r"\{([^{}]*)\}", lambda m, row=row: values[m[1]][row], pattern)  # type: ignore[misc]
            for row in range(len(self._rows))
        ]

    def videos(self, columns: CsvColumns) -> list[str]:
        first = columns.video or next((name for name in columns.id if "{" not in name), "video_id")
        return self._column(first, "--video")

    def splits(self, columns: CsvColumns) -> list[str]:
        if columns.label == "none" and not columns.split and not {"split", "mode"} & set(self._header):
            return ["test"] * len(self._rows)  # it is there to be predicted
        name = columns.split or self._usual_split()
        values = [value.strip().lower() for value in self._column(name, "--split")]
        for (line, _), value in zip(self._rows, values, strict=True):
            if value not in SPLIT_NAMES:
                raise DataError(f"{self._path} line {line}: {name} is {value!r}{nearest(value, SPLIT_NAMES)}")
        return [SPLIT_NAMES[value] for value in values]

    def texts(self, wanted: str | None) -> list[str] | None:
        if wanted == "none" or (wanted is None and "text" not in self._header):
            return None
        return self._column(wanted or "text", "--text")

    def labels(self, columns: CsvColumns) -> dict[str, list[float]]:
        if columns.label == "none":
            return {}
        unimodal = {"T": columns.label_text, "A": columns.label_audio, "V": columns.label_vision}
        names = {"M": columns.label or "label"} | {task: name or f"label_{task}" for task, name in unimodal.items()}
        asked = {"M"} | {task for task, name in unimodal.items() if name}
        return {
            task: self._numbers(names[task], optional=task != "M")
            for task in TASKS
            if task in asked or names[task] in self._header  # the usual name, where there is one
        }

    def _numbers(self, name: str, optional: bool) -> list[float]:
        numbers = []
        for (line, _), value in zip(self._rows, self._column(name, "--label"), strict=True):
            try:
                # a sample may lack a unimodal label
                numbers.append(math.nan if optional and not value.strip() else float(value))
            except ValueError as error:
                remedy = "" if value.strip() else "; --label none packs utterances that have no labels, to predict them"
                raise DataError(f"{self._path} line {line}: {name} is {value!r}, expected a number{remedy}") from error
        return numbers

    def _column(self, name: str, option: str) -> list[str]:
        if name not in self._header:
            raise DataError(f"{self._path}: there is no column {name!r} ({option}){nearest(name, self._header)}")
        if (times := self._header.count(name)) > 1:
            raise DataError(f"{self._path}: column {name!r} ({option}) is there {times} times; rename all but one")
        position = self._header.index(name)
        return [row[position] for _, row in self._rows]

    def _usual(self, *choices: tuple[str, ...]) -> tuple[str, ...]:
        return next((names for names in choices if set(names) <= set(self._header)), choices[-1])

    def _usual_split(self) -> str:
        for name in ("split", "mode"):
            if name in self._header:
                return name
        similar = [name for name in self._header if name.startswith("split")]
        said = f"it has {' and '.join(similar)}" if similar else f"its columns are {', '.join(self._header)}"
        raise ConfigError(f"{self._path}: which column holds the split? {said}; name one with --split")
