"""`mmsa-dist robustness`: a trained model's metrics where a modality is missing or corrupted, at every rate."""

import csv
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmsa_dist import run_folder
from mmsa_dist.errors import ConfigError, DataError, TransientError
from mmsa_dist.predict import device_of
from mmsa_dist.prediction.inputs import check_fits, open_input
from mmsa_dist.predictions import LASTING
from mmsa_dist.robustness.damage import KINDS, Damage
from shards.command_line import parsed
from shards.options import option
from shards.progress import console, remarks, track
from shards.suggest import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from mmsa_dist.robustness.measured import Robustness

RATES = (0.1, 0.25, 0.5, 0.75, 1.0)

EXAMPLES = f"""Predicts a split again and again, each time with one modality damaged:
  missing     {KINDS["missing"]}
  corrupted   {KINDS["corrupted"]} (words of a transcript, tokens, or steps of features)
What is damaged at a rate is damaged at every higher one too. Nothing is trained or chosen by it.

Examples:
  mmsa-dist robustness models:/tam_ulag@champion --data data/mosi --to robustness/
  mmsa-dist robustness runs/self_mm-20260101-120000-ab12 --data data/mosi --to out --rates 0.5 1 --kinds missing"""


@dataclass(frozen=True)
class Options:
    """Shows what a trained model still answers where a modality is missing or corrupted."""

    model: Annotated[tyro.conf.Positional[str], option("MODEL")]
    """models:/NAME@alias, models:/NAME/VERSION, runs:/RUN_ID or the folder of a run."""
    data: Annotated[str, option("DATA")]
    """Folder that `mmsa-dist pack` wrote or its address, or a feature pickle of the MMSA toolkit (.pkl)."""
    to: Annotated[Path, option("FOLDER")]
    """Folder for robustness.csv and robustness.png."""
    split: Literal["train", "valid", "test"] = "test"
    """The split that is predicted."""
    rates: tuple[float, ...] = RATES
    """Shares of samples that lack the modality, and of steps that are corrupted."""
    kinds: tuple[Literal["missing", "corrupted"], ...] = ("missing", "corrupted")
    """Which kinds of damage."""
    seeds: Annotated[int, option("N")] = 3
    """How often the samples and steps are drawn, for each kind and rate."""
    batch_size: Annotated[int, option("N")] = 64
    """Samples at a time. Does not change any result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    tracking_uri: Annotated[str | None, option("URI")] = None
    """MLflow store of the model. Unset: MLFLOW_TRACKING_URI, else the sqlite file in the folder of the runs."""
    runs_dir: Annotated[Path, option("FOLDER")] = Path("runs")
    """Folder of the runs."""

    def __post_init__(self) -> None:
        for rate in self.rates:
            if not 0 < rate <= 1:
                raise ConfigError(f"--rates {rate:g}: expected shares above 0, at most 1")
        for name in ("rates", "kinds"):
            if not getattr(self, name):
                raise ConfigError(f"--{name}: give at least one")
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist robustness`."""
    options = parsed(Options, argv, "mmsa-dist robustness", EXAMPLES)
    with _folder(options.to):
        return _run(options)


def _run(options: Options) -> int:
    data = open_input(options.data)
    if not data.counts.get(options.split):
        there = ", ".join(name for name, count in data.counts.items() if count) or "none"
        raise ConfigError(f"--split {options.split}: {data.where} has no such samples; it has {there}")
    from mmsa_dist.metrics import kind_for
    from mmsa_dist.predictor import Predictor
    from mmsa_dist.robustness.measured import measure
    from mmsa_dist.tracking.fetch import fetched

    with fetched(options.model, options.tracking_uri, options.runs_dir) as folder:
        predictor = Predictor.load(folder, device_of(options.device))
    check_fits(predictor, data)
    if predictor.card.classes != data.classes:
        raise DataError(f"{data.where} has no labels of what the model answers, so there are no metrics")
    damages = [
        Damage(column, kind, rate, seed)
        for column in predictor.columns
        for kind in options.kinds
        for rate in sorted(set(options.rates))
        for seed in range(1, options.seeds + 1)
    ]
    utterances = track(
        data.utterances(options.split, with_text="raw_text" in predictor.columns),
        total=data.counts[options.split],
        description=f"predicting {1 + len(damages)} times",
    )
    kind = kind_for(data.label_range, data.classes)
    found = measure(predictor, utterances, damages, kind, options.batch_size)
    if found is None:
        raise DataError(f"{data.where}: no sample of {options.split} is labelled, so there are no metrics")
    title = f"{predictor.recipe.system} on {data.name} {options.split}{' (synthetic)' if data.synthetic else ''}"
    from mmsa_dist.report import save

    metric = next(iter(found.whole))
    with _written(options.to):
        write_csv(found, options.to / "robustness.csv")
        save(picture(found, metric, title), options.to / "robustness.png")
    console.print(table(found, metric, title))
    remarks.print(
        f"{found.samples:,} samples, {counted(options.seeds, 'draw')} of each; all metrics are in "
        f"{options.to / 'robustness.csv'}, curves in {options.to / 'robustness.png'}",
        soft_wrap=True,
    )
    return 0


@contextmanager
def _folder(to: Path) -> Iterator[None]:
    """The folder is there before the work begins; where that fails nothing of it stays behind.

    Raises:
        ConfigError: no folder can be made there, or nothing written in it. TransientError: the disk is full, say.
    """
    made: list[Path] = []
    try:
        with _written(to):
            for each in reversed([to, *to.parents]):
                if not os.path.isdir(each):  # noqa: PTH112  Path.is_dir raises where the name is too long
                    each.mkdir()
                    made.append(each)
            if not os.access(to, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield
    except BaseException:
        for each in reversed(made):
            with suppress(OSError):  # something is in it
                each.rmdir()
        raise


@contextmanager
def _written(to: Path) -> Iterator[None]:
    """What the system says of writing there becomes one of our sentences."""
    try:
        yield
    except FileExistsError as error:
        raise ConfigError(f"--to {error.filename}: is a file; give a folder") from error
    except OSError as error:
        kind = ConfigError if error.errno in LASTING else TransientError
        raise kind(f"--to {to}: cannot be written ({error.strerror or error}); give another folder") from error


def _cases(found: "Robustness") -> tuple[list[tuple[str, str]], list[float]]:
    """Column and kind of each curve, and the rates."""
    curves = list(dict.fromkeys((damage.column, damage.kind) for damage in found.damaged))
    return curves, sorted({damage.rate for damage in found.damaged})


def table(found: "Robustness", metric: str, title: str) -> "Table":
    """A curve a row, a rate a column: mean over the draws."""
    from rich.table import Table

    from mmsa_dist.report import label, value_text

    curves, rates = _cases(found)
    shown = Table("damaged", "how", title=f"{title}: {label(metric)}", title_justify="left")
    for rate in (0.0, *rates):
        shown.add_column(f"{100 * rate:.0f} %", justify="right")
    for column, kind in curves:
        means = [found.over_seeds(column, kind, rate, metric) for rate in rates]
        cells = [value_text(metric, mean[0]) if mean else "-" for mean in means]
        shown.add_row(column, kind, value_text(metric, found.whole[metric]), *cells)
    return shown


def picture(found: "Robustness", metric: str, title: str) -> "Figure":
    """A panel a kind of damage, a curve a modality; bands are one standard deviation over the draws."""
    from matplotlib.figure import Figure

    from mmsa_dist.report import label

    curves, rates = _cases(found)
    kinds = list(dict.fromkeys(kind for _, kind in curves))
    figure = Figure(figsize=(5 * len(kinds), 4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    whole = found.whole[metric]
    for axes, kind in zip(panels, kinds, strict=True):
        for column in [column for column, each in curves if each == kind]:
            points = [(0.0, (whole, 0.0))] if whole is not None else []
            points += [(rate, mean) for rate in rates if (mean := found.over_seeds(column, kind, rate, metric))]
            x = [rate for rate, _ in points]
            (line,) = axes.plot(x, [middle for _, (middle, _) in points], marker="o", label=column)
            low = [middle - spread for _, (middle, spread) in points]
            high = [middle + spread for _, (middle, spread) in points]
            axes.fill_between(x, low, high, alpha=0.2, color=line.get_color())
        axes.set(title=kind, xlabel="share of samples" if kind == "missing" else "share of steps")
        axes.legend()
    panels[0].set_ylabel(label(metric))
    figure.suptitle(title)
    return figure


def write_csv(found: "Robustness", path: Path) -> None:
    """Every draw with all metrics; the first row is the undamaged split."""
    names = list(found.whole)
    rows: list[Sequence[object]] = [["", "whole", 0, "", *_cells(found.whole, names)]]
    for damage, values in found.damaged.items():
        rows.append([damage.column, damage.kind, damage.rate, damage.seed, *_cells(values, names)])
    from io import StringIO

    text = StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([["damaged", "kind", "rate", "seed", *names], *rows])
    run_folder.write_text(path, text.getvalue())


def _cells(values: "dict[str, float | None]", names: Sequence[str]) -> list[object]:
    return ["" if values.get(name) is None else values[name] for name in names]
