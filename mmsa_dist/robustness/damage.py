"""Utterances that lack a modality, or of which a part of it is not theirs; the same for the same seed and key.

What is damaged at a rate is damaged at every higher one too: curves over rates are of the same samples and steps.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.utterance import Utterance

KINDS = {
    "missing": "a share of the samples lacks the modality",
    "corrupted": "a share of the steps of every sample is replaced by steps of other samples",
}

POOL = 256
"""Samples whose steps stand in for others'."""


@dataclass(frozen=True)
class Damage:
    """One way to do it.

    Attributes:
        column: what is damaged: ``audio``, ``vision``, ``text``, ``raw_text`` (by words) or ``tokens``.
        kind: of `KINDS`. rate: share of samples, or of steps, 0 to 1. seed: of what is drawn.
    """

    column: str
    kind: str
    rate: float
    seed: int

    def of(self, utterance: Utterance, others: Sequence[Any]) -> Utterance:
        """`utterance`, damaged.

        Args:
            others: what other samples hold in this column (`steps_of`).
        """
        own = steps_of(utterance, self.column)
        if own is None:
            return utterance
        rng = _rng(self.seed, utterance.key, self.column)
        if self.kind == "missing":
            return without(utterance, self.column) if rng.random() < self.rate else utterance
        replaced = rng.random(len(own)) < self.rate
        if self.column == "tokens":
            replaced[[0, -1]] = False  # the tokenizer's own, which stand around every sentence
        known = others or [(utterance.key, own)]  # none of those that were looked at has any: its own, in another order
        strangers = [_other(known, utterance.key, rng) for _ in range(len(own))]  # drawn alike at every rate
        steps = [stranger if gone else step for step, stranger, gone in zip(own, strangers, replaced, strict=True)]
        return with_steps(utterance, self.column, steps)


def steps_of(utterance: Utterance, column: str) -> Any:
    """The steps of a column: words, token ids, or (T, D) features; None where the sample has none."""
    if column == "raw_text":
        words = (utterance.raw_text or "").split()
        return words or None
    held = utterance.tokens if column == "tokens" else utterance.modalities.get(column)
    return held if held is not None and len(held) else None


def without(utterance: Utterance, column: str) -> Utterance:
    if column == "raw_text":
        return replace(utterance, raw_text=None)
    if column == "tokens":
        return replace(utterance, tokens=None)
    return replace(utterance, modalities={name: a for name, a in utterance.modalities.items() if name != column})


def with_steps(utterance: Utterance, column: str, steps: Sequence[Any]) -> Utterance:
    if column == "raw_text":
        return replace(utterance, raw_text=" ".join(steps))
    if column == "tokens":
        return replace(utterance, tokens=np.array(steps, dtype=np.int32))
    array = np.stack(steps).astype(utterance.modalities[column].dtype)
    return replace(utterance, modalities={**utterance.modalities, column: array})


def pool(utterances: Sequence[Utterance], column: str) -> list[tuple[str, Any]]:
    """Key and steps of those that have some."""
    return [(each.key, steps) for each in utterances if (steps := steps_of(each, column)) is not None]


def _other(others: Sequence[tuple[str, Any]], key: str, rng: np.random.Generator) -> Any:
    """A step of another sample; of the same one where there is no other."""
    number, where = int(rng.integers(len(others))), rng.random()
    if others[number][0] == key:
        number = (number + 1) % len(others)
    steps = others[number][1]
    return steps[int(where * len(steps))]


def _rng(seed: int, key: str, column: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{column}\0{key}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
