"""Law 4 as far as data goes: padding is nothing. And what a batch is made of."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.batch import BatchSpec, Standard, collate, pad
from shards.errors import ConfigError, DataError
from shards.index import Index
from shards.utterance import Utterance
from tests.shards.made import WIDTHS, packed, utterance, utterances

SPEC = BatchSpec(WIDTHS, ("M", "T", "A", "V"))


@st.composite
def samples(draw: st.DrawFn) -> list[Utterance]:
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    lengths = st.fixed_dictionaries({}, optional={m: st.integers(1, 40) for m in WIDTHS})
    return [utterance(f"s{i}", "train", rng, draw(lengths)) for i in range(draw(st.integers(1, 6)))]


standards = st.sampled_from(
    [{}, {m: Standard.of({"mean": [0.3] * d, "std": [2.0] * (d - 1) + [0.0]}) for m, d in WIDTHS.items()}]
)


@settings(deadline=None)
@given(samples(), standards, st.sampled_from([np.float16, np.float32, np.float64]))
def test_a_sample_is_the_same_in_any_company(
    given: list[Utterance], standard: dict[str, Standard], dtype: type
) -> None:
    given = [replace_dtype(sample, dtype) for sample in given]
    spec = BatchSpec(WIDTHS, ("M",), standard=standard)
    batch = collate(given, spec)
    for row, sample in enumerate(given):
        alone = collate([sample], spec)
        for name in WIDTHS:
            length = int(batch.lengths[name][row])
            assert length == int(alone.lengths[name][0]) == max(1, len(sample.modalities.get(name, ())))
            assert torch.equal(batch.values[name][row, :length], alone.values[name][0])
            assert not batch.values[name][row, length:].any()  # padding is zero, standardised or not
            assert bool(batch.present[name][row]) == (name in sample.modalities)
            expected_mask = torch.arange(batch.values[name].shape[1]) < length
            assert torch.equal(batch.mask(name)[row], expected_mask)
    for name in WIDTHS:  # trimmed to the batch's longest
        assert batch.values[name].shape == (len(given), int(batch.lengths[name].max()), WIDTHS[name])
        assert batch.values[name].dtype == torch.float32


def replace_dtype(sample: Utterance, dtype: type) -> Utterance:
    arrays = {name: array.astype(dtype) for name, array in sample.modalities.items()}
    return Utterance(sample.key, sample.split, arrays, sample.labels, sample.raw_text, sample.tokens)


@settings(deadline=None)
@given(samples(), st.booleans())
def test_values_are_the_samples_own(given: list[Utterance], writeable: bool) -> None:
    """Exactly: float16 to float32 loses nothing, and a read-only array is taken without a warning."""
    halves = [replace_dtype(sample, np.float16) for sample in given]
    for sample in halves:
        for array in sample.modalities.values():
            array.flags.writeable = writeable
    batch = collate(halves, SPEC)
    for row, sample in enumerate(given):
        for name, array in sample.modalities.items():
            np.testing.assert_array_equal(batch.values[name][row, : len(array)].numpy(), array)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_any_memory_layout_and_kind_of_number(threads: int) -> None:
    """Turned round, every other one, of the other byte order, wider than wanted: as NumPy reads them."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(8, 5)).astype(np.float32)
    odd = [plain[::-1], plain[::2], np.asfortranarray(plain), plain.astype(">f4"), plain.astype(np.float64), plain[:0]]
    odd += [plain[:1][::-1], plain.astype(np.longdouble)]
    values, lengths, present = pad([*odd, None], 5)
    for row, array in zip(values, odd, strict=False):
        np.testing.assert_array_equal(row[: len(array)].numpy(), array.astype(np.float32))
        assert not row[len(array) :].any()
    assert lengths.tolist() == [8, 4, 8, 8, 8, 1, 1, 8, 1]
    assert present.tolist() == [True] * 5 + [False] + [True] * 2 + [False]
    ids, *_ = pad([np.array([3, 4], ">i4"), np.arange(6, dtype=np.uint8)[::2]], None)
    assert ids.tolist() == [[3, 4, 0], [0, 2, 4]]
    assert [len(part) for part in pad([], 5)] == [0, 0, 0]


def test_float16_specials_and_long_samples_convert_exactly(threads: int) -> None:
    """With threads copied in pieces, below the size at which torch would start some: no piece is lost."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    array = np.resize(every, (1300, 74))
    values, lengths, _ = pad([array, array[:7]], 74)
    np.testing.assert_array_equal(values[0].numpy(), array.astype(np.float32))
    np.testing.assert_array_equal(values[1, :7].numpy(), array[:7].astype(np.float32))
    assert lengths.tolist() == [1300, 7] and not values[1, 7:].any()
    wide = np.resize(every, (3, 40000))  # one step alone is larger than a piece
    np.testing.assert_array_equal(pad([wide], 40000)[0][0].numpy(), wide.astype(np.float32))


def test_standardised_by_hand(threads: int) -> None:
    standard = Standard.of({"mean": [1.0, -2.0, 5.0], "std": [2.0, 0.5, 0.0]})
    values, _, _ = pad([np.array([[3.0, -1.0, 5.0]], np.float16), None, np.zeros((2, 3), np.float32)], 3, standard)
    assert values[0].tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert values[1].tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert values[2].tolist() == [[-0.5, 4.0, -5.0], [-0.5, 4.0, -5.0]]  # a constant dimension is only shifted


def test_labels_weights_and_numbers() -> None:
    rng = np.random.default_rng(0)
    first, second = (utterance(key, "train", rng, {"text": 2}) for key in ("a.b/c", "é"))
    del second.labels["V"]
    batch = collate([first, second, first], SPEC, np.array([7, 3, 7]), np.array([1, 1, 0], np.float32), norm=1.5)
    assert batch.keys == ["a.b/c", "é", "a.b/c"] and batch.size == 3
    assert batch.numbers.tolist() == [7, 3, 7] and batch.numbers.dtype == torch.int64
    assert batch.weight.tolist() == [1, 1, 0] and batch.norm == 1.5
    assert list(batch.labels) == ["M", "T", "A", "V"]
    assert batch.labels["M"].tolist() == [np.float32(s.labels["M"]) for s in (first, second, first)]
    assert math.isnan(batch.labels["V"][1]) and not math.isnan(batch.labels["V"][0])
    plain = collate([first, second], SPEC)
    assert plain.numbers.tolist() == [0, 1] and plain.weight.tolist() == [1, 1] and plain.norm == 2
    assert all(not present.any() for name, present in plain.present.items() if name != "text")


def test_token_ids_take_the_place_of_text_features() -> None:
    rng = np.random.default_rng(0)
    given = [utterance(f"s{i}", "train", rng, {"text": 3, "audio": 2}) for i in range(3)]

    def ids(asked: list[Utterance]) -> list[np.ndarray]:
        return [np.arange(len(u.key) + i, dtype=np.int32) + 1 for i, u in enumerate(asked)]

    batch = collate(given, BatchSpec({"text": None, "audio": 5}, ("M",), ids))
    assert batch.values["text"].dtype == torch.int64
    assert batch.values["text"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 0], [1, 2, 3, 4]]
    assert batch.lengths["text"].tolist() == [2, 3, 4] and batch.present["text"].all()
    assert list(batch.values) == ["text", "audio"]


def test_an_empty_transcript_is_an_absent_text() -> None:
    values, lengths, present = pad([np.zeros(0, np.int64), np.array([5, 6])], None)
    assert values.tolist() == [[0, 0], [5, 6]] and lengths.tolist() == [1, 2] and present.tolist() == [False, True]


def test_features_of_another_width_are_named() -> None:
    sample = utterance("who", "test", np.random.default_rng(0), {"text": 3})
    with pytest.raises(DataError, match=r"sample 'who': text is of shape \(3, 6\), expected \(steps, 768\)"):
        collate([sample], BatchSpec({"text": 768}, ("M",)))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return packed(tmp_path_factory.mktemp("data") / "made", utterances({"train": 20}, absent=0.3))


def test_spec_of_an_index(index: Index) -> None:
    spec = BatchSpec.of(index)
    assert dict(spec.widths) == WIDTHS and spec.tasks == index.tasks and not spec.standard
    assert BatchSpec.of(index, modalities=("vision", "text")).modalities == ("text", "vision")
    encoded = BatchSpec.of(index, ("text", "audio"), text_ids=lambda samples: [], normalize=("audio",))
    assert dict(encoded.widths) == {"text": None, "audio": 5}
    np.testing.assert_allclose(encoded.standard["audio"].mean, index.statistics["audio"]["mean"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modalities": ("text", "smell")},
            r"data.modalities asks for smell, but .* has features of text, audio, vision",
        ),
        ({"modalities": ()}, "data.modalities asks for nothing"),
        ({"modalities": ("text",), "normalize": ("audio",)}, "data.normalize names 'audio', .* choose among: text"),
        ({"text_ids": lambda samples: [], "normalize": ("text",)}, "data.normalize names 'text', .*: audio, vision"),
    ],
)
def test_a_spec_that_cannot_be(index: Index, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchSpec.of(index, **options)


def test_text_alone_needs_an_encoder(tmp_path: Path, index: Index) -> None:
    bare = index.model_copy(update={"modalities": {"audio": index.modalities["audio"]}})
    with pytest.raises(ConfigError, match=r"asks for text, but .* has features of audio .*text.encoder"):
        BatchSpec.of(bare, ("text", "audio"))
    assert BatchSpec.of(bare, text_ids=lambda samples: []).modalities == ("text", "audio")


def test_to_keeps_lengths_and_numbers_on_the_cpu() -> None:
    batch = collate(utterances({"train": 3}), SPEC).to("meta")
    assert {t.device.type for t in (*batch.values.values(), *batch.labels.values(), batch.weight)} == {"meta"}
    assert {t.device.type for t in (*batch.lengths.values(), batch.numbers)} == {"cpu"}
