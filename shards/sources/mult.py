"""The pickle of MulT (Tsai et al. 2019): ``{"train" | "valid" | "test": {"labels", "text", "audio", "vision", "id"}}``.

``mosi_data.pkl``, ``mosei_senti_data.pkl``, ``iemocap_data.pkl`` (aligned: all modalities have one step a word) and
their ``_noalign`` twins (own steps), read by https://github.com/yaohungt/Multimodal-Transformer. Text is GloVe. No
lengths are told: arrays are padded with zeros *in front*, which is left out (where they are padded at the end, that).
Labels are (N, 1, 1), an intensity in -3..3; or of IEMOCAP (N, 4, 2), for each emotion one-hot whether it is there.

Shapes: N samples, T padded steps, D width.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.files import sha256_of
from shards.sources import fields, pickles
from shards.sources.stamp import Stamp
from shards.suggest import nearest
from shards.utterance import EMOTIONS, MODALITIES, SPLITS, Utterance


@dataclass
class _Split:
    """One split of the pickle, checked."""

    features: dict[str, Sequence[np.ndarray]]  # modality -> N of (T, D)
    steps: dict[str, int | None]  # modality -> T that all are padded to
    labels: np.ndarray  # (N, tasks) float32
    ids: list[tuple[str, ...]] | None  # (video, start, end) as MOSI and MOSEI have them, or one string


class MultSource:
    """Reads one such pickle. Its arrays stay in the file, which is mapped (see `pickles`).

    A copy that is sent to another process opens the file again: there it must have the same path.

    Args:
        path: the pickle.
        label_range: of intensities; None takes -3..3.
        modalities: those to read.
        sha256: of the file, where it is known.

    Raises:
        DataError: not such a pickle; names file, split and key.
    """

    synthetic = False
    has_raw_text = False
    has_tokens = False

    def __init__(
        self,
        path: Path,
        *,
        label_range: tuple[float, float] | None = None,
        modalities: Iterable[str] = MODALITIES,
        sha256: str | None = None,
    ) -> None:
        self.where = str(path)
        wanted = tuple(modalities)
        self._stamp = Stamp.of(path)  # before anything of it is read
        content = fields.splits(self.where, pickles.load(path))
        self._notes = fields.others(content)
        self._splits = {split: self._checked(split, content.get(split), wanted) for split in SPLITS}
        parts = list(self._splits.values())
        self.tasks = self._tasks()
        self.classes = dict.fromkeys(self.tasks, 2) if self.tasks == EMOTIONS else {}
        self.label_range = (0.0, 1.0) if self.classes else label_range or (-3.0, 3.0)
        have = [list(part.features) for part in parts]
        if have.count(have[0]) < len(have):
            raise DataError(f"{path}: the splits have modalities {have}; every split needs the same")
        self.widths = {m: fields.width(self.where, m, [part.features[m] for part in parts]) for m in have[0]}
        self.counts = {split: len(part.labels) for split, part in self._splits.items()}
        self._keys = self._named()
        self.name = path.stem
        long = parts[0].steps
        self._aligned = len(long) > 1 and len(set(long.values())) == 1 and None not in long.values()
        self._front = {m: _padded_in_front(parts[0].features[m]) for m in long if long[m]}
        if self._aligned:  # all modalities stand beside the text, whose steps are hardly ever silent
            self._front = dict.fromkeys(long, self._front[next(iter(long))])
        self.provenance: dict[str, Any] = {
            "format": "mult",
            "file": path.name,
            "sha256": sha256 or sha256_of(path),
            "aligned": self._aligned,
            "padded": {m: "in front" if front else "at the end" for m, front in self._front.items()},
        }
        self._reopened = partial(
            MultSource, path.resolve(), label_range=label_range, modalities=wanted, sha256=self.provenance["sha256"]
        )

    def __reduce__(self) -> tuple[Callable[[], "MultSource"], tuple[()]]:
        return self._reopened, ()

    def keys(self, split: str) -> Iterable[str]:
        return self._keys[split]

    def read(self, split: str, number: int) -> Utterance:
        part = self._splits[split]
        arrays = {name: part.features[name][number] for name in self.widths}
        ranges = {name: self._range(part, name, array) for name, array in arrays.items()}
        if self._aligned:
            # one range for all: an aligned step whose audio or vision is zero is silence, not padding
            real = [(begin, end) for begin, end in ranges.values() if end > begin] or [(0, 0)]
            ranges = dict.fromkeys(ranges, (min(begin for begin, _ in real), max(end for _, end in real)))
        return Utterance(
            key=self._keys[split][number],
            split=split,
            modalities={m: fields.float32(array[slice(*ranges[m])]) for m, array in arrays.items()},
            labels={task: float(part.labels[number, n]) for n, task in enumerate(self.tasks)},
        )

    def notes(self) -> list[str]:
        return self._notes

    def unchanged(self) -> None:
        self._stamp.check()

    def _range(self, part: _Split, name: str, array: np.ndarray) -> tuple[int, int]:
        """Where the steps of `array` (T, D) begin and end that are not padding."""
        if part.steps[name] is None:
            return 0, len(array)
        begin, end = fields.real_steps(array)
        if begin == end:
            return 0, 0
        return (begin, len(array)) if self._front[name] else (0, end)

    # --- the file

    def _checked(self, split: str, content: Any, wanted: tuple[str, ...]) -> _Split:
        at = f"{self.where}: {split}"
        if content is None:
            raise DataError(f"{at} is missing; a training set needs {', '.join(SPLITS)}")
        if not isinstance(content, dict):
            raise DataError(f"{at} is {pickles.describe(content)}, expected a dict of arrays")
        if "labels" not in content:
            other = "; it is one of the MMSA toolkit: pack mmsa" if "regression_labels" in content else ""
            raise DataError(f"{at} has no key 'labels'{other or nearest('labels', map(fields.shown, content))}")
        labels = _labels(f"{at}.labels", content["labels"])
        if not len(labels):
            raise DataError(f"{at} is empty: it has no samples; every split needs some")
        names = [name for name in MODALITIES if name in wanted and content.get(name) is not None]
        if not names:
            raise DataError(f"{at} has none of {', '.join(wanted)}; keys are {fields.listed(content)}")
        columns = {name: fields.rows(f"{at}.{name}", content[name]) for name in names}
        ids = content.get("id")
        if ids is not None:
            columns["id"] = fields.rows(f"{at}.id", ids)
        for name, column in columns.items():
            if len(column) != len(labels):
                raise DataError(f"{at}.{name} has {len(column)} rows, expected {len(labels)}, one for each label")
        read = {name: fields.features(f"{at}.{name}", columns[name]) for name in names}
        return _Split(
            features={name: samples for name, (samples, _) in read.items()},
            steps={name: steps for name, (_, steps) in read.items()},
            labels=labels,
            ids=None if ids is None else [_id(f"{at}.id[{number}]", value) for number, value in enumerate(ids)],
        )

    def _tasks(self) -> tuple[str, ...]:
        widths = {split: part.labels.shape[1] for split, part in self._splits.items()}
        if len(set(widths.values())) > 1:
            raise DataError(f"{self.where}: labels a sample are {widths}; every split needs the same")
        return ("M",) if widths["train"] == 1 else EMOTIONS

    def _named(self) -> dict[str, list[str]]:
        """Ids that are unique, the same for the same file.

        Of MOSI the first part of an id names the utterance, of MOSEI the video; start and end, in seconds, then tell
        utterances apart. In IEMOCAP there are none: they are numbered.
        """
        ids = {split: part.ids for split, part in self._splits.items()}
        if None in ids.values():
            lacking = [split for split in SPLITS if ids[split] is None]
            self._notes.append(f"{', '.join(lacking)}: the file has no ids; named by split and number, as train-00000")
        named = {
            split: ids[split] or [(f"{split}-{number:05d}",) for number in range(self.counts[split])]
            for split in SPLITS
        }
        every = [parts for column in named.values() for parts in column]
        if len({parts[0] for parts in every}) == len(every):
            return {split: [parts[0] for parts in column] for split, column in named.items()}
        joined = {split: [_interval(*parts) for parts in column] for split, column in named.items()}
        times = Counter(key for column in joined.values() for key in column)
        if repeated := sum(count for count in times.values() if count > 1):
            self._notes.append(f"{repeated:,} samples share their ids with others; told apart by -2, -3, …")
        seen: Counter[str] = Counter()
        for column in joined.values():
            for number, key in enumerate(column):
                seen[key] += 1
                column[number] = key if seen[key] == 1 else f"{key}-{seen[key]}"
        return joined


def _labels(at: str, value: Any) -> np.ndarray:
    """(N, 1) intensities, or (N, 4) classes 0 and 1."""
    found = fields.array(at, fields.rows(at, value))
    if found.dtype.kind not in "iufb" or found.size not in (len(found), 8 * len(found)):
        raise DataError(f"{at} is {pickles.describe(found)}, expected (N, 1, 1) intensities or (N, 4, 2) emotions")
    if found.size == len(found):
        return found.reshape(-1, 1).astype(np.float32)
    one_hot = np.isin(found, (0, 1)).all() and (found.sum(axis=-1) == 1).all()
    if found.shape[1:] != (len(EMOTIONS), 2) or not one_hot:
        raise DataError(
            f"{at} is {pickles.describe(found)}, expected (N, 4, 2): for each of {', '.join(EMOTIONS)} one-hot whether "
            "it is there"
        )
    return found.argmax(axis=-1).astype(np.float32)


def _id(at: str, value: Any) -> tuple[str, ...]:
    """An id of whatever kind, as its parts."""
    parts = (
        list(value) if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim) else [value]
    )
    if len(parts) > fields.MOST_PARTS:
        parts = []
    texts = [str(part) if isinstance(part, float | np.floating) else fields.text(part) for part in parts]
    if None in texts or not texts:
        raise DataError(f"{at} is {pickles.describe(value)}, expected a string, or (video, start, end)")
    return tuple(map(str, texts))


def _interval(video: str, *bounds: str) -> str:
    """``video[start,end]``, as CMU-MultimodalSDK puts what stands for a part of a video."""
    return f"{video}[{','.join(bounds)}]" if bounds else video


def _padded_in_front(samples: Sequence[np.ndarray]) -> bool:
    """Whether more samples begin with a step of zeros than end with one; MulT's own do."""
    in_front = sum(not np.any(sample[0]) for sample in samples if len(sample))
    at_end = sum(not np.any(sample[-1]) for sample in samples if len(sample))
    return in_front >= at_end
