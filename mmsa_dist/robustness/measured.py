"""A model's metrics under every kind of damage, in one pass over the data.

Shapes: N samples, E judged tasks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from mmsa_dist.metrics import running
from mmsa_dist.predictor import Predictor, chunks
from mmsa_dist.robustness.damage import POOL, Damage, pool
from mmsa_dist.shares import Values
from shards.utterance import Utterance

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Robustness:
    """What came out.

    Attributes:
        samples: labelled ones. whole: metrics of the undamaged data.
        damaged: metrics by damage.
    """

    samples: int
    whole: Values
    damaged: dict[Damage, Values]

    def over_seeds(self, column: str, kind: str, rate: float, metric: str) -> tuple[float, float] | None:
        """Mean and standard deviation (of a sample; 0 of one seed) over the seeds; None where one is undefined."""
        found = [
            values.get(metric)
            for damage, values in self.damaged.items()
            if (damage.column, damage.kind, damage.rate) == (column, kind, rate)
        ]
        known = [value for value in found if value is not None]
        if not known or len(known) < len(found):
            return None
        return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else 0.0


def measure(
    predictor: Predictor, utterances: Iterable[Utterance], damages: Sequence[Damage], kind: str, size: int
) -> Robustness | None:
    """
    Args:
        utterances: of one split; those without labels are left out. kind: of labels, `metrics.kind_for`.
        size: samples at a time.

    Returns:
        None where no sample is labelled.
    """
    judged = predictor.card.judged
    labelled = _labelled(utterances, judged)
    begun = list(islice(labelled, POOL))
    if not begun:
        return None
    pools = {column: pool(begun, column) for column in {damage.column for damage in damages}}
    scores = {damage: running(kind, judged) for damage in (None, *damages)}
    for chunk in chunks(chain(begun, labelled), size):
        y = np.array([[each.labels[task] for task in judged] for each in chunk], dtype=np.float32)
        for damage, score in scores.items():
            seen = chunk if damage is None else [damage.of(each, pools[damage.column]) for each in chunk]
            found: Mapping[str, Floats] = predictor.predict(seen)
            score.add(y, np.stack([found[task] for task in judged], axis=1))
    whole = scores.pop(None)
    damaged = {damage: score.values() for damage, score in scores.items() if damage is not None}
    return Robustness(whole.samples, whole.values(), damaged)


def _labelled(utterances: Iterable[Utterance], judged: Sequence[str]) -> Iterator[Utterance]:
    return (each for each in utterances if all(np.isfinite(each.labels.get(task, np.nan)) for task in judged))
