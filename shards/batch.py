"""Ragged samples -> padded tensors with lengths.

Shapes: B samples, T steps of the batch's longest sample in a modality, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.errors import ConfigError, DataError
from shards.utterance import MODALITIES, Utterance

if TYPE_CHECKING:
    from shards.mix import AnyIndex

TextIds = Callable[[list[Utterance]], list[np.ndarray]]
"""B utterances -> B arrays of (T,) integer token ids."""

_SERIAL = 32768 - 1
"""Elements that torch copies in the calling thread (at::internal::GRAIN_SIZE is the first size that it does not). Where
it has a pool of threads, each reader would start one of its own for more."""


@dataclass(frozen=True)
class Batch:
    """What a system sees.

    Attributes:
        values: modality -> (B, T, D) float32 features, or (B, T) int64 token ids where a text encoder reads them.
            Trimmed to the batch's longest; padding is zero. An absent sample has one zero step.
        lengths: modality -> (B,) int64 on the CPU (so that no step waits for the device); at least 1.
        present: modality -> (B,) bool, False where the sample lacks the modality.
        labels: task -> (B,) float32.
        numbers: (B,) int64, the samples' numbers in the index; CPU.
        weight: (B,) float32, 1 for a sample, 0 for filler at the end of an epoch.
        norm: the weight of the *global* batch divided by (ranks x accumulation). A loss is `sum(weight * l) / norm`,
            so that the mean over ranks and micro-batches is the loss of the joint batch.
        keys: the samples' keys, for error messages and predictions.
    """

    values: dict[str, Tensor]
    lengths: dict[str, Tensor]
    present: dict[str, Tensor]
    labels: dict[str, Tensor]
    numbers: Tensor
    weight: Tensor
    norm: float
    keys: list[str]

    @property
    def size(self) -> int:
        return len(self.keys)

    def mask(self, modality: str) -> Tensor:
        """(B, T) bool on the values' device: True on real steps."""
        values = self.values[modality]
        lengths = self.lengths[modality].to(values.device, non_blocking=True)
        return torch.arange(values.shape[1], device=values.device)[None, :] < lengths[:, None]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; lengths and numbers stay on the CPU."""

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: t.to(device, non_blocking=True) for name, t in tensors.items()}

        return replace(
            self,
            values=move(self.values),
            present=move(self.present),
            labels=move(self.labels),
            weight=self.weight.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Standard:
    """How a modality is standardised: (value - mean) * scale.

    Attributes:
        mean: (D,) float32.
        scale: (D,) float32, 1 / standard deviation; 1 where a dimension is constant.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, statistics: Mapping[str, Sequence[float]]) -> "Standard":
        """From the index's ``{"mean": [D], "std": [D]}``."""
        mean, std = (torch.tensor(statistics[name], dtype=torch.float64) for name in ("mean", "std"))
        return cls(mean.float(), torch.where(std > 1e-8, 1 / std, 1.0).float())


@dataclass(frozen=True)
class BatchSpec:
    """What goes into a batch.

    Attributes:
        widths: modality -> D of the features to use, in the order text, audio, vision; None for text that `text_ids`
            reads.
        tasks: labels to use.
        text_ids: turns B utterances into B arrays of (T,) token ids, for a text encoder; None where text features are
            used.
        standard: modalities to standardise, and how.
    """

    widths: Mapping[str, int | None]
    tasks: tuple[str, ...]
    text_ids: TextIds | None = None
    standard: Mapping[str, Standard] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        index: "AnyIndex",
        modalities: Sequence[str] | None = None,
        text_ids: TextIds | None = None,
        normalize: Sequence[str] = (),
    ) -> "BatchSpec":
        """The spec for a packed data set.

        Args:
            index: of the data set.
            modalities: to use; all that it has by default, text among them where `text_ids` reads it.
            text_ids: as above.
            normalize: modalities to standardise with the train split's statistics.

        Raises:
            ConfigError: a modality to use or to standardise is not there.
        """
        held: dict[str, int | None] = {name: modality.width for name, modality in index.modalities.items()}
        if text_ids is not None:
            held = {"text": None, **held}
            held["text"] = None
        used = tuple(held) if modalities is None else tuple(name for name in MODALITIES if name in modalities)
        missing = [name for name in modalities or () if name not in held]
        if missing or not used:
            asked = ", ".join(missing) or "nothing"
            raise ConfigError(
                f"data.modalities asks for {asked}, but {index.name} has features of {', '.join(held) or 'nothing'}"
                f"{'' if text_ids else ' (its text may need text.encoder)'}; choose among these"
            )
        for name in normalize:
            if name not in used or held[name] is None:
                features = ", ".join(n for n in used if held[n] is not None)
                raise ConfigError(
                    f"data.normalize names {name!r}, which has no features in use; choose among: {features}"
                )
        standard = {name: Standard.of(index.statistics[name]) for name in normalize}
        return cls({name: held[name] for name in used}, index.tasks, text_ids, standard)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.widths)


def collate(
    samples: Sequence[Utterance],
    spec: BatchSpec,
    numbers: NDArray[np.int64] | None = None,
    weight: NDArray[np.float32] | None = None,
    norm: float | None = None,
) -> Batch:
    """The batch of some samples.

    Args:
        samples: B of them.
        spec: what to take from them.
        numbers: (B,) in the index; 0 .. B - 1 by default, where there is no index.
        weight: (B,) 1, or 0 for filler; all 1 by default.
        norm: see `Batch.norm`; the sum of the weights by default.

    Raises:
        DataError: a sample's features are of another width than `spec` says; names it.
    """
    values: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    present: dict[str, Tensor] = {}
    for name, width in spec.widths.items():
        if width is None:
            assert spec.text_ids is not None, name
            arrays: list[np.ndarray | None] = list(spec.text_ids(list(samples)))
        else:
            arrays = [_checked(sample, name, width) for sample in samples]
        values[name], lengths[name], present[name] = pad(arrays, width, spec.standard.get(name))
    size = len(samples)
    weights = torch.ones(size) if weight is None else torch.tensor(weight, dtype=torch.float32)
    labels = {task: [sample.labels.get(task, math.nan) for sample in samples] for task in spec.tasks}
    return Batch(
        values=values,
        lengths=lengths,
        present=present,
        labels={task: torch.tensor(column, dtype=torch.float32) for task, column in labels.items()},
        numbers=torch.arange(size) if numbers is None else torch.tensor(numbers, dtype=torch.int64),
        weight=weights,
        norm=float(weights.sum()) if norm is None else norm,
        keys=[sample.key for sample in samples],
    )


def _checked(sample: Utterance, modality: str, width: int) -> np.ndarray | None:
    array = sample.modalities.get(modality)
    if array is not None and (array.ndim != 2 or array.shape[1] != width):
        raise DataError(
            f"sample {sample.key!r}: {modality} is of shape {array.shape}, expected (steps, {width}); "
            "use data with the features that the model was made for"
        )
    return array


def pad(
    arrays: Sequence[np.ndarray | None], width: int | None, standard: Standard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pads ragged arrays.

    Args:
        arrays: (T_i, D) floats, or (T_i,) integer token ids; None where absent.
        width: D, or None for token ids.
        standard: applied to real steps; padding stays zero.

    Returns:
        values (B, T, D) float32 or (B, T) int64, lengths (B,) int64 (>= 1), present (B,) bool.
    """
    lengths = [0 if a is None else len(a) for a in arrays]
    longest = max(1, *lengths) if lengths else 1
    rest = () if width is None else (width,)
    dtype = np.int64 if width is None else np.float32
    # from NumPy, which asks for huge pages; and not zeros: memory would be zeroed of which most is written again
    out = torch.from_numpy(np.empty((len(arrays) * longest, *rest), dtype))
    nothing = torch.empty((0, *rest))
    # few calls for all samples, none of which holds the interpreter: a reader must not hold up the training thread
    places = out.split_with_sizes([size for n in lengths for size in (n, longest - n)])
    real, padding = list(places[0::2]), list(places[1::2])
    sources = [nothing if a is None or not len(a) else _tensor(a, dtype) for a in arrays]
    if torch.get_num_threads() > 1:
        steps = max(1, _SERIAL // (width or 1))
        real, padding, sources = (
            [part for t in tensors for part in t.split(steps)] for tensors in (real, padding, sources)
        )
    if real:
        torch._foreach_copy_(real, sources)
        torch._foreach_zero_(padding)
    if standard is not None:
        for place in real:
            place.sub_(standard.mean).mul_(standard.scale)
    return (
        out.view(len(arrays), longest, *rest),
        torch.tensor([max(1, n) for n in lengths], dtype=torch.int64),
        torch.tensor([n > 0 for n in lengths], dtype=torch.bool),
    )


def _tensor(array: np.ndarray, dtype: type[np.generic]) -> Tensor:
    """The array's memory as a tensor, if that can be; else a copy as `dtype`.

    Torch takes no array that it could not write to or would step over backwards, and not every kind of number.
    """
    if array.flags.carray and array.dtype.isnative:
        with suppress(TypeError, ValueError):
            return torch.from_numpy(array)
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))
