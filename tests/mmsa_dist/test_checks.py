"""What is found out of data and recipe together before a run starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from mmsa_dist.config import LabelConfig
from mmsa_dist.errors import DataError
from mmsa_dist.recipe import Recipe, load_recipe
from mmsa_dist.session import without_effect
from mmsa_dist.train import fit_together
from shards.utterance import Utterance
from shards.write import pack
from tests.data import TinyEmotions, TinySource


class Unlabelled(TinySource):
    """The samples of `split` with the numbers in `numbers` have no label; packing learns of it only when it reads."""

    def __init__(self, samples: int, split: str, numbers: tuple[int, ...]) -> None:
        super().__init__(samples)
        self.lacking = {(split, number) for number in numbers}

    def read(self, split: str, number: int) -> Utterance:
        made = super().read(split, number)
        return replace(made, labels={}) if (split, number) in self.lacking else made


class Sided(TinySource):
    """No label is below zero, or none above; half of them are zero."""

    def __init__(self, samples: int, sign: int) -> None:
        super().__init__(samples)
        self.sign = sign

    def read(self, split: str, number: int) -> Utterance:
        made = super().read(split, number)
        return replace(made, labels={"M": self.sign * abs(made.labels["M"]) * (number % 2)})


class UnlabelledEmotions(TinyEmotions):
    """A training sample of which nobody said whether it is sad."""

    def read(self, split: str, number: int) -> Utterance:
        made = super().read(split, number)
        return made if (split, number) != ("train", 5) else replace(made, labels={**made.labels, "sad": float("nan")})


def fitted(source: TinySource, folder: Path, *words: str, system: str = "ufen_mtfn") -> Recipe:
    pack(source, folder / "data", dtype="float32", shard_bytes=8_000)
    _, recipe = fit_together(load_recipe(system, None, ["--data", str(folder / "data"), *words]))
    return recipe


def test_a_run_says_which_label_generator_it_takes(tmp_path: Path) -> None:
    """The one of the paper by its name: the recipe that a run keeps is whole."""
    assert fitted(TinySource(60), tmp_path, system="self_mm").labels.generator == "ulgm"
    assert fitted(TinySource(60), tmp_path / "other", "--labels.generator", "sugrm", system="self_mm").labels == (
        LabelConfig(generator="sugrm")
    )


@pytest.mark.parametrize("system", ["ufen_mtfn", "self_mm"])
def test_a_train_sample_without_its_label_is_refused(tmp_path: Path, system: str) -> None:
    """Its loss would be NaN, and the learning rate would be blamed."""
    message = r"data\.path: 2 of 36 train samples of synthetic-tiny have no label M, e\.g\. 'train\$_\$\d+'; pack the"
    with pytest.raises(DataError, match=message):
        fitted(Unlabelled(60, "train", (7, 20)), tmp_path, system=system)


def test_so_is_one_that_the_system_is_judged_by(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"1 of 12 valid samples of synthetic-tiny has no label M, e\.g\. 'valid\$_\$3'"
    ):
        fitted(Unlabelled(60, "valid", (3,)), tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"12 of 12 test samples .* or leave the test split alone \(--train\.no-test\)"):
        fitted(Unlabelled(60, "test", tuple(range(12))), tmp_path / "test")
    (tmp_path / "left").mkdir()
    fitted(Unlabelled(60, "test", tuple(range(12))), tmp_path / "left", "--train.no-test")


def test_an_emotion_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 36 train samples .* has no label sad, e\.g\. 'train\$_\$5'"):
        fitted(UnlabelledEmotions(60), tmp_path, system="mult")


@pytest.mark.parametrize("generator", ["ulgm", "sugrm", "ulag"])
@pytest.mark.parametrize(("sign", "lacking"), [(1, "negative"), (-1, "positive"), (0, "positive or a negative")])
def test_a_label_generator_without_one_of_its_classes_is_told(
    tmp_path: Path, generator: str, sign: int, lacking: str
) -> None:
    """Its unimodal labels would stay y_m, and nothing would say so."""
    index = pack(Sided(60, sign), tmp_path, dtype="float32")[0]

    def notes(*words: str) -> list[str]:
        recipe = load_recipe("self_mm", None, ["--labels.generator", generator, *words])
        return [note for note in without_effect(recipe, index) if note.startswith("labels.")]

    (note,) = notes()
    assert note.startswith(f"labels.generator: {generator} is idle: it tells samples with a positive label M from")
    assert f"of 36 train samples none has a {lacking} one: " in note
    assert ("unimodal labels stay equal to it" in note) == (generator != "ulag")
    assert ("--labels.zero-is-positive counts zeros as positive" in note) == (sign == -1)
    positive = notes("--labels.zero-is-positive")
    assert len(positive) == (sign != -1)
    assert sign == -1 or "none has a negative one" in positive[0]


def test_with_both_classes_nothing_is_told(tmp_path: Path) -> None:
    index = pack(TinySource(60), tmp_path, dtype="float32")[0]
    for generator in ("ulgm", "multimodal"):
        recipe = load_recipe("self_mm", None, ["--labels.generator", generator, "--model.text-pooling", "mean"])
        assert without_effect(recipe, index) == []
