"""One computational sequence of the CMU-MultimodalSDK: a ``.csd`` file, read entry by entry.

It is HDF5: a group named after the sequence that holds ``data/<entry>/{features (S, D), intervals (S, 2)}``, seconds,
and ``metadata``. An entry is a video, or a piece of it: ``video[3]``.

HDF5 can name other files of this machine in many ways (external links, external storage, virtual data sets): none of
them has a place in a sequence, and a file that tries one is refused.

Shapes: S steps of all entries asked for, one entry after another; n steps of them; D width.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from shards.errors import DataError
from shards.sources.stamp import Stamp

if TYPE_CHECKING:
    import h5py

_LARGEST = 2**31
"""Bytes of one array. An hour of COVAREP has 0.1 GB; a damaged or hostile file may claim anything."""

_KEPT = 2**24
"""Bytes of intervals that a sequence keeps in memory."""


class _Entry(NamedTuple):
    features: "h5py.Dataset"
    intervals: np.ndarray  # (S, 2)

    @property
    def cost(self) -> int:
        """Bytes, those of the open array included."""
        return self.intervals.nbytes + 4096


class ComputationalSequence:
    """An open ``.csd`` file. Each process that reads it opens it anew, and a pickled copy too.

    Args:
        path: the file.
        kind: what its features are: numbers, or words (strings).

    Attributes:
        videos: video -> its entries, in order of their numbers.
        width: D.

    Raises:
        DataError: no such sequence; names the file and the entry.
    """

    def __init__(self, path: Path, kind: Literal["numbers", "words"] = "numbers") -> None:
        self.path = path
        self._kind = kind
        self._open: tuple[int, h5py.File, h5py.Group] | None = None  # by which process, the file, its data
        self._recent: OrderedDict[str, _Entry] = OrderedDict()
        self._kept = 0
        self.videos: dict[str, list[str]] = {}
        self.stamp = Stamp.of(path, "a computational sequence (.csd)")  # before anything of it is read
        try:
            with self._explained():
                names = sorted(self._data(), key=entry_number)
            for name in names:
                self.videos.setdefault(video_of(name), []).append(name)
            self.width = self._width(names)
        finally:
            self.close()

    def intervals(self, entries: Sequence[str]) -> np.ndarray:
        """(S, 2) float64: start and end in seconds of all steps of these entries."""
        return np.concatenate([np.zeros((0, 2)), *(self._entry(name).intervals for name in entries)])

    def features(self, entries: Sequence[str], steps: np.ndarray) -> np.ndarray:
        """(n, D) float64 of steps (n,), which are numbers into all steps of these entries."""
        return self._gather(entries, steps, np.float64)

    def words(self, entries: Sequence[str], steps: np.ndarray) -> list[str]:
        """The words at steps (n,), as `features`."""
        return [_word(value) for value in self._gather(entries, steps, object)[:, 0]]

    def close(self) -> None:
        """Until the next reading."""
        self._recent.clear()
        self._kept = 0
        if self._open:
            self._open[1].close()
            self._open = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_recent": OrderedDict(), "_kept": 0}

    # --- entries

    def _gather(self, entries: Sequence[str], steps: np.ndarray, dtype: Any) -> np.ndarray:
        """(n, D) of `dtype`; of each entry only the stretch is read that holds the steps wanted."""
        found = np.empty((len(steps), self.width), dtype)
        begin = 0
        for name in entries:
            entry = self._entry(name)
            mine = np.flatnonzero((steps >= begin) & (steps < begin + len(entry.intervals)))
            if len(mine):
                wanted = steps[mine] - begin
                first = int(wanted.min())
                with self._explained(name):
                    block = entry.features[first : int(wanted.max()) + 1]
                block = block[wanted - first].reshape(len(mine), -1)
                if block.shape[1] != self.width:
                    raise DataError(f"{self._at(name)}: features have width {block.shape[1]}, others {self.width}")
                found[mine] = block
            begin += len(entry.intervals)
        return found

    def _entry(self, name: str) -> "_Entry":
        """The entry, checked; those last used are kept."""
        with self._explained(name):
            data = self._data()
            if name in self._recent:
                self._recent.move_to_end(name)
                return self._recent[name]
            group = self._child(data, name, "group", name)
            features, intervals = (self._child(group, part, "array", name) for part in ("features", "intervals"))
            if intervals.ndim != 2 or intervals.shape[1] != 2 or intervals.dtype.kind not in "iuf":
                raise DataError(
                    f"{self._at(name)}: intervals are {_kind(intervals)}, expected numbers (steps, 2): start and end"
                )
            if self._unlike(features):
                raise DataError(
                    f"{self._at(name)}: features are {_kind(features)}, expected {self._kind} (steps, width)"
                )
            if len(features) != len(intervals):
                raise DataError(
                    f"{self._at(name)}: {len(features):,} steps of features, but {len(intervals):,} intervals"
                )
            entry = self._recent[name] = _Entry(features, intervals[()].astype(np.float64))
        self._kept += entry.cost
        while self._kept > _KEPT and len(self._recent) > 1:
            self._kept -= self._recent.popitem(last=False)[1].cost
        return entry

    def _unlike(self, features: "h5py.Dataset") -> bool:
        import h5py

        strings = features.dtype.kind == "S" or h5py.check_string_dtype(features.dtype) is not None
        right = strings if self._kind == "words" else features.dtype.kind in "iuf"
        return not right or features.ndim not in (1, 2)

    def _width(self, names: list[str]) -> int:
        """D of the first entry that has steps."""
        for name in names:
            shape = self._entry(name).features.shape
            if shape[0]:
                return int(shape[1]) if len(shape) == 2 else 1
        raise DataError(f"{self.path}: not one of its {len(names):,} entries has a step; expected an entry a video")

    # --- the file

    def _data(self) -> "h5py.Group":
        """The group of all entries, of a file that this process has opened."""
        import h5py

        if self._open is None or self._open[0] != os.getpid():
            self.close()  # the parent's: HDF5 would take it up again and read at its position
            # files are often on read-only or network file systems, some of which refuse locks
            file = h5py.File(self.path, "r", locking=False)
            try:
                self._open = (os.getpid(), file, self._data_of(file))
            except BaseException:
                file.close()
                raise
        return self._open[2]

    def _data_of(self, file: "h5py.File") -> "h5py.Group":
        roots = [name for name in file if "data" in self._child(file, name, "group")]
        if len(roots) != 1:
            raise DataError(
                f"{self.path}: {len(roots)} of its groups ({', '.join(list(file)[:5])}) hold data, expected one, named "
                "after the sequence; is it a .csd file?"
            )
        data: h5py.Group = self._child(file[roots[0]], "data", "group")
        return data

    def _child(self, group: "h5py.Group", name: str, kind: Literal["group", "array"], entry: str | None = None) -> Any:
        """A group or an array that lies in this very file."""
        import h5py

        at = self._at(entry)
        link = group.get(name, getlink=True)
        if link is None:
            raise DataError(f"{at}: has no {name!r}, only {', '.join(list(group)[:5]) or 'nothing'}")
        if not isinstance(link, h5py.HardLink):
            raise DataError(
                f"{at}: {name!r} is a link to elsewhere, which a sequence has no use for; it is not followed"
            )
        found = group[name]
        if not isinstance(found, h5py.Group if kind == "group" else h5py.Dataset):
            raise DataError(f"{at}: {name!r} is no {kind}; is it a .csd file?")
        if kind == "array":
            if found.is_virtual or found.external:
                raise DataError(f"{at}: {name!r} is stored in other files, which a sequence has no use for; not read")
            elements = max(found.size or 0, math.prod(found.chunks or (0,)))
            if elements * found.dtype.itemsize > _LARGEST:
                raise DataError(
                    f"{at}: {name!r} claims to be {_kind(found)}, more than {_LARGEST / 2**30:g} GB; not read"
                )
        return found

    def _at(self, entry: str | None) -> str:
        return f"{self.path}: entry {entry!r}" if entry else str(self.path)

    @contextmanager
    def _explained(self, entry: str | None = None) -> Iterator[None]:
        """Says in a sentence what HDF5 says in its own words."""
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: no such file; expected a computational sequence (.csd)") from error
        except (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError) as error:
            said = " ".join(str(error).strip("'\"").split())
            raise DataError(
                f"{self._at(entry)}: cannot be read as a computational sequence (HDF5): {said}; it is another kind of "
                "file, or damaged: download it again"
            ) from error


def video_of(entry: str) -> str:
    """The video of an entry: ``a`` of ``a`` and of ``a[3]``."""
    return entry.split("[", 1)[0]


def entry_number(entry: str) -> tuple[str, int]:
    """Sorts ``a[2]`` before ``a[10]``."""
    video, _, rest = entry.partition("[")
    number = rest.removesuffix("]")
    return video, int(number) if number.isdecimal() else -1


def _word(value: object) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _kind(array: "h5py.Dataset") -> str:
    return f"{array.dtype} {array.shape}"
