"""Damage that is the same whoever asks, and what a model answers under it."""

import csv
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsa_dist.errors import ConfigError
from mmsa_dist.metrics import evaluate
from mmsa_dist.predictor import Predictor
from mmsa_dist.recipe import Recipe
from mmsa_dist.robustness.command import main
from mmsa_dist.robustness.damage import Damage, pool, steps_of
from mmsa_dist.robustness.measured import measure
from shards.index import Index
from shards.read import ShardReader
from shards.utterance import Utterance

COLUMNS = ("text", "audio", "vision", "raw_text", "tokens")


def utterance(number: int, steps: int = 6) -> Utterance:
    """Every number and word says whose it is."""
    arrays = {name: np.full((steps, 2), number, np.float32) for name in ("text", "audio", "vision")}
    words = " ".join([f"word{number}"] * steps)
    tokens = np.full(steps, 10 + number, np.int32)
    tokens[[0, -1]] = 1, 2
    return Utterance(f"video$_${number}", "test", arrays, {"M": 0.5}, words, tokens)


def strange(own: Utterance, seen: Utterance, column: str) -> np.ndarray:
    """(T,) which steps are no longer those of `own`."""
    before, after = steps_of(own, column), steps_of(seen, column)
    assert len(before) == len(after)
    return np.array([np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(before, after, strict=True)])


everyone = [utterance(number) for number in range(40)]
damages = st.builds(
    Damage, st.sampled_from(COLUMNS), st.sampled_from(["missing", "corrupted"]), st.floats(0.01, 1), st.integers(0, 5)
)


@given(damages, st.integers(0, 39))
def test_damage_touches_its_column_alone_and_is_the_same_again(damage: Damage, number: int) -> None:
    own, others = everyone[number], pool(everyone, damage.column)
    seen = damage.of(own, others)
    again = damage.of(utterance(number), others)
    for column in COLUMNS:
        before, after, second = (steps_of(each, column) for each in (own, seen, again))
        if column != damage.column:
            assert np.array_equal(before, after)
        assert (after is None) == (second is None)
        assert after is None or np.array_equal(after, second)
    assert (seen.key, seen.labels) == (own.key, own.labels)
    if damage.kind == "corrupted":
        assert len(steps_of(seen, damage.column)) == len(steps_of(own, damage.column))


@given(damages, st.floats(0.01, 1))
def test_what_is_damaged_at_a_rate_is_at_every_higher_one(damage: Damage, other: float) -> None:
    low, high = sorted((damage.rate, other))
    others = pool(everyone, damage.column)
    for own in everyone:
        less, more = (Damage(damage.column, damage.kind, rate, damage.seed).of(own, others) for rate in (low, high))
        if damage.kind == "missing":
            assert steps_of(less, damage.column) is not None or steps_of(more, damage.column) is None
        else:
            assert not np.any(strange(own, less, damage.column) & ~strange(own, more, damage.column))


@pytest.mark.parametrize("column", COLUMNS)
def test_a_rate_is_a_share_of_samples_or_of_steps(column: str) -> None:
    many = [utterance(number, steps=50) for number in range(400)]
    others = pool(many[:50], column)
    missing = [steps_of(Damage(column, "missing", 0.3, 1).of(each, others), column) is None for each in many]
    assert np.mean(missing) == pytest.approx(0.3, abs=0.07)
    corrupted = [strange(each, Damage(column, "corrupted", 0.3, 1).of(each, others), column).mean() for each in many]
    assert np.mean(corrupted) == pytest.approx(0.3, abs=0.03)
    at_all = [strange(each, Damage(column, "corrupted", 1.0, 1).of(each, others), column).mean() for each in many]
    assert np.mean(at_all) == pytest.approx(48 / 50 if column == "tokens" else 1.0), "never a step of its own"
    other = [steps_of(Damage(column, "missing", 0.3, 2).of(each, others), column) is None for each in many]
    assert missing != other, "another draw"


def test_a_sample_that_lacks_the_modality_stays_as_it_is() -> None:
    bare = Utterance("a", "test", {"audio": np.ones((2, 2), np.float32)}, {"M": 0.0})
    for column in ("vision", "raw_text", "tokens"):
        assert Damage(column, "corrupted", 1.0, 1).of(bare, pool(everyone, column)) is bare


# --- of a trained model -----------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_damaged_samples(trained: tuple[Path, Recipe], index: Index) -> None:
    predictor = Predictor.load(trained[0])
    samples = list(ShardReader(index).samples(index.numbers("test")))
    kinds = [Damage("audio", "missing", 1.0, 1), Damage("text", "corrupted", 0.5, 1)]
    for size in (3, 64):
        found = measure(predictor, samples, kinds, "mosi", size)
        assert found is not None and found.samples == len(samples)
        y = np.array([sample.labels["M"] for sample in samples], np.float32)
        seen = {None: samples, kinds[0]: [_without_audio(sample) for sample in samples]}
        others = pool(samples, "text")
        seen[kinds[1]] = [kinds[1].of(sample, others) for sample in samples]
        for damage, each in seen.items():
            expected = evaluate("mosi", y, predictor.predict(each)["M"])
            got = found.whole if damage is None else found.damaged[damage]
            assert got == pytest.approx(expected, abs=1e-5)
        assert found.over_seeds("audio", "missing", 1.0, "mae") == (found.damaged[kinds[0]]["mae"], 0.0)
    assert measure(predictor, [], kinds, "mosi", 4) is None


def _without_audio(sample: Utterance) -> Utterance:
    rest = {name: array for name, array in sample.modalities.items() if name != "audio"}
    return Utterance(sample.key, sample.split, rest, sample.labels, sample.raw_text, sample.tokens)


def test_the_command_writes_a_table_and_a_picture(
    trained: tuple[Path, Recipe], index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained[0]), "--data", str(index.folder), "--to", str(tmp_path / "out")]
    assert main([*words, "--rates", "1", "0.5", "--seeds", "2"]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "robustness.csv").open()))
    assert len(rows) == 1 + 3 * 2 * 2 * 2
    assert (rows[0]["kind"], rows[0]["rate"]) == ("whole", "0")
    gone = {row["mae"] for row in rows if (row["damaged"], row["kind"], row["rate"]) == ("audio", "missing", "1.0")}
    assert len(gone) == 1, "of all samples, whatever is drawn"
    assert matplotlib.image.imread(tmp_path / "out" / "robustness.png").std() > 0.05
    said = capsys.readouterr().out
    for word in ("MAE ↓", "50 %", "100 %", "missing", "corrupted", "vision", "synthetic"):
        assert word in said
    first = (tmp_path / "out" / "robustness.csv").read_text()
    assert main([*words, "--rates", "0.5", "1", "--seeds", "2", "--batch-size", "5"]) == 0
    again = list(csv.DictReader((tmp_path / "out" / "robustness.csv").open()))
    for one, other in zip(csv.DictReader(first.splitlines()), again, strict=True):
        assert float(one["mae"]) == pytest.approx(float(other["mae"]), abs=1e-5), "whatever the batches"


REFUSED: dict[str, tuple[list[str], str]] = {
    "no rate": (["--rates", "0"], r"--rates 0: expected shares above 0, at most 1"),
    "a percentage": (["--rates", "50"], r"--rates 50: expected shares above 0"),
    "no draws": (["--seeds", "0"], r"--seeds is 0, expected at least 1"),
    "a misspelt option": (["--rate", "0.5"], r"--rate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case: str, trained: tuple[Path, Recipe], index: Index, tmp_path: Path) -> None:
    words, said = REFUSED[case]
    given: list[Any] = [str(trained[0]), "--data", str(index.folder), "--to", str(tmp_path / "out"), *words]
    with pytest.raises(ConfigError, match=said):
        main(given)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--to .*file: is a file; give a folder"):
        main([str(trained[0]), "--data", str(index.folder), "--to", str(tmp_path / "file")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rate", ["nan", "inf", "-0.5", "1.0001"])
def test_what_is_no_rate(rate: str, trained: tuple[Path, Recipe], index: Index, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rates .*: expected shares above 0, at most 1"):
        main([str(trained[0]), "--data", str(index.folder), "--to", str(tmp_path / "out"), f"--rates={rate}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/below", "x" * 300], ids=["below a file", "too long"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    place: str, trained: tuple[Path, Recipe], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("mmsa_dist.robustness.command.open_input", None)
    with pytest.raises(ConfigError, match=r"--to .*") as caught:
        main([str(trained[0]), "--data", str(index.folder), "--to", str(tmp_path / place)])
    assert "give a" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.fault
def test_what_is_stopped_or_fails_leaves_nothing(
    trained: tuple[Path, Recipe], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--data", str(index.folder), "--to", str(tmp_path / "a" / "b")]
    with pytest.raises(ConfigError, match="neither a folder nor"):
        main(["nowhere", *words])
    assert list(tmp_path.iterdir()) == []

    def interrupted(*rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmsa_dist.robustness.measured.measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([str(trained[0]), *words])
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_the_first_samples_lack() -> None:
    """Then there are no others' steps to take: its own, in another order."""
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    lone = Utterance("a", "test", {"audio": features}, {"M": 0.0})
    damaged = Damage("audio", "corrupted", 1.0, 1).of(lone, [])
    assert {tuple(step) for step in damaged.modalities["audio"]} <= {tuple(step) for step in features}
