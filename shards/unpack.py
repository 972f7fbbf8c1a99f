"""Back to a feature pickle of the MMSA toolkit, so that another program can train on the same data.

The layout is the one that `shards.sources.mmsa` reads: arrays padded with zeros at the end, *aligned* (one length for
all modalities) or *unaligned* (``audio_lengths``, ``vision_lengths``). Samples come in the order of the source they
were packed from, padded as far as it was. The file is written sample by sample: no array is ever held.

Shapes: N samples of a split, T padded steps, D width.
"""

import errno
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.errors import ConfigError, TransientError
from shards.files import sync_folder
from shards.index import Index
from shards.packing.job import stored_order
from shards.pickled import Pickler, Streamed
from shards.read import ShardReader
from shards.remote.url import names_address
from shards.suggest import counted, has
from shards.utterance import MODALITIES, SPLITS, Utterance

LAYOUTS = ("auto", "aligned", "unaligned")

_SENTIMENTS = np.array(["Negative", "Neutral", "Positive", ""])
_MAPPED = 4096
"""Shards mapped at a time; Linux allows some 65,000 mappings."""

_SPARE = 64
"""File descriptors for all else: each mapped shard has one."""

Report = Callable[[int], None]


def unpack(
    index: Index,
    file: Path,
    *,
    layout: str = "auto",
    overwrite: bool = False,
    report: Report = lambda samples: None,
) -> list[str]:
    """Writes `index`'s samples as an MMSA pickle, whole or not at all.

    Args:
        file: to be written.
        layout: one of `LAYOUTS`; auto takes the source's, or aligned where every sample has one length.
        overwrite: replace a file that is there.
        report: is told of samples that are written (`passes` of them for each).

    Returns:
        What the reader of the pickle should know, in sentences.

    Raises:
        ConfigError: `file` is there or cannot be written; the data do not fit the layout, or are classes.
        DataError: a shard is damaged.
        TransientError: the disk is full, or the data set cannot be read just now.
    """
    if "M" not in index.tasks:
        raise ConfigError(
            f"{index.where}: labels are {', '.join(index.tasks) or 'none'}, but an MMSA pickle holds intensities "
            "(label M); such a set cannot be written as one"
        )
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: expected one of {', '.join(LAYOUTS)}")
    with _explained(file):
        _check_target(file, overwrite)
    parts = {split: _Part.of(index, split) for split in SPLITS if index.splits.get(split)}
    shape = _Shape.of(index, parts, layout)
    # the source's order goes to and fro among the shards: they stay mapped
    reader = ShardReader(index, open_shards=min(len(index.shards), _mappable()))
    with _explained(file), reader, _whole_or_not(file) as out:
        Pickler(out).dump({s: _content(index, reader, part, shape, report) for s, part in parts.items()})
    return _notes(index, parts, shape)


def _mappable() -> int:
    """Shards that may be mapped at a time: this process has one file descriptor for each, and one for its table."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAPPED if allowed == resource.RLIM_INFINITY else max(1, min(_MAPPED, (allowed - _SPARE) // 2))


def passes(index: Index) -> int:
    """How often each sample is written a part of: once a modality."""
    return len(index.modalities) + index.has_raw_text + index.has_tokens


@dataclass(frozen=True)
class _Part:
    """One split, in the order in which it is written.

    Attributes:
        numbers: (N,) in the index.
        keys: N of them.
        lengths: modality -> (N,) steps, 0 where absent; "tokens" -> (N,).
        labels: task -> (N,) float32.
    """

    numbers: np.ndarray
    keys: list[str]
    lengths: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    @classmethod
    def of(cls, index: Index, split: str) -> "_Part":
        numbers = index.numbers(split)
        names = ["key", *(f"length_{m}" for m in index.modalities), "n_tokens", *(f"label_{t}" for t in index.tasks)]
        held: dict[str, list[Any]] = {name: [] for name in names}
        for shard_no in index.shards_of(split):
            table = index.table(shard_no)
            for name in names:  # copied, so that no table stays open
                held[name].append(table[name].to_pylist() if name == "key" else table[name].to_numpy().copy())
        stored = stored_order(index.seed, split, len(numbers))
        # shards of somebody else (they have a layout) are indexed in place, in their own order
        order = np.arange(len(numbers)) if index.layout else np.argsort(stored)

        def column(name: str) -> np.ndarray:
            return np.concatenate(held[name])[order]

        keys = [key for its in held["key"] for key in its]
        return cls(
            numbers=numbers.start + order,
            keys=[keys[n] for n in order],
            lengths={m: column(f"length_{m}") for m in index.modalities} | {"tokens": column("n_tokens")},
            labels={task: column(f"label_{task}") for task in index.tasks},
        )


@dataclass(frozen=True)
class _Shape:
    """What is the same for all splits.

    Attributes:
        aligned: without lengths, all modalities padded to the same T.
        steps: modality -> T, "tokens" -> T.
        text_lengths: the text's lengths must be told, since no mask of tokens tells them.
    """

    aligned: bool
    steps: dict[str, int]
    text_lengths: bool

    @classmethod
    def of(cls, index: Index, parts: dict[str, _Part], layout: str) -> "_Shape":
        misfit = _misfit(index, parts)
        aligned = layout == "aligned" or (layout == "auto" and index.source.get("aligned", True) and not misfit)
        if layout == "aligned" and misfit:
            raise ConfigError(f"--layout aligned: {misfit}; leave the option out, or say unaligned")
        padded = index.source.get("padded_to")
        padded = padded if isinstance(padded, dict) else {}
        told = {"tokens": padded.get("text_bert"), **{m: padded.get(m) for m in index.modalities}}
        steps = {
            name: max(
                known if isinstance(known, int) else 1, *(int(part.lengths[name].max()) for part in parts.values())
            )
            for name, known in told.items()
        }
        if aligned:
            steps |= dict.fromkeys(index.modalities, max(steps[m] for m in index.modalities))
        by_mask = steps["tokens"] == steps.get("text") and all(
            np.array_equal(part.lengths["tokens"], part.lengths["text"]) for part in parts.values()
        )
        return cls(aligned, steps, "text" in index.modalities and not aligned and not (index.has_tokens and by_mask))


def _misfit(index: Index, parts: dict[str, _Part]) -> str:
    """Why the data is not aligned; empty where it is."""
    names = list(index.modalities)
    if len(names) < 2:
        return f"{index.name} has features of {', '.join(names) or 'nothing'} alone, so that nothing stands beside them"
    names += ["tokens"] * index.has_tokens
    for split, part in parts.items():
        for name in names[1:]:
            for row in np.flatnonzero(part.lengths[name] != part.lengths[names[0]])[:1]:
                return (
                    f"sample {part.keys[row]!r} of {split} has {part.lengths[names[0]][row]:,} steps of {names[0]} and "
                    f"{part.lengths[name][row]:,} of {name}"
                )
    return ""


# --- what is written


def _content(index: Index, reader: ShardReader, part: _Part, shape: _Shape, report: Report) -> dict[str, Any]:
    """One split; its arrays are read while they are written."""
    count = len(part.keys)
    content: dict[str, Any] = {"id": part.keys, "raw_text": _texts(index, reader, part, report)}
    for name, modality in index.modalities.items():
        size = (shape.steps[name], modality.width)
        content[name] = Streamed(np.dtype("<f4"), (count, *size), _padded(reader, part, name, size, report))
    if index.has_tokens:
        long = shape.steps["tokens"]
        content["text_bert"] = Streamed(np.dtype("<i8"), (count, 3, long), _masked(reader, part, long, report))
    if not shape.aligned:
        told = [m for m in index.modalities if m != "text" or shape.text_lengths]
        content |= {f"{m}_lengths": part.lengths[m].tolist() for m in told}
    for task, labels in part.labels.items():
        suffix = "" if task == "M" else f"_{task}"
        content[f"regression_labels{suffix}"] = Streamed.of(labels.astype("<f4"))
        content[f"classification_labels{suffix}"] = Streamed.of((np.sign(labels) + 1).astype("<f4"))
    signs = np.nan_to_num(np.sign(part.labels["M"]), nan=2)
    content["annotations"] = _SENTIMENTS[signs.astype(int) + 1].tolist()
    return content


def _sample(reader: ShardReader, number: int, with_text: bool = False) -> Utterance:
    """A sample; what fails here is none of the written file's."""
    try:
        return reader.sample(number, with_text)
    except OSError as error:
        raise TransientError(
            f"{reader.index.where} cannot be read: {error.strerror or error}; nothing was written, try again"
        ) from error


def _texts(index: Index, reader: ShardReader, part: _Part, report: Report) -> list[str]:
    if not index.has_raw_text:
        return [""] * len(part.keys)  # MMSA wants the key
    texts = []
    for number in part.numbers:
        texts.append(_sample(reader, number, with_text=True).raw_text or "")
        report(1)
    return texts


def _padded(reader: ShardReader, part: _Part, name: str, size: tuple[int, int], report: Report) -> Iterator[np.ndarray]:
    """(T, D) float32 for each sample."""
    for number in part.numbers:
        row = np.zeros(size, np.float32)
        values = _sample(reader, number).modalities.get(name)
        if values is not None:
            row[: len(values)] = values
        yield row
        report(1)


def _masked(reader: ShardReader, part: _Part, steps: int, report: Report) -> Iterator[np.ndarray]:
    """(3, T) int64 for each sample: ids, mask, segment."""
    for number in part.numbers:
        row = np.zeros((3, steps), np.int64)
        tokens = _sample(reader, number).tokens
        if tokens is not None:
            row[0, : len(tokens)] = tokens
            row[1, : len(tokens)] = 1
        yield row
        report(1)


def _notes(index: Index, parts: dict[str, _Part], shape: _Shape) -> list[str]:
    notes = []
    if index.dtype == "float16":
        notes.append("features were packed as float16: the pickle holds them rounded (pack with --dtype float32)")
    if not index.has_tokens:
        notes.append("no token ids: without text_bert MMSA needs use_bert false, or the text tokenised first")
    if not index.has_raw_text:
        notes.append("no transcripts: raw_text is empty")
    if lacking := [m for m in MODALITIES if m not in index.modalities]:
        notes.append(f"no features of {', '.join(lacking)}: the keys are left out")
    if unknown := sum(int(np.isnan(part.labels["M"]).sum()) for part in parts.values()):
        notes.append(f"{unknown:,} samples have no label M: nan")
    for m in index.modalities:
        if absent := sum(int((part.lengths[m] == 0).sum()) for part in parts.values()):
            notes.append(
                f"{m}: {counted(absent, 'sample')} {has(absent)} none: zeros"
                + ("" if shape.aligned else " of length 0")
            )
    if missing := [split for split in SPLITS if split not in parts]:
        notes.append(f"no samples of {', '.join(missing)}: MMSA needs all three splits")
    return notes


# --- the file


def _check_target(file: Path, overwrite: bool) -> None:
    if names_address(file):
        raise ConfigError(f"--to {file} is an address; write the pickle to a file here, then copy it there")
    if file.is_dir():
        raise ConfigError(f"--to {file} is a folder; name the pickle in it, e.g. {file / 'features.pkl'}")
    if file.exists() and not overwrite:
        raise ConfigError(f"--to {file} is there already; choose another name, or --overwrite to replace it")


@contextmanager
def _whole_or_not(file: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name at the end. What a killed process has left of it is taken over."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    with part.open("ab") as out:
        if not _ours(out, part):
            raise ConfigError(f"--to {file} is being written by another process; wait for it")
        try:
            out.truncate(0)
            yield out
            out.flush()
            os.fsync(out.fileno())
            part.replace(file)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    sync_folder(file.parent)


def _ours(out: BinaryIO, part: Path) -> bool:
    """Whether no other process writes what was opened as `part`, nor has finished and renamed it in the meantime."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return part.exists() and os.path.samestat(os.fstat(out.fileno()), part.stat())


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """What an OSError means to the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TransientError(
                f"no space left for {file} ({os.strerror(error.errno)}); what was written is removed again: make room "
                "or choose another --to"
            ) from error
        raise ConfigError(f"--to {file} cannot be written: {error.strerror or error}; choose another place") from error
