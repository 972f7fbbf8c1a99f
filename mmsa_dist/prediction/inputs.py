"""What is predicted: a packed data set or an MMSA pickle, as utterances that come one at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.predictor import Predictor, check_width
from shards.progress import remarks
from shards.remote.url import is_url
from shards.utterance import Utterance

if TYPE_CHECKING:
    from shards.index import Index


@dataclass(frozen=True)
class Input:
    """What is predicted: utterances by split, one at a time.

    Attributes:
        where: as messages name it.
        name: as tables name it.
        widths: modality -> D of the features there are.
        counts: split -> samples.
        label_range: lowest and highest possible label.
        classes: task -> number of classes, where labels are classes.
    """

    where: str
    name: str
    widths: dict[str, int]
    has_raw_text: bool
    has_tokens: bool
    counts: dict[str, int]
    label_range: tuple[float, float]
    classes: dict[str, int]
    synthetic: bool
    source: Any
    index: "Index | None" = None
    """Of a packed data set."""
    left_out: tuple[str, ...] = ()
    """Addresses of damaged shards that are no part of it."""

    def utterances(self, split: str, with_text: bool) -> Iterator[Utterance]:
        """The split's samples in the input's order. Memory does not grow with their number for a packed data set."""
        return self.source(split, with_text)


def open_input(path: str, quarantine: bool = False) -> Input:
    """A packed data set, or an MMSA pickle.

    Args:
        quarantine: damaged shards of a packed one are left out.

    Raises:
        ConfigError: neither. DataError: damaged.
    """
    if is_url(path):
        return _packed(path, quarantine)
    place = Path(path)
    if place.is_dir() or place.name == "index.json":
        return _packed(place, quarantine)
    if place.suffix.lower() in (".pkl", ".pickle") and place.is_file():
        if quarantine:
            raise ConfigError(f"--quarantine leaves shards out, and {path} is a pickle; leave it out")
        return _pickled(place)
    raise ConfigError(
        f"--data {path}: "
        + ("is neither a folder nor a .pkl file" if place.exists() else "does not exist")
        + "; give a folder that `mmsa-dist pack` wrote, or a feature pickle of the MMSA toolkit"
    )


def check_fits(predictor: Predictor, data: Input) -> None:
    """Says before the first sample that the data is not what the model reads.

    Raises:
        DataError: a modality is missing or has another width.
    """
    for name, column in zip(predictor.card.widths, predictor.columns, strict=True):
        there = {"raw_text": data.has_raw_text, "tokens": data.has_tokens}.get(column, name in data.widths)
        if not there:
            held = [
                *data.widths,
                *(["raw_text"] if data.has_raw_text else []),
                *(["tokens"] if data.has_tokens else []),
            ]
            raise DataError(
                f"{data.where} has no {column}, which the model reads; it holds {', '.join(held)}: "
                "give data with it, or a model that was trained without it (--data.modalities)"
            )
        if column == name:
            check_width(data.where, name, data.widths[name], predictor.card.widths[name])
    _compare_labels(predictor, data)


def _compare_labels(predictor: Predictor, data: Input) -> None:
    """Notes that the labels here are others than those that the model learnt."""
    card = predictor.card
    if card.classes != data.classes:
        answered = f"the emotions {', '.join(card.judged)}" if card.classes else "a sentiment intensity"
        note = f"the model answers {answered}, for which there are no labels here, so no metrics"
    elif card.label_range != data.label_range:
        (low, high), (a, b) = card.label_range, data.label_range
        note = (
            f"the model answers on the scale {low:g}..{high:g}, labels here are on {a:g}..{b:g}; "
            "metrics compare them as they stand"
        )
    else:
        return
    remarks.print(f"note: {note}", soft_wrap=True)


def _packed(place: Path | str, quarantine: bool) -> Input:
    from shards.ahead import InOrder, looking_ahead
    from shards.index import Index
    from shards.read import ShardReader

    index, left_out = Index.load(place), tuple[str, ...]()
    if quarantine:
        index, left_out = _sound(index)
    reader = ShardReader(index)

    def utterances(split: str, with_text: bool) -> Iterator[Utterance]:
        numbers = index.numbers(split)
        with looking_ahead(index, InOrder(numbers.start, len(numbers)), 0, depth=2) as reach:
            for done, number in enumerate(numbers, 1):
                reach(done)
                yield reader.sample(number, with_text)

    widths = {name: modality.width for name, modality in index.modalities.items()}
    return Input(
        index.where,
        index.name,
        widths,
        index.has_raw_text,
        index.has_tokens,
        dict(index.splits),
        index.label_range,
        index.classes,
        index.synthetic,
        utterances,
        index,
        left_out,
    )


def _sound(index: "Index") -> "tuple[Index, tuple[str, ...]]":
    """The data set without its damaged shards, each of which is named, and their addresses."""
    from shards.quarantine import damaged, without

    lost = damaged(index)
    for each in lost:
        remarks.print(
            f"left out: shard {each.address} with {each.samples:,} samples of {each.split}: {each.why}", soft_wrap=True
        )
    left_out = tuple(each.address for each in lost)
    return (without([index], left_out)[0] if lost else index), left_out


def _pickled(place: Path) -> Input:
    from shards.sources.clean import Cleaner
    from shards.sources.mmsa import MmsaSource

    source = MmsaSource(place, strict=False)
    cleaner = Cleaner(source, unlabelled=True)

    def utterances(split: str, with_text: bool) -> Iterator[Utterance]:
        return (cleaner.clean(source.read(split, number)) for number in range(source.counts[split]))

    return Input(
        str(place),
        place.name,
        source.widths,
        source.has_raw_text,
        source.has_tokens,
        source.counts,
        source.label_range,
        source.classes,
        False,
        utterances,
    )
