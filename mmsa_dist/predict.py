"""`mmsa-dist predict`: a trained model's predictions for a packed data set or an MMSA pickle, with metrics."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic import Field

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.predictions import Writer, check_out
from mmsa_dist.predictor import Predictor, check_width, chunks
from shards.command_line import parsed
from shards.progress import console, remarks, track
from shards.remote.url import is_url
from shards.utterance import SPLITS, UNIMODAL_TASK, Utterance

EXAMPLES = """Writes a row a sample: key, split, y (the label, where there is one), prediction, and the system's
unimodal predictions. Of a model of classes y_TASK and prediction_TASK for each, e.g. prediction_happy: the probability,
0 to 1, that it is there. Prints the metrics that the field reports, where there are labels.

Examples:
  mmsa-dist predict models:/ufen_mtfn@champion --data data/mosi --split test --out predictions.csv
  mmsa-dist predict models:/ufen_mtfn/3 --data unaligned_50.pkl --out predictions.parquet
  mmsa-dist predict runs/self_mm-20260101-120000-ab12 --data data/mosi --out predictions.jsonl --json"""


class PredictOptions(Strict):
    """What to predict with, for what, and where to."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """models:/NAME@alias, models:/NAME/VERSION, runs:/RUN_ID or the folder of a run."""
    data: str
    """Folder that `mmsa-dist pack` wrote or its address, or a feature pickle of the MMSA toolkit (.pkl)."""
    out: Path
    """File to write: .csv, .parquet or .jsonl."""
    split: Literal["train", "valid", "test"] | None = None
    """Only this split. Unset: all."""
    batch_size: int = Field(default=64, ge=1)
    """Samples at a time. Does not change any result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    json_metrics: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")] = False
    """Print the metrics as JSON on standard output, not as a table."""
    tracking_uri: str | None = None
    """MLflow store of the model. Unset: MLFLOW_TRACKING_URI, else the sqlite file in the folder of the runs."""
    runs_dir: Path = Path("runs")
    """Folder of the runs."""


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

    def utterances(self, split: str, with_text: bool) -> Iterator[Utterance]:
        """The split's samples in the input's order. Memory does not grow with their number for a packed data set."""
        return self.source(split, with_text)


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist predict`."""
    options = parsed(PredictOptions, argv, "mmsa-dist predict", EXAMPLES)
    check_out(options.out)
    data = open_input(options.data)
    splits = _splits(data, options.split)
    from mmsa_dist.tracking.fetch import fetched

    with fetched(options.model, options.tracking_uri, options.runs_dir) as folder:
        predictor = Predictor.load(folder, device_of(options.device))
    check_fits(predictor, data)
    columns = [*map(label_name, predictor.card.judged), *map(prediction_name, predictor.tasks)]
    with Writer(options.out, columns) as writer:
        done = {split: _predict_split(predictor, data, split, options.batch_size, writer) for split in splits}
    remarks.print(f"{writer.rows:,} predictions in {options.out}", soft_wrap=True)
    if unread := sum(count for _, count in done.values()):
        remarks.print(
            f"note: {unread:,} of {writer.rows:,} samples have none of {', '.join(predictor.columns)}, "
            "which the model reads; their prediction is the same for all",
            soft_wrap=True,
        )
    scores = {split: score for split, (score, _) in done.items()}
    _show(scores, predictor, data, options.json_metrics)
    return 0


def open_input(path: str) -> Input:
    """A packed data set, or an MMSA pickle.

    Raises:
        ConfigError: neither. DataError: damaged.
    """
    if is_url(path):
        return _packed(path)
    place = Path(path)
    if place.is_dir() or place.name == "index.json":
        return _packed(place)
    if place.suffix.lower() in (".pkl", ".pickle") and place.is_file():
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


def label_name(task: str) -> str:
    """Column of a task's labels."""
    return "y" if task == "M" else f"y_{task}"


def prediction_name(task: str) -> str:
    """Column of a task's predictions."""
    names = {"M": "prediction", **{unimodal: f"prediction_{modality}" for modality, unimodal in UNIMODAL_TASK.items()}}
    return names.get(task, f"prediction_{task}")


def _packed(place: Path | str) -> Input:
    from shards.index import Index
    from shards.read import ShardReader
    from shards.remote.ahead import InOrder, looking_ahead

    index = Index.load(place)
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
    )


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


def _splits(data: Input, wanted: str | None) -> list[str]:
    there = [split for split in SPLITS if data.counts.get(split)]
    if wanted is None:
        return there
    if wanted not in there:
        raise ConfigError(f"--split {wanted}: {data.where} has no such samples; it has {', '.join(there) or 'none'}")
    return [wanted]


def device_of(asked: str) -> str:
    """The device that is asked for.

    Raises:
        ConfigError: there is none.
    """
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU that PyTorch can use here; leave it out or use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _predict_split(
    predictor: Predictor, data: Input, split: str, size: int, writer: Writer
) -> tuple[dict[str, Any] | None, int]:
    """Writes a split's predictions.

    Returns:
        Its metrics, None where no sample has a label; and how many samples hold nothing that the model reads.
    """
    from mmsa_dist.metrics import evaluate, kind_for

    judged = predictor.card.judged
    truth, predicted, unread = [], [], 0
    utterances = data.utterances(split, with_text="raw_text" in predictor.columns)
    batches = track(chunks(utterances, size), total=-(-data.counts[split] // size), description=f"predicting {split}")
    for chunk in batches:
        answers = predictor.predict(chunk)
        unread += sum(not predictor.reads(utterance) for utterance in chunk)
        labels = [u.labels if data.classes == predictor.card.classes else {} for u in chunk]
        y = np.array([[known.get(task, np.nan) for task in judged] for known in labels], dtype=np.float32)
        columns = {label_name(task): values for task, values in zip(judged, y.T, strict=True)}
        columns |= {prediction_name(task): values for task, values in predictor.readable(answers).items()}
        writer.write([utterance.key for utterance in chunk], split, columns)
        truth.append(y)
        predicted.append(np.stack([answers[task] for task in judged], axis=1))
    y, p = np.concatenate(truth), np.concatenate(predicted)
    labelled = np.isfinite(y).all(axis=1)
    if not labelled.any():
        return None, unread
    metrics = evaluate(kind_for(data.label_range, data.classes), y[labelled], p[labelled], judged)
    return {"samples": int(labelled.sum()), **metrics}, unread


def _show(scores: dict[str, dict[str, Any] | None], predictor: Predictor, data: Input, as_json: bool) -> None:
    known = {split: score for split, score in scores.items() if score is not None}
    if as_json:
        print(
            json.dumps({"model": predictor.recipe.system, "synthetic": data.synthetic, "metrics": known}),
            file=sys.stdout,
        )
        return
    if not known:
        remarks.print("no labels here, so no metrics")
        return
    from mmsa_dist.report import metrics_table

    title = f"{predictor.recipe.system} on {data.name}{' (synthetic)' if data.synthetic else ''}"
    columns = {
        f"{split} ({score['samples']:,})": {k: v for k, v in score.items() if k != "samples"}
        for split, score in known.items()
    }
    console.print(metrics_table(columns, title))
