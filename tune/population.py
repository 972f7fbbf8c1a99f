"""Population-based training of learning rates (Jaderberg et al. 2017), in generations.

All trials train side by side until an epoch, and pause there, saved. Then the worst quarter ends, and in the place of
each a copy of one of the best quarter goes on, with other learning rates. The copy is a trial of its own: what it has
of the other one is in its folder, its record, and the recipe that it trains.

Ray Tune's scheduler of that name copies checkpoints that trials report to Tune. A trial here is a run of Ray Train,
whose reports reach Tune without their checkpoints (`TuneReportCallback`): the scheduler would find none, say so in a
log, and leave the worst as they are. And it keeps what it knows in one process; here it is in the sweep's folder.
"""

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist import checkpoint, run_folder, stopping
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.metrics import higher_is_better
from mmsa_dist.recipe import Recipe
from tune.asked import Asked
from tune.outcome import FAILED, INTERRUPTED, TRIAL, Outcome, epochs_of, read_outcomes
from tune.space import RATES, Knob, Space, Value, with_rates

if TYPE_CHECKING:
    from tune.room import Room

FILE = "population.json"
"""What was decided after each generation."""

QUANTILE = 0.25
"""Share of the population that ends, and share that is copied: the usual one, a fifth in the paper."""

FACTORS = (0.8, 1.2)
"""What a learning rate of a range is multiplied by, as in the paper."""


@dataclass(frozen=True)
class Heir:
    """A trial that takes the place of another.

    Attributes:
        number: its own. replaces: the trial that ends, or has failed. origin: the trial that it is a copy of.
        rates: its learning rates from now on, by dotted key.
    """

    number: int
    replaces: int
    origin: int
    rates: dict[str, float]


def check(space: Space, recipe: Recipe, asked: Asked) -> None:
    """
    Raises:
        ConfigError: there is nothing for a population to do.
    """
    if not knobs_of(space):
        raise ConfigError(
            f"--stopping pbt: {space.where} leaves no learning rate to search ({RATES}*), and it changes nothing else; "
            "search one, or use --stopping asha"
        )
    if asked.trials < 2:
        raise ConfigError("--stopping pbt: a population has two trials or more; give --trials")
    if not generations(recipe.train.epochs, asked.grace):
        raise ConfigError(
            f"--stopping pbt: {recipe.train.epochs} epochs have no two generations of {asked.grace}; lower --grace"
        )
    if recipe.optim.lr_from:
        raise ConfigError(
            "--stopping pbt: the recipe changes learning rates on the way itself (optim.lr_from); remove that"
        )


def knobs_of(space: Space) -> list[Knob]:
    """What of the space are learning rates, and can be changed."""
    rates = (knob for knob in space.knobs if all(key.startswith(RATES) for key in knob.keys))
    return [knob for knob in rates if knob.kind != "randint" and len(knob.values) > 1]


def generations(epochs: int, every: int) -> list[int]:
    """The epochs that trials pause after: all multiples of `every` that leave as many until the end."""
    return list(range(every, epochs - every + 1, every))


def breed(space: Space, recipe: Recipe, folder: Path, asked: Asked, *, room: "Room") -> None:
    """Trains the population to its end; goes on where an earlier process was. What became of the trials is read from
    their folders; where one is still open, somebody stopped it.

    Args:
        recipe: what all trials share.
    """
    from tune.generations import Generations, train

    trials, monitor = folder / "trials", recipe.train.monitor
    pauses = generations(recipe.train.epochs, asked.grace)
    watch = Generations(trials, monitor, recipe.train.epochs, asked.trials, pauses)
    decided = load(folder)
    for until in pauses:
        if until not in decided:
            if not train(space, recipe, folder, asked, until, watch, room=room):
                return
            outcomes = read_outcomes(trials, monitor)
            gone = {heir.replaces for heirs in decided.values() for heir in heirs}
            members = [each for each in outcomes if each.number not in gone]
            decided[until] = heirs_of(members, len(outcomes), until, space, recipe)
            _save(folder, decided, members, monitor)
        for heir in decided[until]:
            take_place(heir, until, recipe, trials)
    train(space, recipe, folder, asked, None, watch, room=room)


def heirs_of(members: Sequence[Outcome], drawn: int, until: int, space: Space, recipe: Recipe) -> list[Heir]:
    """Who takes whose place after epoch `until`; the same for the same results.

    Args:
        members: trials in whose place none has come yet; those that wait are compared, those that failed are replaced,
            and one that ended before (``train.patience``) has left. drawn: trials that there were in all.
    """
    waiting = ranked(members, until, recipe.train.monitor)
    failed = [each for each in members if each.status == FAILED]
    few = quarter(len(waiting) + len(failed))
    best, others = waiting[:few], waiting[few:]
    worst = [*failed, *others[max(0, len(others) - max(0, few - len(failed))) :]]
    if not best:
        return []
    rng = random.Random(f"{recipe.seed}/{until}")
    heirs = []
    for number, each in enumerate(sorted(worst, key=lambda outcome: outcome.number), drawn + 1):
        origin = rng.choice(best)
        heirs.append(Heir(number, each.number, origin.number, explored(space, origin.values, rng)))
    return heirs


def ranked(members: Iterable[Outcome], until: int, monitor: str) -> list[Outcome]:
    """The trials that wait, by their validation result of epoch `until`, the best first, the earlier of equals; what is
    undefined comes last."""

    def rank(outcome: Outcome) -> tuple[bool, float, int]:
        value = value_at(outcome, until, monitor)
        cost = 0.0 if value is None else -value if higher_is_better(monitor) else value
        return (value is None, cost, outcome.number)

    return sorted((each for each in members if each.status == INTERRUPTED), key=rank)


def value_at(outcome: Outcome, epoch: int, monitor: str) -> float | None:
    """A trial's validation result of an epoch; None where it is undefined."""
    value = dict(epochs_of(outcome.folder)).get(epoch, {}).get(monitor)
    return None if value is None or value != value else value


def quarter(members: int) -> int:
    """How many end, and how many are copied at most: a quarter, one at least, and no more than half."""
    return min(-(-members // round(1 / QUANTILE)), members // 2)


def explored(space: Space, values: Mapping[str, Value], rng: random.Random) -> dict[str, float]:
    """Other learning rates within the space, by dotted key."""
    rates: dict[str, float] = {}
    for knob in knobs_of(space):
        rates |= knob.spread(beside(knob, knob.read(values), rng))
    return rates


def beside(knob: Knob, value: Value, rng: random.Random) -> Value:
    """A value near `value`: of a range a fifth more or less, within it; of a list a neighbour."""
    if knob.ranges:
        low, high = knob.values
        tried = [min(max(value * factor, low), high) for factor in rng.sample(FACTORS, len(FACTORS))]
        return next((each for each in tried if each != value), value)
    listed = sorted(knob.values)
    at = listed.index(tuple(value) if isinstance(value, list | tuple) else value)
    return rng.choice([listed[n] for n in (at - 1, at + 1) if 0 <= n < len(listed)])


def load(folder: Path) -> dict[int, list[Heir]]:
    """Epoch -> who took whose place after it, of the sweep in `folder`.

    Raises:
        DataError: the file is damaged.
    """
    if not (folder / FILE).is_file():
        return {}
    try:
        known = run_folder.read_json(folder / FILE)["generations"]
        return {each["epoch"]: [Heir(**heir) for heir in each["heirs"]] for each in known}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / FILE}: is damaged ({error}); begin another sweep") from error


def _save(folder: Path, decided: Mapping[int, Sequence[Heir]], members: Iterable[Outcome], monitor: str) -> None:
    """Adds the last generation, and what its trials had reached."""
    before = run_folder.read_json(folder / FILE)["generations"] if (folder / FILE).is_file() else []
    until, heirs = list(decided.items())[-1]
    reached = {str(each.number): value_at(each, until, monitor) for each in members}
    own: dict[str, Any] = {"epoch": until, "reached": reached, "heirs": [asdict(heir) for heir in heirs]}
    run_folder.write_json(folder / FILE, {"generations": [*before, own]})


def take_place(heir: Heir, until: int, recipe: Recipe, trials: Path) -> None:
    """Makes the heir's folder, then ends the trial that it replaces; a second call does what is missing."""
    from tune.draw import prepared
    from tune.record import record_trial
    from tune.watch import spare_disk

    monitor = recipe.train.monitor
    by_number = {each.number: each for each in read_outcomes(trials, monitor)}
    if heir.number not in by_number:
        origin = by_number[heir.origin]
        if stopping.paused(origin.folder) != until:
            raise DataError(
                f"{trials}: trial {heir.number} is gone, and trial {origin.number}, which it was a copy of, has gone "
                f"on since epoch {until}; put its folder there again, or begin another sweep"
            )
        values = {**origin.values, **heir.rates}
        begun = {key: value for key, value in origin.values.items() if key in heir.rates}
        rates = (*(origin.rates or ((1, begun),)), (until + 1, heir.rates))
        tags = {**recipe.tracking.tags, "sweep.from": f"trial {origin.number}, epoch {until}"}
        tagged = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"tags": tags})})
        name = f"trial-{heir.number:03d}"
        folder, parameters = prepared(with_rates(tagged, values, rates, name), trials, name)
        inherit(origin.folder, folder, until)
        record = {"number": heir.number, "values": values, "parameters": parameters}
        record |= {"from": {"trial": origin.number, "epoch": until}, "rates": rates}
        run_folder.write_json(folder / TRIAL, record)  # last: without it the folder is none
    ended = by_number[heir.replaces]
    if ended.status == INTERRUPTED:
        run_folder.write_json(ended.folder / TRIAL, run_folder.read_json(ended.folder / TRIAL) | {"stopped": until})
        record_trial(next(each for each in read_outcomes(trials, monitor) if each.number == heir.replaces), monitor)
        spare_disk(trials, monitor)


def inherit(origin: Path, folder: Path, until: int) -> None:
    """What the run in `folder` goes on from: the checkpoints of the one in `origin`, by the same bytes, and what its
    epochs until then had reached. From there on the two know nothing of each other."""
    events = run_folder.Events(folder, 0)
    epochs = {event["epoch"]: event for event in run_folder.read_events(origin) if event["event"] == "epoch"}
    for epoch in sorted(epoch for epoch in epochs if epoch <= until):
        known = {name: value for name, value in epochs[epoch].items() if name not in ("event", "booked")}
        events.write("epoch", **{**known, "inherited": origin.name})
    events.close()
    for path in checkpoint.saved(origin / "checkpoints"):
        target = folder / "checkpoints" / path.name
        partial = target.with_name(f".partial-{target.name}-{os.getpid()}")
        partial.mkdir()
        for file in path.iterdir():
            checkpoint.link_or_copy(file, partial / file.name)
        partial.rename(target)
