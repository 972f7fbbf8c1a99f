"""What a trained model must remember of the data it was trained on: ``data.json`` of a run and of a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from mmsa_dist.config import Strict, TextConfig
from mmsa_dist.errors import DataError

if TYPE_CHECKING:
    from mmsa_dist.systems.base import DataSpec

FILE = "data.json"


class Statistics(Strict):
    """Mean and standard deviation per feature, over the real steps of the train split; each (D,)."""

    mean: list[float]
    std: list[float]


class DataCard(Strict):
    """The data set as a model sees it."""

    name: str
    """Of the data set."""
    fingerprint: str
    """The index's: changes with any shard."""
    kind: str
    """Which metrics the field reports for it: `metrics.kind_for`."""
    synthetic: bool = False
    """Generated data; every report says so."""
    widths: dict[str, int]
    """modality -> D of what the system reads, in the order text, audio, vision. Behind an encoder: its hidden size."""
    label_range: tuple[float, float]
    """Lowest and highest possible label."""
    tasks: tuple[str, ...]
    """Labels that the data set has, M first."""
    classes: dict[str, int] = Field(default_factory=dict)
    """task -> number of classes, where labels are classes; empty where they are intensities."""
    text: TextConfig | None = None
    """How text is read; None where the data set's own text features are."""
    has_raw_text: bool = True
    """The data set holds transcripts."""
    has_tokens: bool = False
    """The data set holds token ids."""
    splits: dict[str, int] = Field(default_factory=dict)
    """Samples per split."""
    statistics: dict[str, Statistics] = Field(default_factory=dict)
    """Of the modalities that the recipe standardises, and of no other."""

    @classmethod
    def of(cls, index: Any, spec: "DataSpec", kind: str, normalize: tuple[str, ...] = ()) -> "DataCard":
        """The card of a run that trains on `index` (a `shards.index.Index`), described to the system by `spec`.

        Args:
            normalize: modalities that are standardised (``data.normalize``).
        """
        return cls(
            name=index.name,
            fingerprint=index.fingerprint,
            kind=kind,
            synthetic=index.synthetic,
            widths=dict(spec.widths),
            label_range=spec.label_range,
            tasks=tuple(spec.tasks),
            classes=dict(spec.classes),
            text=spec.text,
            has_raw_text=index.has_raw_text,
            has_tokens=index.has_tokens,
            splits=dict(index.splits),
            statistics={
                name: Statistics(**_plain(index.statistics[name])) for name in normalize if name in spec.widths
            },
        )

    def spec(self, text: TextConfig | None = None) -> "DataSpec":
        """What the system is built from; `text` stands in for the card's own where the encoder lies elsewhere now."""
        from mmsa_dist.systems.base import DataSpec

        return DataSpec(
            widths=self.widths,
            label_range=self.label_range,
            tasks=self.tasks,
            text=text or self.text,
            classes=self.classes,
        )

    @property
    def judged(self) -> tuple[str, ...]:
        """The tasks that metrics are of: ``M``; where labels are classes all of them."""
        return self.tasks if self.classes else ("M",)

    @property
    def reads_tokens(self) -> bool:
        """True where the text encoder reads the data set's token ids, False where it reads transcripts."""
        if self.text is None:
            return False
        return self.text.input == "tokens" or (self.text.input == "auto" and not self.has_raw_text)

    def save(self, folder: Path) -> Path:
        """Writes ``data.json`` into `folder`."""
        path = folder / FILE
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: Path) -> "DataCard":
        """Reads ``data.json`` of `folder`.

        Raises:
            DataError: missing, not JSON, or written by another version.
        """
        path = folder / FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); expected the folder of a run or of a model"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(
                f"{path}: {field}: {first['msg']}; another version of mmsa-dist wrote it, or it is damaged: train again"
            ) from error


def _plain(statistics: Mapping[str, Any]) -> dict[str, list[float]]:
    return {key: [float(value) for value in statistics[key]] for key in ("mean", "std")}
