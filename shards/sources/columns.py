"""Which column of a csv is what, and which array or file has the features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shards.errors import ConfigError
from shards.options import option
from shards.suggest import nearest

_Column = Annotated[str | None, option("COLUMN")]
_Name = Annotated[str, option("NAME")]
_Array = Annotated[str | None, option("ARRAY")]


class CsvColumns(BaseModel):
    """Which column of the csv is what. Unset ones take the usual names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    id: Annotated[tuple[str, ...], option("COLUMN...")] = ()
    """Columns that make the id, joined with "_"; or a pattern like {video_id}[{clip_id}]. Default: video_id clip_id."""
    split: _Column = None
    """Column that holds train, valid (val, dev) or test. Default: split, or mode."""
    label: _Column = None
    """Column of the multimodal label. Default: label; none for utterances without labels, to be predicted."""
    label_text: _Column = None
    """Column of the label of the text alone. Default: label_T where there is one."""
    label_audio: _Column = None
    """Column of the label of the audio alone. Default: label_A where there is one."""
    label_vision: _Column = None
    """Column of the label of the vision alone. Default: label_V where there is one."""
    text: _Column = None
    """Column of the transcript. Default: text where there is one; none leaves it out."""
    video: _Column = None
    """Column of the video, for --hold-out-valid. Default: the first id column."""

    @classmethod
    def from_yaml(cls, path: Path, overrides: Mapping[str, Any]) -> Self:
        """Reads the YAML file; `overrides` win.

        Raises:
            ConfigError: no such file, not YAML, or an unknown key (names the nearest).
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # a date that is none, say
            raise ConfigError(f"--columns {path}: cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"--columns {path}: holds {type(content).__name__}, expected `name: column` lines")
        for key in content:
            if key not in cls.model_fields:
                raise ConfigError(f"--columns {path}: unknown key {key!r}{nearest(str(key), cls.model_fields)}")
        if isinstance(content.get("id"), str):
            content["id"] = (content["id"],)
        try:
            return cls(**{**content, **overrides})
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"--columns {path}: {first['loc'][0]}: {first['msg']}") from error


class Columns(CsvColumns):
    """Which array of the npz is what, besides."""

    text_features: _Array = None
    """Array of text features, NAME or NAME:LENGTHS (see above). Default: none."""
    audio: _Array = None
    """Array of audio features, NAME or NAME:LENGTHS. Default: none."""
    vision: _Array = None
    """Array of vision features, NAME or NAME:LENGTHS. Default: none."""
    id_array: _Array = None
    """Array that holds the ids. Default: id."""


class FileColumns(CsvColumns):
    """Where the features of a row are, besides."""

    files: Annotated[str, option("PATTERN")] = "{modality}/{video_id}/{clip_id}.npy"
    """Path of an utterance's file in the folder; {column} stands for what the row has there. With {modality} (text,
    audio, vision) a .npy for each; without it, e.g. {video_id}_{clip_id}.npz, one .npz with arrays of these names."""
    text_features: _Name = "text"
    """What text features are called in the paths or the .npz; none leaves them out."""
    audio: _Name = "audio"
    """What audio features are called; none leaves them out."""
    vision: _Name = "vision"
    """What vision features are called; none leaves them out."""


FEATURES = {"text": "text_features", "audio": "audio", "vision": "vision"}
"""modality -> the field of `Columns` and of `FileColumns` that says what its features are called."""


def feature_names(columns: Columns | FileColumns) -> dict[str, str | None]:
    """modality -> what its features are called."""
    return {modality: getattr(columns, field) for modality, field in FEATURES.items()}


def feature_option(modality: str) -> str:
    """The command line's option for that, e.g. ``--text-features``."""
    return "--" + FEATURES[modality].replace("_", "-")
