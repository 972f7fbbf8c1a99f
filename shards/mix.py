"""Several packed data sets as one: `Mix` stands where an `Index` does, `MixReader` where a `ShardReader` does.

Samples are numbered split by split and, within a split, set by set, so that a split of the mix is a contiguous range of
numbers as it is in an index. Keys get the name of their set in front (``mosi/03bSnISJMiM$_$1``). In which order they
are trained on is said at `shards.order.MixedOrder`.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import isfinite, lcm
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.closing import Closing
from shards.errors import ConfigError, DataError
from shards.index import Index, Modality, Shard
from shards.numbering import Numbered
from shards.order import MOST_SHARES, MixedOrder, ShardOrder, packed_counts, reduced
from shards.quarantine import without
from shards.read import ShardReader
from shards.trust import Expected
from shards.utterance import MODALITIES, SPLITS, Utterance

Widths = Literal["refuse", "blocks"]
"""What is done where sets have features of different widths for a modality: refuse, or give each its own columns."""


class Mix(Numbered):
    """The joint index of several data sets. Has those attributes and methods of an `Index` that training asks for.

    Args:
        parts: two or more data sets, of different names.
        weights: share of each set in every batch, positive and in any unit; None takes the sets' numbers of train
            samples, so that each sample comes once an epoch.
        widths: ``refuse`` refuses sets whose features of one modality differ in width. ``blocks`` gives each such set
            its own columns of a wider feature, zeros elsewhere: no column means two things.
        use: modalities whose features are wanted; all by default. Others are left out.

    Raises:
        ConfigError: the sets do not fit together; says which, in what, and what can be done.
    """

    def __init__(
        self,
        parts: Sequence[Index],
        weights: Sequence[float] | None = None,
        widths: Widths = "refuse",
        use: Iterable[str] | None = None,
    ) -> None:
        assert len(parts) > 1, len(parts)
        self.parts = tuple(parts)
        self._check_names()
        self._check_labels()
        self.shares = _shares(self.parts, weights)
        self._widths = widths
        self._used = [
            m for m in MODALITIES if (use is None or m in use) and any(m in part.modalities for part in parts)
        ]
        self._columns = {m: self._places(m) for m in self._used}
        self._shards = [
            (split, i, shard_no)
            for split in SPLITS
            for i, part in enumerate(self.parts)
            for shard_no in part.shards_of(split)
        ]
        self.shards: tuple[Shard, ...] = tuple(self.parts[i].shards[n] for _, i, n in self._shards)

    # --- what it is

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def synthetic(self) -> bool:
        return any(part.synthetic for part in self.parts)

    @property
    def where(self) -> str:
        """The folders or addresses of the sets, as messages name them."""
        return " + ".join(part.where for part in self.parts)

    @property
    def remote(self) -> bool:
        """Whether some files are fetched when they are used."""
        return any(part.remote for part in self.parts)

    @property
    def modalities(self) -> dict[str, Modality]:
        return {
            m: Modality(
                width=max(end for _, end in self._columns[m].values()),
                max_length=max(part.modalities[m].max_length for part in self.parts if m in part.modalities),
            )
            for m in self._used
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """Labels that all sets have."""
        return tuple(task for task in self.parts[0].tasks if all(task in part.tasks for part in self.parts))

    @property
    def classes(self) -> dict[str, int]:
        return {task: number for task, number in self.parts[0].classes.items() if task in self.tasks}

    @property
    def label_range(self) -> tuple[float, float]:
        return self.parts[0].label_range

    @property
    def has_raw_text(self) -> bool:
        return all(part.has_raw_text for part in self.parts)

    @property
    def has_tokens(self) -> bool:
        return all(part.has_tokens for part in self.parts)

    @property
    def splits(self) -> dict[str, int]:
        return {split: sum(part.splits.get(split, 0) for part in self.parts) for split in SPLITS}

    @cached_property
    def fingerprint(self) -> str:
        """Of the sets, their shares and how their features are mapped, and of nothing else."""
        content = {
            "mix": 1,
            "parts": [[part.name, part.fingerprint] for part in self.parts],
            "shares": list(self.shares),
            "widths": self._widths,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def statistics(self) -> dict[str, dict[str, list[float]]]:
        """As `Index.statistics`, over the train splits of all sets; in a set's own columns the others count as zero.

        Merged from the sets' own without reading features; their numbers of steps are in the tables, all of which are
        read when this is first asked for.
        """
        return {m: self._merged(m) for m in self._used}

    def notes(self) -> list[str]:
        """What one might not expect of the mix, in sentences: what not all sets have, and how often each set comes."""
        said = []
        for part, share in zip(self.parts, self.shares, strict=True):
            passes = self.splits["train"] * share / sum(self.shares) / part.splits["train"]
            if not 0.1 <= passes <= 3:
                said.append(
                    f"an epoch has {passes:,.2g} passes over {part.name} ({part.splits['train']:,} train samples)"
                )
            if lost := [split for split in SPLITS[1:] if not part.splits.get(split) and self.splits[split]]:
                said.append(f"{part.name} has no {' and no '.join(lost)} samples: those of the other sets stand alone")
            if lost := [task for task in part.tasks if task not in self.tasks]:
                said.append(f"labels {', '.join(lost)} of {part.name} are not used: not all sets of the mix have them")
            if lacking := [m for m in self._used if m not in part.modalities]:
                said.append(f"{part.name} has no {', '.join(lacking)}: absent in all of its samples")
        return said

    # --- numbers

    def place(self, number: int) -> tuple[int, int]:
        """(set, number in that set) of the sample with this number in the mix."""
        shard_no, row = self.locate(number)
        _, part, own = self._shards[shard_no]
        return part, self.parts[part].first(own) + row

    def ranges(self, split: str) -> dict[str, range]:
        """Set -> the numbers of its samples of `split`, where it has some."""
        begin, found = self.numbers(split).start, {}
        for part in self.parts:
            if count := part.splits.get(split, 0):
                found[part.name] = range(begin, begin + count)
                begin += count
        return found

    def table(self, shard_no: int, verify: bool = True) -> pa.Table:
        """The table of a shard, as `Index.table` gives it, with the keys that the samples have in the mix."""
        _, i, own = self._shards[shard_no]
        table = self.parts[i].table(own, verify)
        keys = pc.binary_join_element_wise(f"{self.parts[i].name}/", table["key"], "")
        other = [f"label_{task}" for task in self.parts[i].tasks if task not in self.tasks]
        return table.set_column(0, table.schema.field("key"), keys).drop_columns(other)

    def files(self, shard_no: int) -> tuple[Expected, Expected]:
        """Both files of a shard: its table and its tar."""
        _, i, own = self._shards[shard_no]
        return self.parts[i].files(own)

    def order(self, split: str, seed: int, epoch: int, window: int) -> MixedOrder:
        """The order of an epoch over `split`; see `MixedOrder`.

        Raises:
            DataError: a set has no samples of the split.
        """
        ranges, orders = self.ranges(split), []
        for part in self.parts:
            if part.name not in ranges:
                raise DataError(f"{part.name}: split {split!r} has no samples; leave the set out, or pack some")
            counts = packed_counts(shard.samples for shard in part.shards if shard.split == split)
            orders.append(ShardOrder(part.fingerprint, split, ranges[part.name].start, counts, seed, 0, window))
        return MixedOrder(self.fingerprint, tuple(orders), self.shares, seed, epoch)

    def adapted(self, part: int, sample: Utterance) -> Utterance:
        """A sample of a set as it is in the mix: its key, the labels in common, features in the set's columns."""
        return replace(
            sample,
            key=f"{self.parts[part].name}/{sample.key}",
            labels={task: label for task, label in sample.labels.items() if task in self.tasks},
            modalities={m: self._widened(m, part, a) for m, a in sample.modalities.items() if m in self._columns},
        )

    # --- how it is made

    def _check_names(self) -> None:
        seen: dict[str, Index] = {}
        for part in self.parts:
            if (other := seen.setdefault(part.name, part)) is not part:
                raise ConfigError(
                    f"data.path: two data sets are called {part.name!r} ({other.where}, {part.where}), and keys are "
                    "told apart by the set's name; pack one of them with another --name, or give it once"
                )

    def _check_labels(self) -> None:
        first = self.parts[0]
        for part in self.parts[1:]:
            if part.label_range != first.label_range:
                said = [f"{p.label_range[0]:g}..{p.label_range[1]:g} in {p.name}" for p in (first, part)]
                raise ConfigError(
                    f"data.path: labels are in {' but '.join(said)}: one model cannot learn both; train on one of the "
                    "sets, or pack one with labels in the other's range"
                )
            if part.classes != first.classes:
                raise ConfigError(
                    f"data.path: {first.name} has the classes {first.classes or 'of no task'}, {part.name} "
                    f"{part.classes or 'of no task'}: one model cannot learn both; train on one of the sets"
                )
        if not self.tasks:
            raise ConfigError(
                "data.path: the sets have no label in common ("
                + ", ".join(f"{part.name}: {', '.join(part.tasks)}" for part in self.parts)
                + "); train on one of them"
            )

    def _places(self, modality: str) -> dict[int, tuple[int, int]]:
        """Set -> the columns that its features have: all of them, or a block where widths differ."""
        widths = {
            i: part.modalities[modality].width for i, part in enumerate(self.parts) if modality in part.modalities
        }
        if len(set(widths.values())) == 1:
            return {i: (0, width) for i, width in widths.items()}
        if self._widths == "refuse":
            said = ", ".join(f"{self.parts[i].name} {width}" for i, width in widths.items())
            raise ConfigError(
                f"data.path: {modality} is of different widths ({said}), so its columns mean different things; "
                "choose other modalities (--data.modalities), or give each set its own columns "
                "(--data.align-widths blocks)"
            )
        ends = list(accumulate(widths.values()))
        return {i: (end - width, end) for (i, width), end in zip(widths.items(), ends, strict=True)}

    def _widened(self, modality: str, part: int, array: np.ndarray) -> np.ndarray:
        begin, end = self._columns[modality][part]
        width = max(last for _, last in self._columns[modality].values())
        if end - begin == width:
            return array
        wide = np.zeros((len(array), width), array.dtype)
        wide[:, begin:end] = array
        return wide

    def _merged(self, modality: str) -> dict[str, list[float]]:
        """Mean and deviation over all sets' steps, from those of each (Chan, Golub, LeVeque 1979)."""
        columns = self._columns[modality]
        width = max(end for _, end in columns.values())
        steps, means, variances = [], [], []
        for i, (begin, end) in columns.items():
            held = self.parts[i].statistics[modality]
            mean, variance = np.zeros((2, width))
            mean[begin:end], variance[begin:end] = held["mean"], np.square(held["std"])
            steps.append(self._train_steps(i, modality))
            means.append(mean)
            variances.append(variance)
        share = np.array(steps) / max(1, sum(steps))
        mean = share @ means
        return {"mean": mean.tolist(), "std": np.sqrt(share @ (variances + np.square(means - mean))).tolist()}

    def _train_steps(self, i: int, modality: str) -> int:
        part = self.parts[i]
        return sum(int(pc.sum(part.table(n)[f"length_{modality}"]).as_py()) for n in part.shards_of("train"))


class MixReader(Closing):
    """Reads the samples of a mix by number; as `ShardReader`."""

    def __init__(self, index: Mix, verify: bool = True, open_shards: int = 16) -> None:
        self.index = index
        self.verify = verify
        self.open_shards = open_shards
        self._readers = [ShardReader(part, verify, open_shards) for part in index.parts]

    def sample(self, number: int, with_text: bool = False) -> Utterance:
        """The sample with this number in the mix; see `ShardReader.sample`."""
        part, own = self.index.place(int(number))
        return self.index.adapted(part, self._readers[part].sample(own, with_text))

    def samples(self, numbers: Iterable[int], with_text: bool = False) -> list[Utterance]:
        """`sample` for each of `numbers`, in their order."""
        return [self.sample(number, with_text) for number in numbers]

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


AnyIndex = Index | Mix
AnyReader = ShardReader | MixReader


def open_data(
    paths: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    widths: Widths = "refuse",
    use: Iterable[str] | None = None,
    leave_out: Collection[str] = (),
) -> AnyIndex:
    """The index of a data set, or of the mix of several; see `Mix`, and for `leave_out` `shards.quarantine`.

    Raises:
        ConfigError: the sets do not fit together, weights are given for one set, or there is no such shard.
        DataError: an index is missing or damaged.
    """
    if len(paths) == 1 and weights is not None:
        raise ConfigError("data.weights: they are for a mix of several data sets, and one is given; leave them out")
    parts = without([Index.load(path) for path in paths], leave_out)
    return parts[0] if len(parts) == 1 else Mix(parts, weights, widths, use)


def open_reader(index: AnyIndex, verify: bool = True, open_shards: int = 16) -> AnyReader:
    """The reader of a data set or of a mix; see `ShardReader` for the arguments."""
    return (MixReader if isinstance(index, Mix) else ShardReader)(index, verify, open_shards)  # type: ignore[arg-type]


def _shares(parts: Sequence[Index], weights: Sequence[float] | None) -> tuple[int, ...]:
    """The weights as small integers; the train splits' sizes where there are none."""
    for part in parts:
        if not part.splits.get("train"):
            raise ConfigError(f"data.path: {part.name} has no train samples; leave it out of the mix")
    if weights is None:
        return reduced(part.splits["train"] for part in parts)
    if len(weights) != len(parts):
        names = ", ".join(part.name for part in parts)
        raise ConfigError(f"data.weights: {len(weights)} for {len(parts)} data sets ({names}); give one for each")
    if wrong := [weight for weight in weights if not isfinite(weight) or weight <= 0]:
        raise ConfigError(f"data.weights: {wrong[0]:g} is not a positive number; leave out a set that is not wanted")
    exact = [Fraction(str(weight)) for weight in weights]
    shares = reduced(int(share * lcm(*(f.denominator for f in exact))) for share in exact)
    if sum(shares) > MOST_SHARES:
        given = ", ".join(map(str, weights))
        raise ConfigError(f"data.weights: {given} lie too far apart or have too many digits; round them")
    return shares
