"""Folds: which videos are train, valid and test, as the authors of a data set publish them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shards.errors import ConfigError, DataError
from shards.sources.rows import SPLIT_NAMES
from shards.sources.stamp import check_file
from shards.suggest import nearest
from shards.utterance import SPLITS

EXPECTED = "expected lists of video ids under train, valid and test"


def read_folds(paths: tuple[Path, ...]) -> dict[str, str]:
    """video id -> split.

    Args:
        paths: one YAML or JSON file with a list of video ids under each of train, valid and test; or three text files
            in that order, one id a line.

    Raises:
        DataError: a file is not like that, or a video is in two folds.
        ConfigError: neither one file nor three.
    """
    if len(paths) == 1:
        lists = _by_name(paths[0])
    elif len(paths) == len(SPLITS):
        lists = {split: _text(path).split() for split, path in zip(SPLITS, paths, strict=True)}
    else:
        raise ConfigError(f"--folds: {len(paths)} files; give one YAML or JSON file, or three: train, valid, test")
    where = " ".join(map(str, paths))
    found: dict[str, str] = {}
    for split, videos in lists.items():
        for video in videos:
            if found.setdefault(video, split) != split:
                raise DataError(f"{where}: video {video!r} is in {found[video]} and in {split}; it may be in one only")
    for split in SPLITS:
        if not lists.get(split):
            raise DataError(f"{where}: {split} names no video; {EXPECTED}")
    return found


def _by_name(path: Path) -> dict[str, list[str]]:
    try:
        # every scalar a string: YAML would take the id 100178 for a number, 1:30 for ninety and no for false
        content: Any = yaml.load(_text(path), Loader=yaml.BaseLoader)
    except (RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())}; {EXPECTED}") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds {'a ' + type(content).__name__ if content else 'nothing'}; {EXPECTED}")
    lists: dict[str, list[str]] = {}
    for name, videos in content.items():
        if str(name).lower() not in SPLIT_NAMES:
            raise DataError(f"{path}: unknown fold {name!r}{nearest(str(name), SPLIT_NAMES)}")
        if not isinstance(videos, list) or not all(isinstance(video, str) for video in videos):
            raise DataError(f"{path}: {name} is no list of video ids; {EXPECTED}")
        lists.setdefault(SPLIT_NAMES[str(name).lower()], []).extend(videos)
    return lists


def _text(path: Path) -> str:
    check_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {EXPECTED}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8: {error}") from error
