"""`mmsa-dist inspect`: numbers worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmsa_dist.__main__ import main
from shards.index import Index
from shards.inspect import render, summary
from shards.utterance import Utterance
from tests.shards.made import packed


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Twenty training samples with text of 1..20 steps, audio in every other one."""
    made = []
    for n in range(20):
        modalities = {"text": np.ones((n + 1, 6), np.float32)}
        if n % 2:
            modalities["audio"] = np.full((2, 5), n, np.float32)
        labels = {"M": (-3.0, -0.6, 0.4, 2.5, 2.6)[n % 5], "T": float("nan") if n == 7 else 1.0}
        made.append(
            Utterance(f"a{n}", "train", modalities, labels, raw_text="words", tokens=np.arange(n + 3, dtype=np.int32))
        )
    made[3].modalities["audio"][0, :2] = [np.nan, np.inf]
    made.append(
        Utterance("b", "valid", {"text": np.ones((5, 6), np.float32)}, {"M": 0.0, "T": 0.0}, "w", np.zeros(1, np.int32))
    )
    made.append(
        Utterance("c", "test", {"text": np.ones((5, 6), np.float32)}, {"M": 3.0, "T": 0.0}, "w", np.zeros(1, np.int32))
    )
    return packed(tmp_path / "set", made, shard_bytes=10_000, seed=3)


def test_every_number(index: Index) -> None:
    told = summary(index)
    assert (told["samples"], told["splits"]) == (22, {"train": 20, "valid": 1, "test": 1})
    assert told["modalities"]["text"] == {
        "width": 6,
        "length_percentiles": {"p0": 1, "p50": 9, "p95": 19, "p100": 20},
        "absent": 0,
        "non_finite": 0,
    }
    assert told["modalities"]["audio"] == {
        "width": 5,
        "length_percentiles": {"p0": 2, "p50": 2, "p95": 2, "p100": 2},
        "absent": 12,
        "non_finite": 2,
    }
    assert told["tokens"]["length_percentiles"]["p100"] == 22
    assert told["labels"]["M"]["near"] == [-3, -2, -1, 0, 1, 2, 3]
    # -3 | -0.6 is nearest to -1, 0.4 to 0, 2.5 (a tie) to the even bin 6 of 0..6, which is 3, as is 2.6
    assert told["labels"]["M"]["counts"]["train"] == [4, 0, 4, 4, 0, 0, 8]
    assert told["labels"]["M"]["counts"]["test"] == [0, 0, 0, 0, 0, 0, 1]
    assert (told["labels"]["T"]["missing"], sum(told["labels"]["T"]["counts"]["train"])) == (1, 19)
    files = [path.stat().st_size for path in index.folder.iterdir() if path.suffix in (".tar", ".arrow")]
    assert told["bytes"] == sum(files)
    assert told["shards"]["train"] > 1
    assert told["seed"] == 3
    assert (told["label_range"], told["dtype"], told["synthetic"]) == ([-3, 3], "float16", False)


def rendered(told: dict[str, object], width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render(told))
    return console.export_text()


def test_what_a_person_reads(index: Index) -> None:
    text = rendered(summary(index))
    for expected in (
        "train 20, valid 1, test 1, all 22",
        "transcripts and token ids (length p0 1",
        "M, T in -3..3",
        "sha256 000000000000…",
        index.fingerprint,
    ):
        assert expected in text
    assert any(line.split("│")[1].split() == ["audio"] and " 12 " in line for line in text.splitlines() if "│" in line)
    labels, unimodal = text.split("label M, by nearest label")[1].split("single modalities, by nearest")
    bars = {line.split("│")[1].strip(): line.count("█") for line in labels.splitlines() if "│" in line}
    assert bars["+3"] == 30  # the longest
    assert bars["-3"] == round(30 * 4 / 9)
    assert bars["-2"] == 0
    assert [line.split() for line in unimodal.splitlines() if "none" in line] == [["│", "none", "│", "1", "│"]]
    assert "SYNTHETIC" not in text


def test_synthetic_data_is_called_so(index: Index) -> None:
    told = summary(index.model_copy(update={"synthetic": True}))
    assert "SYNTHETIC: results on it say nothing about sentiment" in rendered(told)


def test_json_is_the_summary(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(index.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary(index)


def test_nothing_to_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 3
    assert "no index.json in" in capsys.readouterr().err
