"""One shard being written: a standard WebDataset tar, its Arrow table, and where each payload lies in the tar.

A sample is two members, ``<escaped key>.json`` and ``<escaped key>.safetensors``. Everything that could differ between
two packings (times, owners, modes) is fixed, so the same samples give the same bytes.
"""

import hashlib
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from shards.errors import DataError
from shards.files import write_atomic
from shards.index import Shard, table_schema
from shards.utterance import MODALITIES, Utterance

JSON, TENSORS = ".json", ".safetensors"
"""Suffixes of a sample's members, in their order."""


def escape_key(key: str) -> str:
    """A key as a member name: WebDataset cuts at the first dot and reads a slash as a folder, so both are escaped.

    Raises:
        DataError: the key is empty or no valid unicode.
    """
    try:
        escaped = quote(key, safe="$").replace(".", "%2E").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise DataError(f"id {key!r} is not valid unicode; rename it") from error
    if not escaped:
        raise DataError("a sample has an empty id; every sample needs one of its own")
    return escaped


def unescape_key(name: str) -> str:
    """The key that `escape_key` made `name` of."""
    return unquote(name, errors="strict")


class ShardWriter:
    """Writes samples of one split into ``<stem>.tar``; `close` adds ``<stem>.arrow`` and returns the shard's entry.

    Args:
        folder: where both files go.
        stem: their name without suffix, e.g. ``train-00000``.
        tasks: labels that the data set has.
    """

    def __init__(self, folder: Path, stem: str, split: str, tasks: tuple[str, ...]) -> None:
        self.bytes = 0
        self._folder, self._stem, self._split, self._tasks = folder, stem, split, tasks
        self._hash = hashlib.sha256()
        self._columns: dict[str, list[Any]] = {name: [] for name in table_schema(tasks).names}
        self._file = (folder / f"{stem}.tar").open("wb")

    @property
    def samples(self) -> int:
        return len(self._columns["key"])

    def add(self, utterance: Utterance) -> None:
        """Appends a sample; `utterance.modalities` are stored in the dtype they have."""
        name = escape_key(utterance.key)
        tensors = dict(utterance.modalities)
        if utterance.tokens is not None:
            tensors["tokens"] = utterance.tokens
        labels = {task: _short(utterance.labels[task]) for task in self._tasks if task in utterance.labels}
        described = {"key": utterance.key, "split": utterance.split, "labels": labels}
        if utterance.raw_text is not None:
            described["raw_text"] = utterance.raw_text
        text = json.dumps(described, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        json_offset, json_size = self._member(name + JSON, text.encode())
        offset, size = self._member(name + TENSORS, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
        row = {
            "key": utterance.key,
            "offset": offset,
            "size": size,
            "json_offset": json_offset,
            "json_size": json_size,
            "split": utterance.split,
            **{f"length_{m}": len(tensors[m]) if m in tensors else 0 for m in MODALITIES},
            "n_tokens": 0 if utterance.tokens is None else len(utterance.tokens),
            **{f"label_{task}": utterance.labels.get(task, float("nan")) for task in self._tasks},
        }
        for column, value in row.items():
            self._columns[column].append(value)

    def close(self) -> Shard:
        """Ends the tar, writes the table, both onto the disk."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sink = pa.BufferOutputStream()
        schema = table_schema(self._tasks)
        columns = [
            pa.array(self._columns[name], pa.string()).dictionary_encode().cast(field.type)
            if pa.types.is_dictionary(field.type)
            else pa.array(self._columns[name], field.type)
            for name, field in zip(schema.names, schema, strict=True)
        ]
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        table = sink.getvalue().to_pybytes()
        write_atomic(self._folder / f"{self._stem}.arrow", table)
        return Shard(
            url=f"{self._stem}.tar",
            bytes=self.bytes,
            sha256=self._hash.hexdigest(),
            samples=self.samples,
            split=self._split,
            table=f"{self._stem}.arrow",
            table_bytes=len(table),
            table_sha256=hashlib.sha256(table).hexdigest(),
        )

    def abandon(self) -> None:
        """Lets go of the file; its folder is about to be removed."""
        with suppress(OSError):  # a full disk is full again when the rest of the buffer is flushed
            self._file.close()

    def _member(self, name: str, payload: bytes) -> tuple[int, int]:
        """Writes one member; (offset, size) of its payload."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        info.mode = 0o444
        self._write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self.bytes
        self._write(payload)
        self._write(bytes(-len(payload) % tarfile.BLOCKSIZE))
        return offset, len(payload)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)


def _short(label: float) -> float | None:
    """The label as stored (float32) in its shortest spelling: 2.4, not 2.4000000953674316; None for a missing one."""
    return None if np.isnan(label) else float(str(np.float32(label)))
