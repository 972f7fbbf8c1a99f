"""What the runs of a row have reached on the test split, read from the folders that they left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmsa_dist.shares import Values
from shards.sources.arrays import DAMAGE
from tune.outcome import RESULT
from tune.papers.compared import Floats, errors
from tune.papers.planned import PlannedRow
from tune.papers.runs import DONE, Run, damaged, read, state, why_failed


@dataclass(frozen=True)
class Measured:
    """One row that is trained.

    Attributes:
        tests: seed -> test metrics of a run that is done. folders: seed -> where it lies.
        failed: seed -> why.
    """

    name: str
    tests: dict[int, Values]
    folders: dict[int, Path]
    failed: dict[int, str]

    def values(self, metric: str) -> list[float]:
        """Of all seeds for which it is defined."""
        return [value for test in self.tests.values() if (value := test.get(metric)) is not None]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return float(np.mean(values)) if values else None

    def less(self, other: "Measured", metric: str) -> float | None:
        """The mean difference to another row, over the seeds for which both are defined; None without one."""
        pairs = [(test.get(metric), other.tests.get(seed, {}).get(metric)) for seed, test in self.tests.items()]
        differences = [one - its for one, its in pairs if one is not None and its is not None]
        return float(np.mean(differences)) if differences else None

    def deviation(self, metric: str) -> float | None:
        """Standard deviation over seeds, of a sample; None of fewer than two."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def measure(row: PlannedRow) -> Measured:
    """What there is of a row's runs now."""
    done = {run.seed: run for run in row.runs if state(run) == DONE}
    failed = {run.seed: f"{why} ({run.folder})" for run in row.runs if (why := why_failed(run)) is not None}
    tests = {seed: dict(read(run.folder / RESULT, "test")) for seed, run in done.items()}
    return Measured(row.name, tests, {seed: run.folder for seed, run in done.items()}, failed)


def predictions(folder: Path) -> tuple[list[str], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Keys, truth and predictions of a run's test split.

    Raises:
        DataError: they are damaged.
    """
    path = folder / "predictions" / "test.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["key"].tolist(), file["y"], file["p"]
    except (KeyError, *DAMAGE) as error:
        raise damaged(path, error) from error


def error_differences(one: Measured, other: Measured, kind: str) -> Floats | None:
    """(N,) for each test sample the error of `one` less that of `other`, both means over the seeds that both have.

    None where they have no seed in common, or were not tested on the same samples.
    """
    seeds = sorted(one.folders.keys() & other.folders.keys())
    found = [_mean_errors(each, seeds, kind) for each in (one, other)]
    if not seeds or found[0].keys() != found[1].keys():
        return None
    return np.array([found[0][key] - found[1][key] for key in found[0]], dtype=np.float64)


def _mean_errors(measured: Measured, seeds: Sequence[int], kind: str) -> dict[str, float]:
    """key -> mean error over the seeds."""
    by_key: dict[str, list[float]] = {}
    for seed in seeds:
        keys, y, p = predictions(measured.folders[seed])
        for key, error in zip(keys, errors(kind, y, p).tolist(), strict=True):
            by_key.setdefault(key, []).append(error)
    return {key: float(np.mean(each)) for key, each in by_key.items()}


def sentence(run: Run, monitor: str) -> str:
    """What a run that is done has reached, for a line of progress."""
    from mmsa_dist.report import label, value_text

    result = read(run.folder / RESULT)
    shown = monitor if monitor in result["test"] else next(iter(result["test"]))
    reached = value_text(shown, result["test"][shown])
    return f"test {label(shown)[:-2]} {reached}, of epoch {result['best_epoch']} of {result['epochs']}"
