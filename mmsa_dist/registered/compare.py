"""`mmsa-dist compare`: how two models differ, in what they were made of and in what they do."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from shards.command_line import parsed
from shards.options import option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmsa_dist.registered.sides import Side

DESCRIPTION = """Shows how two models differ: the values of their recipes, their data, code and size, and their metrics
on validation and test. Where both have kept what they predicted for the same test samples, says how sure the difference
of their test MAE is: 95 % of 10,000 resamples of these samples, the same for both.

Examples:
  mmsa-dist compare models:/ufen_mtfn@champion models:/ufen_mtfn/4
  mmsa-dist compare runs/self_mm-20260101-120000-ab12 models:/ufen_mtfn@champion"""

ABSENT = "(none)"
"""Stands for a key that a recipe does not have: it is of another system or version."""


@dataclass(frozen=True)
class Options:
    """Which two models."""

    a: Annotated[tyro.conf.Positional[str], option("A")]
    """models:/NAME@alias, models:/NAME/VERSION, runs:/RUN_ID or the folder of a run."""
    b: Annotated[tyro.conf.Positional[str], option("B")]
    """The other one, named likewise."""
    tracking_uri: Annotated[str | None, option("URI")] = None
    """MLflow store. Unset: MLFLOW_TRACKING_URI, else the sqlite file in the folder of the runs."""
    runs_dir: Annotated[Path, option("FOLDER")] = Path("runs")
    """Folder of the runs."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist compare`."""
    options = parsed(Options, argv, "mmsa-dist compare", DESCRIPTION)
    from mmsa_dist.registered.sides import side
    from shards.progress import console

    a, b = (side(model, options.tracking_uri, options.runs_dir) for model in (options.a, options.b))
    console.print(f"A is {a.name}, B is {b.name}", soft_wrap=True)
    differing = recipe_differences(a.recipe, b.recipe)
    console.print(recipe_table(differing) if differing else "their recipes are the same")
    console.print(facts_table(a, b))
    if a.card.fingerprint != b.card.fingerprint:
        console.print(
            f"WARNING: their data differ (fingerprints {a.card.fingerprint[:12]} and {b.card.fingerprint[:12]}): "
            "these figures are not comparable; predict one data set with both (mmsa-dist predict)",
            soft_wrap=True,
        )
    console.print(metrics_table(a, b))
    console.print(certainty(a, b), soft_wrap=True)
    return 0


def recipe_differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Dotted key, value of A, value of B, whether it changes results; those that do first."""
    from mmsa_dist.recipe import RESUMABLE

    found = [
        (key, _text(a, key), _text(b, key), not key.startswith(RESUMABLE))
        for key in sorted(a.keys() | b.keys())
        if a.get(key, ABSENT) != b.get(key, ABSENT)
    ]
    return sorted(found, key=lambda row: not row[3])


def recipe_table(differing: list[tuple[str, str, str, bool]]) -> "RenderableType":
    """A differing value a row."""
    from rich.table import Table

    table = Table("recipe", "A", "B", "changes results", title="their recipes differ", title_justify="left")
    for key, of_a, of_b, counts in differing:
        table.add_row(key, of_a, of_b, "yes" if counts else "no")
    return table


def facts_table(a: "Side", b: "Side") -> "RenderableType":
    """What each was made of."""
    from rich.table import Table

    from mmsa_dist.report import data_name

    def facts(side: "Side") -> dict[str, str]:
        card = side.card
        return {
            "data set": data_name({"data": card.name, "synthetic": card.synthetic}),
            "data fingerprint": card.fingerprint[:12],
            "samples": ", ".join(f"{count:,} {split}" for split, count in card.splits.items()) or "-",
            "code": side.code or "-",
            "parameters": f"{side.parameters:,}" if side.parameters is not None else "-",
        }

    table = Table("", "A", "B")
    ours, theirs = facts(a), facts(b)
    for name, value in ours.items():
        table.add_row(name, value, theirs[name])
    return table


def metrics_table(a: "Side", b: "Side") -> "RenderableType":
    """A metric a row, of validation and then of test: A, B and which is better by how much."""
    from rich.table import Table

    from mmsa_dist.report import label, value_text
    from mmsa_dist.tracking.version import SPLITS

    table = Table("split", "metric")
    for column in ("A", "B", "B - A"):
        table.add_column(column, justify="right")
    table.add_column("better")
    for split in SPLITS:
        ours, theirs = a.metrics.get(split, {}), b.metrics.get(split, {})
        for metric in dict.fromkeys([*ours, *theirs]):
            old, new = ours.get(metric), theirs.get(metric)
            table.add_row(
                split, label(metric), value_text(metric, old), value_text(metric, new), *_apart(metric, old, new)
            )
    return table


def certainty(a: "Side", b: "Side") -> str:
    """A sentence on the difference of the test MAE."""
    from mmsa_dist.registered.paired import RESAMPLES, SHARE, interval

    if a.card.classes or b.card.classes:
        return "labels are classes, which have no MAE: no confidence interval"
    lacking = [letter for letter, each in (("A", a), ("B", b)) if each.predictions is None]
    if a.predictions is None or b.predictions is None:
        return f"no confidence interval: {' and '.join(lacking)} kept no predictions of the test split"
    if a.card.kind != b.card.kind:
        return "no confidence interval: their labels are on different scales"
    found = interval(a.predictions, b.predictions, a.card.kind)
    if isinstance(found, str):
        return f"no confidence interval: {found}"
    means = (
        f"{'B' if found.difference < 0 else 'A'} is better beyond the chance of these samples"
        if found.tells
        else "it holds 0, so these samples do not tell them apart"
    )
    return (
        f"test MAE, B - A: {found.difference:+.4f}, {SHARE:.0%} interval {found.low:+.4f} to {found.high:+.4f} "
        f"({RESAMPLES:,} paired resamples of {found.samples:,} samples): {means}. It is about these two sets of "
        "weights: other seeds would differ too"
    )


def _apart(metric: str, old: float | None, new: float | None) -> tuple[str, str]:
    """B - A, and the letter of the better one."""
    from mmsa_dist.metrics import is_better
    from mmsa_dist.report import value_text

    if old is None or new is None:
        return "-", "-"
    text = value_text(metric, abs(new - old))
    sign = "+" if new > old else "-" if new < old else ""
    return f"{sign}{text}", "B" if is_better(metric, new, old) else "A" if is_better(metric, old, new) else "same"


def _text(values: dict[str, Any], key: str) -> str:
    """A value of a recipe as it stands in YAML."""
    value = values.get(key, ABSENT)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    from mmsa_dist.tracking.version import plain

    return plain(", ".join(map(str, value)) or "[]" if isinstance(value, list) else str(value))
