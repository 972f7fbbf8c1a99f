"""Whether a system and its label generator can learn a data set, found out before anything starts."""

from dataclasses import replace

import pyarrow.compute as pc
from torch import nn

from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.label_generators import over_nothing
from mmsa_dist.layers.hub import check_checkpointing
from mmsa_dist.recipe import Recipe
from mmsa_dist.session import data_spec
from mmsa_dist.systems import get_system, make_system
from mmsa_dist.systems.base import classifying
from shards.ahead import fetch_tables
from shards.mix import AnyIndex
from shards.suggest import has


def check_system(recipe: Recipe, index: AnyIndex) -> None:
    """Builds the system, without its text encoder, and its label generator, to see that they fit the data.

    Raises:
        ConfigError: they do not.
    """
    spec = data_spec(recipe, index)
    name = recipe.label_generator
    if index.classes:
        check_classes(recipe, index, name)
    if spec.text is not None and spec.text.gradient_checkpointing and spec.text.finetune:
        assert spec.text.encoder is not None
        check_checkpointing(spec.text.encoder)
    system = make_system(recipe.system, recipe.model, replace(spec, text=None))
    check_parameters(system, f"system {recipe.system}")
    generator = over_nothing(name, system.feature_widths(), index.label_range, **recipe.labels.given)
    if generator.layers is not None:
        check_parameters(generator.layers, f"labels.generator: {name}")
    if not system.feature_widths().keys() - {"M"} and name not in ("none", type(system).labels):
        raise ConfigError(
            f"labels.generator: {name} is without effect: {recipe.system} as it is set up has no unimodal task whose "
            "labels it could make; leave it out, or use a system that has some (tam_ulag, iam, self_mm, sugrm, or "
            "ufen_mtfn with --model.unimodal-targets own)"
        )
    lacking = system.feature_widths().keys() - {"M", *index.tasks}
    if name == "none" and lacking:
        raise ConfigError(
            f"labels.generator: none, but {index.name} has no labels for the tasks {', '.join(sorted(lacking))} of "
            f"{recipe.system}; use a generator (ulgm, sugrm, ulag), or train fewer tasks (--model.subtasks)"
        )


def check_parameters(module: nn.Module, whose: str) -> None:
    """Says which parameter DeepSpeed cannot send to all ranks, or no checkpoint can hold.

    Raises:
        ConfigError: there is one.
    """
    for name, parameter in module.named_parameters():
        if not parameter.dim() or not parameter.numel() or not parameter.is_contiguous():
            what = "is not contiguous" if parameter.numel() > 1 else f"has the shape {tuple(parameter.shape)}"
            raise ConfigError(
                f"{whose}: its parameter {name} {what}; ranks share what has a dimension, is not empty and lies in "
                "order: make a single number of shape (1,), leave an empty parameter out, or call contiguous()"
            )


def check_labels(recipe: Recipe, index: AnyIndex) -> None:
    """Says which samples lack a label that the system learns or is judged by: their loss would be NaN.

    Raises:
        DataError: there are some. No packing of ours lets them through; another source may.
    """
    tasks = tuple(index.classes) or ("M",)
    for split in ("train", "valid", *(["test"] if recipe.train.test else [])):
        missing: dict[str, int] = {}
        example: dict[str, str] = {}
        fetch_tables(index, index.shards_of(split))
        for table in map(index.table, index.shards_of(split)):
            for task in tasks:
                lacking = pc.invert(pc.is_finite(table[f"label_{task}"]))
                if count := pc.sum(lacking).as_py():
                    missing[task] = missing.get(task, 0) + count
                    example.setdefault(task, table["key"].filter(lacking)[0].as_py())
        for task, count in missing.items():
            raise DataError(
                f"data.path: {count:,} of {index.splits[split]:,} {split} samples of {index.name} {has(count)} no "
                f"label {task}, e.g. {example[task]!r}; pack the data without {'it' if count == 1 else 'them'}"
                + (", or leave the test split alone (--train.no-test)" if split == "test" else "")
            )


def check_classes(recipe: Recipe, index: AnyIndex, generator: str) -> None:
    """Says that a system or a label generator knows intensities only, where the labels are classes.

    Raises:
        ConfigError: so it is.
    """
    if not get_system(recipe.system).classifies:
        raise ConfigError(
            f"system {recipe.system} predicts a sentiment intensity, but the labels of {index.name} are classes "
            f"({', '.join(index.tasks)}); train one that classifies: {', '.join(classifying()) or 'none here does'}"
        )
    if generator != "none":
        raise ConfigError(
            f"labels.generator: {generator} makes unimodal intensities from the label M, which {index.name} has not: "
            "its labels are classes; use none"
        )
