"""No label is made: a system learns the labels that the data set has."""

from mmsa_dist.label_generators.base import LabelGenerator, label_generator


@label_generator("none")
class NoLabelGenerator(LabelGenerator):
    """The data set's own labels, unimodal ones where it has them."""
