"""Everything one rank needs to train: data, system, labels, engine. Built the same way on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from mmsa_dist import checkpoint, data_card, divided, metrics, run_folder
from mmsa_dist.config import Monitor
from mmsa_dist.data_card import DataCard
from mmsa_dist.engine import Engine, device
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.label_generators import LabelGenerator, configured, get_label_generator, make_generator
from mmsa_dist.layers.text import encoder_width, text_ids
from mmsa_dist.recipe import Recipe
from mmsa_dist.systems import DataSpec, System
from mmsa_dist.tracking import Link
from shards.ahead import fetch_tables
from shards.batch import BatchSpec
from shards.costs import CostRule
from shards.loader import Loader
from shards.mix import AnyIndex, AnyReader, Mix, open_data, open_reader
from shards.plan import Plan, training_plan
from shards.suggest import counted
from shards.utterance import MODALITIES


@dataclass
class Session:
    """One rank's share of a run.

    Attributes:
        kind: which metrics are computed: `metrics.kind_for`.
        progress: the checkpoint's plain values, empty in a fresh run.
    """

    recipe: Recipe
    folder: Path
    rank: int
    world: int
    index: AnyIndex
    spec: DataSpec
    kind: str
    system: System
    generator: LabelGenerator
    engine: Engine
    reader: AnyReader
    loader: Loader
    progress: dict[str, Any]

    @property
    def origin(self) -> dict[str, Any]:
        """What its checkpoints say of who wrote them."""
        link, recipe = Link.load(self.folder), self.recipe
        return {
            "packages": run_folder.environment()["packages"],
            "recipe": recipe.digest(),
            "data": self.index.fingerprint,
            "ranks": self.world,
            "zero": recipe.engine.zero,
            "mlflow_run": link.run_id if link else None,
        }

    def plan(self, epoch: int) -> Plan:
        """The order of `epoch` (from 1)."""
        return plan_of(self.recipe, self.index, self.spec, epoch)

    def close(self) -> None:
        self.loader.close()
        self.reader.close()
        self.engine.close()


def open_session(recipe: Recipe, folder: Path, rank: int, world: int) -> Session:
    """Builds a rank's session, from the newest whole checkpoint in `folder` where there is one.

    Raises:
        ConfigError, DataError: recipe and data do not fit each other.
    """
    index = open_index(recipe)
    check_same(folder, index)
    check_data(recipe, index)
    recipe = settled(recipe, index)
    spec = data_spec(recipe, index)
    torch.manual_seed(recipe.seed)
    system = divided.build(recipe.system, recipe.model, spec, device(), in_parts=recipe.engine.zero == 3)
    # of a folder that nodes share, a list may be an older one on another than the first rank's
    saved = checkpoint.load_latest(folder / "checkpoints", of_first)
    steps = -(-index.splits["train"] // recipe.data.batch_size) * recipe.train.epochs
    generator = label_generator(recipe, index, system, device())
    if generator.layers is not None:
        system.attach(generator.layers)
    engine = Engine(
        system,
        recipe.optim,
        recipe.engine,
        micro_batch=-(-recipe.data.batch_size // (world * recipe.optim.accumulation)),
        total_steps=steps,
        state=saved.engine if saved else None,
    )
    if saved:
        generator.load_state_dict(saved.generator)
    reader = open_reader(index, open_shards=shards_in_reach(recipe, index))
    loader = Loader(reader, batch_spec(recipe, index, spec), recipe.data.readers)
    kind = kind_of(index)
    progress = saved.progress if saved else {}
    return Session(recipe, folder, rank, world, index, spec, kind, system, generator, engine, reader, loader, progress)


def of_first(number: int) -> int:
    """The first rank's number, on all. A collective call."""
    told = torch.tensor(number, device=device())
    dist.broadcast(told, 0)
    return int(told)


def check_same(folder: Path, index: AnyIndex) -> None:
    """Says that a rank found other data than the driver did: its node has another copy, or it was packed again.

    Raises:
        DataError: so it is.
    """
    if (folder / data_card.FILE).is_file() and (meant := DataCard.load(folder).fingerprint) != index.fingerprint:
        raise DataError(
            f"{index.where}: has the fingerprint {index.fingerprint[:12]}, but this run is on {meant[:12]}: the data "
            "was replaced, or this node has another copy; put the first one there again, or begin a new run"
        )


def open_index(recipe: Recipe) -> AnyIndex:
    """The data set that the recipe names, or the mix of several.

    Raises:
        ConfigError, DataError: there is none, or several do not fit together.
    """
    data = recipe.data
    wanted: tuple[str, ...] = data.modalities or MODALITIES
    features = [m for m in wanted if m != "text" or recipe.text.encoder is None]
    return open_data(data.paths, data.weights, data.align_widths, features, data.without)


def plan_of(recipe: Recipe, index: AnyIndex, spec: DataSpec, epoch: int) -> Plan:
    """The order of `epoch` (from 1)."""
    data = recipe.data
    rule = cost_rule(index, spec) if data.length_pool else None
    return training_plan(
        index, "train", recipe.seed, epoch, data.batch_size, data.window, pool=data.length_pool, rule=rule
    )


def cost_rule(index: AnyIndex, spec: DataSpec) -> CostRule:
    """What counts as a sample's length where batches are made of samples alike: the steps that cost the most.

    Behind a text encoder the text alone, whose tokens cost more than all else together: their number, or the bytes of
    the transcript where the data set has no tokens. Otherwise the steps of all modalities together: a recurrent or an
    attention layer costs by the step, however wide its input is.
    """
    if spec.text is not None:
        return CostRule((("n_tokens" if index.has_tokens else "json_size", 1),))
    return CostRule(tuple((f"length_{modality}", 1) for modality in spec.widths))


def shards_in_reach(recipe: Recipe, index: AnyIndex) -> int:
    """Files that one step after the other may need: those of two blocks, and of a pool where there is one."""
    data, shards = recipe.data, len(index.shards_of("train"))
    return 2 * data.window + -(-data.length_pool * data.batch_size * shards // index.splits["train"])


def check_data(recipe: Recipe, index: AnyIndex) -> None:
    """Says at once what in the recipe does not fit the data.

    Raises:
        ConfigError: a modality, split or metric that the data set lacks.
    """
    if "M" not in index.tasks and not index.classes:
        raise ConfigError(
            f"data.path: {index.name} has no label to learn: its labels are {', '.join(index.tasks) or 'none'}; "
            "a system learns a sentiment intensity (label M), or emotions as classes"
        )
    if more := {task: number for task, number in index.classes.items() if number != 2}:
        task, number = next(iter(more.items()))
        raise ConfigError(
            f"data.path: label {task} of {index.name} has {number} classes, but systems decide between two, there (1) "
            "or not (0); pack the data with such a label for each class"
        )
    for split in ("train", "valid"):
        if not index.splits.get(split):
            raise ConfigError(
                f"data.path: {index.name} has no {split} samples, but "
                f"{', '.join(f'{n:,} of {name}' for name, n in index.splits.items() if n) or 'none at all'}; training "
                "needs train and valid. Pack it with both (pack table --hold-out-valid N holds training videos out for "
                "validation; index --train PATTERN --valid PATTERN says which tars are what)"
            )
    known = [name for name in metrics.names(kind_of(index)) if name in get_args(Monitor)]
    if recipe.train.monitor not in ("auto", *known):
        raise ConfigError(
            f"train.monitor: {recipe.train.monitor!r} is not a metric of {index.name}; one of {', '.join(known)}"
        )
    if recipe.train.monitor == "corr" and index.splits["valid"] < 2:
        raise ConfigError(f"train.monitor: corr needs two validation samples, {index.name} has one; use mae")


def kind_of(index: AnyIndex) -> str:
    """Which metrics the field reports for the data set."""
    return metrics.kind_for(index.label_range, index.classes)


def settled(recipe: Recipe, index: AnyIndex) -> Recipe:
    """The recipe with what it leaves open decided: ``train.monitor`` by the data, ``labels.generator`` by the paper."""
    train, labels = recipe.train, recipe.labels.model_copy(update={"generator": recipe.label_generator})
    if train.monitor == "auto":
        train = train.model_copy(update={"monitor": metrics.default_monitor(kind_of(index))})
    return recipe.model_copy(update={"train": train, "labels": labels})


def inputs(recipe: Recipe, index: AnyIndex) -> str:
    """What the system reads, and what of the data set it does not, in a line."""
    spec = data_spec(recipe, index)
    read = [f"{m} {spec.text.encoder if spec.text and m == 'text' else width}" for m, width in spec.widths.items()]
    left = [m for m in available(recipe, index) if m not in spec.widths]
    if "text" not in {*spec.widths, *left} and (index.has_raw_text or index.has_tokens):
        left.insert(0, "text (--text.encoder NAME reads it)")
    return f"reads {', '.join(read)}" + (f"; not read: {', '.join(left)}" if left else "")


FIRST_STEP = {"text_pooling": "cls", "pooling": "state"}
"""Fields of systems -> the value that reads a sentence by its first step."""


def without_effect(recipe: Recipe, index: AnyIndex) -> list[str]:
    """Sentences about values of the recipe that change nothing in this run."""
    spec, launch, said = data_spec(recipe, index), recipe.launch, []
    if isinstance(index, Mix):
        said += index.notes()
    elif recipe.data.align_widths != "refuse":
        said.append("data.align_widths is without effect: there is one data set")
    said += [
        f"optim.lr_from: epoch {each.epoch} comes after the last (train.epochs {recipe.train.epochs})"
        for each in recipe.optim.lr_from
        if each.epoch > recipe.train.epochs
    ]
    idle = [m for m in recipe.data.normalize if m not in spec.widths]
    if idle:
        said.append(f"data.normalize: {', '.join(idle)} is not in use")
    if spec.text is None:
        changed = [key for key, value in recipe.text.model_dump(exclude_defaults=True).items() if value is not None]
        said += [f"text.{key} is without effect: no text encoder reads the text" for key in changed]
        for field, value in FIRST_STEP.items():
            if "text" in spec.widths and getattr(recipe.model, field, None) == value:
                said.append(
                    f"model.{field}: {value} takes the first step of the given text features for all of them, which is "
                    f"right where it is BERT's [CLS]; --model.{field.replace('_', '-')} mean reads every step"
                )
    elif recipe.text.gradient_checkpointing and not recipe.text.finetune:
        said.append("text.gradient_checkpointing is without effect: the text encoder is frozen")
    name = recipe.label_generator
    if name != "none":
        labels = np.concatenate([table["label_M"].to_numpy() for table in train_tables(index)])
        if why := get_label_generator(name).idle(configured(name, **recipe.labels.given), labels):
            said.append(f"labels.generator: {name} is idle: {why}")
    if recipe.engine.offload != "none" and not launch.gpus_per_worker and not torch.cuda.is_available():
        said.append("engine.offload costs memory and gains nothing: ranks compute on the CPU, where the optimizer is")
    if launch.launcher != "ray":
        said += ["launch.address is without effect: only --launcher ray joins a cluster"] if launch.address else []
        said += ["launch.gpus_per_worker is without effect: each local rank takes one GPU where there are any"] * bool(
            launch.gpus_per_worker
        )
    return said


def available(recipe: Recipe, index: AnyIndex) -> list[str]:
    """Modalities of the data set that the recipe could use: text counts where the encoder has something to read."""
    have = [m for m in MODALITIES if m in index.modalities]
    if recipe.text.encoder and "text" not in have and (index.has_raw_text or index.has_tokens):
        have.insert(0, "text")
    return have


def data_spec(recipe: Recipe, index: AnyIndex) -> DataSpec:
    """What the system must know of the data.

    Raises:
        ConfigError: the recipe asks for a modality that the data set lacks.
    """
    have = available(recipe, index)
    wanted: tuple[str, ...] = recipe.data.modalities or tuple(have)
    lacking = [m for m in wanted if m not in have]
    if lacking or not wanted:
        unread = ("text" in lacking or not wanted) and (index.has_raw_text or index.has_tokens)
        held = ", ".join(have) or (unread and "transcripts or token ids only") or "none"
        raise ConfigError(
            f"data.modalities: {index.name} has no {', '.join(lacking) or 'features'}; it has {held}"
            + ("; --text.encoder NAME reads its text" if unread else "")
        )
    encoded = recipe.text.encoder is not None and "text" in wanted
    if encoded and recipe.text.input == "tokens" and not index.has_tokens:
        raise ConfigError(f"text.input: {index.name} has no token ids; use raw")
    if encoded and recipe.text.input == "raw" and not index.has_raw_text:
        raise ConfigError(f"text.input: {index.name} has no transcripts; use tokens")
    widths: dict[str, int] = {
        m: encoder_width(recipe.text) if m == "text" and encoded else index.modalities[m].width
        for m in MODALITIES
        if m in wanted
    }
    return DataSpec(widths, index.label_range, index.tasks, recipe.text if encoded else None, index.classes)


def batch_spec(recipe: Recipe, index: AnyIndex, spec: DataSpec) -> BatchSpec:
    """How samples become batches."""
    ids = text_ids(spec.text, index) if spec.text else None
    normalize = [m for m in recipe.data.normalize if m in spec.widths]
    return BatchSpec.of(index, tuple(spec.widths), ids, normalize)


def label_generator(recipe: Recipe, index: AnyIndex, system: System, device: torch.device) -> LabelGenerator:
    """The generator that the recipe names, else the paper's, over the train split."""
    name = recipe.label_generator
    ids = [np.empty(0, np.int64)]
    labels = [np.empty(0, np.float32)]
    for table in train_tables(index) if name != "none" else ():
        ids.append(np.array([stable_id(key) for key in table["key"].to_pylist()], np.int64))
        labels.append(table["label_M"].to_numpy())
    return make_generator(
        name,
        numbers=[] if name == "none" else index.numbers("train"),
        ids=np.concatenate(ids),
        labels=np.concatenate(labels),
        widths=system.feature_widths(),
        label_range=index.label_range,
        device=device,
        **recipe.labels.given,
    )


def train_tables(index: AnyIndex) -> Iterator[pa.Table]:
    """What is known of each train sample, shard by shard, in the order of their numbers."""
    shards = [n for n, shard in enumerate(index.shards) if shard.split == "train"]
    fetch_tables(index, shards)
    yield from map(index.table, shards)


def stable_id(key: str) -> int:
    """A 64-bit number of a sample's key: the same in every packing of the data set."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


def card(recipe: Recipe, index: AnyIndex) -> DataCard:
    """``data.json``: what the system was built for, enough to build it again without the data."""
    return DataCard.of(index, data_spec(recipe, index), kind_of(index), recipe.data.normalize)


def write_description(folder: Path, recipe: Recipe, index: AnyIndex) -> None:
    """Writes ``data.json`` and ``plan.json`` into a run folder; the driver does, before anything starts."""
    card(recipe, index).save(folder)
    run_folder.write_json(folder / "plan.json", arithmetic(recipe, index))


def arithmetic(recipe: Recipe, index: AnyIndex) -> dict[str, Any]:
    """The derived numbers of a run, and which shards it goes without."""
    world, k = recipe.launch.workers, recipe.optim.accumulation
    train = index.splits["train"]
    steps = -(-train // recipe.data.batch_size)
    return {
        "train_samples": train,
        "global_batch": recipe.data.batch_size,
        "ranks": world,
        "accumulation": k,
        "micro_batch": -(-recipe.data.batch_size // (world * k)),
        "steps_per_epoch": steps,
        "epochs": recipe.train.epochs,
        "total_steps": steps * recipe.train.epochs,
        "order": plan_of(recipe, index, data_spec(recipe, index), 1).describe(),
        **left_out(recipe),
    }


def left_out(recipe: Recipe) -> dict[str, Any]:
    """The shards that the run goes without, for those who read its files; empty where it goes without none."""
    return {"left_out": list(recipe.data.without)} if recipe.data.without else {}


def sentence(numbers: dict[str, Any]) -> str:
    """The arithmetic as a person reads it."""
    n = numbers
    return (
        f"global batch {n['global_batch']} = {counted(n['ranks'], 'rank')} x {n['micro_batch']} micro x "
        f"{n['accumulation']} accumulation; epoch {counted(n['train_samples'], 'sample')} -> "
        f"{counted(n['steps_per_epoch'], 'step')}; at most {counted(n['epochs'], 'epoch')} = "
        f"{counted(n['total_steps'], 'step')}"
    )
