"""`mmsa-dist pack`, `index`, `unpack`, `inspect` and `verify`."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shards.command_line import parsed
from shards.errors import ConfigError, DataError
from shards.files import is_utf8
from shards.formats import FORMATS
from shards.index import Index
from shards.options import Flag, option
from shards.progress import console, meter, remarks, track
from shards.suggest import counted, nearest, told_bytes
from shards.utterance import SPLITS
from shards.write import MEGABYTE

PACK_HELP = """usage: mmsa-dist pack FORMAT ... --out FOLDER

Writes a data set as WebDataset shards with an index.

formats:
  mmsa FILE.pkl               the feature pickle of the MMSA toolkit, aligned or unaligned
  mult FILE.pkl               the pickle of MulT: MOSI, MOSEI or IEMOCAP, aligned or not
  table FILE.csv [FILE.npz]   a csv with one row an utterance, and features for the same ids
  folder FILE.csv FOLDER      a csv with one row an utterance, and a .npy or .npz file for each: your own data
  csd                         computational sequences (.csd) of the CMU-MultimodalSDK, by segments or words
  generated                   synthetic data at the size of a published set

examples:
  mmsa-dist pack mmsa MOSI/Processed/unaligned_50.pkl --out data/mosi
  mmsa-dist pack mult mosi_data_noalign.pkl --out data/mosi-mult
  mmsa-dist pack table utterances.csv features.npz --split split_official --audio audio_opensmile --out data/mosi
  mmsa-dist pack folder label.csv features --out data/mine
  mmsa-dist pack csd --labels CMU_MOSI_Opinion_Labels.csd --audio CMU_MOSI_COVAREP.csd --folds folds.yaml --out data/csd
  mmsa-dist pack generated --like mosi --out data/synthetic

`mmsa-dist pack FORMAT --help` lists the options of a format."""


def pack(argv: list[str]) -> int:
    """Entry of `mmsa-dist pack`."""
    from shards.write import pack as write

    if not argv or argv[0] in ("-h", "--help"):
        print(PACK_HELP)
        return 0 if argv else 2
    if argv[0] not in FORMATS:
        raise ConfigError(f"pack: unknown format {argv[0]!r}{nearest(argv[0], FORMATS)}")
    options = parsed(FORMATS[argv[0]], argv[1:], f"mmsa-dist pack {argv[0]}", twins=False)
    options.check()
    try:
        index, notes = write(
            options.source(),
            options.out,
            name=options.name,
            dtype=options.dtype,
            seed=options.seed,
            shard_bytes=int(options.shard_size * MEGABYTE),
            overwrite=options.overwrite,
            show=meter,
            workers=options.workers,
            ray=(options.address or os.environ.get("RAY_ADDRESS") or "local") if options.ray else None,
        )
    except KeyboardInterrupt as stopped:
        for note in getattr(stopped, "__notes__", []):
            remarks.print(note, soft_wrap=True)
        raise
    _tell(index, notes, options.out)
    return 0


@dataclass(frozen=True)
class Inspect:
    """Shows what a packed data set holds."""

    folder: Annotated[tyro.conf.Positional[str], option("FOLDER")]
    """Folder that `mmsa-dist pack` wrote, or its address (s3://bucket/mosi)."""
    json: Flag = False
    """Print it as JSON."""
    fast: Flag = False
    """Do not compare the transcripts of the splits, which reads every shard (and fetches remote ones)."""
    picture: Annotated[Path | None, option("FILE.png")] = None
    """Also draw labels and lengths, per split."""


def inspect(argv: list[str]) -> int:
    """Entry of `mmsa-dist inspect`."""
    from shards import picture
    from shards.inspect import Columns, summary
    from shards.shown import render

    options = parsed(Inspect, argv, "mmsa-dist inspect", twins=False)
    if options.picture:
        picture.check(options.picture)
    index = Index.load(options.folder)
    columns = Columns.of(index)
    told = summary(index, options.fast, track, columns)
    if options.picture:
        picture.draw(index, columns, options.picture)
    if options.json:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        console.print(render(told))
    return 0


@dataclass(frozen=True)
class Unpack:
    """Writes a packed data set as a feature pickle of the MMSA toolkit, for other programs to train on."""

    folder: Annotated[tyro.conf.Positional[str], option("FOLDER")]
    """Folder that `mmsa-dist pack` wrote, or its address (s3://bucket/mosi)."""
    to: Annotated[Path, option("FILE.pkl")]
    """The pickle to write."""
    layout: Literal["auto", "aligned", "unaligned"] = "auto"
    """aligned: one length for all modalities; unaligned: lengths of their own; auto: as the source was."""
    overwrite: Flag = False
    """Replace the file if it is there."""


def unpack(argv: list[str]) -> int:
    """Entry of `mmsa-dist unpack`."""
    from shards.unpack import passes
    from shards.unpack import unpack as write

    options = parsed(Unpack, argv, "mmsa-dist unpack", twins=False)
    index = Index.load(options.folder)
    with meter(index.num_samples * passes(index), "unpacking") as tell:
        notes = write(
            index,
            options.to,
            layout=options.layout,
            overwrite=options.overwrite,
            report=lambda samples: tell(samples, 0),
        )
    for note in notes:
        remarks.print(f"note: {note}", soft_wrap=True, markup=False)
    print(f"{options.to}: {counted(index.num_samples, 'sample')}, {told_bytes(options.to.stat().st_size)}")
    return 0


_Place = Annotated[str | None, option("MEMBER[:FIELD]")]
_Globs = Annotated[tuple[str, ...], option("PATTERN...")]


@dataclass(frozen=True)
class IndexTars:
    """Indexes WebDataset tars that somebody else wrote, in place: each is read once, none is changed or copied.

    A place is MEMBER, the suffix of a file of each sample (audio.npy), or MEMBER:FIELD, a tensor or a JSON field in it
    (features.npz:audio, json:label.sentiment). What has a usual name is found by itself; none leaves it out. Numbers
    are read where they stand, so they must be in .npy, .npz (np.savez) or .safetensors members.
    """

    tars: Annotated[tyro.conf.Positional[tuple[Path, ...]], option("TAR...")]
    """The tars, or folders of them; each of one split."""
    out: Annotated[Path | None, option("FOLDER")] = None
    """Folder for the index, with links to the tars. Default: beside the tars."""
    text: _Place = None
    """Text features, e.g. text.npy."""
    audio: _Place = None
    """Audio features, e.g. features.npz:audio."""
    vision: _Place = None
    """Vision features, e.g. safetensors:vision."""
    tokens: _Place = None
    """Token ids (steps,) for a text encoder."""
    raw_text: _Place = None
    """The transcript, e.g. txt or json:text."""
    label: _Place = None
    """The multimodal label, e.g. cls or json:label; none for tars without labels."""
    label_text: _Place = None
    """The label of the text alone."""
    label_audio: _Place = None
    """The label of the audio alone."""
    label_vision: _Place = None
    """The label of the vision alone."""
    text_length: _Place = None
    """Number of real text steps, the rest being padding, e.g. json:text_length."""
    audio_length: _Place = None
    """Number of real audio steps."""
    vision_length: _Place = None
    """Number of real vision steps."""
    split: _Place = None
    """The sample's split, e.g. json:split. Default: what the tar's name says."""
    train: _Globs = ()
    """Names of the tars of the train split, instead of those that have the word train (valid, val, dev; test) in their
    name, or lie in a folder of that name."""
    valid: _Globs = ()
    """Names of the tars of the valid split."""
    test: _Globs = ()
    """Names of the tars of the test split."""
    label_range: Annotated[tuple[float, float] | None, option("LOW HIGH")] = None
    """Lowest and highest possible label. Default: -1 1 where there are unimodal labels (SIMS), else -3 3."""
    name: Annotated[str | None, option("NAME")] = None
    """Name of the data set. Default: the folder's."""
    allow_absent: Flag = False
    """Samples may lack a modality, or their transcript."""
    strip_padding: Flag = False
    """Steps at a sample's end that are all zero are padding."""
    overwrite: Flag = False
    """Replace an index that is there."""
    workers: Annotated[int | None, option("N")] = None
    """Processes that read, 1 for none beside this one. Default: one a core, fewer where there is little to do."""


def index(argv: list[str]) -> int:
    """Entry of `mmsa-dist index`."""
    from shards.foreign.build import Options, index_tars
    from shards.foreign.mapping import FEATURES, OTHERS

    options = parsed(IndexTars, argv, "mmsa-dist index", twins=False)
    low, high = options.label_range or (-1, 1)
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"--label-range {low:g} {high:g}: expected two numbers, the lower one first")
    if not is_utf8(options.name or ""):
        raise ConfigError(f"--name {options.name!r} has bytes that are no UTF-8; give another")
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers {options.workers}: expected a number of processes, 0 or more")
    made, notes = index_tars(
        options.tars,
        options.out,
        Options(
            {what: getattr(options, what) for what in (*FEATURES, *OTHERS)},
            {split: getattr(options, split) for split in SPLITS},
            options.label_range,
            options.name,
            options.allow_absent,
            options.strip_padding,
            options.overwrite,
            options.workers,
        ),
        meter,
    )
    _tell(made, notes, made.folder)
    return 0


def _tell(index: Index, notes: list[str], folder: Path) -> None:
    """What became of a packing or an indexing."""
    for note in notes:
        remarks.print(f"note: {note}", soft_wrap=True, markup=False)
    stored = sum(shard.bytes + shard.table_bytes for shard in index.shards)
    counts = ", ".join(f"{split} {count:,}" for split, count in index.splits.items())
    modalities = ", ".join(f"{m} {part.width}" for m, part in index.modalities.items())
    what = modalities or "transcripts only"
    shards = counted(len(index.shards), "shard")
    print(f"{index.name}: {counts} samples; {what}; {shards}, {told_bytes(stored)}")
    print(f"see what is inside with: mmsa-dist inspect {folder}")


@dataclass(frozen=True)
class Verify:
    """Checks every checksum of a packed data set, and that each shard holds what the index says."""

    folder: Annotated[tyro.conf.Positional[str], option("FOLDER")]
    """Folder that `mmsa-dist pack` wrote, or its address (s3://bucket/mosi)."""
    shards: Annotated[int | None, option("N")] = None
    """Check the first N shards of the index alone. Default: all."""


def verify(argv: list[str]) -> int:
    """Entry of `mmsa-dist verify`."""
    from shards.verify import check_shard

    options = parsed(Verify, argv, "mmsa-dist verify")
    if options.shards is not None and options.shards < 1:
        raise ConfigError(f"--shards {options.shards}: expected a number of shards, 1 or more")
    index = Index.load(options.folder)
    numbers = range(len(index.shards))[: options.shards]
    wrong = [sentence for n in track(numbers, len(numbers), "verifying") for sentence in check_shard(index, n)]
    if wrong:
        raise DataError(
            f"{index.where}: {len(wrong)} of {2 * len(numbers)} files are not what was packed; copy them again, or "
            "pack again:\n  " + "\n  ".join(wrong)
        )
    samples = sum(index.shards[n].samples for n in numbers)
    part = f" of {len(index.shards)}" if len(numbers) < len(index.shards) else ""
    print(f"{index.name}: {counted(len(numbers), 'shard')}{part}, {samples:,} samples, every checksum as packed")
    return 0
