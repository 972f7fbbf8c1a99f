"""What a sweep was asked: kept in its folder, so that it can be gone on with."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmsa_dist import run_folder
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.suggest import nearest

FILE = "sweep.json"

SEARCHES = {
    "tpe": "Optuna's tree-structured Parzen estimator: after some trials at random, near what was good",
    "random": "each value for itself",
    "grid": "all combinations, in random order; of a range its ends and its middle",
}

STOPPINGS = {
    "asha": "of the trials that have run for as long, the best third goes on, again and again",
    "median": "a trial ends whose best is worse than the median of what the others had on average until then",
    "pbt": "population-based training: the worst go on as copies of the best, with other rates",
    "none": "every trial runs to its end",
}


@dataclass(frozen=True)
class Asked:
    """The options of `mmsa-dist sweep` beside the recipe.

    Attributes:
        trials: how many are drawn in all. search, stopping: of `SEARCHES`, of `STOPPINGS`.
        grace: epochs that every trial may run before it can be stopped; of a population those of a generation.
        max_concurrent: trials at the same time at most; None: as many as there is room for.
        objectives: what is searched for; the first decides, the others make a Pareto front with it.
        seeds: how many times the best recipe is trained.
        keys: dotted keys of the recipe that are searched. fixed: those that the command gave a value.
    """

    trials: int
    search: str
    stopping: str
    grace: int
    max_concurrent: int | None
    objectives: tuple[str, ...]
    seeds: int
    keys: tuple[str, ...]
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("trials", "grace", "max_concurrent", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
        for name, known in (("search", SEARCHES), ("stopping", STOPPINGS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"--{name}: unknown {value!r}{nearest(value, known)}")

    def write(self, folder: Path) -> None:
        run_folder.write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Asked":
        """Of the sweep in `folder`.

        Raises:
            DataError: it is no sweep's folder, or an unknown version's.
        """
        try:
            known = run_folder.read_json(folder / FILE)
            lists = {name: tuple(known[name]) for name in ("objectives", "keys", "fixed")}
            return cls(**{**known, **lists})
        except FileNotFoundError as error:
            raise DataError(f"{folder}: is not the folder of a sweep: it has no {FILE}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder / FILE}: cannot be read as what a sweep was asked ({error})") from error

    def with_more(self, trials: int | None, max_concurrent: int | None) -> "Asked":
        """What may change when a sweep is gone on with.

        Raises:
            ConfigError: fewer trials than before, or more of a population.
        """
        if trials not in (None, self.trials) and self.stopping == "pbt":
            raise ConfigError(
                f"--trials {trials}: the sweep has a population of {self.trials}, which keeps its size; leave it out, "
                "or begin another sweep"
            )
        if trials is not None and trials < self.trials:
            raise ConfigError(f"--trials {trials}: the sweep was begun with {self.trials}; give as many or more")
        given = {"trials": trials, "max_concurrent": max_concurrent}
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
