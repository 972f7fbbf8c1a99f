"""What every system is: a network, its loss and its paper's defaults behind one interface, found by name.

Shapes: B batch, T time, D width.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from mmsa_dist.config import Strict, TextConfig
from mmsa_dist.errors import ConfigError
from mmsa_dist.layers.pooling import zero_absent
from mmsa_dist.registry import Registry, theirs
from shards.batch import Batch
from shards.utterance import UNIMODAL_TASK

GROUPS = ("text", "audio", "vision", "rest")
"""Parameter groups of the papers: the text encoder, the audio and the vision subnetwork, everything else."""


@dataclass(frozen=True)
class DataSpec:
    """What a system must know of the data to be built.

    Attributes:
        widths: modality -> D of what the system reads, in the order text, audio, vision; modalities that are not used
            are not in it. For text behind an encoder: the encoder's hidden size.
        label_range: the data set's lowest and highest possible label.
        tasks: the labels that the data set has, ``M`` first.
        text: how text is read; None where the given text features are.
        classes: task -> number of classes, always 2, where labels are classes; empty where they are intensities.
    """

    widths: Mapping[str, int]
    label_range: tuple[float, float]
    tasks: tuple[str, ...]
    text: TextConfig | None = None
    classes: Mapping[str, int] = field(default_factory=dict)

    @property
    def judged(self) -> tuple[str, ...]:
        """The tasks that metrics are of: ``M``; where labels are classes all of them."""
        return self.tasks if self.classes else ("M",)


@dataclass(frozen=True)
class Prediction:
    """What a system says of a batch.

    Attributes:
        tasks: task -> (B,) predictions in label units; ``M`` is the system's answer. Where labels are classes, of each
            task the log-odds of 1: the logit of 1 less that of 0, above zero where argmax is 1. A system may add tasks
            of its own.
        features: name -> (B, d) features that a label generator reads, keyed by task (``M``, ``T``, ``A``, ``V``).
        learned: task -> (B,) what a label generator's own layers make of the features (`System.attach`), in training.
    """

    tasks: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """What a batch costs.

    Attributes:
        total: the scalar to minimise.
        parts: its named terms, detached, that sum to it.
        means: (n,) detached. Given where terms weigh one another (IAM), so that the loss of the step is not the mean of
            its micro-batches': what the weights are made of, as this batch has it.
        within: their mean over the step's ranks and micro-batches -> this batch's losses as they count in that step.
            `total` and `parts` are those of a batch that is the whole step.
    """

    total: Tensor
    parts: dict[str, Tensor]
    means: Tensor | None = None
    within: "Callable[[Tensor], Losses] | None" = None


class System(nn.Module):
    """Base of all systems. A subclass holds its modules, `forward` and `loss`.

    Modules named ``text``, ``audio`` and ``vision`` form those optimizer groups, all else is ``rest``
    (override `parameter_group` to change that). ``self.text`` is `layers.text.text_reader(spec)`.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    Config: ClassVar[type[Strict]] = Strict
    labels: ClassVar[str] = "none"
    """The label generator of the paper."""
    classifies: ClassVar[bool] = False
    """Whether it learns classes too (`DataSpec.classes`), not intensities alone."""
    weighs_terms: bool = False
    """Whether `loss` gives `Losses.within`; the engine must know before it asks for a loss."""

    def __init__(self, config: Strict, spec: DataSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    @abstractmethod
    def forward(self, batch: Batch) -> Prediction: ...

    @abstractmethod
    def loss(self, prediction: Prediction, batch: Batch, targets: dict[str, Tensor]) -> Losses:
        """The loss of `batch`, normalised by ``batch.norm``: sum over samples of weight * loss / norm.

        Args:
            targets: task -> (B,) labels to learn; ``M`` is the true one, others come from the label generator.
        """

    def feature_widths(self) -> dict[str, int]:
        """task -> d of `Prediction.features`: what a label generator must hold. Empty where there are none."""
        return {}

    def attach(self, layers: nn.Module) -> None:
        """Makes a label generator's own layers part of the system: they learn with it, in the group ``rest``, and are
        kept in its checkpoints. In training they see the features of every batch; a trained system goes without them.

        Args:
            layers: task -> (B, d) features in, zero where the modality is absent; task -> (B,) out.
        """
        self.label_layers = layers
        self.register_forward_hook(_with_learned)

    def parameter_group(self, name: str) -> str:
        """One of `GROUPS` for the parameter called `name`."""
        first = name.split(".", 1)[0]
        return first if first in GROUPS else "rest"


LABEL_LAYERS = "label_layers."
"""Begins the names of the parameters that `System.attach` brought."""


def _with_learned(system: nn.Module, arguments: tuple[Batch], prediction: Prediction) -> Prediction | None:
    """Within the forward pass, where ZeRO-3 has the parameters together."""
    if not system.training:
        return None
    features, (batch,) = dict(prediction.features), arguments
    for modality, task in UNIMODAL_TASK.items():
        if task in features:
            features[task] = zero_absent(features[task], batch.present[modality])
    return replace(prediction, learned=system.get_submodule("label_layers")(features))


def weighted_mean(values: Tensor, batch: Batch, present: Tensor | None = None) -> Tensor:
    """Sum over samples of weight * value / norm; samples whose `present` is False take no part. values (B,) -> ()."""
    weight = batch.weight if present is None else batch.weight * present
    # where, not a product with zero: an absent sample's value may be anything
    return values.where(weight > 0, 0.0).mul(weight).sum() / batch.norm


_REGISTRY: Registry[System] = Registry("system", System, "mmsa_dist.systems")  # type: ignore[type-abstract]
_Class = TypeVar("_Class", bound=type[System])


def system(name: str) -> Callable[[_Class], _Class]:
    """Registers a system: ``@system("my_system")`` on its class.

    A third party publishes one with an entry point in the group ``mmsa_dist.systems``, or names it
    ``package.module:Class`` on the command line; nothing of ours is edited.

    Raises:
        ConfigError: another class has the name.
    """

    def register(cls: _Class) -> _Class:
        _REGISTRY.register(name)(cls)
        cls.name = name
        return cls

    return register


def system_names() -> list[str]:
    """Every system that `get_system` finds by a bare name."""
    return _REGISTRY.names()


def get_system(name: str) -> type[System]:
    """The class registered as `name`, or at ``package.module:Class``.

    Raises:
        ConfigError: no such system; names the nearest.
    """
    return _REGISTRY.get(name)


def make_system(name: str, config: Strict, spec: DataSpec) -> System:
    """Builds the system called `name`.

    Raises:
        ConfigError: no such system, values that do not fit together, or a third party's that cannot be built.
    """
    cls = get_system(name)
    with theirs("system", name, cls, "when it was built"):
        return cls(config, spec)


def classifying() -> list[str]:
    """Every system found by a bare name that learns classes too; a third party's that cannot be imported is none."""
    able = []
    for name in system_names():
        with suppress(ConfigError):
            able += [name] if get_system(name).classifies else []
    return able
