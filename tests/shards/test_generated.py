"""Generated data: the sizes of the published sets, a signal that no modality holds alone, and its label: synthetic."""

import time
from itertools import islice

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from shards.errors import ConfigError
from shards.sources.generated import CLS, FIRST_TOKEN, NEGATIVE, POSITIVE, PRESETS, SEP, WORDS, GeneratedSource
from shards.utterance import EMOTIONS, MODALITIES, SPLITS, Utterance


@pytest.mark.parametrize(
    ("like", "counts", "widths", "longest", "tasks", "top"),
    [
        ("mosi", (1284, 229, 686), (768, 5, 20), (50, 375, 500), ("M",), 3),
        ("mosei", (16326, 1871, 4659), (768, 74, 35), (50, 500, 500), ("M",), 3),
        ("sims", (1368, 456, 457), (768, 33, 709), (39, 400, 55), ("M", "T", "A", "V"), 1),
        ("iemocap", (2717, 798, 938), (300, 74, 35), (20, 400, 500), EMOTIONS, 1),
    ],
)
def test_sizes_are_those_of_the_published_set(
    like: str,
    counts: tuple[int, ...],
    widths: tuple[int, ...],
    longest: tuple[int, ...],
    tasks: tuple[str, ...],
    top: int,
) -> None:
    source = GeneratedSource(like)
    assert tuple(source.counts[split] for split in SPLITS) == counts
    assert tuple(source.widths[m] for m in MODALITIES) == widths
    assert (source.tasks, source.label_range) == (tasks, (0 if tasks == EMOTIONS else -top, top))
    assert source.classes == (dict.fromkeys(EMOTIONS, 2) if tasks == EMOTIONS else {})
    seen = [source.read("train", n) for n in range(40)]
    for modality, width, most in zip(MODALITIES, widths, longest, strict=True):
        lengths = [len(u.modalities[modality]) for u in seen]
        least = 8 if modality == "text" else most // 5
        assert min(lengths) >= least and max(lengths) <= most and len(set(lengths)) > 10
        assert all(u.modalities[modality].shape[1] == width for u in seen)
    for u in seen:
        assert tuple(u.labels) == tasks
        assert all(abs(y) <= top and abs(y * 5 - round(y * 5)) < 1e-9 for y in u.labels.values())


@pytest.mark.parametrize("samples", [3, 10, 999])
def test_any_number_of_samples_keeps_the_proportions(samples: int) -> None:
    counts = GeneratedSource("mosi", samples).counts
    assert sum(counts.values()) == samples
    for split, part in zip(SPLITS, PRESETS["mosi"].counts, strict=True):
        assert counts[split] >= 1
        assert abs(counts[split] - samples * part / 2199) <= 2


def test_wrong_requests() -> None:
    with pytest.raises(ConfigError, match="--samples 2: at least 3 are needed, one a split"):
        GeneratedSource("mosi", 2)
    with pytest.raises(ConfigError, match="unknown data set 'mosie'; did you mean 'mosi'"):
        GeneratedSource("mosie")


def test_a_sample_depends_on_its_place_and_the_seed_only() -> None:
    one, same, other = (
        GeneratedSource("mosi", 50, seed=1),
        GeneratedSource("mosi", 9000, seed=1),
        GeneratedSource("mosi", 50),
    )
    for split in SPLITS:
        a, b, c = one.read(split, 3), same.read(split, 3), other.read(split, 3)
        assert (a.key, a.labels, a.raw_text) == (b.key, b.labels, b.raw_text)
        assert all(np.array_equal(a.modalities[m], b.modalities[m]) for m in MODALITIES)
        assert a.raw_text != c.raw_text
    assert one.read("train", 3).raw_text != one.read("valid", 3).raw_text != one.read("train", 4).raw_text


def test_transcript_token_ids_and_label_agree() -> None:
    source = GeneratedSource("sims")
    for number in range(100):
        u = source.read("train", number)
        words = (u.raw_text or "").split()
        assert u.tokens is not None
        assert u.tokens.tolist() == [CLS, *(FIRST_TOKEN + WORDS.index(word) for word in words), SEP]
        assert len(u.tokens) == len(u.modalities["text"])
        polarity = (set(words) & set(POSITIVE) != set()) - (set(words) & set(NEGATIVE) != set())
        assert polarity == np.sign(source.meaning("train", number).polarity) == np.sign(u.labels["T"])


def test_emotions_follow_from_what_is_said_and_how() -> None:
    """One of the four each, none of them rare; the words alone do not tell happy from the others, words and tone do."""
    source = GeneratedSource("iemocap")
    samples = [source.read("train", n) for n in range(300)]
    labels = np.array([[u.labels[emotion] for emotion in EMOTIONS] for u in samples])
    assert (labels.sum(axis=1) == 1).all() and labels.mean(axis=0).min() > 0.1
    meanings = [source.meaning("train", n) for n in range(300)]
    happy = labels[:, EMOTIONS.index("happy")] == 1
    assert all(m.polarity * m.tone > 0 for m, there in zip(meanings, happy, strict=True) if there)
    assert {m.tone for m, there in zip(meanings, happy, strict=True) if there} == {-1.0, 1.0}
    angry, sad = (labels[:, EMOTIONS.index(emotion)] == 1 for emotion in ("angry", "sad"))
    strength = np.array([m.strength for m in meanings])
    assert strength[angry].min() > strength[sad].max()


def test_every_name_says_synthetic() -> None:
    for like in PRESETS:
        source = GeneratedSource(like, 6)
        assert source.synthetic
        assert source.name == f"synthetic-{like}"
        assert all(key.startswith("synthetic") for split in SPLITS for key in source.keys(split))
        assert any("synthetic" in note for note in source.notes())


def test_no_number_of_samples_costs_anything_before_they_are_read() -> None:
    start = time.process_time()
    source = GeneratedSource("mosei", 10**9)
    assert source.read("train", 10**8).labels
    assert next(islice(source.keys("train"), 5, None)) == "synthetic-train-0$_$5"
    assert time.process_time() - start < 5


# --- the signal needs more than one modality


@pytest.fixture(scope="module", params=["mosi", "sims"])
def halves(request: pytest.FixtureRequest) -> tuple[GeneratedSource, list[Utterance], list[Utterance]]:
    source = GeneratedSource(request.param, samples=1000)
    return source, *([source.read(split, n) for n in range(source.counts[split])] for split in ("train", "test"))


def pooled(samples: list[Utterance], *modalities: str) -> np.ndarray:
    """(N, D): means over the steps, side by side."""
    return np.stack([np.concatenate([u.modalities[m].mean(axis=0) for m in modalities]) for u in samples])


def probe(train: np.ndarray, target: np.ndarray) -> RidgeCV:
    return RidgeCV(np.logspace(-3, 4, 15)).fit(train, target)


def test_no_modality_and_no_sum_of_them_gives_the_label_but_their_product_does(
    halves: tuple[GeneratedSource, list[Utterance], list[Utterance]],
) -> None:
    source, train, test = halves
    truth = np.array([u.labels["M"] for u in test])
    target = np.array([u.labels["M"] for u in train])

    def corr(predicted: np.ndarray) -> float:
        return float(np.corrcoef(predicted, truth)[0, 1])

    alone = {m: corr(probe(pooled(train, m), target).predict(pooled(test, m))) for m in MODALITIES}
    side_by_side = corr(probe(pooled(train, *MODALITIES), target).predict(pooled(test, *MODALITIES)))
    meanings = [source.meaning("train", n) for n in range(len(train))]
    parts = {
        "text": [m.polarity for m in meanings],
        "audio": [m.tone for m in meanings],
        "vision": [m.strength for m in meanings],
    }
    product = np.prod([probe(pooled(train, m), np.array(y)).predict(pooled(test, m)) for m, y in parts.items()], axis=0)
    assert corr(product) > 0.95  # each modality does hold its part, where a mean can find it
    assert max(alone.values()) < 0.55
    assert side_by_side < 0.55
    assert alone["text"] > 0.1 > max(abs(alone["audio"]), abs(alone["vision"])) - 0.1  # words say a little, as in life
    sign = np.mean((product > 0) == (truth > 0))
    assert sign > 0.97
