"""What the next trial tries: Optuna draws, and each trial gets its folder before it starts anywhere."""

import itertools
import random
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from mmsa_dist import run_folder, stopping, train
from mmsa_dist.diagnosis import first_line
from mmsa_dist.errors import ConfigError, MmsaError, TrainingError, TransientError
from mmsa_dist.memory import sizes_of
from mmsa_dist.recipe import Recipe, from_dict
from shards.progress import remarks
from tune import objectives
from tune.asked import Asked
from tune.outcome import FAILED, INTERRUPTED, TRIAL, Outcome, read_outcome
from tune.space import Knob, Space, Value, with_values
from tune.trial import OBJECTIVE

LEVELS = 3
"""Values of a range that a grid has: both ends and the middle."""


def is_open(outcome: Outcome, until: int | None = None) -> bool:
    """Whether a trial was begun and is to go on (until it pauses after epoch `until`)."""
    return outcome.status == INTERRUPTED and (until is None or stopping.paused(outcome.folder) != until)


class Drawing(Searcher):
    """Gives Ray Tune trial after trial: those that were begun before and have not ended, then new ones.

    The first one that is drawn has the recipe's own values, where they lie inside: a sweep does not end worse than it
    started.

    Args:
        recipe: what trials share; its seed is that of the drawing too. before: trials of the same sweep, earlier.
        until: an epoch that they all pause after.
    """

    def __init__(
        self,
        space: Space,
        recipe: Recipe,
        trials_dir: Path,
        asked: Asked,
        before: Sequence[Outcome] = (),
        until: int | None = None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max" if objectives.maximised(recipe.train.monitor) else "min")
        self.space, self.trials_dir, self.asked = space, trials_dir, asked
        self.base = recipe.dump()  # plain values: Tune keeps a copy of this object on disk
        self.monitor = recipe.train.monitor
        self.drawn = max((each.number for each in before), default=0)
        self.until = until
        self.open = [each for each in before if is_open(each, until)]
        self.planned = first_points(space, recipe, grid_too=asked.search == "grid")
        self.running: dict[str, tuple[Path, int | None]] = {}
        self.study = optuna.create_study(
            directions=["maximize" if objectives.maximised(name) else "minimize" for name in asked.objectives],
            sampler=sampler(asked.search, recipe.seed + self.drawn),
        )
        for each in before:
            self._remember(each)

    @property
    def left(self) -> int:
        """How many trials there are to run."""
        return len(self.open) + max(0, self.total - self.drawn)

    @property
    def total(self) -> int:
        """How many trials there will be in all: a grid may have fewer than were asked for."""
        return min(self.asked.trials, len(self.planned)) if self.asked.search == "grid" else self.asked.trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of `run_trial` for the next trial."""
        if self.open:
            outcome = self.open.pop(0)
            return self._begun(trial_id, outcome.folder, self._ask(self.space.encoded(outcome.values)))
        if self.drawn >= self.total:
            return Searcher.FINISHED
        number = self._ask(self.planned[self.drawn] if self.drawn < len(self.planned) else None)
        assert number is not None
        values = self.space.decoded(self.study.trials[number].params)
        self.drawn += 1
        return self._drawn(trial_id, number, values)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        folder, number = self.running.pop(trial_id)
        if number is None:
            return
        outcome = read_outcome(folder, self.monitor)
        found = objectives.values(outcome, self.asked.objectives)
        if error or outcome.status == FAILED or found is None:
            self.study.tell(number, state=TrialState.FAIL)
        else:
            self.study.tell(number, found)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from the folders of its trials."""
        Path(checkpoint_path).touch()

    def _ask(self, point: dict[str, Value] | None) -> int | None:
        """The number of Optuna's next trial, which has `point` where that is given."""
        if point is not None:
            self.study.enqueue_trial(point)
        return self.study.ask(self.space.distributions()).number

    def _begun(self, trial_id: str, folder: Path, number: int | None) -> dict[str, Any]:
        self.running[trial_id] = (folder, number)
        record = run_folder.read_json(folder / TRIAL)
        until = {} if self.until is None else {"until": self.until}
        if "error" not in record:
            return {"folder": str(folder), **until}
        # a sweep of an older version kept no exit code: it was the recipe's
        return {"folder": str(folder), "error": record["error"], "exit_code": record.get("exit_code", 2)}

    def _drawn(self, trial_id: str, number: int, values: dict[str, Value]) -> dict[str, Any]:
        name = f"trial-{self.drawn:03d}"
        record: dict[str, Any] = {"number": self.drawn, "values": values}
        try:
            recipe = with_values(from_dict(self.base), values, name)
            folder, record["parameters"] = prepared(recipe, self.trials_dir, name)
        except Exception as error:  # values that do not fit together, a disk in trouble, a system's own fault
            folder = failed(error, self.trials_dir / name, record)
        try:
            run_folder.write_json(folder / TRIAL, record)
        except OSError as error:
            raise full(folder, error) from error
        return self._begun(trial_id, folder, number)

    def _remember(self, outcome: Outcome) -> None:
        """What a trial that has ended reached is known to Optuna."""
        point = self.space.encoded(outcome.values)
        if point is None or outcome.status == INTERRUPTED:
            return
        found = None if outcome.status == FAILED else objectives.values(outcome, self.asked.objectives)
        state = TrialState.FAIL if found is None else TrialState.COMPLETE
        self.study.add_trial(
            create_trial(params=point, distributions=self.space.distributions(), values=found, state=state)
        )


def prepared(recipe: Recipe, trials_dir: Path, name: str) -> tuple[Path, int]:
    """A trial's folder, and how many parameters it learns. Where MLflow is away its run there is opened later.

    Raises:
        MmsaError: nothing can be made of the recipe, or its folder cannot be written.
    """
    index, recipe = train.check(recipe)
    parameters = sum(sizes_of(recipe, index).trained.values())
    try:
        return train.prepare(recipe, index, trials_dir, name), parameters
    except TransientError as error:
        if not recipe.tracking.enabled:
            raise
        remarks.print(f"{name} is recorded in MLflow later: {error}")
        return train.prepare(recipe, index, trials_dir, name, tracked=False), parameters


def failed(error: Exception, folder: Path, record: dict[str, Any]) -> Path:
    """Makes the folder of a trial that could not be drawn, and writes into its record why: this trial fails, the sweep
    goes on.

    Raises:
        TransientError: not even that can be written.
    """
    try:
        folder.mkdir(parents=True)
        if isinstance(error, MmsaError):
            record |= {"error": str(error), "exit_code": error.exit_code}
            return folder
        trace = folder / "traceback.txt"
        run_folder.write_text(trace, "".join(traceback.format_exception(error)))
        said = f"{type(error).__name__}: {first_line(str(error))}".removesuffix(": ")
        record |= {"error": f"it could not be drawn: {said}; see {trace}", "exit_code": TrainingError.exit_code}
        return folder
    except OSError as seen:
        raise full(folder, seen) from error


def full(folder: Path, error: OSError) -> TransientError:
    """What to raise where a trial can leave nothing: no other could either."""
    return TransientError(
        f"{folder}: the trial's folder cannot be written: {error.strerror}; free space, then go on with --resume"
    )


def sampler(search: str, seed: int) -> optuna.samplers.BaseSampler:
    seed %= 2**32  # of numpy, which Optuna takes it for
    if search == "tpe":
        # several are drawn before the first has a result: without the liar they would be drawn close together
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def first_points(space: Space, recipe: Recipe, *, grid_too: bool) -> list[dict[str, Value]]:
    """The points that are tried before Optuna draws any: the recipe's own, and all others of a grid.

    Raises:
        ConfigError: the grid is too large to be listed.
    """
    own = space.point(recipe)
    first = [] if own is None else [own]
    return first + [point for point in grid(space, recipe.seed) if point != own] if grid_too else first


LARGEST_GRID = 100_000


def grid(space: Space, seed: int) -> list[dict[str, Value]]:
    """All combinations of the values of each knob, in an order of `seed`, as Optuna would have drawn them.

    Raises:
        ConfigError: they are too many.
    """
    columns = [levels(knob) for knob in space.knobs]
    size = 1
    for column in columns:
        size *= len(column)
    if size > LARGEST_GRID:
        raise ConfigError(
            f"--search grid: {space.where} has {size:,} combinations; search fewer values (give the others a value on "
            "the command line), or use --search tpe or random"
        )
    names = [knob.name for knob in space.knobs]
    points = [dict(zip(names, row, strict=True)) for row in itertools.product(*columns)]
    random.Random(seed).shuffle(points)
    return points


def levels(knob: Knob) -> list[Value]:
    """The values of a grid, as Optuna would have drawn them: all, or `LEVELS` of a range."""
    distribution = knob.distribution()
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, optuna.distributions.IntDistribution):
        low, high = distribution.low, distribution.high
        return sorted({round(low + (high - low) * i / (LEVELS - 1)) for i in range(LEVELS)})
    assert isinstance(distribution, optuna.distributions.FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        return [low, (low * high) ** 0.5, high]
    return [low, (low + high) / 2, high]
