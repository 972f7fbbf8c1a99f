"""Checks a packed data set against its index: sizes, checksums, and that each tar holds what its table says."""

import tarfile
from pathlib import Path

from shards.errors import DataError
from shards.files import sha256_of
from shards.index import Index
from shards.tar import JSON, TENSORS, escape_key


def check_shard(index: Index, shard_no: int) -> list[str]:
    """What is wrong with one shard and its table, a sentence each; empty where all is well."""
    shard = index.shards[shard_no]
    wrong = [
        *_check_file(index.tar_path(shard_no), shard.url, shard.bytes, shard.sha256),
        *_check_file(index.table_path(shard_no), shard.table, shard.table_bytes, shard.table_sha256),
    ]
    return wrong or _check_structure(index, shard_no)


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
