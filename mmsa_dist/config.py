"""The configuration tree: strict, typed, each field with its help under it. A recipe only chooses.

Configuration of one part lives here only where the part has no class of its own; a system's is `System.Config`.
"""

from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """Unknown keys are errors; values are checked; nothing changes after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def switch(default: Any, table: str, **checks: Any) -> Any:
    """A field that an ablation of the system's paper turns; `mmsa-dist systems NAME` lists these.

    Args:
        table: of the paper, e.g. "5, 6".
        checks: further arguments of pydantic's `Field`, e.g. ``ge=1``.
    """
    return Field(default=default, json_schema_extra={"ablation": table}, **checks)


class TextConfig(Strict):
    """How text is read."""

    encoder: str | None = None
    """Hugging Face encoder: a local folder or a hub name. Unset: the data set's own text features are used."""
    input: Literal["auto", "raw", "tokens"] = "auto"
    """What the encoder reads: the transcript, or the data set's token ids. auto: the transcript where there is one."""
    finetune: bool = True
    """Train the encoder (with its own learning rate); otherwise it is frozen."""
    pretrained: bool = True
    """Load the encoder's weights; otherwise only its shape is used and its weights are random."""
    max_tokens: int = Field(default=128, ge=2)
    """Longer texts are cut to this many tokens (special tokens included)."""
    gradient_checkpointing: bool = False
    """Keep only the input of each of the encoder's layers for the backward pass, which computes the rest once more:
    less memory, more time. Does not change any result."""


class DataConfig(Strict):
    """What is read and how it is cut into batches."""

    path: Annotated[str | tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ""
    """Folder that `mmsa-dist pack` wrote, or its address (s3://bucket/mosi); several are trained on as one."""
    weights: tuple[float, ...] | None = None
    """Of several data sets: the share of each in every batch, e.g. 1 2. Unset: as their sizes, each sample once an
    epoch."""
    align_widths: Literal["refuse", "blocks"] = "refuse"
    """Of several data sets whose features of one modality differ in width. blocks: each has its own columns."""
    modalities: tuple[Literal["text", "audio", "vision"], ...] | None = None
    """Modalities to use. Unset: all that the data set has."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = Field(default=32, ge=1)
    """Samples per optimizer step, over all ranks and accumulation: the same numbers at any number of workers."""
    eval_batch_size: int = Field(default=64, ge=1)
    """Samples per evaluation batch and rank. Does not change any result."""
    readers: int = Field(default=1, ge=0)
    """Threads per rank that prepare batches ahead; 0 reads in the training thread. Does not change any result."""
    window: int = Field(default=8, ge=1)
    """Shards that are shuffled together: memory-mapped files a rank holds open at a time."""
    length_pool: int = Field(default=0, ge=0)
    """Batches whose samples are sorted by length together, so that less of a batch is padding. 0 sorts none."""
    normalize: tuple[Literal["text", "audio", "vision"], ...] = ()
    """Modalities standardised with the train split's mean and standard deviation, which the index holds."""

    quarantine: bool = False
    """Leave damaged shards out instead of stopping at them: all are read and checked before the run begins."""
    without: tuple[str, ...] = ()
    """Shards not to use, each as the data set's name and the tar's: mosi/train-00003.tar. What quarantine found is kept
    here, so that a restart agrees."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders of all data sets."""
        return (self.path,) if isinstance(self.path, str) else self.path


class GroupValues(Strict):
    """One value per parameter group."""

    text: float = Field(ge=0, allow_inf_nan=False)
    """The text encoder."""
    audio: float = Field(ge=0, allow_inf_nan=False)
    """The audio subnetwork."""
    vision: float = Field(ge=0, allow_inf_nan=False)
    """The vision subnetwork."""
    rest: float = Field(ge=0, allow_inf_nan=False)
    """Everything else."""


class RatesFrom(GroupValues):
    """Learning rates from an epoch on."""

    epoch: int = Field(ge=2)
    """The first epoch that they hold for."""


class LabelConfig(Strict):
    """Labels of the unimodal tasks."""

    generator: str | None = Field(default=None, min_length=1)
    """Label generator. Unset: the one of the system's paper."""
    divide_above: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """GiB of label state above which a rank keeps the features of its part of the samples only (default: 1)."""
    zero_is_positive: bool = False
    """Count a label of exactly zero with the positive ones, instead of with neither."""
    options: Annotated[dict[str, bool | int | float | str], tyro.conf.arg(metavar="NAME VALUE …")] = Field(
        default_factory=dict
    )
    """Options of a third party's label generator, by name."""

    @field_validator("options")
    @classmethod
    def _own(cls, options: dict[str, Any]) -> dict[str, Any]:
        if twice := sorted(options.keys() & cls.model_fields.keys()):
            raise ValueError(f"{twice[0]} is set as labels.{twice[0]}, not among the options")
        return options

    @property
    def given(self) -> dict[str, Any]:
        """What a label generator is built with: a field of its ``Config`` -> value."""
        return {"zero_is_positive": self.zero_is_positive, "divide_above": self.divide_above, **self.options}


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Strict):
    """The optimizer, its parameter groups and its schedule."""

    name: Literal["adam", "adamw"] = "adamw"
    """adam adds weight decay to the gradient, adamw decays the weights."""
    lr: GroupValues = GroupValues(text=5e-5, audio=1e-3, vision=1e-3, rest=1e-3)
    """Learning rate per group."""
    lr_from: tyro.conf.Suppress[tyro.conf.Fixed[tuple[RatesFrom, ...]]] = ()
    """Other learning rates from later epochs on, in a recipe's file alone: what a population-based sweep has found.
    Schedule and warm-up scale these too."""
    weight_decay: GroupValues = GroupValues(text=0.01, audio=0.0, vision=0.0, rest=0.0)
    """Weight decay per group; the text encoder's biases and layer norms get none."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Adam's epsilon."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How learning rates go from their value to zero over the run, after the warm-up."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which learning rates rise from zero."""
    clip: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Greatest norm of the gradient; 0 does not clip."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches that a rank sums before a step; the global batch stays `data.batch_size`."""

    @field_validator("lr_from")
    @classmethod
    def _rising(cls, changes: tuple[RatesFrom, ...]) -> tuple[RatesFrom, ...]:
        epochs = [each.epoch for each in changes]
        if epochs != sorted(set(epochs)):
            raise ValueError(f"the epochs must rise, found {epochs}")
        return changes

    def rates(self, epoch: int) -> GroupValues:
        """The learning rates of `epoch` (from 1), before schedule and warm-up."""
        return next((each for each in reversed(self.lr_from) if each.epoch <= epoch), self.lr)


Monitor = Literal[
    "auto", "mae", "corr", "acc2_has0", "acc2_non0", "acc7", "acc2", "acc3", "acc5", "loss", "acc", "f1"
]  # fmt: skip


class TrainConfig(Strict):
    """How long, and what is best."""

    epochs: Annotated[int, tyro.conf.arg(aliases=["--epochs"])] = Field(default=30, ge=1)
    """At most this many passes over the train split."""
    patience: int = Field(default=8, ge=1)
    """Stop after this many epochs without a better validation result."""
    monitor: Monitor = "auto"
    """Validation metric that chooses the best epoch. auto: mae; where labels are classes the loss, a cross-entropy."""
    test: bool = True
    """Read the test split, once, with the best epoch's weights, at the very end."""
    profile: Annotated[int, tyro.conf.arg(aliases=["--profile"])] = Field(default=0, ge=0)
    """Steps that each rank traces, after three that warm up, into the run's profile/rank-*.json, for Perfetto. The
    run goes on once they are written, which takes longer the more they hold. Does not change any result."""
    dry_run: bool = True
    """Before the first step take the epoch's largest batch forward and backward, without learning from it: what does
    not fit stops at once. Does not change any result."""


class EngineConfig(Strict):
    """DeepSpeed."""

    zero: Annotated[Literal[0, 1, 2, 3], tyro.conf.arg(aliases=["--zero"])] = 1
    """ZeRO stage: 0 keeps all on every rank; 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of weights and activations; fp16 needs a GPU, and bf16 is often slower than fp32 on a CPU."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: what a rank's GPU keeps for Adam (moments, weights in fp32) its host keeps, and updates there: slower.
    Needs ZeRO 1, 2 or 3. Does not change any result."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.offload != "none" and self.zero == 0:
            raise ValueError(
                "offload needs ZeRO 1, 2 or 3, which divide the optimizer's state; use --zero 1, or 2 or 3"
            )
        return self


class LaunchConfig(Strict):
    """Where the ranks run."""

    workers: Annotated[int, tyro.conf.arg(aliases=["--workers"])] = Field(default=1, ge=1)
    """Number of ranks. `--workers 1:4`: four, and as few as one where there is no room for more."""
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest ranks to go on with. Unset: always as many as `workers`."""
    launcher: Annotated[Literal["ray", "local", "torchrun"], tyro.conf.arg(aliases=["--launcher"])] = "ray"
    """ray: Ray Train. local: processes of this machine. torchrun: this process is one rank that torchrun started."""
    address: Annotated[str | None, tyro.conf.arg(aliases=["--address"])] = None
    """Ray cluster to join (`auto`, or host:port). Unset: the cluster this process runs in, else one of its own."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPUs a rank reserves in the Ray cluster; also its number of computing threads."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs a rank reserves."""
    max_failures: int = Field(default=2, ge=0)
    """How often ranks that died are started again from the last checkpoint."""
    timeout: float = Field(default=1800.0, gt=0, allow_inf_nan=False)
    """Seconds that ranks may take to their first step, and that a collective may take."""
    step_timeout: float = Field(default=600.0, ge=1, allow_inf_nan=False)
    """Seconds that a rank may stand still once it has taken a step; then all are started again."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers: {self.min_workers} are more than workers, {self.workers}; --workers LEAST:MOST sets both"
            )
        return self


class CheckpointConfig(Strict):
    """What is kept of a run on the way."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save after this many steps too, not only at the end of an epoch."""
    every_seconds: float | None = Field(default=900.0, gt=0, allow_inf_nan=False)
    """Save after so much time too: what a run can lose, at most. `mmsa-dist plan` says what loses the least."""
    keep: int = Field(default=1, ge=1)
    """Newest checkpoints kept, beside the best one."""
    mirror: str | None = None
    """Address (s3://bucket/folder, gs://bucket/folder, or file:///folder on another disk) that the newest and the best
    checkpoint are sent to as well; on a machine that lacks the run's folder, `--resume` ADDRESS/RUN goes on from there.
    """


class TrackingConfig(Strict):
    """MLflow."""

    enabled: bool = True
    """Record the run in MLflow."""
    uri: Annotated[str | None, tyro.conf.arg(aliases=["--tracking-uri"])] = None
    """Tracking server. Unset: MLFLOW_TRACKING_URI, else a sqlite file in the folder of the runs."""
    experiment: str | None = None
    """Experiment. Unset: the data set's name."""
    register_as: Annotated[str | None, tyro.conf.arg(aliases=["--register"])] = None
    """Name of the registered model. Unset: the system's name. `none` registers nothing."""
    alias: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--alias"])] = ()
    """Aliases to move to the new version, e.g. champion."""
    parent: str | None = None
    """Run that this run is a child of."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""
