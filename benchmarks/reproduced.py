"""Trains the papers' comparisons on MOSI again, on real CMU-MOSI: ``make reproduced DATA=FOLDER``.

FOLDER holds ``utterances.csv`` and ``features.npz`` (docs/your-data.md), which `benchmarks.real` packs: the official
split, text read by a small fine-tuned encoder, audio, no vision. Each table is one `mmsa-dist reproduce`, so what is
done already is not trained again, and tables share the runs that they have in common. What is recorded are the tables'
figures; their pages and pictures stay beside the runs.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import MINILM, record
from benchmarks.real import RECIPES, SPLITS, pack
from mmsa_dist import run_folder
from tune.papers.planned import Asked, plan
from tune.papers.published import paper_of
from tune.papers.reproduction import SUMMARY, folder_of

TABLES = (("tam_ulag", "3"), ("iam", "3"), ("pmr", "mosi_unaligned"), ("ufen_mtfn", "3"))
"""Paper and table: between them they have every system."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with utterances.csv and features.npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path("real"), help="where shards and runs go (default: %(default)s)"
    )
    parser.add_argument("--encoder", default=MINILM, help="text encoder (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("overrides", nargs="*", help="after --: recipe values for every run, e.g. -- --epochs 1")
    options = parser.parse_args()
    shards = pack(options.data, options.out / "official", SPLITS["official"][1])
    values = ["--data", str(shards), "--text.encoder", options.encoder, *options.overrides]
    pages = [reproduced(paper, table, values, options.seeds, options.out / "runs") for paper, table in TABLES]
    if not options.no_record:
        content = {"name": "reproduced", "command": record.command_line(), **record.environment(), "pages": pages}
        print(f"written to {record.write('reproduced', content)}, README.md and docs/reproducing.md")


def reproduced(paper: str, table: str, values: list[str], seeds: int, runs: Path) -> dict[str, Any]:
    """What one `mmsa-dist reproduce` has written of its page, for programs."""
    words = ["--seeds", str(seeds), "--recipe", str(RECIPES), "--runs-dir", str(runs)]
    command = ["reproduce", paper, "--table", table, *values, *words]
    print(f"\n$ mmsa-dist {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "mmsa_dist", *command], check=True)
    planned = plan(Asked(paper_of(paper), table, None, seeds, str(RECIPES), tuple(values), runs))
    summary = run_folder.read_json(folder_of(planned) / SUMMARY)
    kept = ("title", "data", "fingerprint", "told", "notes", "grids", "rows")
    return {
        "paper": paper,
        "table": table,
        "differences": planned.asked.table.differences,
        "command": f"mmsa-dist {shlex.join(map(record.portable, command))}",
        **{name: summary[name] for name in kept},
    }


if __name__ == "__main__":
    main()
