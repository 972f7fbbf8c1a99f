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
    extra = [str(name) for name in content if name not in SPLITS]
    return [f"{', '.join(extra)}: is none of the splits {', '.join(SPLITS)}; left out"] if extra else []


def listed(content: dict[Any, Any]) -> str:
    return ", ".join(sorted(map(str, content))[:20])


def text(value: object) -> str | None:
    """A string of any of the kinds that pickles hold; None for anything else."""
    if isinstance(value, bytes | memoryview):
        return str(value, "utf-8", "replace")
    if isinstance(value, str | int | np.integer):
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
        return np.asarray(value)
    except (ValueError, RecursionError) as error:  # a list may hold itself
        raise DataError(
            f"{at} is {pickles.describe(value)} whose entries differ in length or depth, expected an array"
        ) from error


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
