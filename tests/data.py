"""A small packed data set for tests of training: narrow, short and ragged, so that a run takes seconds."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shards.utterance import EMOTIONS, SPLITS, Utterance
from shards.write import pack

WIDTHS = {"text": 12, "audio": 5, "vision": 7}


class TinySource:
    """Ragged normal noise around the label; some samples lack audio or vision.

    Args:
        samples: over all splits, about 60 / 20 / 20.
        absent: share of samples that lack audio, and of those that lack vision.
    """

    name = "tiny"
    where = "generated for tests"
    synthetic = True
    label_range = (-3.0, 3.0)
    tasks: tuple[str, ...] = ("M",)
    has_raw_text = True
    has_tokens = False
    classes: ClassVar[dict[str, int]] = {}

    def __init__(self, samples: int, absent: float = 0.0, seed: int = 0) -> None:
        held = samples // 5
        self.widths = dict(WIDTHS)
        self.counts = dict(zip(SPLITS, (samples - 2 * held, held, held), strict=True))
        self.provenance: dict[str, Any] = {"format": "tiny", "file": "", "sha256": ""}
        self._absent, self._seed = absent, seed

    def keys(self, split: str) -> Iterable[str]:
        return (f"{split}$_${number}" for number in range(self.counts[split]))

    def read(self, split: str, number: int) -> Utterance:
        rng = np.random.default_rng((self._seed, SPLITS.index(split), number))
        label = float(np.clip(rng.normal(0, 1.5), -3, 3))
        arrays = {}
        for modality, width in WIDTHS.items():
            if modality != "text" and rng.random() < self._absent:
                continue
            direction = np.random.default_rng(width).normal(size=width)
            steps = int(rng.integers(1, 11))
            arrays[modality] = (rng.normal(size=(steps, width)) + 0.5 * label * direction).astype(np.float32)
        words = " ".join(rng.choice(["good", "bad", "film", "really", "not"], size=int(rng.integers(1, 9))))
        return Utterance(f"{split}$_${number}", split, arrays, {"M": label}, raw_text=words)

    def notes(self) -> list[str]:
        return []


class TinyEmotions(TinySource):
    """The same with emotions for labels: the intensity cut into four parts, a class each."""

    name = "tiny-iemocap"
    label_range = (0.0, 1.0)
    tasks = EMOTIONS
    classes: ClassVar[dict[str, int]] = dict.fromkeys(EMOTIONS, 2)

    def read(self, split: str, number: int) -> Utterance:
        made = super().read(split, number)
        part = np.digitize(made.labels["M"], (-1.0, 0.0, 1.0))
        return replace(made, labels={emotion: float(part == n) for n, emotion in enumerate(EMOTIONS)})


def packed(
    folder: Path, samples: int = 100, absent: float = 0.1, shard_bytes: int = 8_000, dtype: str = "float32"
) -> Path:
    """The data set packed into several shards below `folder`; gives its path."""
    out = folder / "tiny"
    pack(TinySource(samples, absent), out, dtype=dtype, shard_bytes=shard_bytes)
    return out
