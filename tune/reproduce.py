"""`mmsa-dist reproduce`: a published table, trained again, with the paper's figures beside what came out.

Every run is kept under a name made of all that decides its result, so that a second call trains only what is missing.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import no_system
from shards.progress import console, remarks
from tune.papers.published import DATA, Paper, Row, paper_of, papers

if TYPE_CHECKING:
    from tune.papers.planned import Planned

HELP = """usage: mmsa-dist reproduce                                    the tables of every paper
       mmsa-dist reproduce SYSTEM                             those of SYSTEM's paper
       mmsa-dist reproduce SYSTEM --table N                   one of them, as published
       mmsa-dist reproduce SYSTEM --table N --data FOLDER [--seeds K] [--rows NAME …] [any value of the recipe]

Trains the rows of a published table on a packed data set, K times each, and sets mean ± standard deviation of the test
metrics beside the paper's figures: on the terminal, as table.md and table.html, with loss curves, confusion matrices,
t-SNE of the fused features, generated labels and paired tests between the systems. Rows that nothing here trains show
the paper's figures alone.

Each row and seed is an ordinary training run: best epoch on validation, the test split read once, at its end. Runs are
kept below --runs-dir by all that decides their result (recipe, data, code): the same command again trains only what is
missing, more --seeds only the new ones, and a run that was interrupted goes on from its checkpoint. As many run at once
as fit into the machine or the Ray cluster. A run that fails does not stop the others.

  --table N            the table's number, as in the paper
  --data FOLDER        what `mmsa-dist pack` wrote, of the table's data set
  --seeds K            runs of each row, with the seeds 1 to K (default 3; --seed S begins with S); a test over seeds
                       needs 3
  --rows NAME …        only these rows are trained, e.g. --rows TAM-ULAG "w/o ULAG"
  --recipe NAME|FILE|FOLDER   as in `mmsa-dist train`; of a FOLDER the file SYSTEM.yaml for each row's system.
                       Default: the packaged recipe of the table's data set
  --dry-run            show which runs are there and which are missing, and train nothing
  --max-concurrent N   runs at the same time; default: as many as the cluster has room for
  --runs-dir FOLDER    where runs and tables go, in its folder reproduce (default: runs)

The most used values of the recipe, which hold for all rows (a row's own, such as its label generator, wins):
  --text.encoder PATH  the papers read transcripts with BERT: bert-base-uncased, or a local folder
  --epochs N           at most so many; the page says that it is not the paper's number
  --workers N          ranks of one run (default 1)
  --tracking-uri URI, --tracking.no-enabled   as in `mmsa-dist train`; runs are children of the reproduction's run

Examples:
  mmsa-dist reproduce tam_ulag --table 6 --data data/mosi --text.encoder bert-base-uncased --seeds 5
  mmsa-dist reproduce iam --table 5 --data data/mosi --rows bi uni --seeds 3 --dry-run"""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist reproduce`."""
    system, options, overrides = _split(argv)
    if options.help:
        print(HELP)
        return 0
    if system is None:
        if argv:
            raise no_system("reproduce", argv, "; without any it lists the tables")
        return list_tables(list(papers()))
    paper = paper_of(system)
    if options.table is None:
        if overrides:
            raise ConfigError(f"--table is missing: which one of {', '.join(paper.tables)}? See reproduce {system}")
        return list_tables([paper])
    for name in ("seeds", "max_concurrent"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    table = paper.table(options.table)
    if table.instead or not overrides:
        return show_figures(paper, options.table)
    from tune.papers.planned import Asked, plan

    rows = tuple(options.rows) if options.rows else None
    asked = Asked(paper, options.table, rows, options.seeds, options.recipe, tuple(overrides), Path(options.runs_dir))
    planned = plan(asked)
    if options.dry_run:
        return show_runs(planned, options.max_concurrent)
    from tune.papers.reproduction import reproduce

    reproduce(planned, options.max_concurrent)
    return 0


def list_tables(found: Sequence[Paper]) -> int:
    """Prints the tables of papers."""
    from rich.table import Table

    table = Table("system", "table", "what", "data")
    table.add_column("rows", justify="right")
    table.add_column("trained here", overflow="fold")
    for paper in found:
        for number, each in paper.tables.items():
            data = ", ".join(DATA[name] for name in each.data)
            what = f"{each.title}{' (prose only)' if each.own and not _figures(each.rows.values()) else ''}"
            table.add_row(paper.system, number, what, data, str(len(each.rows)), ", ".join(each.trains) or each.instead)
        table.add_section()
    console.print(table)
    remarks.print(
        "mmsa-dist reproduce SYSTEM --table N --data FOLDER --dry-run says what would be trained; --help explains",
        soft_wrap=True,
    )
    return 0


def _figures(rows: Iterable[Row]) -> int:
    return sum(len(row.paper) for row in rows)


def show_figures(paper: Paper, number: str) -> int:
    """Prints what the paper has published, where nothing is to be trained."""
    from tune.papers.page import as_published
    from tune.papers.written import on_terminal

    console.print(on_terminal(as_published(paper, number)))
    return 0


def show_runs(planned: "Planned", most: int | None) -> int:
    """Prints which runs are there and which are missing."""
    from tune.papers.reproduction import estimate, folder_of
    from tune.papers.runs import progress

    for row in planned.rows:
        if row.recipe is not None:
            states = (f"seed {run.seed} {progress(run)}" for run in row.runs)
            console.print(f"{row.name} ({row.row.system}): {', '.join(states)}", soft_wrap=True)
        elif row.why:
            console.print(f"{row.name}: not trained: {row.why}", soft_wrap=True)
    for names in planned.same_runs:
        console.print(f"note: {' and '.join(names)} are the same runs here", soft_wrap=True)
    if planned.doubt:
        console.print(f"note: {planned.doubt}", soft_wrap=True)
    print(estimate(planned, most))
    print(f"the table goes to {folder_of(planned)}")
    return 0


def _split(argv: list[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    """SYSTEM, our own options, and the recipe's overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--recipe")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--max-concurrent", type=int)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    system = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        options, overrides = parser.parse_known_args(argv[1:] if system else argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist reproduce --help") from error
    return system, options, overrides
