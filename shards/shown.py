"""The summary of a packed data set (`shards.inspect`) for a terminal."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shards.suggest import counted, told_bytes

BAR = 30
"""Cells of a histogram's longest bar."""
EXAMPLES = 3
"""Of what occurs in several splits; --json has more."""
PERCENTILES = ("p0", "p50", "p95", "p100")
"""Of the lengths; --json has more."""
CHARACTERS = 70
"""Of an example's transcript."""


def render(told: dict[str, Any]) -> Group:
    """Facts, modalities, labels as a picture, and what deserves a second look."""
    title = Text(told["name"], style="bold")
    if told["synthetic"]:
        title.append("  SYNTHETIC: results on it say nothing about sentiment", style="bold yellow")
    parts: list[RenderableType] = [title, _facts(told)]
    if told["modalities"]:
        parts += [Text("\nmodalities, lengths in steps of samples that have it"), _modality_table(told)]
    intensities = {task: facts for task, facts in told["labels"].items() if task not in told["classes"]}
    for task, facts in list(intensities.items())[:1]:
        parts += [Text(f"\nlabel {task}, by nearest label"), _label_table(facts, facts["counts"])]
    if others := dict(list(intensities.items())[1:]):
        totals = {task: _totals(facts) for task, facts in others.items()}
        parts += [Text("\nlabels of single modalities, by nearest label"), _others_table(others, totals)]
    if told["classes"]:
        parts += [Text("\nclasses, samples of each"), _class_table(told)]
    if told["tasks"]:
        parts += [Text("\nlabels per split"), _moments_table(told)]
    return Group(*parts, *_second_look(told), *_checked(told))


def _facts(told: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    splits = ", ".join(f"{split} {count:,}" for split, count in told["splits"].items())
    shards = ", ".join(f"{split} {count:,}" for split, count in told["shards"].items() if count)
    low, high = told["label_range"]
    each = told["bytes"] / max(1, told["samples"])
    kinds = ", ".join(f"{task} ({told['classes'][task]} classes)" for task in told["classes"])
    for name, value in (
        ("samples", f"{splits}, all {told['samples']:,}"),
        (
            "stored",
            f"{told_bytes(told['bytes'])} of {told['dtype']}, {told_bytes(each)} a sample, "
            f"in {counted(sum(told['shards'].values()), 'shard')} ({shards})",
        ),
        ("text", _text_line(told)),
        ("labels", kinds or (f"{', '.join(told['tasks'])} in {low:g}..{high:g}" if told["tasks"] else "none")),
        ("source", _origin(told["source"])),
        ("packed by", f"mmsa-dist {told['tool_version']}, seed {told['seed']}"),
        ("fingerprint", told["fingerprint"]),
        ("folder", told["folder"]),
    ):
        table.add_row(name, value)
    return table


def _origin(source: dict[str, Any]) -> str:
    parts = [f"{source.get('format', '')} {source.get('file', '')}".strip()]
    if source.get("sha256"):
        parts.append(f"sha256 {source['sha256'][:12]}…")
    plain = {n: v for n, v in source.items() if n not in ("format", "file", "sha256") and v not in (None, "", {}, [])}
    return ", ".join([*parts, *(f"{name} {_told(value)}" for name, value in plain.items())])


def _told(value: Any) -> str:
    """A value of the provenance on one line; a long checksum by its beginning."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_told(inner)}" for name, inner in value.items() if inner) + ")"
    if isinstance(value, list):
        return " ".join(map(_told, value))
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text


def _text_line(told: dict[str, Any]) -> str:
    parts = ["transcripts" if told["raw_text"] else "no transcripts"]
    if told["tokens"]:
        lengths = ", ".join(f"{p} {told['tokens']['length_percentiles'][p]:,}" for p in PERCENTILES)
        parts.append(f"token ids (length {lengths})")
    return " and ".join(parts)


def _modality_table(told: dict[str, Any]) -> Table:
    table = Table(pad_edge=False)
    table.add_column("modality")
    for heading in ("width", *PERCENTILES, "std in\ntrain", "non-\nfinite", "con-\nstant", "absent"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, facts in told["modalities"].items():
        lengths = (f"{facts['length_percentiles'][p]:,}" for p in PERCENTILES)
        low, high = facts["std"]  # of the dimensions that vary
        std, constant = f"{low:.2g}..{high:.2g}", f"{len(facts['constant']):,}"
        absent = [f"{split} {count:,}" for split, count in facts["absent"].items() if count]
        counts = (f"{facts['width']:,}", *lengths, std, f"{facts['non_finite']:,}", constant)
        table.add_row(name, *counts, ", ".join(absent) or "0")
    return table


def _label_table(facts: dict[str, Any], columns: dict[str, list[int]]) -> Table:
    """One row a label, one column a split, and bars of their sum."""
    table = Table()
    for heading in ("label", *columns):
        table.add_column(heading, justify="right")
    table.add_column("all")
    totals = _totals(facts)
    for row, (label, total) in enumerate(zip(facts["near"], totals, strict=True)):
        table.add_row(_signed(label), *(f"{counts[row]:,}" for counts in columns.values()), _bar(total, max(totals)))
    if facts["missing"]:
        table.add_row("none", *([""] * len(columns)), f"{facts['missing']:,}")
    return table


def _others_table(tasks: dict[str, dict[str, Any]], columns: dict[str, list[int]]) -> Table:
    """One row a label, one column a task."""
    table = Table()
    for heading in ("label", *columns):
        table.add_column(heading, justify="right")
    for row, label in enumerate(next(iter(tasks.values()))["near"]):
        table.add_row(_signed(label), *(f"{counts[row]:,}" for counts in columns.values()))
    if any(lacking := [facts["missing"] for facts in tasks.values()]):
        table.add_row("none", *(f"{count:,}" for count in lacking))
    return table


def _class_table(told: dict[str, Any]) -> Table:
    """One row a class of each task; of a task with two classes, only the class 1."""
    table = Table("task")
    for heading in ("class", *told["splits"]):
        table.add_column(heading, justify="right")
    table.add_column("all")
    for task, classes in told["classes"].items():
        facts = told["labels"][task]
        totals = _totals(facts)
        for number in range(classes) if classes > 2 else [1]:
            counts = (f"{part[number]:,} ({part[number] / max(1, sum(part)):.0%})" for part in facts["counts"].values())
            table.add_row(task, str(number), *counts, _bar(totals[number], sum(totals)))
    return table


def _moments_table(told: dict[str, Any]) -> Table:
    """Mean ± deviation of each label in each split, and the share of zeros."""
    table = Table("label")
    for split in told["splits"]:
        table.add_column(split, justify="right")
        table.add_column("zero", justify="right")
    for task, facts in told["labels"].items():
        cells = []
        for split in told["splits"]:
            known = facts["mean"][split] is not None
            spread = f" ± {facts['std'][split]:.2f}" if sum(facts["counts"][split]) > 1 else ""  # of one there is none
            cells.append(f"{facts['mean'][split]:+.2f}{spread}" if known else "")
            cells.append(f"{facts['zero'][split]:.1%}" if known else "")
        table.add_row(task, *cells)
    return table


def _second_look(told: dict[str, Any]) -> list[RenderableType]:
    """The remarks; under those on leaks, examples."""
    examples = {
        "transcripts": [
            f"{_places(example)}: {_shortened(example['text'])!r}"
            for example in (told["transcripts"] or {}).get("examples", [])
        ],
        "videos": [
            f"video {example['video']}: {_places(example)}" for example in (told["videos"] or {}).get("examples", [])
        ],
    }
    lines = []
    for remark in told["remarks"]:
        lines.append(f"- {remark}")
        lines += [f"    {example}" for example in examples.get(remark.partition(":")[0], [])[:EXAMPLES]]
    return [Text("\nworth a look"), Text("\n".join(lines) or "- nothing")]


def _checked(told: dict[str, Any]) -> list[RenderableType]:
    """What was looked at and is as it should be, and what could not be."""
    lines = []
    if told["transcripts"] is None:
        why = "left out (--fast)" if told["raw_text"] else "the data set has none"
        lines.append(f"- transcripts were not compared between splits: {why}")
    elif not told["transcripts"]["compared"]:
        lines.append("- transcripts were not compared between splits: none of them has a word")
    elif not told["transcripts"]["in_several_splits"]:
        lines.append("- no transcript occurs in more than one split")
    if told["videos"] is None:
        lines.append("- videos were not compared between splits: the samples' ids do not name any")
    elif not told["videos"]["in_several_splits"]:
        lines.append(f"- no video occurs in more than one split (of {told['videos']['videos']:,})")
    return [Text("\nchecked"), Text("\n".join(lines))] if lines else []


def _places(example: dict[str, Any]) -> str:
    return ", ".join(f"{split} {key}" for split, key in example["keys"].items())


def _shortened(text: str) -> str:
    return text[:CHARACTERS] + ("…" if len(text) > CHARACTERS else "")


def _bar(count: int, longest: int) -> str:
    return f"{'█' * round(BAR * count / max(1, longest))} {count:,}"


def _signed(label: float) -> str:
    return f"{label:+g}" if label else "0"


def _totals(facts: dict[str, Any]) -> list[int]:
    """Counts over all splits."""
    return [sum(row) for row in zip(*facts["counts"].values(), strict=True)]
