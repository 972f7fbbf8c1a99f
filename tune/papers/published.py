"""What papers have published: their tables, row by row, with what trains a row here.

``tables/<system>.yaml`` holds those of one paper. A row that names a ``system`` is trained with that system's recipe
and the values of ``set``; of any other the paper's figures are all there is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.suggest import nearest

PACKAGED = Path(__file__).parent / "tables"

DATA = {"mosi": "CMU-MOSI", "mosei": "CMU-MOSEI", "sims": "CH-SIMS", "iemocap": "IEMOCAP"}
"""Data set -> its name in print."""

COLUMNS = {
    "mosi": ("mae", "corr", "acc7", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0"),
    "sims": ("mae", "corr", "acc5", "acc3", "acc2", "f1"),
    "iemocap": tuple(f"{kind}_{emotion}" for emotion in ("neutral", "happy", "sad", "angry") for kind in ("acc", "f1")),
}
"""Kind of labels -> the metrics that are shown, those of `mmsa_dist.metrics`."""

KIND = {"mosi": "mosi", "mosei": "mosi", "sims": "sims", "iemocap": "iemocap"}

UNSTATED = {"acc2": ("acc2_has0", "acc2_non0"), "f1": ("f1_has0", "f1_non0")}
"""A figure whose convention the paper does not state, where there are two -> the columns that it may belong to."""

Figures = dict[str, float]


class Row(Strict):
    """One row of a table."""

    system: str | None = None
    """What trains it; None where nothing here does."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the recipe -> the values that make it this row."""
    setting: str | None = None
    """What the paper says of how it was trained."""
    paper: Figures = Field(default_factory=dict)
    """As printed: shares in percent."""
    other: Figures = Field(default_factory=dict)
    """From the paper's second source, `Paper.other`."""
    note: str | None = None
    """What looks like a misprint, and the like."""

    @model_validator(mode="after")
    def _sets_something_of_ours(self) -> "Row":
        if self.set and self.system is None:
            raise ValueError("set, but no system: name what trains the row")
        return self


class Table(Strict):
    """One table of a paper."""

    title: str
    data: tuple[Literal["mosi", "mosei", "sims", "iemocap"], ...] = Field(min_length=1)
    """The data sets that its rows can be trained on."""
    own: str | None = None
    """The row of the paper's own system, whole, which the others are compared to."""
    setting: str | None = None
    """How the paper's own system was trained."""
    aligned: bool | None = None
    """Whether the modalities that its own system reads are aligned to words; None where that is not known."""
    conventions: str | None = None
    """What the paper says of its metrics, where it is not the same for all its tables."""
    differences: bool = False
    """Figures are not a row's own but the `own` row's less the row's."""
    note: str | None = None
    instead: str | None = None
    """What there is here of a table that no training reproduces."""
    rows: dict[str, Row] = Field(min_length=1)

    @property
    def trains(self) -> dict[str, Row]:
        """The rows that are trained here."""
        return {name: row for name, row in self.rows.items() if row.system}

    def columns(self, data: str) -> tuple[str, ...]:
        """What is shown of runs on `data`; where no training reproduces the table, what is printed."""
        if self.instead:
            return tuple(dict.fromkeys(key for row in self.rows.values() for key in row.paper))
        return COLUMNS[KIND[data]]

    @model_validator(mode="after")
    def _whole(self) -> "Table":
        if (self.own is None) != (self.instead is not None):
            raise ValueError("own is the row that others are compared to; instead stands where nothing is trained")
        if self.instead and self.trains:
            raise ValueError(f"instead, but row {next(iter(self.trains))!r} names a system")
        if self.own is not None and self.own not in self.trains:
            raise ValueError(f"own: {self.own!r} is not a row that names a system{nearest(self.own, self.trains)}")
        valid = {key for data in self.data for key in self.columns(data)} | UNSTATED.keys()
        for name, row in self.rows.items():
            for key in row.paper.keys() | row.other.keys():
                if key not in valid:
                    raise ValueError(f"row {name!r}: unknown metric {key!r}{nearest(key, valid)}")
        return self


class Paper(Strict):
    """The tables of one paper."""

    system: str
    """The system that the paper is about; it names the file too."""
    paper: str
    """Who wrote it, and when."""
    conventions: str
    """What the paper says of its metrics."""
    other: str | None = None
    """Where rows' ``other`` figures come from."""
    tables: dict[str, Table] = Field(min_length=1)

    @model_validator(mode="after")
    def _named(self) -> "Paper":
        given = any(row.other for table in self.tables.values() for row in table.rows.values())
        if given != (self.other is not None):
            raise ValueError("other: name the second source of figures, and give figures of it, or neither")
        return self

    def table(self, number: str) -> Table:
        """The table called `number`.

        Raises:
            ConfigError: there is none.
        """
        if number not in self.tables:
            listed = f"mmsa-dist reproduce {self.system} lists them"
            raise ConfigError(f"--table {number}: {self.paper} has none{nearest(number, self.tables)}; {listed}")
        return self.tables[number]


def load(path: Path) -> Paper:
    """The tables in a file.

    Raises:
        ConfigError: it cannot be read, or something in it is unknown or wrong; says where.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    try:
        return Paper.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_sentence(issue) for issue in error.errors())}") from error


def packaged() -> list[str]:
    """Systems whose paper's tables are here."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def papers() -> Iterator[Paper]:
    """All papers."""
    yield from (load(PACKAGED / f"{name}.yaml") for name in packaged())


def paper_of(system: str) -> Paper:
    """The paper of `system`.

    Raises:
        ConfigError: there is none here; says in whose tables the system stands.
    """
    known = packaged()
    if system in known:
        return load(PACKAGED / f"{system}.yaml")
    having = [
        p.system for p in papers() if any(row.system == system for t in p.tables.values() for row in t.rows.values())
    ]
    if having:
        raise ConfigError(
            f"no tables of {system}'s own paper are here; it has rows in those of {', '.join(having)}: "
            f"mmsa-dist reproduce {having[0]}"
        )
    raise ConfigError(f"no published tables of {system!r}{nearest(system, known)}")


def _sentence(issue: Any) -> str:
    key = ".".join(str(part) for part in issue["loc"]) or "the file"
    if issue["type"] == "extra_forbidden":
        cls = (Paper, Table, Row)[min(issue["loc"].count("tables") + issue["loc"].count("rows"), 2)]
        return f"unknown key `{key}`{nearest(str(issue['loc'][-1]), cls.model_fields)}"
    said = issue["msg"].removeprefix("Value error, ")
    found = "" if issue["type"] == "value_error" else f", found {issue['input']!r}"
    return f"`{key}`: {said[0].lower()}{said[1:]}{found}"
