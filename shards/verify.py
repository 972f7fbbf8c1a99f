"""Checks a packed data set against its index: sizes, checksums, and that each tar holds what its table says."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shards.errors import DataError, TransientError
from shards.files import sha256_of
from shards.foreign.arrays import DTYPES
from shards.foreign.samples import split_name
from shards.foreign.tar import TarReader
from shards.index import Index
from shards.remote.cache import Cache
from shards.remote.file import RemoteFile
from shards.tar import JSON, TENSORS, escape_key


def check_shard(index: Index, shard_no: int) -> list[str]:
    """What is wrong with one shard and its table, a sentence each; empty where all is well."""
    if index.origin:
        return _check_remote(index, shard_no)
    shard = index.shards[shard_no]
    wrong = [
        *_check_file(index.tar_path(shard_no), shard.url, shard.bytes, shard.sha256),
        *_check_file(index.table_path(shard_no), shard.table, shard.table_bytes, shard.table_sha256),
    ]
    return wrong or _check_structure(index, shard_no)


def _check_remote(index: Index, shard_no: int) -> list[str]:
    """As `check_shard`: what lies there, whatever the cache holds. Takes room for one shard at a time.

    Raises:
        ConfigError, TransientError: it does not come, or there is no room for it.
    """
    try:
        with TemporaryDirectory(prefix="mmsa-verify-") as folder:
            return _check_fetched(index, shard_no, Path(folder))
    except OSError as error:
        raise TransientError(
            f"{index.shards[shard_no].url}: cannot be fetched into a temporary folder ({error.strerror}); set TMPDIR "
            "to one with room for a shard"
        ) from error


def _check_fetched(index: Index, shard_no: int, folder: Path) -> list[str]:
    shard, wrong = index.shards[shard_no], []
    own = Cache(folder, limit=shard.bytes + shard.table_bytes, setting="TMPDIR")
    for file in index.files(shard_no):
        assert isinstance(file, RemoteFile)
        try:
            own.fetch(file.wanted)
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        return wrong
    for name, sha256 in ((shard.url, shard.sha256), (shard.table, shard.table_sha256)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        own.path(sha256).replace(folder / name)
    return _check_structure(index.model_copy(update={"origin": None, "folder": folder}), shard_no)


def _check_file(path: Path, name: str, size: int, sha256: str) -> list[str]:
    try:
        found_size = path.stat().st_size
        if found_size != size:
            return [f"{name}: is {found_size:,} bytes, the index says {size:,}"]
        found = sha256_of(path)
    except FileNotFoundError:
        return [f"{name}: is missing"]
    except OSError as error:
        return [f"{name}: cannot be read: {error.strerror}"]
    return [] if found == sha256 else [f"{name}: sha256 is {found[:12]}…, the index says {sha256[:12]}…"]


def _check_structure(index: Index, shard_no: int) -> list[str]:
    """The tar's members are those of the table, in its order, at its offsets. Reads headers only."""
    shard = index.shards[shard_no]
    try:
        rows = index.table(shard_no, verify=False).to_pylist()  # its checksum has just been compared
        if index.foreign:
            return _check_foreign(index, shard_no, rows)
    except DataError as error:
        return [str(error)]
    expected = [
        (escape_key(row["key"]) + suffix, row[f"{prefix}offset"], row[f"{prefix}size"])
        for row in rows
        for suffix, prefix in ((JSON, "json_"), (TENSORS, ""))
    ]
    try:
        with tarfile.open(index.tar_path(shard_no), "r:") as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar]
    except (tarfile.TarError, OSError) as error:
        return [f"{shard.url}: is not a readable tar: {error}"]
    for number, (is_there, should_be) in enumerate(zip(found, expected, strict=False)):
        if is_there != should_be:
            return [f"{shard.url}: member {number} is {is_there}, its table says {should_be} (name, offset, size)"]
    if len(found) != len(expected):
        return [f"{shard.url}: holds {len(found)} members, its table says {len(expected)}"]
    splits = {row["split"] for row in rows} - {shard.split}
    return [f"{shard.table}: has samples of {sorted(splits)}, the index says {shard.split}"] if splits else []


def _check_foreign(index: Index, shard_no: int, rows: list[dict[str, Any]]) -> list[str]:
    """What the table points at lies in the member that the layout names, of the sample that the row is of.

    Raises:
        DataError: the tar is damaged.
    """
    layout = {what: place.partition(":")[0] for what, place in index.layout.items()}
    shard, number = index.shards[shard_no], -1
    begins = [row["offset"] for row in rows]
    with TarReader(index.tar_path(shard_no)) as tar:
        for member in tar.members():
            number += number + 1 < len(rows) and member.begin == begins[number + 1]
            if number < 0:
                continue
            row, suffix = rows[number], split_name(member.name)[1]
            for what, begin, end in _pointed_at(row, index, layout, suffix):
                if not member.offset <= begin <= end <= member.offset + member.size:
                    return [f"{shard.url}: {what} of {row['key']!r} is not in its member {member.name!r}"]
    return [] if number + 1 == len(rows) else [f"{shard.url}: holds {number + 1} samples, its table has {len(rows)}"]


def _pointed_at(
    row: dict[str, Any], index: Index, layout: dict[str, str], suffix: str
) -> Iterator[tuple[str, int, int]]:
    """(what, first byte, last byte) of all that the row says to be in the member of this suffix."""
    for what, member in layout.items():
        if member != suffix:
            continue
        if what == "raw_text" and row["json_size"]:
            yield what, row["json_offset"], row["json_offset"] + row["json_size"]
        if f"offset_{what}" in row and row[f"dtype_{what}"]:
            steps = row["n_tokens"] if what == "tokens" else row[f"length_{what}"] * index.modalities[what].width
            begin = row[f"offset_{what}"]
            yield what, begin, begin + steps * DTYPES[row[f"dtype_{what}"]].itemsize
