"""A table of a paper with what was measured here beside it."""

from collections.abc import Mapping, Sequence

import numpy as np

from mmsa_dist import session
from mmsa_dist.metrics import CLASSES
from mmsa_dist.recipe import Recipe
from shards.mix import AnyIndex
from shards.suggest import counted
from tune.papers.compared import FEWEST, RESAMPLES, over_samples, over_seeds
from tune.papers.measured import Measured, error_differences
from tune.papers.page import NONE, UNSURE, Grid, Page, digits, figure, header, paper_notes, published, scale, title
from tune.papers.planned import Planned, PlannedRow
from tune.papers.published import DATA, Figures, Table


def page(planned: Planned, measured: Mapping[str, Measured]) -> Page:
    """The whole page.

    Args:
        measured: by the row's name, of the rows that are trained.
    """
    named = title(planned.asked.paper, planned.asked.number, DATA[planned.data])
    if planned.index.synthetic:
        named += ": SYNTHETIC DATA"
    grids = [_figures(planned, measured)]
    if tests := _tests(planned, measured):
        grids.append(tests)
    return Page(named, _told(planned, measured), grids, _notes(planned, measured))


# --- the figures ------------------------------------------------------------------------------------------------------


def _figures(planned: Planned, measured: Mapping[str, Measured]) -> Grid:
    table, source = planned.asked.table, planned.asked.paper.other
    columns = table.columns(planned.data)
    rows: list[tuple[str, ...]] = []
    for each in planned.rows:
        lines: list[tuple[str, Sequence[str]]] = []
        ours = measured.get(each.name)
        differs = table.differences and each.name != table.own
        if each.row.paper or ours is None:
            who = f"paper: {table.own} less this row" if differs else "paper"
            lines.append((who, [figure(each.row.paper, column) for column in columns]))
        if each.row.other:
            lines.append((str(source), [figure(each.row.other, column) for column in columns]))
        if ours is not None:
            lines.append((f"ours, {counted(len(ours.tests), 'seed')}", [_reached(ours, column) for column in columns]))
            found = _means(table, each, measured, columns) if differs else {c: ours.mean(c) for c in columns}
            if differs:
                lines.append((f"ours: {table.own} less this row", [_signed(c, found[c]) for c in columns]))
            if each.row.paper and ours.tests:
                lines.append(("ours less paper", [_less(found[c], each.row.paper, c) for c in columns]))
        rows += [(each.name if not n else "", who, *cells) for n, (who, cells) in enumerate(lines)]
    return Grid("", header(columns), rows)


def _reached(ours: Measured, column: str) -> str:
    mean, deviation = ours.mean(column), ours.deviation(column)
    if mean is None:
        return NONE
    times, places = scale(column), digits(column)
    shown = f"{times * mean:.{places}f}"
    shown += "" if deviation is None else f" ± {times * deviation:.{places}f}"
    defined, seeds = len(ours.values(column)), len(ours.tests)
    return shown if defined == seeds else f"{shown} ({defined} of {seeds})"


def _means(
    table: Table, row: PlannedRow, measured: Mapping[str, Measured], columns: Sequence[str]
) -> dict[str, float | None]:
    """By how much the paper's own system differs from a row, here, over the seeds that both have."""
    assert table.own is not None
    own, its = measured.get(table.own), measured[row.name]
    return {column: None if own is None else own.less(its, column) for column in columns}


def _less(ours: float | None, figures: Figures, column: str) -> str:
    paper, sure = published(figures, column)
    if ours is None or paper is None:
        return NONE
    return f"{scale(column) * ours - paper:+.{digits(column)}f}{'' if sure else UNSURE}"


def _signed(column: str, value: float | None) -> str:
    return NONE if value is None else f"{scale(column) * value:+.{digits(column)}f}"


# --- whether systems differ -------------------------------------------------------------------------------------------


def _tests(planned: Planned, measured: Mapping[str, Measured]) -> Grid | None:
    """The paper's own row, where it was trained, beside each other; None where there are no two."""
    done = [row.name for row in planned.trained if measured[row.name].tests]
    own = planned.asked.table.own
    first = own if own in done else next(iter(done), None)
    if first is None or len(done) < 2:
        return None
    classes = session.kind_of(planned.index) == CLASSES
    metric = "acc" if classes else "mae"
    rows = []
    for name in done:
        if name == first or measured[name].folders == measured[first].folders:
            continue
        one, other = measured[first], measured[name]
        seeds = over_seeds(*({s: t.get(metric) for s, t in each.tests.items()} for each in (one, other)))
        differences = error_differences(one, other, session.kind_of(planned.index))
        cells = [f"{first} - {name}", *(NONE,) * 6]
        if seeds is not None:
            cells[1:4] = [str(seeds.seeds), f"{seeds.mean:+.4f}", _probability(seeds.p)]
        if differences is not None:
            samples = over_samples(differences)
            cells[4:] = [
                f"{samples.mean:+.4f}", f"{samples.low:+.4f} to {samples.high:+.4f}", _probability(samples.p)
            ]  # fmt: skip
        rows.append(tuple(cells))
    what = "share of emotions that are wrong" if classes else "MAE"
    heads = (
        "systems", "seeds", f"{'accuracy' if classes else 'MAE'}, difference", "p, paired t test over seeds",
        f"{what}, difference", "95 % of bootstraps over samples", "p, bootstrap",
    )  # fmt: skip
    return Grid("do they differ on the test split?", heads, rows, text=1) if rows else None


def _probability(p: float | None) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# --- what must be said of them ----------------------------------------------------------------------------------------


def _told(planned: Planned, measured: Mapping[str, Measured]) -> list[str]:
    """Under what conditions ours were measured, and the paper's."""
    index, table = planned.index, planned.asked.table
    counts = ", ".join(f"{count:,} {split}" for split, count in index.splits.items())
    said = [planned.doubt] if planned.doubt else []
    said.append(f"Data: {index.name}, {counts}; fingerprint {index.fingerprint[:12]}.")
    reads: dict[str, list[str]] = {}
    for row in planned.trained:
        assert row.recipe is not None
        reads.setdefault(_reads(row.recipe, planned), []).append(row.name)
    said += [_sentence(names, reads, read) for read, names in reads.items()]
    if table.setting:
        said.append(f"The paper: {table.setting}.")
    if table.aligned is not None and table.aligned != aligned(planned.index):
        not_ours, not_theirs = ("not ", "") if table.aligned else ("", "not ")
        said.append(
            f"The modalities of this data set are {not_ours}aligned to each other; the paper's are {not_theirs}so."
        )
    changed: dict[str, list[str]] = {}
    for row in planned.trained:
        if row.changed:
            changed.setdefault("; ".join(row.changed), []).append(row.name)
    said += [_sentence(names, changed, f"not as in the packaged recipe: {each}") for each, names in changed.items()]
    said.append(
        "Ours: mean ± standard deviation over seeds, of the epoch chosen on validation; each run reads the test split "
        "once, at its end."
    )
    return said


def aligned(index: AnyIndex) -> bool:
    """Whether all features of a test sample have as many steps."""
    for number in index.shards_of("test"):
        table = index.table(number)
        lengths = np.stack([table[f"length_{modality}"].to_numpy() for modality in index.modalities])
        if (lengths != lengths.max(axis=0))[lengths > 0].any():  # an absent modality has none
            return False
    return True


def _sentence(names: Sequence[str], groups: Mapping[str, object], what: str) -> str:
    """What holds for some rows, named where there are others."""
    return f"{', '.join(names)}: {what}." if len(groups) > 1 else f"{what[0].upper()}{what[1:]}."


def _reads(recipe: Recipe, planned: Planned) -> str:
    spec = session.data_spec(recipe, planned.index)
    parts = []
    for name, width in spec.widths.items():
        if name == "text" and spec.text is not None:
            how = "fine-tuned" if spec.text.finetune else "frozen"
            random = "" if spec.text.pretrained else ", not pretrained"
            parts.append(f"text by the encoder {spec.text.encoder} ({width} wide, {how}{random})")
        else:
            parts.append(f"{name} as the data set's features, {width} wide")
    absent = [m for m in ("text", "audio", "vision") if m not in spec.widths]
    return "reads " + ", ".join(parts) + (f"; no {' and no '.join(absent)}" if absent else "")


def _notes(planned: Planned, measured: Mapping[str, Measured]) -> list[str]:
    """Conventions, misprints, and what was not trained and why."""
    paper, table = planned.asked.paper, planned.asked.table
    said = paper_notes(paper, table, table.columns(planned.data))
    for each in planned.rows:
        if each.row.setting and each.recipe is not None:
            said.append(f"{each.name} in the paper: {each.row.setting}.")
        if each.row.note:
            said.append(f"{each.name}: {each.row.note}.")
        if each.why:
            said.append(f"{each.why}.")
        for seed, why in measured[each.name].failed.items() if each.name in measured else ():
            said.append(f"{each.name}, seed {seed}, failed: {why}.")
    for names in planned.same_runs:
        said.append(f"{' and '.join(names)} are the same runs here.")
    untrained = [row.name for row in planned.rows if row.row.system is None]
    if untrained:
        said.append(f"Nothing here trains {', '.join(untrained)}.")
    if any(len(each.tests) > 1 for each in measured.values()):
        said.append(
            f"Tests are paired: Student's t over seeds where there are {FEWEST}, and the mean of {RESAMPLES:,} "
            "bootstraps over test samples, of errors averaged over seeds; p is not corrected for the number of rows."
        )
    return said
