"""A reproduction from its plan to its page: trains what is missing, then writes and shows what came out."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from mmsa_dist import places, run_folder, session, tracking
from mmsa_dist.errors import TrainingError
from mmsa_dist.report import data_name
from shards.progress import console
from shards.suggest import counted
from tune.papers import cases
from tune.papers.measured import Measured, measure
from tune.papers.page import Page
from tune.papers.planned import Planned
from tune.papers.published import DATA
from tune.papers.runs import DONE, FAILED, HALF, MISSING, Run, code_version, run_of, seconds, state, why_failed
from tune.papers.side_by_side import page
from tune.papers.written import html, markdown, on_terminal

SUMMARY = "reproduction.json"


def reproduce(planned: Planned, most: int | None = None) -> dict[str, Measured]:
    """Trains what is missing, writes and shows the page, and gives what each row reached.

    Args:
        most: runs at the same time, where that is less than fit.

    Raises:
        TrainingError: not one run came to its end. ConfigError: another process is at it.
        KeyboardInterrupt: somebody stopped it; what is done stays.
    """
    folder = folder_of(planned)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"table {planned.asked.number} of {planned.asked.paper.paper}, {DATA[planned.data]}: {folder}")
    print(estimate(planned, most), flush=True)
    if missing(planned):
        with run_folder.locked(planned.asked.where):
            if left := missing(planned):  # whoever held it may have trained them
                _train(planned, left, folder, most)
    with run_folder.locked(folder):
        for run in planned.runs:
            if state(run) == DONE:
                _close(run)  # of a call that was killed before it could, too
        measured = {row.name: measure(row) for row in planned.trained}
        shown = page(planned, measured)
        _keep(planned, folder, shown, measured)
    console.print(on_terminal(shown))
    print(f"the same as files: {folder / 'table.md'}, {folder / 'table.html'}; pictures in {folder / 'pictures'}")
    if not any(each.tests for each in measured.values()):
        raise TrainingError("no run came to its end; the notes above say why")
    return measured


def folder_of(planned: Planned) -> Path:
    """Where the page lies. More seeds of the same rows go to the same place."""
    own = [run_of(row.recipe, planned.index, row.name, 0, Path()).key for row in planned.trained if row.recipe]
    asked, whole = planned.asked, hashlib.sha256(" ".join(own).encode()).hexdigest()
    return asked.where / f"{asked.paper.system}-table-{asked.number}-{planned.data}-{whole[:8]}"


def missing(planned: Planned) -> list[Run]:
    """The runs that are to be trained, or to be gone on with."""
    return [run for run in planned.runs if state(run) in (HALF, MISSING)]


def estimate(planned: Planned, most: int | None) -> str:
    """How many runs there are and how many are missing, and what that takes on this machine where it can be known."""
    runs = planned.runs
    counts = {each: sum(state(run) == each for run in runs) for each in (DONE, FAILED, HALF, MISSING)}
    said = f"{counted(len(runs), 'run')}: " + ", ".join(f"{count} {each}" for each, count in counts.items() if count)
    left = counts[HALF] + counts[MISSING]
    if not left or places.cluster_address(planned.launch) is not None:
        return said
    launch = planned.launch.launch
    at_once = min(most or left, left, max(1, places.own_cpus() // (launch.workers * launch.cpus_per_worker)))
    said += f"; {at_once} at a time on this machine"
    if took := [time for run in runs if state(run) == DONE and (time := seconds(run))]:
        said += f", about {median(took) * left / at_once / 60:.0f} min, as a run that is done took {median(took):.0f} s"
    else:
        said += ", for how long is not known before one is done"
    return said


def _train(planned: Planned, left: Sequence[Run], folder: Path, most: int | None) -> None:
    """Runs what is left of the table.

    Raises:
        KeyboardInterrupt: somebody stopped it.
    """
    from tune.room import joined

    room = joined(planned.launch, min(most or len(left), len(left)))
    print(f"{counted(len(left), 'run')} left, {room.count()} at a time", flush=True)
    from tune.papers.recorded import as_child, open_reproduction
    from tune.papers.spread import spread
    from tune.record import store_of

    recipe, uri = planned.launch, store_of(planned.launch, planned.asked.runs_dir)
    recipe = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"uri": uri})})
    parent = open_reproduction(folder, recipe, planned.index)
    left = [as_child(run, parent, uri) for run in left]
    try:
        spread(left, planned.index, folder, room)
    finally:
        stopped = [run for run in left if state(run) in (HALF, MISSING) and why_failed(run) is None]
        for run in left:
            if state(run) != DONE:
                tracking.end_run(run.folder, "KILLED" if run in stopped else "FAILED")
        if stopped:
            tracking.end_run(folder, "KILLED")
    if stopped:  # Ray Tune ends on Ctrl-C as if it were done
        print(f"{counted(len(stopped), 'run')} not done; the same command goes on from here")
        raise KeyboardInterrupt


def _close(run: Run) -> None:
    """Records a run that is done, once. Its checkpoints go, but for the labels in them: thirty of BERT's would need
    80 GB."""
    cases.keep(run)
    if run.recipe.tracking.enabled:
        from tune.papers.recorded import record_run

        record_run(run)
    for part in ("checkpoints", "ray"):
        shutil.rmtree(run.folder / part, ignore_errors=True)


def _keep(planned: Planned, folder: Path, shown: Page, measured: Mapping[str, Measured]) -> None:
    """Writes the page and, where there are other runs than the last time, the pictures and MLflow's copy."""
    from tune.papers.pictures import draw, generated

    summary = _summary(planned, shown, measured)
    known = run_folder.read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else None
    pictures = sorted((folder / "pictures").glob("*.png"))
    if known is None or known["rows"] != summary["rows"]:
        shutil.rmtree(folder / "pictures", ignore_errors=True)
        kind, tasks = session.kind_of(planned.index), tuple(planned.index.tasks)
        where = data_name({"data": planned.index.name, "synthetic": planned.index.synthetic})
        monitor = planned.launch.train.monitor
        pictures = draw(measured.values(), kind, tasks, monitor, where, folder / "pictures")
    beside, grids = [picture.relative_to(folder) for picture in pictures], generated(measured.values())
    run_folder.write_text(folder / "table.md", markdown(shown, beside, grids))
    run_folder.write_text(folder / "table.html", html(shown, beside, grids))
    if known != {**summary, "recorded": True}:
        from tune.papers.recorded import record_reproduction

        files = [folder / "table.md", folder / "table.html"]
        recorded = record_reproduction(folder, measured.values(), files, pictures)
        # last: what a killed call leaves out the next one does
        run_folder.write_json(folder / SUMMARY, {**summary, "recorded": recorded})


def _summary(planned: Planned, shown: Page, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The page's numbers for programs."""
    rows = {
        row.name: {
            "system": row.row.system,
            "set": row.row.set,
            "paper": row.row.paper,
            "runs": {str(seed): path.name for seed, path in measured[row.name].folders.items()},
            "test": {str(seed): test for seed, test in measured[row.name].tests.items()},
            "failed": {str(seed): why for seed, why in measured[row.name].failed.items()},
        }
        for row in planned.trained
    }
    card = {"data": planned.index.name, "synthetic": planned.index.synthetic, "fingerprint": planned.index.fingerprint}
    return {
        "title": shown.title,
        **card,
        "code": code_version(),
        "told": shown.told,
        "notes": shown.notes,
        "grids": [asdict(grid) for grid in shown.grids],
        "rows": rows,
    }
