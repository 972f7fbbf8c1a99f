"""`mmsa-dist inspect`: numbers worked out by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mmsa_dist.__main__ import main
from shards import leaks
from shards.index import Index
from shards.inspect import Columns, summary
from shards.picture import sequences
from shards.shown import render
from shards.utterance import SPLITS, Utterance
from tests.shards.made import Samples, packed


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Twenty training samples with text of 1..20 steps, audio in every other one; b and c have none."""
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
        "length_percentiles": {"p0": 1, "p5": 2, "p50": 9, "p95": 19, "p99": 20, "p100": 20},
        "absent": {"train": 0, "valid": 0, "test": 0},
        "non_finite": 0,
        "constant": [0, 1, 2, 3, 4, 5],
        "std": [0.0, 0.0],
    }
    audio = told["modalities"]["audio"]
    assert audio["length_percentiles"]["p100"] == 2
    assert audio["absent"] == {"train": 10, "valid": 1, "test": 1}
    assert (audio["non_finite"], audio["constant"]) == (2, [])
    # 1, 3, .. 19 twice each, in the second dimension 3 once zero instead: the others deviate by sqrt(33)
    assert audio["std"][0] == pytest.approx(33**0.5) and audio["std"][1] > audio["std"][0]
    assert told["tokens"]["length_percentiles"]["p100"] == 22
    assert told["labels"]["M"]["near"] == [-3, -2, -1, 0, 1, 2, 3]
    # -3 | -0.6 is nearest to -1, 0.4 to 0, 2.5 (a tie) to the even bin 6 of 0..6, which is 3, as is 2.6
    assert told["labels"]["M"]["counts"]["train"] == [4, 0, 4, 4, 0, 0, 8]
    assert told["labels"]["M"]["counts"]["test"] == [0, 0, 0, 0, 0, 0, 1]
    assert told["labels"]["M"]["mean"] == {"train": pytest.approx(0.38), "valid": 0.0, "test": 3.0}
    assert told["labels"]["M"]["std"]["test"] == 0.0
    assert told["labels"]["M"]["zero"] == {"train": 0.0, "valid": 1.0, "test": 0.0}
    assert (told["labels"]["T"]["missing"], sum(told["labels"]["T"]["counts"]["train"])) == (1, 19)
    files = [path.stat().st_size for path in index.folder.iterdir() if path.suffix in (".tar", ".arrow")]
    assert told["bytes"] == sum(files)
    assert told["shards"]["train"] > 1
    assert told["seed"] == 3
    assert (told["label_range"], told["dtype"], told["synthetic"]) == ([-3, 3], "float16", False)


def rendered(told: dict[str, object], width: int = 120) -> str:
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
        "train 10, valid 1, test 1│",
        "+0.38 ±",
        "audio: 2 values of the source were NaN or infinite",
        "text: 6 of 6 dimensions never change in train (0, 1, 2, 3, 4, …)",
        "audio: no sample of valid and test has it, though samples of train do",
        "videos were not compared",
        " 0..0 │",
        "kB of float16",
    ):
        assert expected in text
    looked, checked = text.split("worth a look")[1].split("\nchecked\n")
    assert "videos were not compared" in checked and "transcripts: 1 occurs in more than one split" in looked
    assert "audio: 2 values" in looked
    assert text.count("± 0.00") == 1  # of T in train, whose labels are all alike; of one sample there is none
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


# --- what occurs in several splits


def said(key: str, split: str, text: str) -> Utterance:
    return Utterance(key, split, {"text": np.ones((1, 6), np.float32)}, {"M": 1.0}, raw_text=text)


LEAKY = [
    said("v1$_$1", "train", "I really did like this film!"),
    said("v1$_$2", "train", "Thank you."),
    said("v2$_$1", "train", "only here, and only here"),
    said("v2$_$2", "train", "only here and only here"),
    said("v3$_$1", "valid", "thank YOU"),
    said("v1$_$3", "test", "i REALLY did  like — this film"),
    said("v4$_$1", "test", "Thank you"),
    said("v4$_$2", "test", "?!"),
    said("v3$_$2", "test", "..."),
]


def test_transcripts_without_a_word_are_not_called_compared(tmp_path: Path) -> None:
    wordless = [said(f"v{n}$_$1", split, "…") for n, split in enumerate(SPLITS)]
    told = summary(packed(tmp_path / "set", wordless))
    text = " ".join(rendered(told).split())
    assert "transcripts were not compared between splits: none of them has a word" in text
    assert "no transcript occurs" not in text


def test_transcripts_and_videos_in_several_splits(tmp_path: Path) -> None:
    index = packed(tmp_path / "set", LEAKY)
    told = summary(index)
    texts = told["transcripts"]
    # "thank you" in all three splits, the film in two; punctuation alone is no transcript; twice in train is no leak
    assert (texts["compared"], texts["in_several_splits"], texts["of_them_long"]) == (7, 2, 1)
    assert texts["samples"] == {"train": 2, "valid": 1, "test": 2}
    film, thanks = texts["examples"]
    assert film["text"] == "I really did like this film!"
    assert film["keys"] == {"train": "v1$_$1", "test": "v1$_$3"}
    assert list(thanks["keys"]) == ["train", "valid", "test"]
    videos = told["videos"]
    assert (videos["videos"], videos["in_several_splits"]) == (4, 2)
    assert videos["samples"] == {"train": 2, "valid": 1, "test": 2}
    assert {example["video"] for example in videos["examples"]} == {"v1", "v3"}
    text = rendered(told)
    assert "transcripts: 2 occur in more than one split, 1 of them of 5 words or more" in text
    assert "train 2 of 4, valid 1 of 1, test 2 of 4" in " ".join(text.split())
    assert "train v1$_$1, test v1$_$3: 'I really did like this film!'" in text
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("- videos: 2 of 4 have"))
    after = next(n for n, line in enumerate(lines) if "'I really did" in line)
    assert (after < first and lines[first + 2].strip().startswith("video v1:")) or "video v1:" in lines[first + 1]


def test_scales_that_differ_a_thousandfold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scale = np.array([0.01, 1, 20, 1, 1], np.float32)
    made = [
        Utterance(f"{split}{n}", split, {"audio": rng.standard_normal((9, 5)).astype(np.float32) * scale}, {"M": 0.5})
        for split in SPLITS
        for n in range(20)
    ]
    (remark,) = [said for said in summary(packed(tmp_path / "set", made))["remarks"] if said.startswith("audio")]
    assert re.fullmatch(
        r"audio: deviations of its dimensions go from 0\.0\d+ to [12]\d\.?\d*; --data\.normalize audio standardises it",
        remark,
    )
    for utterance in made:
        utterance.modalities["audio"] /= scale
    assert not any("deviations" in said for said in summary(packed(tmp_path / "even", made))["remarks"])


def test_labels_that_tell_their_place(tmp_path: Path) -> None:
    made = [
        Utterance(f"{s}{n}", s, {"text": np.ones((1, 6), np.float32)}, {"M": n / 10 - 3})
        for s in SPLITS
        for n in range(60)
    ]
    index = packed(tmp_path / "set", made, shard_bytes=10_000)
    columns = Columns.of(index)
    assert not any("place on disk" in said for said in summary(index, columns=columns)["remarks"])  # pack shuffles
    columns.labels["M"].sort()
    (remark,) = [said for said in summary(index, columns=columns)["remarks"] if "place on disk" in said]
    shards = len(index.shards_of("train"))
    assert remark.startswith("label M: in train it correlates with its place on disk (+1.00)")
    assert f"(8 unless told; train has {shards})" in remark


@pytest.mark.parametrize(("labels", "said"), [((0.0, 1.0), True), ((0.0, 1.5), False), ((-1.0, 1.0), False)])
def test_whole_labels_that_may_be_classes(tmp_path: Path, labels: tuple[float, float], said: bool) -> None:
    text = np.ones((1, 6), np.float32)
    made = [Utterance(f"{s}{n}", s, {"text": text}, {"M": labels[n % 2]}) for s in SPLITS for n in range(4)]
    remark = "label M: only 0 and 1 occur, in a range of -3..3: are these classes, or another range?"
    assert (remark in summary(packed(tmp_path / "set", made))["remarks"]) == said


def test_fast_reads_no_transcript(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = packed(tmp_path / "set", LEAKY)
    size = index.shards[0].bytes
    index.tar_path(0).write_bytes(bytes(size))  # the size is right, and nothing else
    assert main(["inspect", str(index.folder), "--fast"]) == 0
    assert "not compared between splits: left out (--fast)" in capsys.readouterr().out
    assert main(["inspect", str(index.folder)]) == 3
    assert index.shards[0].url in capsys.readouterr().err


@given(
    st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 6)), min_size=1, max_size=40),
)
def test_shared_is_what_comparing_all_pairs_finds(drawn: list[tuple[str, int]]) -> None:
    """The sorted digests against the definition: a value (0 is none) is shared where two splits have it."""
    drawn.sort(key=lambda pair: SPLITS.index(pair[0]))
    counts = {split: sum(s == split for s, _ in drawn) for split in SPLITS}

    class Counted:
        splits = counts

        def numbers(self, split: str) -> range:
            first = sum(counts[s] for s in SPLITS[: SPLITS.index(split)])
            return range(first, first + counts[split])

    values = [leaks.digest(str(v)) if v else 0 for _, v in drawn]
    found = leaks.shared(Counted(), np.array(values, np.uint64))  # type: ignore[arg-type]
    homes = {v: {s for s, w in drawn if w == v} for _, v in drawn if v}
    wanted = {v: [n for n, (_, w) in enumerate(drawn) if w == v] for v, splits in homes.items() if len(splits) > 1}
    assert sorted(group.tolist() for group in found.groups) == sorted(wanted.values())
    assert found.samples == {split: sum(s == split and v in wanted for s, v in drawn) for split in SPLITS}


@pytest.mark.parametrize(
    ("key", "video"),
    [
        ("03bSn_JMiM$_$12", "03bSn_JMiM"),
        ("a[b][3]", "a[b]"),
        ("_dI--eQ_04", "_dI--eQ"),
        ("utterance", None),
        ("[1]", None),
    ],
)
def test_video_of_a_key(key: str, video: str | None) -> None:
    assert leaks.video_of(key) == video


def test_words_of_any_script() -> None:
    assert leaks.normalised("Ｄｏｎ't stop: 你好, Straße_2") == ["don", "t", "stop", "你", "好", "strasse", "2"]


# --- classes, and the picture


class Emotions(Samples):
    """Classification: three classes of one task, two of another."""

    def __init__(self, utterances: list[Utterance]) -> None:
        super().__init__(utterances)
        self.tasks, self.classes, self.label_range = ("neutral", "happy"), {"neutral": 3, "happy": 2}, (0.0, 2.0)


@pytest.fixture
def classes(tmp_path: Path) -> Index:
    made = [
        Utterance(f"k{n}", split, {"text": np.ones((2, 6), np.float32)}, {"neutral": n % 3, "happy": float(n % 4 == 0)})
        for n, split in enumerate(["train"] * 8 + ["valid"] * 3 + ["test"] * 3)
    ]
    from shards.write import pack

    return pack(Emotions(made), tmp_path / "classes")[0]


def test_classes_are_counted(classes: Index) -> None:
    told = summary(classes)
    assert told["classes"] == {"neutral": 3, "happy": 2}
    assert told["labels"]["neutral"]["counts"]["train"] == [3, 3, 2]
    assert told["labels"]["happy"]["counts"]["train"] == [6, 2]
    assert told["labels"]["happy"]["near"] == [0, 1]
    rows = [line.split("│")[1:4] for line in rendered(told).splitlines() if "(" in line and "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["neutral", "0", "3 (38%)"],
        ["neutral", "1", "3 (38%)"],
        ["neutral", "2", "2 (25%)"],
        ["happy", "1", "2 (25%)"],
    ]
    assert "neutral (3 classes), happy (2 classes)" in rendered(told)


def test_a_picture_has_no_panel_of_vectors(index: Index) -> None:
    columns = Columns.of(index)
    assert list(sequences(index, columns)) == ["text", "audio", "tokens"]
    columns.lengths["audio"][:] = np.minimum(columns.lengths["audio"], 1)
    assert list(sequences(index, columns)) == ["text", "tokens"]


def test_picture(index: Index, classes: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.image import imread

    for data in (index, classes):
        file = tmp_path / "looks.png"
        assert main(["inspect", str(data.folder), "--fast", "--picture", str(file)]) == 0
        pixels = imread(file)
        assert pixels.shape[1] > 300 and pixels.min() < pixels.max()
    capsys.readouterr()
    for wrong in (tmp_path / "looks.gif", tmp_path / "nowhere" / "looks.png", tmp_path / f"{'a' * 300}.png"):
        assert main(["inspect", str(index.folder), "--picture", str(wrong)]) == 2
        assert f"--picture {wrong}: give a file" in capsys.readouterr().err
