"""The index of WebDataset tars that somebody else wrote: every tar read once, the tars themselves left as they are."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import ConfigError, DataError
from shards.foreign.arrays import FLOATS
from shards.foreign.mapping import Layout, layout
from shards.foreign.place import Place
from shards.foreign.reading import Rules
from shards.foreign.scan import FEW, SPLIT_NAMES, Job, Scanned, scan
from shards.index import Index, Modality
from shards.moments import Moments
from shards.packing.job import installed
from shards.packing.processes import Here, Processes, chosen
from shards.suggest import counted, has, was
from shards.utterance import SPLITS
from shards.write import MEGABYTE, Show, silent


@dataclass(frozen=True)
class Options:
    """What `mmsa-dist index` may be told.

    Attributes:
        places: what -> its member and field, as `shards.foreign.mapping` has it.
        splits: split -> patterns of the names of its tars.
        label_range: default -1..1 where there are unimodal labels, else -3..3.
        name: of the data set; the folder's by default.
        allow_absent, strip_padding: see `Rules`.
        overwrite: replace an index that is there.
        workers: processes, as in packing.
    """

    places: Mapping[str, str | None]
    splits: Mapping[str, Sequence[str]]
    label_range: tuple[float, float] | None = None
    name: str | None = None
    allow_absent: bool = False
    strip_padding: bool = False
    overwrite: bool = False
    workers: int | None = 1


def index_tars(
    given: Sequence[Path], out: Path | None, options: Options, show: Show = silent
) -> tuple[Index, list[str]]:
    """Indexes tars in place, or from the folder `out` with links to them.

    Args:
        given: tars, or folders of them.

    Returns:
        The index, and what was found, guessed or odd, in sentences.

    Raises:
        ConfigError: the options do not fit, or the folder is taken or may not be written.
        DataError: a tar or a sample is not as it should be.
        TransientError: the disk is full, or a process was killed. In any case nothing new stays behind.
    """
    tars = _tars(given)
    place = Place(tars, out, options.overwrite)
    found = layout(tars, options.places)
    tasks = set(found.tasks)
    rules = Rules(
        found,
        options.label_range or ((-1.0, 1.0) if tasks & {"T", "A", "V"} else (-3.0, 3.0)),
        options.allow_absent,
        options.strip_padding,
    )
    jobs = [
        Job(number, tar, url, _split(url, tar, options, found), rules)
        for number, (tar, url) in enumerate(zip(tars, place.urls, strict=True))
    ]
    total = _Total(jobs, rules)
    with place.open():
        for number, scanned in enumerate(_scanned(jobs, options.workers, show)):
            place.add(number, scanned)
            total.add(scanned)
        total.check(place.folder)
        index = total.index(place.folder, options.name or place.folder.name or "data")
        place.save(index)
    return Index.load(place.folder), total.notes(options)


def _scanned(jobs: Sequence[Job], workers: int | None, show: Show) -> Iterable[Scanned]:
    """What was found in each tar, in their order."""
    sizes = [job.path.stat().st_size for job in jobs]
    number = chosen(workers, len(jobs), sum(sizes))
    # those who pack take any work that has a number and a name
    make: Any = scan
    crew: Any = Processes(make, number) if number > 1 else Here(make)
    done = told = 0
    with crew, show(sum(sizes) // MEGABYTE, "indexing (MB)", "") as tell:

        def report(samples: int, bytes_: int) -> None:
            nonlocal done, told
            done += bytes_
            tell(done // MEGABYTE - told, bytes_)
            told = done // MEGABYTE

        yield from crew.work(tuple(jobs), report)


class _Total:
    """What was found in all tars."""

    def __init__(self, jobs: Sequence[Job], rules: Rules) -> None:
        self._jobs, self._rules = jobs, rules
        self._scanned: list[Scanned] = []
        self._widths: dict[str, tuple[int, str]] = {}
        self._non_finite, self._absent, self._padding = Counter[str](), Counter[str](), Counter[str]()
        self._unread = Counter[str]()

    def add(self, scanned: Scanned) -> None:
        """Takes in what was found in the next tar; its table is written by now.

        Raises:
            DataError: it does not fit those before it.
        """
        for modality, width in scanned.widths.items():
            other, where = self._widths.setdefault(modality, (width, scanned.shard.url))
            if width != other:
                raise DataError(
                    f"{self._jobs[len(self._scanned)].path}: {modality} is of width {width}, in {where} of width "
                    f"{other}; they cannot be one data set"
                )
        scanned.table = b""
        self._non_finite.update(scanned.non_finite)
        self._absent.update(scanned.absent)
        self._padding.update(scanned.padding)
        self._unread.update(scanned.unread)
        self._scanned.append(scanned)

    def check(self, folder: Path) -> None:
        """What only the whole can tell.

        Raises:
            DataError: a modality is nowhere, or a key is there twice.
        """
        train = [scanned for scanned in self._scanned if scanned.shard.split == "train"]
        have = {modality for scanned in train for modality in scanned.moments} if train else set(self._widths)
        for modality in self._rules.layout.modalities:
            place = self._rules.layout.places[modality]
            if modality not in have:
                raise DataError(
                    f"{folder}: {modality} ({place}) has not one finite value in any {'train ' if train else ''}sample;"
                    f" leave it out with --{modality} none"
                )
        self._check_keys(folder)

    def index(self, folder: Path, name: str) -> Index:
        """The index, not saved yet."""
        order = sorted(range(len(self._jobs)), key=lambda n: (SPLITS.index(self._scanned[n].shard.split), n))
        shards = tuple(self._scanned[n].shard for n in order)
        found = self._rules.layout
        dtypes = {dtype for scanned in self._scanned for dtype in scanned.dtypes}
        return Index(
            folder=folder,
            name=name,
            synthetic=False,
            dtype=[dtype for dtype in FLOATS if dtype in dtypes or dtype == "float16"][-1] if dtypes else "float32",
            modalities={
                m: Modality(width=self._widths[m][0], max_length=max(s.longest[m] for s in self._scanned))
                for m in found.modalities
            },
            tasks=found.tasks,
            label_range=self._rules.label_range,
            layout=found.dump(),
            has_raw_text="raw_text" in found.places,
            has_tokens="tokens" in found.places,
            splits={split: sum(shard.samples for shard in shards if shard.split == split) for split in SPLITS},
            shards=shards,
            statistics={m: self._moments(m).result() for m in found.modalities},
            non_finite={m: self._non_finite[m] for m in found.modalities},
            source={
                "format": "webdataset",
                "file": str(Path(self._jobs[0].path).absolute().parent),
                "sha256": hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest(),
            },
            tool_version=installed("mmsa-dist"),
            seed=0,
        )

    def notes(self, options: Options) -> list[str]:
        """What was found, guessed, odd or mended, in sentences."""
        guessed = [what for what in self._rules.layout.places if not options.places.get(what)]
        places = self._rules.layout.dump()
        told = [
            f"{how}: " + ", ".join(f"{what} in {place}" for what, place in places.items() if (what in guessed) == found)
            for how, found in (("found", True), ("as told", False))
            if any((what in guessed) == found for what in places)
        ]
        for name, n in self._non_finite.items():
            told += [f"{name}: {counted(n, 'value')} {was(n)} NaN or infinite, read as zero"] if n else []
        for name, n in self._absent.items():
            told += [f"{name}: {counted(n, 'sample')} {has(n)} none; marked absent"] if n else []
        for name, n in self._padding.items():
            told += [f"{name}: {counted(n, 'step')} at the ends of samples, padding: not read"] if n else []
        if self._unread:
            names = ", ".join(f".{suffix} ({n:,})" for suffix, n in sorted(self._unread.items())[:8])
            told.append(f"members that are never read: {names}{', …' if len(self._unread) > 8 else ''}")
        few = sorted(set[float]().union(*(scanned.labels for scanned in self._scanned)))
        if options.label_range is None and len(few) <= FEW and all(label.is_integer() for label in few) and few:
            low, high = self._rules.label_range
            told.append(
                f"labels are whole numbers from {few[0]:g} to {few[-1]:g}: classes? They are taken for intensities "
                f"from {low:g} to {high:g}; see --label-range, or leave them out with --label none"
            )
        return told

    def _moments(self, modality: str) -> Moments:
        """Those of the train split, merged in the order of the tars."""
        moments = Moments(self._widths[modality][0])
        for scanned in self._scanned:
            if modality in scanned.moments:
                moments.merge(Moments.from_parts(*scanned.moments[modality]))
        return moments

    def _check_keys(self, folder: Path) -> None:
        """Every key once in the whole data set. Holds 8 bytes a sample."""
        ordered = np.sort(np.concatenate([scanned.digests for scanned in self._scanned]))
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice):
            return
        places: dict[str, list[str]] = {}
        for job, scanned in zip(self._jobs, self._scanned, strict=True):
            rows = np.flatnonzero(np.isin(scanned.digests, twice))
            if len(rows):
                keys = pa.ipc.open_file(pa.memory_map(str(folder / scanned.shard.table))).read_all()["key"]
                for key in keys.take(rows).to_pylist():
                    places.setdefault(key, []).append(str(job.path))
        repeated = {key: where for key, where in places.items() if len(where) > 1}
        if repeated:  # else two different keys share a digest, which is no fault of theirs
            key, where = next(iter(repeated.items()))
            more = f", and {len(repeated) - 1:,} more keys occur more than once" if len(repeated) > 1 else ""
            raise DataError(
                f"sample {key!r} is there more than once: in {' and in '.join(where[:3])}{more}; keys must be unique"
            )


_PACKED = re.compile(r"\.(tar\.[a-z0-9]+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
"""Names of compressed tars."""


def _tars(given: Sequence[Path]) -> list[Path]:
    """The tars, by name: their order does not depend on how they were given."""
    found: list[Path] = []
    for path in given:
        if re.match(r"[a-z0-9+]+://?", str(path)):
            raise ConfigError(f"{path}: tars are indexed where their bytes are read; run this where they are files")
        try:
            if not path.exists():
                raise DataError(f"{path}: no such file; give tars, or folders of them")
            if not path.is_dir() and not path.is_file():
                raise DataError(f"{path}: is no file; give tars, or folders of them")
            if path.is_dir():
                next(path.iterdir(), None)  # of a folder that may not be read, `rglob` finds nothing
            inside = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
            strange = next((tar for tar in inside if not tar.is_file()), None)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        if strange:
            raise DataError(
                f"{strange}: is a folder, or a link that leads nowhere; give the tars by name, or (of git-annex) get "
                "them first"
            )
        if packed := sorted(other for other in path.rglob("*") if _PACKED.search(other.name)) if path.is_dir() else []:
            more = f" (and {len(packed) - 1:,} more like it)" if len(packed) > 1 else ""
            raise DataError(
                f"{packed[0]}: is a compressed tar{more}, which samples cannot be read from in place; unpack it first "
                "(gunzip, unzstd, unxz), or give the tars by name"
            )
        if not inside:
            raise DataError(f"{path}: no .tar in this folder; give tars, or folders of them")
        found += inside
    if not found:
        raise ConfigError("no tars; give some, e.g. mmsa-dist index shards/*.tar")
    return sorted(set(found), key=lambda path: str(path.absolute()))


def _split(url: str, tar: Path, options: Options, found: Layout) -> str | None:
    """The split that a tar's name says; None where its samples do.

    Raises:
        ConfigError: it says none, or several.
    """
    splits = options.splits
    if any(splits.values()):
        names = {url, str(tar), tar.name}
        said = [split for split, globs in splits.items() if any(fnmatch(n, glob) for glob in globs for n in names)]
        if len(said) != 1:
            asked = f"is matched by {' and '.join(f'--{split}' for split in said)}" if said else "is matched by none"
            raise ConfigError(f"{tar}: {asked} of --train, --valid, --test; each tar is of one split")
        return said[0]
    if options.places.get("split"):
        return None
    for words in (re.split(r"[^a-z]+", tar.stem.lower()), [tar.absolute().parent.name.lower()]):
        said = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
        if len(said) > 1:
            raise ConfigError(
                f"{tar}: its name says {' and '.join(said)}; say which tars are what with --train, --valid, --test "
                "PATTERN"
            )
        if said:
            return said[0]
    if "split" not in found.places:
        raise ConfigError(
            f"{tar}: its name does not say train, valid or test; say which tars are what with --train, --valid, "
            "--test PATTERN, or where a sample says it with --split json:FIELD"
        )
    return None
