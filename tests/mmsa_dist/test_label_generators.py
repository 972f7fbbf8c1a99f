"""Finding and building a label generator."""

import math

import pytest
import torch

from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.label_generators import (
    ULGM,
    LabelGenerator,
    get_label_generator,
    label_generator,
    label_generator_names,
    make_generator,
)
from mmsa_dist.systems.base import Prediction
from shards.batch import Batch
from tests.mmsa_dist.ulgm_reference import WIDTHS, same


def test_none_gives_the_labels_of_the_data_set() -> None:
    generator = make_generator(
        "none", numbers=[], ids=[], labels=[], widths={}, label_range=(-1, 1), zero_is_positive=False
    )
    batch = Batch(
        values={},
        lengths={},
        present={},
        labels={"M": torch.tensor([0.25]), "T": torch.tensor([0.5])},
        numbers=torch.tensor([3]),
        weight=torch.ones(1),
        norm=1.0,
        keys=["a"],
    )
    assert same(generator.targets(batch), batch.labels)
    generator.observe(1, [batch], [Prediction(tasks={}, features={"M": torch.ones(1, 2)})])
    generator.end_epoch()
    assert generator.state_dict() == {} and generator.state_bytes(10**6, WIDTHS) == 0
    generator.load_state_dict({})


def test_names() -> None:
    assert {"none", "ulgm"} <= set(label_generator_names())
    assert get_label_generator("ulgm") is ULGM and ULGM.name == "ulgm"
    assert get_label_generator("mmsa_dist.label_generators.ulgm:ULGM") is ULGM
    with pytest.raises(ConfigError, match=r"unknown label generator 'ulmg'; did you mean 'ulgm'\?"):
        get_label_generator("ulmg")
    with pytest.raises(ConfigError, match="cannot be imported"):
        get_label_generator("nowhere:Labels")
    with pytest.raises(ConfigError, match=r"wanted a subclass of mmsa_dist\.label_generators\.base\.LabelGenerator"):
        get_label_generator("mmsa_dist.label_generators.ulgm:EPS")


def test_a_third_party_adds_one_without_editing_ours() -> None:
    @label_generator("test_only")
    class Mine(LabelGenerator):
        pass

    built = make_generator("test_only", numbers=[], ids=[], labels=[], widths={}, label_range=(-1, 1))
    assert isinstance(built, Mine)
    with pytest.raises(ConfigError, match=r"'ulgm' is already mmsa_dist.label_generators.ulgm:ULGM; choose another"):
        label_generator("ulgm")(Mine)


def test_an_option_that_a_generator_lacks_is_refused_where_it_is_on() -> None:
    with pytest.raises(ConfigError, match=r"labels.zero_is_positive: label generator 'none' has no such option"):
        make_generator("none", numbers=[], ids=[], labels=[], widths={}, label_range=(-1, 1), zero_is_positive=True)


@pytest.mark.parametrize("widths", [{}, {"M": 3}, {"T": 3}, {"M": 3, "X": 3}])
def test_a_system_without_the_features_is_refused(widths: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"'ulgm' reads features of M and of at least one of T, A, V; the system gives"
    ):
        make_generator("ulgm", numbers=[0], ids=[0], labels=[1.0], widths=widths, label_range=(-1, 1))


def test_train_samples_without_a_label_or_an_id_of_their_own_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 samples have no label M"):
        make_generator("ulgm", numbers=[0, 1], ids=[0, 1], labels=[1, math.nan], widths=WIDTHS, label_range=(-1, 1))
    with pytest.raises(DataError, match="2 samples have 1 ids"):
        make_generator("ulgm", numbers=[0, 1], ids=[5, 5], labels=[1, 1], widths=WIDTHS, label_range=(-1, 1))
