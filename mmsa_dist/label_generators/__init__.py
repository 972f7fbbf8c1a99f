"""Unimodal labels: the data set's own, or made while training. Importing this registers those that come with it."""

from mmsa_dist.label_generators.base import (
    LabelGenerator,
    configured,
    get_label_generator,
    label_generator,
    label_generator_names,
    make_generator,
    over_nothing,
)
from mmsa_dist.label_generators.multimodal import MultimodalLabels
from mmsa_dist.label_generators.none import NoLabelGenerator
from mmsa_dist.label_generators.sugrm import SUGRM
from mmsa_dist.label_generators.ulag import ULAG
from mmsa_dist.label_generators.ulgm import ULGM

__all__ = [
    "SUGRM",
    "ULAG",
    "ULGM",
    "LabelGenerator",
    "MultimodalLabels",
    "NoLabelGenerator",
    "configured",
    "get_label_generator",
    "label_generator",
    "label_generator_names",
    "make_generator",
    "over_nothing",
]
