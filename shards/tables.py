"""The Arrow tables: what is known of each sample of a shard."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shards.utterance import MODALITIES

_NAME = pa.dictionary(pa.int8(), pa.string())
"""One of a few names: a byte a row."""

_NUMBERS = {pa.int32(): np.int32, pa.int64(): np.int64, pa.float32(): np.float32}


def table_schema(tasks: tuple[str, ...], foreign: bool = False) -> pa.Schema:
    """Columns of a shard's table.

    ``key``; ``offset`` and ``size`` of the safetensors payload in the tar, ``json_offset`` and ``json_size`` of the
    JSON payload, in bytes; ``split``; ``length_<modality>``, 0 where absent; ``n_tokens``; ``label_<task>``, NaN where
    absent.

    Of a shard that somebody else wrote (`shards.foreign`) ``offset`` and ``size`` are those of the whole sample, and
    ``json_offset`` and ``json_size`` those of the member that its transcript is in, 0 where there is none. There is
    more for each modality and for ``tokens``: ``offset_…`` of its first number in the tar; ``dtype_…``, the NumPy name
    of the numbers' type, '' where absent; ``non_finite_…``, how many of them are not finite, to be read as zero.
    """
    own = [
        pa.field("key", pa.string(), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("offset", "size", "json_offset", "json_size")),
        pa.field("split", _NAME, nullable=False),
        *(pa.field(f"length_{name}", pa.int32(), nullable=False) for name in MODALITIES),
        pa.field("n_tokens", pa.int32(), nullable=False),
        *(pa.field(f"label_{task}", pa.float32(), nullable=False) for task in tasks),
    ]
    places = [
        pa.field(f"{what}_{name}", kind, nullable=False)
        for name in (*MODALITIES, "tokens")
        for what, kind in (("offset", pa.int64()), ("dtype", _NAME), ("non_finite", pa.int32()))
    ]
    return pa.schema(own + places if foreign else own)


def table_bytes(columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> bytes:
    """An Arrow file of these columns; the same columns give the same bytes."""
    sink = pa.BufferOutputStream()
    arrays = [_column(columns[field.name], field.type) for field in schema]
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """What `pa.array` gives of values none of which is missing; but that imports pandas, half a second a process."""
    if pa.types.is_dictionary(kind):
        return _column(values, kind.value_type).dictionary_encode().cast(kind)
    if not pa.types.is_string(kind):
        numbers = np.array(values, _NUMBERS[kind])
        return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))
