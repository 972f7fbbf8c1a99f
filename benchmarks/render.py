"""Writes what ``benchmarks/results/*.json`` hold into the marked parts of the pages: no figure is typed by hand.

A part begins with ``<!-- NAME:begin -->`` and ends with ``<!-- NAME:end -->``; what lies between is replaced. A result
that does not exist is not shown. ``--check`` writes nothing and exits with 1 where a page is behind the results.
README.md has ``real``, ``reproduced`` (ours beside the papers'), ``memory`` (its first table) and ``figures`` (rows
with a bound, and headlines), docs/reproducing.md has ``tables`` (all that was reproduced), benchmarks/README.md has
``all`` (every row).

``real.json`` (written by `benchmarks.real`) holds, beside `record.environment`:
``{"splits": [{"name", "title", "runs": [{"system", "command", "seeds": [...], "test": [{metric: value}, ...]}]}]}``,
one entry of ``test`` a seed; a run also says its own commit and date. ``reproduced.json`` (`benchmarks.reproduced`)
holds ``pages``: of each `mmsa-dist reproduce` what its ``reproduction.json`` has.
Every other file holds ``rows`` (`record.Row`).
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT
from shards.suggest import counted

PAGES = {
    ROOT / "README.md": ("real", "reproduced", "memory", "figures"),
    ROOT / "docs" / "reproducing.md": ("tables",),
    ROOT / "benchmarks" / "README.md": ("all",),
}
"""Page -> its marked parts."""
FIGURES = ("clone", "startup", "data", "packing", "stall", "training", "peer")
"""Files of the figures' table in this order; others follow by name."""

METRICS = {
    "mae": ("MAE", "{:.3f}"),
    "corr": ("Corr", "{:.3f}"),
    "acc2_has0": ("Acc2 has0", "{:.1%}"),
    "acc2_non0": ("Acc2 non0", "{:.1%}"),
    "f1_has0": ("F1 has0", "{:.1%}"),
    "f1_non0": ("F1 non0", "{:.1%}"),
    "acc5": ("Acc5", "{:.1%}"),
    "acc7": ("Acc7", "{:.1%}"),
}
"""Metric -> heading and format; accuracies are shares of one."""

REFERENCES: dict[str, list[tuple[str, dict[str, str]]]] = {
    "official": [
        ("majority class", {"acc2_has0": "55.2%"}),
        ("TF-IDF + linear model, text", {"mae": "1.191", "corr": "0.516", "acc2_has0": "68.7%"}),
        (
            "MiniLM fine-tuned + MLP head, text alone (3 seeds)",
            {
                "mae": "0.789 ± 0.037",
                "corr": "0.779 ± 0.001",
                "acc2_has0": "81.5%",
                "acc2_non0": "83.1%",
                "acc7": "41.7%",
            },
        ),
    ],
    "poria": [
        ("majority class", {"acc2_has0": "62.1%"}),
        ("linear model, text + audio + vision", {"mae": "0.946", "corr": "0.627", "acc2_has0": "76.7%"}),
        (
            "MiniLM fine-tuned + MLP head, text alone (1 seed)",
            {"mae": "0.705", "corr": "0.767", "acc2_has0": "82.9%", "acc2_non0": "84.5%"},
        ),
        (
            "MiniLM fine-tuned, audio and vision concatenated (1 seed)",
            {"mae": "0.758", "corr": "0.747", "acc2_has0": "79.1%", "acc2_non0": "81.3%"},
        ),
    ],
}
"""Points to compare with, measured once on the same files outside this project (acc2_has0: negative / non-negative)."""


NOTES = {
    "official": "Vision is absent here: the published `vision_cnn3d` comes from a network that was trained with the "
    "labels of most of these test utterances.",
    "poria": "`vision_cnn3d` comes from a network trained with the labels of all training videos, the held-out ones "
    "that validate here among them, so validation is far too hopeful and chooses epochs that lean on vision. "
    "Text alone does better on this split, as the reference points say too, and so do systems that do not see it: the "
    "next table.",
    "poria-blind": "The same videos and recipes as above, but for vision.",
}
"""What must be known to read a split's table."""


def load() -> dict[str, dict[str, Any]]:
    """name -> content of every result there is."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def sections(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Marked part -> its text."""
    figures = {name: content for name, content in results.items() if content.get("rows")}
    names = [*(n for n in FIGURES if n in figures), *(n for n in sorted(figures) if n not in FIGURES)]
    return {
        "real": real(results["real"]) if "real" in results else "",
        "reproduced": beside_papers(results["reproduced"]) if "reproduced" in results else "",
        "tables": reproductions(results["reproduced"]) if "reproduced" in results else "",
        "figures": headlines([figures[name] for name in names]),
        "memory": first_table(figures["memory"]) if "memory" in figures else "",
        "all": "\n\n".join(whole(figures[name]) for name in names),
    }


def real(content: dict[str, Any]) -> str:
    """A table a split: mean ± standard deviation over seeds, the reference points below, the command of each row."""
    parts = []
    for split in content["splits"]:
        shown = [m for m in METRICS if any(seed.get(m) is not None for run in split["runs"] for seed in run["test"])]
        rows: list[Sequence[str]] = [
            [
                f"**{run['system']}** ({counted(len(run['test']), 'seed')})",
                *(spread(m, [t.get(m) for t in run["test"]]) for m in shown),
            ]
            for run in split["runs"]
        ]
        rows += [[f"*{name}*", *(point.get(m, "") for m in shown)] for name, point in REFERENCES.get(split["name"], [])]
        commands = "\n".join(f"{run['command']}{measured_at(run)}" for run in split["runs"])
        valid = ", ".join(
            f"{run['system']} {spread('mae', [seed['mae'] for seed in run['valid']])}"
            for run in split["runs"]
            if run.get("valid")
        )
        note = " ".join(filter(None, [NOTES.get(split["name"], ""), f"Validation MAE: {valid}." if valid else ""]))
        made = generated(split["runs"])
        parts.append(
            f"**{split['title']}**\n\n{table(['', *(METRICS[m][0] for m in shown)], rows)}\n\n{note}\n\n"
            f"{made}"
            f"<details><summary>commands, one a seed</summary>\n\n```\n{commands}\n```\n\n</details>"
        )
    parts.append(
        "Test split, read once a run, of the epoch selected on validation; mean ± standard deviation over seeds. "
        f"Rows in italics are reference points on the same files, not runs of this project. {provenance(content)}"
    )
    return "\n\n".join(parts)


def generated(runs: list[dict[str, Any]]) -> str:
    """How the labels that were generated for each modality differ from the multimodal ones, over all seeds; empty
    where no system generated any."""
    rows = []
    for run in runs:
        for changes in zip(*run.get("generated", []), strict=True):  # of one modality, a seed each
            samples = sum(change["samples"] for change in changes)
            if samples:
                moved, turned = (sum(change[name] for change in changes) / samples for name in ("moved", "turned"))
                far = (change["distance"] * change["samples"] for change in changes if change["samples"])
                distance = sum(far) / samples
                rows.append([run["system"], changes[0]["modality"], f"{moved:.1%}", f"{turned:.1%}", f"{distance:.3f}"])
    if not rows:
        return ""
    head = ["generated labels", "of", "further than 0.3 from y_m", "other sign", "mean distance"]
    title = "<details><summary>labels generated for the training samples</summary>"
    return f"{title}\n\n{table(head, rows)}\n\n</details>\n\n"


def measured_at(run: dict[str, Any]) -> str:
    """Systems are not all measured in one go."""
    if "commit" not in run:
        return ""
    return f"  # commit {run['commit']}{' with changes' if run['changed_since_commit'] else ''}, {run['date']}"


def spread(metric: str, values: Iterable[float | None]) -> str:
    """Mean ± sample standard deviation; a single value stands alone, and no value (corr of a constant) leaves a gap."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    if not known:
        return ""
    style = METRICS[metric][1]
    text = style.format(statistics.mean(known))
    return text if len(known) == 1 else f"{text.removesuffix('%')} ± {style.format(statistics.stdev(known))}"


def beside_papers(content: dict[str, Any]) -> str:
    """Every row that was reproduced, ours and in brackets what the paper prints."""
    shown = ("mae", "corr", "acc7", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0")
    rows = []
    for page in content["pages"]:
        for name, row in page["rows"].items():
            tests = row["test"].values()
            cells = [spread(metric, [test.get(metric) for test in tests]) for metric in shown]
            papers = [as_printed(row["paper"], metric) for metric in shown] if not page["differences"] else [""] * 7
            both = (f"{cell} ({paper})" if cell and paper else cell for cell, paper in zip(cells, papers, strict=True))
            rows.append([f"{page['paper']}, {page['table']}", f"**{name}** ({counted(len(tests), 'seed')})", *both])
    return f"{table(['table', '', *(METRICS[m][0] for m in shown)], rows)}\n\n{provenance(content)}"


def as_printed(figures: dict[str, float], metric: str) -> str:
    """A paper's figure of a metric; marked where its convention is not stated, empty where there is none."""
    unsure = next((kind for kind in ("acc2", "f1") if metric.startswith(f"{kind}_")), None)
    value = figures.get(metric, figures.get(unsure) if unsure else None)
    if value is None:
        return ""
    form = METRICS[metric][1]
    return form.format(value / 100 if form.endswith("%}") else value) + ("?" if metric not in figures else "")


def reproductions(content: dict[str, Any]) -> str:
    """Every page that was reproduced, whole."""
    parts = []
    for page in content["pages"]:
        parts += [f"### {page['title']}", f"```\n{page['command']}\n```", *page["told"]]
        for grid in page["grids"]:
            parts += [f"**{grid['title']}**"] if grid["title"] else []
            parts.append(table(grid["header"], grid["rows"]))
        parts.append("\n".join(f"- {note}" for note in page["notes"]))
    return "\n\n".join([*parts, provenance(content)])


def headlines(contents: list[dict[str, Any]]) -> str:
    """One row a figure that has a bound or is a headline, with the file that holds all that was measured."""
    rows, notes = [], []
    for content in contents:
        shown = [row for row in content["rows"] if row["wanted"] or row.get("headline")]
        if shown:
            name = content["name"]
            source = f"[{name}](benchmarks/results/{name}.json)"
            rows += [[row["what"], measured(row), wanted(row), row["how"], source] for row in shown]
            notes.append(f"- {name}: `{content['command']}`. {provenance(content)}")
    if not rows:
        return ""
    how = "\n".join(["<details><summary>commands, commits, machines</summary>", "", *notes, "", "</details>"])
    return f"{table(['', 'measured', 'wanted', 'how', 'raw'], rows)}\n\n{how}"


def first_table(content: dict[str, Any]) -> str:
    """The first table of one result, with its title."""
    part = content["tables"][0]
    return f"{part['title']}\n\n{table(part['head'], part['rows'])}"


def whole(content: dict[str, Any]) -> str:
    """Every row and table of one result, under its command."""
    rows = [[row["what"], measured(row), wanted(row), row["how"]] for row in content["rows"]]
    head = f"### [{content['name']}](results/{content['name']}.json)\n\n`{content['command']}`"
    tables = [f"{part['title']}\n\n{table(part['head'], part['rows'])}" for part in content.get("tables", [])]
    return "\n\n".join([head, table(["", "measured", "wanted", "how"], rows), *tables, provenance(content)])


def measured(row: dict[str, Any]) -> str:
    """The value with its unit, to three significant digits."""
    return f"{significant(row['value'])} {row['unit']}".strip()


def wanted(row: dict[str, Any]) -> str:
    """The bound, and a word where it does not hold."""
    return row["wanted"] + (" (**missed**)" if row.get("met") is False else "")


def significant(value: float) -> str:
    """Three significant digits, thousands grouped, never an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def provenance(content: dict[str, Any]) -> str:
    """Commit, date, machine and versions of one result."""
    machine, versions = content["machine"], content["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed", "ray") if name in versions)
    changed = " with changes" if content.get("changed_since_commit") else ""
    return (
        f"Commit {content['commit']}{changed}, {content['date']}; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gib']} GiB; {used}."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def replaced(page: str, name: str, text: str) -> str:
    """`page` with the marked part `name` holding `text`.

    Raises:
        SystemExit: the page has no such part, or has it twice.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"error: the page must hold {begin} and {end} once each, where the {name} results belong")
    body = f"\n{text.strip()}\n" if text.strip() else "\n"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{body}{end}", page, flags=re.DOTALL)


def rendered(page: str, parts: Iterable[str], results: dict[str, dict[str, Any]]) -> str:
    """`page` with its marked parts renewed."""
    texts = sections(results)
    for name in parts:
        page = replaced(page, name, texts[name])
    return page


def behind(results: dict[str, dict[str, Any]]) -> dict[Path, str]:
    """Pages that do not show what was measured, with the text that they should have."""
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    return {path: new for path, old in pages.items() if (new := rendered(old, PAGES[path], results)) != old}


def renew() -> list[Path]:
    """Writes the pages that are behind, and gives them."""
    late = behind(load())
    for path, text in late.items():
        path.write_text(text, encoding="utf-8")
    return list(late)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is behind")
    check = parser.parse_args().check
    late = list(behind(load())) if check else renew()
    for path in late:
        print(f"{path.relative_to(ROOT)}: {'behind benchmarks/results' if check else 'renewed'}")
    return int(check and bool(late))


if __name__ == "__main__":
    sys.exit(main())
