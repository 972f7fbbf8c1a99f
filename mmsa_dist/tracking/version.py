"""What a registered version says of itself: the tags that it gets, and the same read back."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mmsa_dist.data_card import DataCard
from mmsa_dist.recipe import Recipe
from mmsa_dist.report import data_name

SPLITS = ("valid", "test")
"""Of which a version keeps the metrics, as the tags ``valid.mae``, ``test.mae``, …"""

ANSWERS = "example_answers.json"
"""In the model folder: what the run's own weights answer to the logged input example, column -> a number a row."""


@dataclass(frozen=True)
class Version:
    """A version as the registry has it; of one that somebody else registered, tags may be missing.

    Attributes:
        aliases: those that point to it.
        created: milliseconds since 1970.
        source: the logged model that it was made from, ``models:/m-…``, or a place of files.
    """

    name: str
    number: str
    aliases: tuple[str, ...]
    run_id: str | None
    created: int
    source: str
    description: str
    tags: dict[str, str]

    @classmethod
    def of(cls, found: Any, aliases: Mapping[str, Any]) -> "Version":
        """From MLflow's ModelVersion.

        Args:
            aliases: of the registered model, alias -> version: what a search gives of versions leaves them out.
        """
        number = str(found.version)
        return cls(
            name=str(found.name),
            number=number,
            aliases=tuple(sorted(alias for alias, held in aliases.items() if str(held) == number)),
            run_id=found.run_id or None,
            created=int(found.creation_timestamp or 0),
            source=str(found.source),
            description=found.description or "",
            tags={key: plain(value) for key, value in (found.tags or {}).items()},
        )

    @property
    def address(self) -> str:
        """``models:/NAME/VERSION``."""
        return f"models:/{self.name}/{self.number}"

    @property
    def data(self) -> str | None:
        """The data set, and that it is synthetic where it is; None where that is not known."""
        if "data" not in self.tags:
            return None
        return data_name({"data": self.tags["data"], "synthetic": self.tags.get("data.synthetic") == "true"})

    @property
    def fingerprint(self) -> str | None:
        """Of the data that it was trained on."""
        return self.tags.get("data.fingerprint")

    @property
    def monitor(self) -> str | None:
        """The validation metric that chose its epoch."""
        return self.tags.get("monitor")

    @property
    def parameters(self) -> int | None:
        """`count_weights` of it."""
        number = self.tags.get("parameters", "")
        return int(number) if number.isdecimal() else None

    @property
    def code(self) -> str | None:
        """What it was trained with, for people."""
        return code_text(self.tags)

    def metrics(self, split: str) -> dict[str, float | None]:
        """Metric -> value of ``valid`` or ``test``; empty where none is known. What is undefined has no tag."""
        found = {key.removeprefix(f"{split}."): text for key, text in self.tags.items() if key.startswith(f"{split}.")}
        return {metric: value for metric, text in found.items() if (value := _number(text)) is not None}


def version_tags(
    result: Mapping[str, Any], card: DataCard, recipe: Recipe, run_dir: Path, weights: Path, code: Mapping[str, str]
) -> dict[str, str]:
    """The tags of a new version.

    Args:
        result: the run's ``result.json``.
        weights: its best ones.
        code: `code_tags`.
    """
    return {
        "system": recipe.system,
        "data": card.name,
        "data.fingerprint": card.fingerprint,
        "data.synthetic": str(card.synthetic).lower(),
        "monitor": recipe.train.monitor,
        "parameters": str(count_weights(weights)),
        "run_dir": run_dir.name,
        **code,
        **{
            f"{split}.{metric}": repr(value)
            for split in SPLITS
            for metric, value in result.get(split, {}).items()
            if value is not None
        },
    }


def code_tags(package: str, run: Mapping[str, str]) -> dict[str, str]:
    """``code.version``, and of a checkout ``code.commit`` and ``code.dirty``.

    Args:
        package: version of this package.
        run: tags of the MLflow run that trained it.
    """
    tags = {"code.version": package}
    if commit := run.get("mlflow.source.git.commit"):
        tags |= {"code.commit": commit, "code.dirty": run.get("git.dirty", "false")}
    return tags


def code_text(tags: Mapping[str, str]) -> str | None:
    """``mmsa-dist 0.1.0, commit 1234567 with changes`` from `code_tags`; None where they are missing."""
    if "code.version" not in tags:
        return None
    commit = f", commit {tags['code.commit'][:7]}" if "code.commit" in tags else ""
    return f"mmsa-dist {tags['code.version']}{commit}{' with changes' * (tags.get('code.dirty') == 'true')}"


def count_weights(path: Path) -> int:
    """Numbers in a file of weights, from its header: parameters and persistent buffers, without what a label generator
    learnt.

    Raises:
        DataError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    from mmsa_dist.errors import DataError
    from mmsa_dist.systems.base import LABEL_LAYERS

    try:
        with safe_open(path, "numpy") as file:
            names = [name for name in file.keys() if not name.startswith(LABEL_LAYERS)]  # noqa: SIM118  it is no dict
            return sum(prod(file.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}); copy it again or train again") from error


def plain(text: str) -> str:
    """`text` without control characters: whoever can write to the registry shall not write to our terminals."""
    return "".join(letter if unicodedata.category(letter) != "Cc" or letter in "\n\t" else "\ufffd" for letter in text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
