"""`mmsa-dist predict`: a trained model's predictions for a packed data set or an MMSA pickle, with metrics."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from mmsa_dist.config import Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.metrics import kind_for
from mmsa_dist.prediction.inputs import Input, check_fits, open_input
from mmsa_dist.prediction.rows import Rows, Score, column_names, predicted
from mmsa_dist.predictions import Writer, check_out
from mmsa_dist.predictor import Predictor, chunks
from shards.command_line import parsed
from shards.progress import console, meter, remarks, track
from shards.utterance import SPLITS

EXAMPLES = """Writes a row a sample: key, split, y (the label, where there is one), prediction, and the system's
unimodal predictions. Of a model of classes y_TASK and prediction_TASK for each, e.g. prediction_happy: the probability,
0 to 1, that it is there. Prints the metrics that the field reports, where there are labels.

--ray predicts a packed data set with many processes, of this machine or of a Ray cluster. What they have finished lies
in a hidden folder beside FILE until all is there: after a kill the same command goes on with it.

Examples:
  mmsa-dist predict models:/ufen_mtfn@champion --data data/mosi --split test --out predictions.csv
  mmsa-dist predict models:/ufen_mtfn/3 --data unaligned_50.pkl --out predictions.parquet
  mmsa-dist predict runs/self_mm-20260101-120000-ab12 --data data/mosi --out predictions.jsonl --json
  mmsa-dist predict models:/ufen_mtfn@champion --data s3://bucket/calls --out calls.parquet --ray --address auto"""


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
    quarantine: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave damaged shards out and say which; one ends the prediction otherwise. Reads every byte before it begins."""
    ray: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Predict with Ray Data: on a cluster, else with processes of this machine."""
    address: str | None = None
    """With --ray the cluster's address, or auto. Unset: RAY_ADDRESS, else a cluster of its own on this machine."""
    workers: int | None = Field(default=None, ge=1)
    """With --ray processes that predict, a CPU (and a GPU where there are any) each. Unset: as many as there is room
    for."""
    json_metrics: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")] = False
    """Print the metrics as JSON on standard output, not as a table."""
    tracking_uri: str | None = None
    """MLflow store of the model. Unset: MLFLOW_TRACKING_URI, else the sqlite file in the folder of the runs."""
    runs_dir: Path = Path("runs")
    """Folder of the runs."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist predict`."""
    options = parsed(PredictOptions, argv, "mmsa-dist predict", EXAMPLES)
    check_out(options.out)
    _check_ray(options)
    data = open_input(options.data, options.quarantine)
    splits = _splits(data, options.split)
    from mmsa_dist.tracking.fetch import fetched

    with fetched(options.model, options.tracking_uri, options.runs_dir) as folder:
        predictor = Predictor.load(folder, "cpu" if options.ray else device_of(options.device))
        check_fits(predictor, data)
        scores = {split: Score(kind_for(data.label_range, data.classes), predictor.card.judged) for split in splits}
        if options.ray:
            written = _predict_on_ray(options, folder, predictor, data, scores)
        else:
            rows = predicted_here(predictor, data, splits, options.batch_size)
            written = write_rows(rows, options.out, column_names(predictor), scores)
    remarks.print(f"{written:,} predictions in {options.out}", soft_wrap=True)
    if unread := sum(score.unread for score in scores.values()):
        remarks.print(
            f"note: {unread:,} of {written:,} samples have none of {', '.join(predictor.columns)}, "
            "which the model reads; their prediction is the same for all",
            soft_wrap=True,
        )
    _show({split: score.values() for split, score in scores.items()}, predictor, data, options.json_metrics)
    return 0


def _check_ray(options: PredictOptions) -> None:
    """Options that belong to --ray come with it, and it has data that other processes can read."""
    for name in ("address", "workers"):
        if getattr(options, name) is not None and not options.ray:
            raise ConfigError(f"--{name} says where --ray predicts; give --ray too, or leave it out")
    if options.ray and Path(options.data).suffix.lower() in (".pkl", ".pickle"):
        raise ConfigError(
            f"--ray: {options.data} is a pickle, which only one process can read; pack it first (mmsa-dist pack mmsa "
            f"{options.data} --out FOLDER), or leave --ray out"
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


def predicted_here(predictor: Predictor, data: Input, splits: list[str], size: int) -> Iterator[tuple[str, Rows]]:
    """Every split's rows, `size` samples at a time."""
    labelled = data.classes == predictor.card.classes
    for split in splits:
        utterances = data.utterances(split, with_text="raw_text" in predictor.columns)
        total = -(-data.counts[split] // size)
        for chunk in track(chunks(utterances, size), total=total, description=f"predicting {split}"):
            yield split, predicted(predictor, chunk, labelled)


def _predict_on_ray(
    options: PredictOptions, folder: Path, predictor: Predictor, data: Input, scores: dict[str, Score]
) -> int:
    """The same rows from many processes; gives their number.

    Args:
        folder: of the model.
    """
    from mmsa_dist.prediction.job import model_files
    from mmsa_dist.prediction.kept import Kept
    from mmsa_dist.prediction.on_ray import job_of, predict_parts
    from shards.ray_cluster import LOCAL

    assert data.index is not None
    files = model_files(folder)
    job = job_of(data, options.data, list(scores), options.batch_size, predictor, files)
    parts = job.divide(data.index)
    address = options.address or os.environ.get("RAY_ADDRESS") or LOCAL
    with Kept(options.out, job, parts) as kept:
        begun = len(kept.done)
        try:
            remark = f"going on: {begun:,} of {len(parts):,} parts are there" if begun else ""
            with meter(sum(part.count for part in parts), "predicting", remark) as tell:
                tell(sum(part.count for part in parts if part.number in kept.done), 0)
                if begun < len(parts):
                    predict_parts(job, kept, parts, files, address, options.workers, options.device, tell)
        except BaseException:
            if kept.done:
                remarks.print(
                    f"{len(kept.done):,} of {len(parts):,} parts are finished and kept beside {options.out}: the same "
                    "command goes on with them",
                    soft_wrap=True,
                )
            raise
        rows = track(kept.rows(), total=len(parts), description=f"writing {options.out.name}")
        written = write_rows(((part.split, each) for part, each in rows), options.out, job.columns, scores)
        kept.remove()
    return written


def write_rows(rows: Iterable[tuple[str, Rows]], out: Path, columns: Iterable[str], scores: Mapping[str, Score]) -> int:
    """Writes each split's rows as they come, and counts them in the split's score; gives their number."""
    with Writer(out, tuple(columns)) as writer:
        for split, each in rows:
            writer.write(each.keys, split, each.columns)
            scores[split].add(each)
    return writer.rows


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
