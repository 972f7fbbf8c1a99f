"""Synthetic data at the size and raggedness of the published sets. Nothing about sentiment can be learned from it.

The planted signal is irony: the words have a polarity p, the tone of voice says whether they are meant (+1) or ironic
(-1), the face says how strongly v. The label is ``p * tone * v``: no modality alone gives it, all three together do.
Like IEMOCAP, emotions are that value cut into classes; see `Meaning.emotion`.
Each sample comes from a random stream of its own, so that any number of them costs no memory.

Shapes: T steps, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shards.errors import ConfigError
from shards.suggest import nearest
from shards.utterance import EMOTIONS, SPLITS, Utterance

POSITIVE = ("good", "great", "love", "wonderful", "funny", "brilliant", "enjoyed", "beautiful")
NEGATIVE = ("bad", "awful", "hate", "boring", "stupid", "terrible", "wasted", "ugly")
NEUTRAL = (
    "the",
    "movie",
    "was",
    "and",
    "it",
    "really",
    "this",
    "scene",
    "with",
    "actor",
    "then",
    "story",
    "i",
    "think",
)
WORDS = POSITIVE + NEGATIVE + NEUTRAL
FIRST_TOKEN, CLS, SEP = 1000, 101, 102
"""Token id of the first word, and BERT's ids of its special tokens."""

IRONIC = 0.25
"""Share of samples whose tone turns the words around."""

NOISE = 0.5
"""Deviation of the noise on each value; the signal along its direction is of size 1."""


@dataclass(frozen=True)
class Preset:
    """Shape of a published data set.

    Attributes:
        counts: samples per split, train, valid, test.
        widths: modality -> D.
        lengths: modality -> (least, greatest) T.
        label_range: lowest and highest label; labels are multiples of 0.2.
        tasks: labels; emotions are classes of two each.
    """

    counts: tuple[int, int, int]
    widths: dict[str, int]
    lengths: dict[str, tuple[int, int]]
    label_range: tuple[float, float] = (-3.0, 3.0)
    tasks: tuple[str, ...] = ("M",)


def _ragged(text: int, audio: int, vision: int) -> dict[str, tuple[int, int]]:
    return {"text": (8, text), "audio": (audio // 5, audio), "vision": (vision // 5, vision)}


PRESETS = {
    "mosi": Preset((1284, 229, 686), {"text": 768, "audio": 5, "vision": 20}, _ragged(50, 375, 500)),
    "mosei": Preset((16326, 1871, 4659), {"text": 768, "audio": 74, "vision": 35}, _ragged(50, 500, 500)),
    "sims": Preset(
        (1368, 456, 457),
        {"text": 768, "audio": 33, "vision": 709},
        _ragged(39, 400, 55),
        label_range=(-1.0, 1.0),
        tasks=("M", "T", "A", "V"),
    ),
    "iemocap": Preset(  # of MulT, not aligned; the greatest lengths are ours
        (2717, 798, 938),
        {"text": 300, "audio": 74, "vision": 35},
        _ragged(20, 400, 500),
        label_range=(0.0, 1.0),
        tasks=EMOTIONS,
    ),
}


@dataclass(frozen=True)
class Meaning:
    """What one sample says: polarity 0.2..1 of either sign, tone +1 or -1, strength 0.4..1."""

    polarity: float
    tone: float
    strength: float

    @property
    def label(self) -> float:
        """The multimodal label, in -1..1."""
        return self.polarity * self.tone * self.strength

    @property
    def emotion(self) -> str:
        """Neutral where the label is near zero, happy above; below angry where the face is strong, sad where not."""
        if abs(self.label) < 0.3:
            return "neutral"
        if self.label > 0:
            return "happy"
        return "angry" if self.strength > 0.7 else "sad"


SYNTHETIC = "synthetic-"
"""Beginning of the key of each generated sample, by which it is known in other formats too."""


class GeneratedSource:
    """Generates one sample at a time.

    Args:
        like: a name in `PRESETS`.
        samples: their number over all splits, in the preset's proportions; None takes the preset's own.
        seed: of everything.

    Raises:
        ConfigError: unknown preset, or too few samples for three splits.
    """

    synthetic = True
    has_raw_text = True
    has_tokens = True

    def __init__(self, like: str, samples: int | None = None, seed: int = 0) -> None:
        if like not in PRESETS:
            raise ConfigError(f"--like: unknown data set {like!r}{nearest(like, PRESETS)}")
        preset = PRESETS[like]
        self._preset, self._seed = preset, seed
        self.classes: dict[str, int] = dict.fromkeys(preset.tasks, 2) if preset.tasks == EMOTIONS else {}
        self.name = f"synthetic-{like}"
        self.where = f"generated like {like}"
        self.label_range, self.tasks, self.widths = preset.label_range, preset.tasks, preset.widths
        self.counts = dict(zip(SPLITS, _shares(preset.counts, samples), strict=True))
        self.provenance: dict[str, Any] = {"format": "generated", "file": "", "sha256": "", "like": like, "seed": seed}

    def keys(self, split: str) -> Iterable[str]:
        return (self._key(split, number) for number in range(self.counts[split]))

    def meaning(self, split: str, number: int) -> Meaning:
        """What the sample says, before any of it is noise: the truth that tests compare with."""
        return _drawn(self._stream(split, number))

    def read(self, split: str, number: int) -> Utterance:
        rng = self._stream(split, number)
        meaning = _drawn(rng)
        lengths = {name: int(rng.integers(*span, endpoint=True)) for name, span in self._preset.lengths.items()}
        words = _sentence(rng, meaning.polarity, lengths["text"] - 2)
        signals = {"audio": meaning.tone, "vision": 2 * meaning.strength - 1.4}
        modalities = {name: self._sequence(rng, name, lengths[name], signals[name]) for name in ("audio", "vision")}
        text = self._noise(rng, lengths["text"], self.widths["text"])
        text[1:-1] += self._embedding[words]  # [CLS] and [SEP] hold no word
        return Utterance(
            key=self._key(split, number),
            split=split,
            modalities={"text": text, **modalities},
            labels=self._labels(meaning),
            raw_text=" ".join(WORDS[word] for word in words),
            tokens=np.concatenate([[CLS], FIRST_TOKEN + words, [SEP]]).astype(np.int32),
        )

    def notes(self) -> list[str]:
        return ["synthetic data: results on it say nothing about sentiment"]

    def _key(self, split: str, number: int) -> str:
        return f"{SYNTHETIC}{split}-{number // 10}$_${number % 10}"

    def _stream(self, split: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, SPLITS.index(split), number])

    def _labels(self, meaning: Meaning) -> dict[str, float]:
        if self.classes:
            return {emotion: float(emotion == meaning.emotion) for emotion in self.tasks}
        values = {"M": meaning.label, "T": meaning.polarity, "A": meaning.tone * 0.6, "V": 2 * meaning.strength - 1.4}
        top = self.label_range[1]
        return {task: round(values[task] * top * 5) / 5 for task in self.tasks}

    def _noise(self, rng: np.random.Generator, steps: int, width: int) -> np.ndarray:
        noise = rng.standard_normal((steps, width), dtype=np.float32)
        noise *= NOISE
        return noise

    def _sequence(self, rng: np.random.Generator, name: str, steps: int, signal: float) -> np.ndarray:
        """(T, D): noise, and the signal along the modality's direction at every step."""
        values = self._noise(rng, steps, self.widths[name])
        values += np.float32(signal) * self._directions[name]
        return values

    @cached_property
    def _directions(self) -> dict[str, np.ndarray]:
        """modality -> (D,) of length sqrt(D) / 2, the same for all samples."""
        rng = np.random.default_rng([self._seed, len(SPLITS)])
        return {
            name: rng.choice(np.array([-0.5, 0.5], dtype=np.float32), self.widths[name]) for name in ("audio", "vision")
        }

    @cached_property
    def _embedding(self) -> np.ndarray:
        """(words, D): each word its own random vector; positive and negative words lie apart along one direction."""
        rng = np.random.default_rng([self._seed, len(SPLITS) + 1])
        table = rng.standard_normal((len(WORDS), self.widths["text"]), dtype=np.float32) * np.float32(0.3)
        direction = rng.choice(np.array([-0.3, 0.3], dtype=np.float32), self.widths["text"])
        table[: len(POSITIVE)] += direction
        table[len(POSITIVE) : len(POSITIVE) + len(NEGATIVE)] -= direction
        return table


def _drawn(rng: np.random.Generator) -> Meaning:
    polarity = rng.uniform(0.2, 1.0) * (1 if rng.random() < 0.5 else -1)
    tone = -1.0 if rng.random() < IRONIC else 1.0
    return Meaning(float(polarity), tone, float(rng.uniform(0.4, 1.0)))


def _sentence(rng: np.random.Generator, polarity: float, length: int) -> np.ndarray:
    """(length,) positions in `WORDS`; the share of polar words grows with the polarity, and at least one is polar."""
    first, kind = (0, POSITIVE) if polarity > 0 else (len(POSITIVE), NEGATIVE)
    words = rng.integers(len(POSITIVE) + len(NEGATIVE), len(WORDS), length)
    polar = rng.random(length) < 0.8 * abs(polarity)
    polar[rng.integers(length)] = True
    words[polar] = first + rng.integers(len(kind), size=int(polar.sum()))
    return words


def _shares(counts: tuple[int, int, int], samples: int | None) -> tuple[int, int, int]:
    """`samples` in the proportions of `counts`, none of them zero."""
    if samples is None:
        return counts
    if samples < len(counts):
        raise ConfigError(f"--samples {samples}: at least {len(counts)} are needed, one a split")
    valid, test = (max(1, round(samples * part / sum(counts))) for part in counts[1:])
    return max(1, samples - valid - test), valid, test
