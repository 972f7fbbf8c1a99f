"""What a packed data set holds, from its index and its tables; of a tar no more than its size is looked at."""

from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shards.index import Index
from shards.utterance import SPLITS

PERCENTILES = (0, 50, 95, 100)
BAR = 30
"""Cells of the histogram's longest bar."""


def summary(index: Index) -> dict[str, Any]:
    """Everything `mmsa-dist inspect` tells, as plain values.

    Raises:
        DataError: a table is damaged, or a tar is missing or cut short.
    """
    for n in range(len(index.shards)):
        index.expected_tar(n).check_size()
    tables = [index.table(n) for n in range(len(index.shards))]
    lengths = {name: _column(tables, f"length_{name}") for name in index.modalities}
    return {
        "name": index.name,
        "synthetic": index.synthetic,
        "folder": str(index.folder),
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
        "label_range": list(index.label_range),
        "raw_text": index.has_raw_text,
        "tokens": _tokens(index, tables),
        "modalities": {
            name: {
                "width": modality.width,
                "length_percentiles": _percentiles(lengths[name]),
                "absent": int((lengths[name] == 0).sum()),
                "non_finite": index.non_finite.get(name, 0),
            }
            for name, modality in index.modalities.items()
        },
        "labels": {task: _histogram(index, tables, task) for task in index.tasks},
    }


def render(told: dict[str, Any]) -> Group:
    """The summary for a terminal."""
    title = Text(told["name"], style="bold")
    if told["synthetic"]:
        title.append("  SYNTHETIC: results on it say nothing about sentiment", style="bold yellow")
    source = told["source"]
    origin = f"{source['format']} {source['file']}".strip()
    if source.get("sha256"):
        origin += f", sha256 {source['sha256'][:12]}…"
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        (
            "samples",
            ", ".join(f"{split} {count:,}" for split, count in told["splits"].items()) + f", all {told['samples']:,}",
        ),
        ("stored", f"{told['bytes'] / 2**20:,.1f} MB of {told['dtype']} in {sum(told['shards'].values())} shards"),
        ("text", _text_line(told)),
        ("labels", f"{', '.join(told['tasks'])} in {told['label_range'][0]:g}..{told['label_range'][1]:g}"),
        ("source", origin),
        ("packed by", f"mmsa-dist {told['tool_version']}, seed {told['seed']}"),
        ("fingerprint", told["fingerprint"]),
        ("folder", told["folder"]),
    ):
        facts.add_row(name, value)
    parts: list[RenderableType] = [title, facts]
    if told["modalities"]:
        parts += [Text("\nmodalities, lengths in steps of samples that have it"), _modality_table(told)]
    parts += [Text("\nlabel M, by nearest label"), _label_table(told, told["labels"]["M"]["counts"])]
    if len(told["tasks"]) > 1:
        others = {task: _totals(told["labels"][task]) for task in told["tasks"] if task != "M"}
        parts += [Text("\nlabels of single modalities, by nearest label"), _label_table(told, others)]
    return Group(*parts)


def _text_line(told: dict[str, Any]) -> str:
    parts = ["transcripts" if told["raw_text"] else "no transcripts"]
    if told["tokens"]:
        parts.append("token ids (length " + _spelled(told["tokens"]["length_percentiles"]) + ")")
    return " and ".join(parts)


def _spelled(percentiles: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in percentiles.items())


def _modality_table(told: dict[str, Any]) -> Table:
    table = Table("modality")
    for heading in ("width", *(f"p{p}" for p in PERCENTILES), "absent", "non-finite values"):
        table.add_column(heading, justify="right")
    for name, facts in told["modalities"].items():
        values = (facts["width"], *facts["length_percentiles"].values(), facts["absent"], facts["non_finite"])
        table.add_row(name, *(f"{value:,}" for value in values))
    return table


def _label_table(told: dict[str, Any], columns: dict[str, list[int]]) -> Table:
    """One row a label, one column for each of `columns`, and bars of their sum where they are splits."""
    splits = set(columns) == set(told["splits"])
    table = Table()
    for heading in ("label", *columns):
        table.add_column(heading, justify="right")
    if splits:
        table.add_column("all")
    totals = [sum(row) for row in zip(*columns.values(), strict=True)]
    for row, (label, total) in enumerate(zip(told["labels"]["M"]["near"], totals, strict=True)):
        bar = [f"{'█' * round(BAR * total / max(1, *totals))} {total:,}"] if splits else []
        table.add_row(f"{label:+g}" if label else "0", *(f"{counts[row]:,}" for counts in columns.values()), *bar)
    if any(lacking := [told["labels"][task]["missing"] for task in columns if task in told["labels"]]):
        table.add_row("none", *(f"{count:,}" for count in lacking))
    return table


def _totals(facts: dict[str, Any]) -> list[int]:
    """Counts over all splits."""
    return [sum(row) for row in zip(*facts["counts"].values(), strict=True)]


def _column(tables: list[pa.Table], name: str) -> np.ndarray:
    return np.concatenate([table[name].to_numpy() for table in tables])


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Percentiles of the lengths that are not zero: p % of them are at most this long."""
    real = lengths[lengths > 0]
    values = np.percentile(real, PERCENTILES, method="inverted_cdf") if len(real) else np.zeros(len(PERCENTILES))
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}


def _tokens(index: Index, tables: list[pa.Table]) -> dict[str, Any] | None:
    return {"length_percentiles": _percentiles(_column(tables, "n_tokens"))} if index.has_tokens else None


def _histogram(index: Index, tables: list[pa.Table], task: str) -> dict[str, Any]:
    """Counts per split of labels nearest to whole steps: seven over -3..3, eleven over -1..1."""
    low, high = index.label_range
    bins = 7 if high - low > 2 else 11
    labels, numbers = _column(tables, f"label_{task}"), np.arange(bins)
    near = np.rint((labels - low) / (high - low) * (bins - 1))
    counts = {
        split: (near[index.numbers(split).start : index.numbers(split).stop, None] == numbers).sum(axis=0).tolist()
        for split in index.splits
    }
    known = labels[~np.isnan(labels)].astype(np.float64)
    return {
        "near": [round(low + (high - low) * n / (bins - 1), 4) for n in range(bins)],
        "counts": counts,
        "missing": len(labels) - len(known),
        "mean": float(known.mean()) if len(known) else None,
    }
