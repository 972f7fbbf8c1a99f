"""Small data sets for the tests of reading: given utterances, packed by the real packer."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shards.index import Index
from shards.utterance import MODALITIES, SPLITS, Utterance
from shards.write import pack

WIDTHS = {"text": 6, "audio": 5, "vision": 4}


class Samples:
    """A source of utterances that are given."""

    name = "made"
    where = "made"
    synthetic = False
    label_range = (-3.0, 3.0)

    def __init__(self, utterances: Iterable[Utterance]) -> None:
        self._split = {split: [u for u in utterances if u.split == split] for split in SPLITS}
        every = [u for held in self._split.values() for u in held]
        self.provenance: dict[str, Any] = {"format": "given", "file": "none", "sha256": "0" * 64}
        self.classes: dict[str, int] = {}
        self.tasks = tuple(task for task in ("M", "T", "A", "V") if any(task in u.labels for u in every))
        self.widths = {m: WIDTHS[m] for m in MODALITIES if any(m in u.modalities for u in every)}
        self.has_raw_text = any(u.raw_text is not None for u in every)
        self.has_tokens = any(u.tokens is not None for u in every)
        self.counts = {split: len(held) for split, held in self._split.items()}

    def keys(self, split: str) -> list[str]:
        return [u.key for u in self._split[split]]

    def read(self, split: str, number: int) -> Utterance:
        return self._split[split][number]

    def notes(self) -> list[str]:
        return []


def utterance(
    key: str, split: str, rng: np.random.Generator, lengths: dict[str, int], tokens: bool = True
) -> Utterance:
    """A sample with random values that float16 holds exactly, so that what is read can be compared exactly."""
    modalities = {
        m: rng.standard_normal((n, WIDTHS[m])).astype(np.float16).astype(np.float32) for m, n in lengths.items()
    }
    labels = {task: round(float(rng.uniform(-3, 3)), 4) for task in ("M", "T", "A", "V")}
    ids = rng.integers(0, 30000, size=rng.integers(2, 9)).astype(np.int32) if tokens else None
    return Utterance(key, split, modalities, labels, raw_text=f"words of {key}", tokens=ids)


def utterances(counts: dict[str, int], seed: int = 0, absent: float = 0.0) -> list[Utterance]:
    """Samples with lengths 1 to 12; each modality but the text is absent with probability `absent`."""
    rng = np.random.default_rng(seed)
    made = []
    for split in SPLITS:
        for number in range(counts.get(split, 1)):
            lengths = {m: int(rng.integers(1, 13)) for m in WIDTHS if m == "text" or rng.random() >= absent}
            made.append(utterance(f"{split} vid.eo/{number}$_$é", split, rng, lengths))
    return made


def packed(folder: Path, samples: list[Utterance], shard_bytes: int = 8192, **options: Any) -> Index:
    """Packs `samples` into shards of a few samples each."""
    index, _ = pack(Samples(samples), folder, shard_bytes=shard_bytes, **options)
    return index


def settle(index: Index) -> None:
    """Waits until the files are old enough that a change must change their times (see `shards.trust`)."""
    time.sleep(0.15)


def overwrite(path: Path, at: int, data: bytes) -> None:
    """Changes bytes in place, as a bad disk or copy would."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    path.chmod(mode)
