"""What every label generator is, and the rows of a step that all ranks exchange.

MOSI and MOSEI have no unimodal labels; a label generator makes them while training. A step is: the loss with the labels
as they stand (`targets`), backward, then `observe`, which may change the labels of the step's samples.

Shapes: N training samples, B rows of the *global* batch, d width of a feature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from mmsa_dist.config import LabelConfig, Strict
from mmsa_dist.errors import ConfigError
from mmsa_dist.registry import Registry, theirs
from shards.batch import Batch
from shards.utterance import UNIMODAL_TASK

if TYPE_CHECKING:  # the systems' package imports every system
    from mmsa_dist.systems.base import Prediction

MODALITY_OF = {task: modality for modality, task in UNIMODAL_TASK.items()}
"""T -> text, A -> audio, V -> vision."""

WEIGHING = "weighing "
"""Before a task's name, among the targets: the label whose distance from the multimodal one weighs the task's loss,
where it is not the label to learn (ULAG)."""


@dataclass(frozen=True)
class TrainSplit:
    """What a label generator is built from.

    Attributes:
        numbers: (N,) int64, the train samples' numbers in the index, in any order.
        ids: (N,) int64, what the samples are known by in a checkpoint: a hash of the key, not a place.
        labels: (N,) float32, their multimodal labels y_m.
        widths: task -> d of the features a system gives (`System.feature_widths`).
        label_range: the lowest and highest possible label.
        device: where the model is.
    """

    numbers: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    widths: Mapping[str, int]
    label_range: tuple[float, float]
    device: torch.device


class LabelGenerator:
    """Base of all label generators: one that makes no labels and keeps nothing.

    Every rank holds one; after every step all ranks' hold the same.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    class Config(Strict):
        """No options."""

    def __init__(self, config: Strict, split: TrainSplit) -> None:
        self.config = config

    @property
    def layers(self) -> nn.Module | None:
        """Layers of its own that learn with the system (`System.attach`): task -> (B, d) features in, task -> (B,)
        out. None where it has none."""
        return None

    def targets(self, batch: Batch, prediction: "Prediction | None" = None) -> dict[str, Tensor]:
        """task -> (B,) labels to learn, as they stand. ``M`` is the true one; a sample outside the train split has
        the labels of its data set. A key ``"weighing T"`` (`WEIGHING`) holds the label that weighs
        the loss of task T, where it is not the label to learn.

        Args:
            prediction: what the system said of the batch, in training. What its `layers` made of it (`learned`) enters
                the labels, and gradients flow back through them.
        """
        return dict(batch.labels)

    def observe(self, epoch: int, batches: Sequence[Batch], predictions: "Sequence[Prediction]") -> None:
        """Takes in what one optimizer step saw. All ranks call it together, once, after the last backward.

        Args:
            epoch: from 1.
            batches: this rank's micro-batches of the step, in order; every rank has as many rows.
            predictions: what the system said of each, in the forward pass that was learned from.
        """

    def end_epoch(self) -> None:
        """Called once after the last step of an epoch."""

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """All that `load_state_dict` needs, as CPU tensors of their own. All ranks call it together.

        Args:
            keep: this rank wants it; others only hand over what they hold, and get nothing.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state_dict`, at any number of ranks and with the samples in any order.

        Raises:
            ConfigError: the state is of another system or another data set.
        """

    @classmethod
    def labels_in(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """task -> (N,) the labels generated so far, of what `state_dict` gave, in the order of its ``ids``."""
        return {}

    @classmethod
    def idle(cls, config: Strict, labels: npt.NDArray[np.float32]) -> str:
        """Why it can make no labels from train samples with these labels M, (N,); empty where it can."""
        return ""

    @classmethod
    def state_bytes(cls, samples: int, widths: Mapping[str, int]) -> int:
        """Bytes for `samples` training samples, where every rank holds all of them."""
        return 0


_REGISTRY: Registry[LabelGenerator] = Registry("label generator", LabelGenerator, "mmsa_dist.label_generators")


def label_generator(name: str) -> Callable[[type[LabelGenerator]], type[LabelGenerator]]:
    """Registers a label generator: ``@label_generator("my_labels")`` on its class; see `Registry` for third parties."""

    def register(cls: type[LabelGenerator]) -> type[LabelGenerator]:
        _REGISTRY.register(name)(cls)
        cls.name = name
        return cls

    return register


def label_generator_names() -> list[str]:
    """Every label generator that is found by a bare name."""
    return _REGISTRY.names()


def get_label_generator(name: str) -> type[LabelGenerator]:
    """The class registered as `name`, or at ``package.module:Class``.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    return _REGISTRY.get(name)


def make_generator(
    name: str,
    *,
    numbers: npt.ArrayLike,
    ids: npt.ArrayLike,
    labels: npt.ArrayLike,
    widths: Mapping[str, int],
    label_range: tuple[float, float],
    device: torch.device | str = "cpu",
    **options: Any,
) -> LabelGenerator:
    """Builds the label generator called `name`; the arguments are described at `TrainSplit`.

    Args:
        options: fields of its ``Config`` (`config.LabelConfig.given`). Those that have a place of their own in a recipe
            may be given to one that lacks them as long as they are off (False or None).

    Raises:
        ConfigError: no such generator, an option that it lacks, or a system without the features that it reads.
        DataError: a training sample has no label, or two have the same id.
    """
    config = configured(name, **options)
    split = TrainSplit(
        np.asarray(numbers, dtype=np.int64),
        np.asarray(ids, dtype=np.int64),
        np.asarray(labels, dtype=np.float32),
        dict(widths),
        label_range,
        torch.device(device),
    )
    cls = get_label_generator(name)
    with theirs("label generator", name, cls, "when it was built"):
        return cls(config, split)


def over_nothing(
    name: str, widths: Mapping[str, int], label_range: tuple[float, float], **options: Any
) -> LabelGenerator:
    """As `make_generator`, over one made-up sample: what is wrong with options and widths, and the layers it has."""
    return make_generator(name, numbers=[0], ids=[0], labels=[0.0], widths=widths, label_range=label_range, **options)


def configured(name: str, **options: Any) -> Strict:
    """The configuration of the label generator called `name`; see `make_generator`."""
    config = get_label_generator(name).Config
    known = {key: value for key, value in options.items() if key in config.model_fields}
    for key in options.keys() - known.keys():
        shared = key in LabelConfig.model_fields
        if not shared or options[key] not in (None, False):
            valid = ", ".join(config.model_fields) or "none"
            raise ConfigError(
                f"labels.{'' if shared else 'options.'}{key}: label generator {name!r} has no such option "
                f"(valid: {valid}); leave it out"
            )
    try:
        return config(**known)
    except ValidationError as error:
        found = [(".".join(map(str, issue["loc"])), issue) for issue in error.errors()]
        said = [
            f"`labels.options.{key}`: {i['msg'][0].lower()}{i['msg'][1:]}, found {i['input']!r}" for key, i in found
        ]
        raise ConfigError("; ".join(said)) from error


@dataclass(frozen=True)
class JointStep:
    """The rows of a step's global batch, in its order, the same on every rank.

    Attributes:
        numbers: (B,) int64 on the device.
        real: (B,) bool, False for filler.
        present: task -> (B,) bool, False where the sample lacks the task's modality; ``M`` is always True.
        features: task -> (B, d) float32, detached.
        learned: task -> (B,) float32, detached; empty where the generator has no layers.
    """

    numbers: Tensor
    real: Tensor
    present: dict[str, Tensor]
    features: dict[str, Tensor]
    learned: dict[str, Tensor]


def join_step(
    batches: Sequence[Batch], predictions: "Sequence[Prediction]", widths: Mapping[str, int], device: torch.device
) -> JointStep:
    """Gathers what the ranks saw in a step: one collective, whatever the number of tasks and micro-batches.

    A rank has the r-th contiguous slice of the global batch, so rows in the order of the ranks are in its order.
    """
    tasks, said = list(widths), list(predictions[0].learned)
    numbers = torch.cat([b.numbers for b in batches]).to(device, non_blocking=True)
    flags = [torch.cat([b.weight for b in batches]) > 0]
    flags += [torch.cat([_present(b, task) for b in batches]) for task in tasks]
    features = [torch.cat([p.features[task].detach() for p in predictions]).float() for task in tasks]
    features += [torch.cat([p.learned[task].detach() for p in predictions]).float()[:, None] for task in said]
    # Bits, not numbers: integers and floats of a row travel side by side and arrive as they were sent.
    columns = [numbers[:, None].view(torch.int32), torch.stack(flags, 1).to(device, torch.int32)]
    columns += [f.contiguous().view(torch.int32) for f in features]
    rows = _gather(torch.cat(columns, 1))
    number_bits, flag_bits, *feature_bits = rows.split([2, len(flags), *(f.shape[1] for f in features)], dim=1)
    real, *present = (flag_bits != 0).unbind(1)
    numbers_of = [bits.contiguous().view(torch.float32) for bits in feature_bits]
    return JointStep(
        numbers=number_bits.reshape(-1).view(torch.int64),
        real=real,
        present=dict(zip(tasks, present, strict=True)),
        features=dict(zip(tasks, numbers_of, strict=False)),
        learned={task: column[:, 0] for task, column in zip(said, numbers_of[len(tasks) :], strict=True)},
    )


def _present(batch: Batch, task: str) -> Tensor:
    modality = MODALITY_OF.get(task)
    return torch.ones_like(batch.weight, dtype=torch.bool) if modality is None else batch.present[modality]


def _gather(rows: Tensor) -> Tensor:
    """(b, w) of each rank -> (ranks * b, w) on all, by rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    out = rows.new_empty(dist.get_world_size() * rows.shape[0], rows.shape[1])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
    gather(out, rows)
    return out
