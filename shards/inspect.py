"""What a packed data set holds: everything that a careful person asks before training on it.

It comes from the index and from the shards' tables; of a tar only the size is looked at, and the transcripts where
`shards.leaks` compares them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards import arrangement, leaks
from shards.ahead import fetch_tables
from shards.index import Index
from shards.leaks import Show
from shards.suggest import counted, has, was
from shards.utterance import SPLITS

PERCENTILES = (0, 5, 50, 95, 99, 100)
CONSTANT = 1e-8
"""A standard deviation below it is none; `shards.batch.Standard` does not divide by it either."""
LARGE = 100.0
"""Features of this deviation drown the others where they are not standardised."""
UNLIKE = 1000.0
"""So do those that deviate as many times as much as others."""


@dataclass(frozen=True)
class Columns:
    """What the tables say of each sample, by number.

    Attributes:
        lengths: modality -> (samples,) steps, 0 where absent.
        tokens: (samples,) number of token ids.
        labels: task -> (samples,) float32, NaN where absent.
        videos: (samples,) digest of the video's id in the key, 0 where it has none.
    """

    lengths: dict[str, NDArray[np.int32]]
    tokens: NDArray[np.int32]
    labels: dict[str, NDArray[np.float32]]
    videos: NDArray[np.uint64]

    @classmethod
    def of(cls, index: Index) -> "Columns":
        """Reads one table after the other; remote ones are fetched, several at a time.

        Raises:
            DataError: a table is damaged.
        """
        total = index.num_samples
        columns = cls(
            lengths={name: np.zeros(total, np.int32) for name in index.modalities},
            tokens=np.zeros(total, np.int32),
            labels={task: np.zeros(total, np.float32) for task in index.tasks},
            videos=np.zeros(total, np.uint64),
        )
        fetch_tables(index, range(len(index.shards)))
        for n in range(len(index.shards)):
            columns._take(index.table(n), slice(index.first(n), index.first(n + 1)))
        return columns

    def _take(self, table: pa.Table, rows: slice) -> None:
        for name, lengths in self.lengths.items():
            lengths[rows] = table[f"length_{name}"].to_numpy()
        self.tokens[rows] = table["n_tokens"].to_numpy()
        for task, labels in self.labels.items():
            labels[rows] = table[f"label_{task}"].to_numpy()
        self.videos[rows] = [leaks.digest(leaks.video_of(key)) for key in table["key"].to_pylist()]


def summary(
    index: Index,
    fast: bool = False,
    show: Show = lambda numbers, total, what: numbers,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Everything `mmsa-dist inspect` tells, as plain values.

    Args:
        fast: leave out the comparison of transcripts, which reads every shard.
        show: wraps the loop over the transcripts, to show progress.
        columns: what the tables say, where it has been read already.

    Raises:
        DataError: a table is damaged, or a tar of this machine is missing or cut short.
    """
    for n in range(0 if index.remote else len(index.shards)):  # a remote one is looked at when it is fetched
        index.expected_tar(n).check_size()
    columns = columns or Columns.of(index)
    told: dict[str, Any] = {
        "name": index.name,
        "synthetic": index.synthetic,
        "folder": index.where,
        "fingerprint": index.fingerprint,
        "dtype": index.dtype,
        "seed": index.seed,
        "tool_version": index.tool_version,
        "source": index.source,
        "splits": {**index.splits},
        "samples": index.num_samples,
        "shards": {split: len(index.shards_of(split)) for split in SPLITS},
        "bytes": sum(shard.bytes + shard.table_bytes for shard in index.shards),
        "tasks": list(index.tasks),
        "classes": {**index.classes},
        "label_range": list(index.label_range),
        "raw_text": index.has_raw_text,
        "tokens": {"length_percentiles": _percentiles(columns.tokens)} if index.has_tokens else None,
        "modalities": {name: _modality(index, name, columns.lengths[name]) for name in index.modalities},
        "labels": {task: _labels(index, task, columns.labels[task]) for task in index.tasks},
        "transcripts": None if fast else leaks.transcripts(index, show),
        "videos": leaks.videos(index, columns.videos, lambda number: _key(index, number)),
    }
    told["remarks"] = list(_remarks(told))
    return told


def per_split(index: Index, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """split -> its part of `values` (samples,)."""
    return {split: values[index.numbers(split).start : index.numbers(split).stop] for split in index.splits}


def _key(index: Index, number: int) -> str:
    shard_no, row = index.locate(number)
    return str(index.table(shard_no)["key"][row].as_py())


def _percentiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    """Percentiles of the lengths that are not zero: p % of them are at most this long."""
    real = lengths[lengths > 0]
    values = np.percentile(real, PERCENTILES, method="inverted_cdf") if len(real) else np.zeros(len(PERCENTILES))
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}


def _modality(index: Index, name: str, lengths: NDArray[np.int32]) -> dict[str, Any]:
    """Of the deviations (of the train split): how many are none, the smallest of the others, the largest."""
    std = np.asarray(index.statistics[name]["std"], dtype=np.float64)
    varying = std[std > CONSTANT]
    return {
        "width": index.modalities[name].width,
        "length_percentiles": _percentiles(lengths),
        "absent": {split: int((part == 0).sum()) for split, part in per_split(index, lengths).items()},
        "non_finite": index.non_finite.get(name, 0),
        "constant": [int(n) for n in np.flatnonzero(std <= CONSTANT)],
        "std": [float(varying.min()), float(varying.max())] if len(varying) else [0.0, 0.0],
    }


def _labels(index: Index, task: str, labels: NDArray[np.float32]) -> dict[str, Any]:
    """Counts per split of labels nearest to whole steps: seven over -3..3, eleven over -1..1; of each class."""
    if task in index.classes:
        low, high, bins = 0.0, index.classes[task] - 1.0, index.classes[task]
    else:
        low, high = index.label_range
        bins = 7 if high - low > 2 else 11
    width = (high - low) / max(1, bins - 1) or 1.0
    near, numbers = np.rint((labels - low) / width), np.arange(bins)
    split_near, split_labels = per_split(index, near), per_split(index, labels)
    known = {split: part[~np.isnan(part)].astype(np.float64) for split, part in split_labels.items()}
    return {
        "near": [round(low + width * n, 4) for n in range(bins)],
        "counts": {split: [int((part == n).sum()) for n in numbers] for split, part in split_near.items()},
        "missing": int(np.isnan(labels).sum()),
        "mean": {split: float(part.mean()) if len(part) else None for split, part in known.items()},
        "std": {split: float(part.std()) if len(part) else None for split, part in known.items()},
        "zero": {split: float((part == 0).mean()) if len(part) else None for split, part in known.items()},
        "whole": _whole(labels[~np.isnan(labels)]),
        "on_disk": _arrangement(index, labels),
    }


def _whole(labels: NDArray[np.float32]) -> list[int] | None:
    """The labels that occur, where all are whole numbers from 0 up, as classes are."""
    distinct = np.unique(labels)
    whole = len(distinct) > 1 and (distinct == np.rint(distinct)).all() and distinct[0] >= 0
    return [int(label) for label in distinct] if whole else None


def _arrangement(index: Index, labels: NDArray[np.float32]) -> dict[str, float | None]:
    """Of the train split (see `shards.arrangement`)."""
    shards, numbers = index.shards_of("train"), index.numbers("train")
    homes = np.repeat(np.arange(len(shards)), [index.shards[n].samples for n in shards])
    return arrangement.of_labels(labels[numbers.start : numbers.stop], homes)


# --- what deserves a second look, in sentences


def _remarks(told: dict[str, Any]) -> Iterator[str]:
    yield from _leaks(told)
    for name, facts in told["modalities"].items():
        if facts["non_finite"]:
            values = counted(facts["non_finite"], "value")
            yield f"{name}: {values} of the source {was(facts['non_finite'])} NaN or infinite; stored as 0"
        if facts["constant"]:
            yield (
                f"{name}: {len(facts['constant']):,} of {facts['width']:,} dimensions never change in train "
                f"({_few(facts['constant'])}): they tell nothing"
            )
        low, high = facts["std"]
        if high > min(LARGE, UNLIKE * low):
            yield (
                f"{name}: deviations of its dimensions go from {low:.3g} to {high:.3g}; "
                f"--data.normalize {name} standardises it"
            )
        lacking = [split for split, absent in facts["absent"].items() if absent == told["splits"][split] > 0]
        if lacking and "train" not in lacking:
            yield f"{name}: no sample of {' and '.join(lacking)} has it, though samples of train do"
    for task in told["tasks"]:
        yield from _label_remarks(told, task)
    for split, count in told["splits"].items():
        if not count:
            yield f"{split}: no samples"


def _label_remarks(told: dict[str, Any], task: str) -> Iterator[str]:
    facts, (low, high) = told["labels"][task], told["label_range"]
    rank, shards = facts["on_disk"]["rank"], facts["on_disk"]["shards"]
    if rank is not None or shards is not None:
        how = (
            f"correlates with its place on disk ({rank:+.2f})"
            if rank is not None
            else f"differs from shard to shard ({shards:.0%} of its variance)"
        )
        yield (
            f"label {task}: in train it {how}; samples are shuffled over --data.window shards (8 unless told; train "
            f"has {told['shards']['train']:,}): where there are more, raise it, or write them anew in random order"
        )
    if task not in told["classes"] and facts["whole"] and low < 0:
        few = " and ".join(map(str, facts["whole"])) if len(facts["whole"]) == 2 else _few(facts["whole"])
        yield f"label {task}: only {few} occur, in a range of {low:g}..{high:g}: are these classes, or another range?"


def _leaks(told: dict[str, Any]) -> Iterator[str]:
    texts, videos = told["transcripts"], told["videos"]
    if texts and (several := texts["in_several_splits"]):
        yield (
            f"transcripts: {several:,} {'occurs' if several == 1 else 'occur'} in more than one split, "
            f"{texts['of_them_long']:,} of them of {leaks.LONG} words or more; "
            f"samples concerned: {_counts(texts['samples'], told['splits'])}"
        )
    if videos and (several := videos["in_several_splits"]):
        yield (
            f"videos: {several:,} of {videos['videos']:,} {has(several)} utterances in more than one split; "
            f"samples concerned: {_counts(videos['samples'], told['splits'])}"
        )


def _counts(counts: dict[str, int], of: dict[str, int]) -> str:
    return ", ".join(f"{split} {count:,} of {of[split]:,}" for split, count in counts.items() if of[split])


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
