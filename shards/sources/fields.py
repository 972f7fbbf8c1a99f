"""The values of a feature pickle, made one kind whatever they were: arrays, lists, arrays of objects, byte strings.

Shapes: N samples, T steps, D width.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.sources import pickles
from shards.utterance import SPLITS

_SCALARS = frozenset((int, float, bool))

MOST_PARTS = 100
"""Parts of an id that is told in parts: more than any has."""

_BITS = 256
"""Of a whole number that is a name: Python refuses to spell out those of some 14,000."""

_SHOWN = 80
"""Characters of a key that a message shows."""

_LEAVES, _SHARED, _WORD = 1 << 24, 1 << 10, 100
"""Numbers in a list that are always taken; how often each may stand in for others beyond that; letters of a string."""


def splits(where: str, content: Any) -> dict[Any, Any]:
    """`content`, which has at least one split.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(content, dict) or not set(content) & set(SPLITS):
        raise DataError(
            f"{where}: holds {pickles.describe(content)}"
            + (f" with keys {listed(content)}" if isinstance(content, dict) else "")
            + f", expected a dict with the splits {', '.join(SPLITS)}"
        )
    return content


def others(content: dict[Any, Any]) -> list[str]:
    """Sentences about what has no place in a data set: splits of one's own, as SIMSv2's of unlabelled samples."""
    extra = [shown(name) for name in content if name not in SPLITS]
    return [f"{', '.join(extra)}: is none of the splits {', '.join(SPLITS)}; left out"] if extra else []


def listed(content: dict[Any, Any]) -> str:
    return ", ".join(sorted(map(shown, content))[:20])


def shown(key: object) -> str:
    """A dict's key as messages name it."""
    name = text(key)
    return f"<{pickles.describe(key)}>" if name is None else name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"


def text(value: object) -> str | None:
    """A string of any of the kinds that pickles hold, a number of usual size too; None for anything else.

    Bytes are taken as UTF-8, or where they are not, as Latin-1: so no two different ones become one.
    """
    if isinstance(value, pickles.ByteString):
        value = value.encode("latin1")
    if isinstance(value, bytes | memoryview):
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            return str(value, "latin1")
    if isinstance(value, str) or (isinstance(value, int | np.integer) and abs(int(value)).bit_length() <= _BITS):
        return str(value)
    return None


def rows(at: str, value: Any) -> Any:
    """`value`, which has one entry a sample. A string has letters, a dict has keys: neither are entries."""
    if not isinstance(value, list | tuple) and not (isinstance(value, np.ndarray) and value.ndim):
        raise DataError(f"{at} is {pickles.describe(value)}, expected a list or an array with one entry a sample")
    return value


def array(at: str, value: Any) -> np.ndarray:
    """`value` as an array."""
    try:
        _check_bounded(at, value)
        return np.asarray(value)
    except MemoryError as error:
        raise DataError(
            f"{at} is {pickles.describe(value)} that does not fit into memory, expected an array"
        ) from error
    except (ValueError, RecursionError) as error:  # a list may hold itself
        raise DataError(
            f"{at} is {pickles.describe(value)} whose entries differ in length or depth, expected an array"
        ) from error


def _check_bounded(at: str, value: Any, arrays: bool = True) -> None:
    """That the lists in `value` do not stand for far more numbers than the file can hold.

    A list may hold another a thousand times, and that one a third: a few kB become more than any memory. A little of
    that is usual (one row of zeros for all padding).

    Args:
        arrays: arrays within are copied, too; otherwise they count as one.

    Raises:
        DataError: they do, or a list holds itself, or a long string where numbers are expected.
    """
    if not isinstance(value, list | tuple):
        return
    counts: dict[int, int] = {}
    held = 0

    def counted(items: list[Any] | tuple[Any, ...]) -> int:
        nonlocal held
        if (known := counts.get(id(items))) is not None:
            if known < 0:
                raise RecursionError
            return known
        counts[id(items)] = -1
        held += len(items)
        total = len(items)
        if not _SCALARS.issuperset(map(type, items)):
            total = 0
            for item in items:
                if isinstance(item, list | tuple):
                    total += counted(item)
                elif isinstance(item, np.ndarray | memoryview) and arrays:
                    total += item.nbytes
                elif isinstance(item, str | bytes) and len(item) > _WORD:
                    raise DataError(f"{at} is {pickles.describe(value)} with a string in it, expected numbers")
                else:
                    total += 1
        counts[id(items)] = total
        return total

    try:
        total = counted(value)
    except RecursionError as error:
        raise DataError(
            f"{at} is {pickles.describe(value)} whose entries differ in length or depth, expected an array"
        ) from error
    if total > max(_LEAVES, _SHARED * held):
        raise DataError(
            f"{at} is {pickles.describe(value)} in which lists repeat each other until they stand for {total:.0e} "
            "numbers; expected an array"
        )


def numbers(at: str, value: Any) -> np.ndarray:
    """(N,) numbers from a list or an array, whatever its unit dimensions."""
    if value is None:
        raise DataError(f"{at} is None; leave the key out or fill it")
    found = array(at, value)
    if found.dtype == object:
        with suppress(TypeError, ValueError, OverflowError):
            found = found.astype(np.float64)
    if found.dtype.kind not in "iufb" or found.size != len(value):
        raise DataError(f"{at} is {pickles.describe(found)}, expected one number a sample")
    return found.reshape(-1)


def features(at: str, value: Any) -> tuple[Sequence[np.ndarray], int | None]:
    """The samples' features (T, D), and T where all have the same; None where they differ, without padding then.

    Nothing is copied of what is an array already.
    """
    if isinstance(value, np.ndarray) and value.dtype != object:
        if value.ndim == 2:
            value = value[:, None]  # one vector a sample is one step
        if value.ndim != 3 or value.dtype.kind not in "iuf":
            raise DataError(f"{at} is {pickles.describe(value)}, expected numbers (N, T, D)")
        return value, value.shape[1]
    _check_bounded(at, list(value), arrays=False)
    samples = [array(f"{at}[{number}]", item) for number, item in enumerate(value)]
    alike = len({sample.shape for sample in samples}) == 1
    for number, sample in enumerate(samples):
        if (sample.size and sample.dtype.kind not in "iuf") or not (
            sample.ndim == 2 or (alike and sample.ndim == 1) or (not alike and not sample.size)
        ):
            raise DataError(f"{at}[{number}] is {pickles.describe(sample)}, expected numbers (steps, width)")
    if alike:
        samples = [sample[None] if sample.ndim == 1 else sample for sample in samples]
    return samples, len(samples[0]) if alike else None


def width(where: str, name: str, parts: Sequence[Sequence[np.ndarray]]) -> int:
    """D of the first sample of `parts` that has a step."""
    for part in parts:
        for sample in part:
            if len(sample):
                return int(sample.shape[-1])
    raise DataError(f"{where}: {name} has length zero in every sample; leave it out with --modalities")


def real_steps(steps: np.ndarray) -> tuple[int, int]:
    """First position at which `steps` (T,) or (T, D) is not all zero, and 1 + the last; (0, 0) where there is none."""
    where = np.flatnonzero(steps if steps.ndim == 1 else steps.any(axis=1))
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def float32(values: np.ndarray) -> np.ndarray:
    """A copy of some steps (T, D), out of the mapped file. What is beyond float32 becomes infinite, and counts so."""
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32, order="C")
