"""A mix of packed data sets: the same samples under joint numbers, keys and widths; what does not fit is said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ConfigError, DataError
from shards.index import Index
from shards.mix import Mix, MixReader, open_data, open_reader
from shards.moments import Moments
from shards.plan import evaluation_plan, training_plan
from shards.read import ShardReader
from shards.utterance import SPLITS, Utterance
from shards.write import pack
from tests.shards.made import Samples, utterances
from tests.shards.plans import make_index

AUDIO = 3
"""Width of the second set's audio; the first has another, and both have the same text."""


class Other(Samples):
    """Narrower audio, no vision, one label, float32."""

    def __init__(self, counts: dict[str, int], name: str = "other", **changed: object) -> None:
        made = [
            replace(
                u,
                modalities={"text": u.modalities["text"], "audio": u.modalities["audio"][:, :AUDIO]},
                labels={"M": u.labels["M"]},
            )
            for u in utterances(counts, seed=1)
        ]
        super().__init__(made)
        self.widths = {"text": 6, "audio": AUDIO}
        self.name = name
        for field, value in changed.items():
            setattr(self, field, value)


COUNTS = {"train": 23, "valid": 5, "test": 3}, {"train": 11, "valid": 4, "test": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Index]:
    folder = tmp_path_factory.mktemp("mix")
    one = pack(Samples(utterances(COUNTS[0], absent=0.2)), folder / "one", shard_bytes=8192)[0]
    other = pack(Other(COUNTS[1]), folder / "other", shard_bytes=8192, dtype="float32")[0]
    return [one, other]


@pytest.fixture(scope="module")
def mix(parts: list[Index]) -> Mix:
    return Mix(parts, widths="blocks")


def test_a_mix_is_described_like_one_set(parts: list[Index], mix: Mix) -> None:
    assert mix.name == "made+other" and mix.num_samples == sum(part.num_samples for part in parts)
    assert mix.splits == {"train": 34, "valid": 9, "test": 5}
    assert {m: f.width for m, f in mix.modalities.items()} == {"text": 6, "audio": 5 + AUDIO, "vision": 4}
    assert mix.tasks == ("M",) and mix.has_raw_text and mix.has_tokens and mix.classes == {}
    assert mix.shares == (23, 11)
    assert [note.split(":")[0] for note in mix.notes()] == [
        "labels T, A, V of made are not used",
        "other has no vision",
    ]
    at = 0
    for split in SPLITS:
        assert mix.numbers(split) == range(at, at + mix.splits[split])
        assert [n for numbers in mix.ranges(split).values() for n in numbers] == list(mix.numbers(split))
        at += mix.splits[split]


def test_what_one_might_not_expect_of_a_mix_is_said(parts: list[Index]) -> None:
    often = Mix(parts, weights=(1, 9), widths="blocks").notes()
    assert "an epoch has 2.8 passes over other" not in " ".join(often)  # 34 * 0.9 / 11: within reason
    rarely = Mix(parts, weights=(100, 1), widths="blocks").notes()
    assert (
        rarely[-1].startswith("other has no vision") and "an epoch has 0.031 passes over other (11 train" in rarely[1]
    )
    bare = parts[1].model_copy(update={"splits": {**parts[1].splits, "valid": 0}})
    assert (
        "other has no valid samples: those of the other sets stand alone"
        in Mix([parts[0], bare], widths="blocks").notes()
    )


def test_every_sample_is_the_one_of_its_set(parts: list[Index], mix: Mix) -> None:
    """Key, labels, text and features; in columns of its own where widths differ, zeros elsewhere."""
    columns = {"made": slice(0, 5), "other": slice(5, 8)}
    with MixReader(mix) as reader:
        seen = []
        for split in SPLITS:
            for part in parts:
                own = ShardReader(part)
                for number, theirs in zip(mix.ranges(split).get(part.name, ()), part.numbers(split), strict=True):
                    mine, other = reader.sample(number, with_text=True), own.sample(theirs, with_text=True)
                    assert mine.key == f"{part.name}/{other.key}" and mine.raw_text == other.raw_text
                    assert mine.labels == {"M": other.labels["M"]} and mine.split == split
                    assert mine.modalities.keys() == other.modalities.keys()
                    for name, array in mine.modalities.items():
                        at = columns[part.name] if name == "audio" else slice(None)
                        assert np.array_equal(array[:, at], other.modalities[name])
                        assert array.shape[1] == mix.modalities[name].width
                        assert np.count_nonzero(array) == np.count_nonzero(other.modalities[name])
                    seen.append(mine.key)
        assert seen == [u.key for u in reader.samples(range(mix.num_samples))]
    tables = [key for n in range(len(mix.shards)) for key in mix.table(n)["key"].to_pylist()]
    assert tables == seen and len(set(seen)) == len(seen)
    assert mix.table(0).column_names[-1] == "label_M"


def test_statistics_are_those_of_the_samples_as_they_are_read(mix: Mix) -> None:
    with MixReader(mix) as reader:
        for name, modality in mix.modalities.items():
            moments = Moments(modality.width)
            for u in reader.samples(mix.numbers("train")):
                if name in u.modalities:
                    moments.add(u.modalities[name])
            wanted, found = moments.result(), mix.statistics[name]
            for field in ("mean", "std"):  # float16 was stored, and the sets' statistics are of what was packed
                assert np.allclose(found[field], wanted[field], atol=2e-3), (name, field)


def test_the_fingerprint_is_of_sets_shares_and_columns(parts: list[Index], mix: Mix) -> None:
    assert Mix(parts, widths="blocks").fingerprint == mix.fingerprint
    assert Mix(parts, (23, 11), widths="blocks").fingerprint == mix.fingerprint, "the same shares"
    others = [
        Mix(parts[::-1], widths="blocks"),
        Mix(parts, (1, 2), widths="blocks"),
        Mix(parts, use=["text"]),
        Mix([parts[0].model_copy(update={"fingerprint": "0" * 64}), parts[1]], widths="blocks"),
    ]
    assert len({mix.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_weights_in_any_unit(parts: list[Index]) -> None:
    for weights in ((1, 2), (0.1, 0.2), (5e5, 1e6), (1 / 3, 2 / 3)):
        shares = Mix(parts, weights, use=["text"]).shares
        assert shares[1] / shares[0] == pytest.approx(2, rel=1e-6)
    assert Mix(parts, (0.5, 1.5), use=["text"]).shares == (1, 3)


def test_evaluation_is_over_all_sets(mix: Mix) -> None:
    plan = evaluation_plan(mix, "valid", 4)
    seen = [int(n) for piece in plan.batches_for(0, 1) for n, w in zip(piece.numbers, piece.weight, strict=True) if w]
    assert seen == list(mix.numbers("valid"))


def test_one_set_is_an_index_and_no_mix(parts: list[Index]) -> None:
    alone = open_data([parts[0].folder])
    assert isinstance(alone, Index) and isinstance(open_reader(alone), ShardReader)
    assert isinstance(open_data([part.folder for part in parts], use=["text"]), Mix)
    with pytest.raises(ConfigError, match=r"data\.weights: they are for a mix of several data sets, and one is given"):
        open_data([parts[0].folder], weights=(1,))


Change = Callable[[Index], Index]


def changed(**fields: object) -> Change:
    return lambda part: part.model_copy(update=fields)


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (changed(), {}, r"audio is of different widths \(made 5, other 3\).*modalities.*--data.align-widths blocks"),
        (changed(name="made"), {}, r"two data sets are called 'made' \(.*one, .*other\).*--name"),
        (changed(label_range=(-1.0, 1.0)), {}, r"labels are in -3..3 in made but -1..1 in other: one model cannot"),
        (changed(classes={"M": 2}), {}, r"made has the classes of no task, other {'M': 2}"),
        (changed(tasks=("V",)), {}, None),
        (changed(tasks=("happy",)), {}, r"no label in common \(made: M, T, A, V, other: happy\)"),
        (changed(splits={"train": 0, "valid": 4, "test": 0}), {}, r"other has no train samples; leave it out"),
        (changed(), {"weights": (1, 2, 3)}, r"data\.weights: 3 for 2 data sets \(made, other\); give one for each"),
        (changed(), {"weights": (1, 0)}, r"data\.weights: 0 is not a positive number"),
        (changed(), {"weights": (1, float("nan"))}, r"data\.weights: nan is not a positive number"),
        (changed(), {"weights": (1, 1e-12)}, r"data\.weights: 1, 1e-12 lie too far apart or have too many digits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    parts: list[Index], change: Change, options: dict[str, object], sentence: str | None
) -> None:
    sets = [parts[0], change(parts[1])]
    if sentence is None:
        assert Mix(sets, use=["text"]).tasks == ("V",)
        return
    with pytest.raises(ConfigError, match=sentence):
        Mix(sets, **options)  # type: ignore[arg-type]


def test_modalities_not_in_use_need_not_fit(parts: list[Index]) -> None:
    mix = Mix(parts, use=["vision", "text"])
    assert list(mix.modalities) == ["text", "vision"]
    with MixReader(mix) as reader:
        assert all(set(u.modalities) <= {"text", "vision"} for u in reader.samples(range(mix.num_samples)))


def test_a_set_without_the_split_is_said(parts: list[Index]) -> None:
    one = make_index({"train": [3], "test": [2]}).model_copy(update={"name": "one"})
    mix = Mix([one, make_index({"train": [4, 2]})])
    assert mix.numbers("test") == range(9, 11) and list(mix.ranges("test")) == ["one"]
    with pytest.raises(DataError, match="made: split 'test' has no samples; leave the set out"):
        training_plan(mix, "test", 0, 1, 4)
    with pytest.raises(DataError, match="did you mean 'train'"):
        mix.numbers("trian")


def test_keys_that_two_sets_share_stay_apart(tmp_path: Path) -> None:
    made: list[Utterance] = utterances({"train": 4})
    indexes = []
    for name in ("a", "b"):
        source = Samples(made)
        source.name = name
        indexes.append(pack(source, tmp_path / name)[0])
    mix = Mix(indexes)
    with MixReader(mix) as reader:
        keys = [u.key for u in reader.samples(mix.numbers("train"))]
    assert len(set(keys)) == 8 and {key.partition("/")[0] for key in keys} == {"a", "b"}
