"""What every sample goes through on its way in, to be packed or to be predicted."""

import math
from pathlib import Path

import numpy as np
import pytest

from mmsa_dist.prediction.inputs import open_input
from shards.errors import DataError
from shards.sources.clean import Cleaner
from shards.utterance import Utterance
from tests.shards.made import Samples
from tests.shards.pickles import content, written

pytestmark = pytest.mark.fault


def sample(key: str = "a", text: str = "words", **labels: float) -> Utterance:
    return Utterance(key, "train", {"audio": np.ones((2, 5), np.float32)}, labels, raw_text=text)


def cleaned(utterance: Utterance, unlabelled: bool = False) -> Utterance:
    return Cleaner(Samples([utterance]), unlabelled).clean(utterance)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            sample(key="a\ud800", M=0.0),
            r"made: train, id 'a\\ud800': the id is not valid unicode: character 1 is '\\ud800'",
        ),
        (sample(text="so \udfff", M=0.0), r"id 'a': the transcript is not valid unicode: character 3 is '\\udfff'"),
    ],
)
def test_half_a_character(wrong: Utterance, said: str) -> None:
    with pytest.raises(DataError, match=said):
        cleaned(wrong)


def test_a_label_that_is_nan_is_none_to_predict_and_wrong_to_learn_from() -> None:
    assert cleaned(sample(M=math.nan, T=0.5), unlabelled=True).labels == {"T": 0.5}
    with pytest.raises(DataError, match="label M is nan"):
        cleaned(sample(M=math.nan, T=0.5))
    with pytest.raises(DataError, match="label M is 7"):
        cleaned(sample(M=7.0), unlabelled=True)


def test_predict_reads_a_pickle_without_labels(tmp_path: Path) -> None:
    data = {"test": content()["test"]}
    data["test"]["regression_labels"][:] = math.nan
    found = list(open_input(str(written(tmp_path, data))).utterances("test", with_text=True))
    assert [u.labels for u in found] == [{}] * 5
