"""Back to an MMSA pickle: the same arrays, the same utterances, nothing half-written."""

import fcntl
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsa_dist.__main__ import main
from shards.errors import ConfigError, DataError
from shards.index import Index
from shards.read import ShardReader
from shards.sources.generated import GeneratedSource
from shards.sources.mmsa import MmsaSource
from shards.sources.mult import MultSource
from shards.unpack import unpack
from shards.utterance import SPLITS, Utterance
from shards.write import pack
from tests.shards.made import Samples, overwrite, utterances
from tests.shards.pickles import content, mult_split, written

REAL = Path(os.environ.get("MMSA_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data") / "mosi"
needs_real_data = pytest.mark.skipif(
    not (REAL / "utterances.csv").is_file(),
    reason=f"needs real CMU-MOSI at {REAL}; set MMSA_REAL_DATA to the folder that holds mosi/",
)


def repacked(source: Any, folder: Path, **options: Any) -> tuple[Index, Index, Path]:
    """pack -> unpack -> pack: both data sets, and the pickle between them."""
    index, _ = pack(source, folder / "one", dtype="float32")
    file = folder / "back.pkl"
    unpack(index, file, **options)
    again, _ = pack(MmsaSource(file, label_range=index.label_range), folder / "two", dtype="float32", seed=3)
    return index, again, file


def held(index: Index) -> dict[str, Utterance]:
    with ShardReader(index) as reader:
        return {u.key: u for u in reader.samples(range(index.num_samples), with_text=True)}


def assert_same(index: Index, other: Index) -> None:
    ours, theirs = held(index), held(other)
    assert ours.keys() == theirs.keys()
    for key, one in ours.items():
        two = theirs[key]
        assert (one.split, one.labels) == (two.split, two.labels)
        assert (one.raw_text or None) == (two.raw_text or None)
        assert one.modalities.keys() == two.modalities.keys()
        for name, values in one.modalities.items():
            np.testing.assert_array_equal(values, two.modalities[name])
        if one.tokens is None or two.tokens is None:
            assert one.tokens is two.tokens
        else:
            np.testing.assert_array_equal(one.tokens, two.tokens)


# --- round trips


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("unimodal", [False, True])
def test_the_original_pickle_array_for_array(tmp_path: Path, aligned: bool, unimodal: bool) -> None:
    data = content(aligned=aligned, unimodal=unimodal)
    index, again, file = repacked(MmsaSource(written(tmp_path, data)), tmp_path)
    back = pickle.loads(file.read_bytes())  # by numpy and pickle alone, as a peer does
    assert list(back) == list(SPLITS)
    for split, raw in data.items():
        added = {f"classification_labels_{t}" for t in "TAV"} if unimodal else set()
        assert set(back[split]) == set(raw) | added
        for key in set(raw) - {"annotations"}:
            ours = np.asarray(back[split][key])
            np.testing.assert_array_equal(ours, np.asarray(raw[key]).astype(ours.dtype))  # float64 labels as float32
        for name in ("text", "audio", "vision"):
            assert back[split][name].dtype == np.float32
            back[split][name] += 1  # not a read-only view
    assert_same(index, again)


def test_annotations_and_classes_follow_the_label(tmp_path: Path) -> None:
    data = content()
    data["valid"]["regression_labels"][:3] = [-0.2, 0, 1.4]
    index, _ = pack(MmsaSource(written(tmp_path, data)), tmp_path / "set")
    unpack(index, tmp_path / "back.pkl")
    back = pickle.loads((tmp_path / "back.pkl").read_bytes())["valid"]
    assert back["annotations"][:3] == ["Negative", "Neutral", "Positive"]
    assert back["classification_labels"][:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("aligned", [False, True])
def test_a_mult_pickle_becomes_an_mmsa_one(tmp_path: Path, aligned: bool) -> None:
    data = {s: mult_split(s, n, aligned=aligned)[0] for s, n in (("train", 9), ("valid", 3), ("test", 4))}
    index, again, file = repacked(MultSource(written(tmp_path, data)), tmp_path)
    assert_same(index, again)
    assert again.source["aligned"] == aligned
    assert ("audio_lengths" in pickle.loads(file.read_bytes())["train"]) != aligned


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), absent=st.sampled_from([0.0, 0.4]), tokens=st.booleans())
def test_any_data_set_comes_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, absent: float, tokens: bool
) -> None:
    samples = utterances({"train": 7, "valid": 2, "test": 3}, seed, absent)
    if not tokens:
        samples = [Utterance(u.key, u.split, u.modalities, u.labels) for u in samples]
    index, again, _ = repacked(Samples(samples), tmp_path_factory.mktemp("set"))
    assert_same(index, again)


@needs_real_data
def test_real_mosi_goes_round(tmp_path: Path) -> None:
    options = ["--split", "split_poria", "--audio", "audio_opensmile", "--vision", "vision_cnn3d"]
    options += ["--text-features", "text_cnn", "--hold-out-valid", "10", "--dtype", "float32", "--workers", "1"]
    table = [str(REAL / "utterances.csv"), str(REAL / "features.npz")]
    assert main(["pack", "table", *table, *options, "--out", str(tmp_path / "one")]) == 0
    assert main(["unpack", str(tmp_path / "one"), "--to", str(tmp_path / "mosi.pkl")]) == 0
    back = ["pack", "mmsa", str(tmp_path / "mosi.pkl"), "--dtype", "float32", "--workers", "1"]
    assert main([*back, "--out", str(tmp_path / "two")]) == 0
    assert_same(Index.load(tmp_path / "one"), Index.load(tmp_path / "two"))


# --- layouts


def test_a_layout_may_be_asked_for(tmp_path: Path) -> None:
    index, again, file = repacked(MmsaSource(written(tmp_path, content(aligned=True))), tmp_path, layout="unaligned")
    assert_same(index, again)
    assert set(pickle.loads(file.read_bytes())["test"]) >= {"audio_lengths", "vision_lengths"}
    ragged, _ = pack(MmsaSource(written(tmp_path, content())), tmp_path / "ragged")
    with pytest.raises(ConfigError, match=r"--layout aligned: sample '.*' of train has \d+ steps of text and \d+ of"):
        unpack(ragged, tmp_path / "never.pkl", layout="aligned")
    with pytest.raises(ConfigError, match="--layout alined: expected one of auto, aligned, unaligned"):
        unpack(ragged, tmp_path / "never.pkl", layout="alined")
    assert not (tmp_path / "never.pkl").exists()


def test_generated_data_stays_what_it_is(tmp_path: Path) -> None:
    """Results on it say nothing about sentiment, whichever way it went."""
    pack(GeneratedSource("mosi", 40), tmp_path / "made")
    unpack(Index.load(tmp_path / "made"), tmp_path / "unaligned.pkl")
    index, _ = pack(MmsaSource(tmp_path / "unaligned.pkl"), tmp_path / "back")
    assert index.synthetic and index.name == "synthetic-unaligned"


def test_what_a_peer_should_know_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = content()
    for raw in data.values():
        del raw["vision"], raw["vision_lengths"], raw["raw_text"], raw["text_bert"]
    data["train"]["audio_lengths"][2] = 0
    assert main(["pack", "mmsa", str(written(tmp_path, data)), "--out", str(tmp_path / "set"), "--workers", "1"]) == 0
    capsys.readouterr()
    assert main(["unpack", str(tmp_path / "set"), "--to", str(tmp_path / "new" / "back.pkl")]) == 0
    out, err = capsys.readouterr()
    assert "back.pkl: 21 samples" in out
    for said in (
        "features were packed as float16",
        "no token ids: without text_bert MMSA needs use_bert false",
        "no transcripts: raw_text is empty",
        "no features of vision",
        "audio: 1 sample has none: zeros of length 0",
    ):
        assert said in err


# --- the file


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    index, _ = pack(MmsaSource(written(tmp_path, content())), tmp_path / "set")
    file = tmp_path / "back.pkl"
    file.write_text("precious")
    with pytest.raises(ConfigError, match=r"back\.pkl is there already; choose another name, or --overwrite"):
        unpack(index, file)
    assert file.read_text() == "precious"
    unpack(index, file, overwrite=True)
    assert MmsaSource(file).counts == {"train": 12, "valid": 4, "test": 5}
    with pytest.raises(ConfigError, match="is a folder; name the pickle in it"):
        unpack(index, tmp_path / "set")


@pytest.mark.parametrize(
    ("to", "said"), [("a" * 300, "cannot be written: File name too long"), ("s3://b/x.pkl", "is an address; write")]
)
def test_a_file_that_cannot_be(tmp_path: Path, to: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = pack(MmsaSource(written(tmp_path, content())), tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        unpack(index, Path(to))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.pkl", "set"]


def test_a_damaged_shard_leaves_nothing(tmp_path: Path) -> None:
    index, _ = pack(MmsaSource(written(tmp_path, content())), tmp_path / "set")
    overwrite(index.tar_path(2), 700, b"\xff")
    with pytest.raises(DataError, match="sha256"):
        unpack(index, tmp_path / "back.pkl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.pkl", "set"]


def test_classes_are_no_intensities(tmp_path: Path) -> None:
    data = {s: mult_split(s, n, emotions=True)[0] for s, n in (("train", 9), ("valid", 3), ("test", 4))}
    index, _ = pack(MultSource(written(tmp_path, data)), tmp_path / "set")
    with pytest.raises(ConfigError, match="labels are neutral, happy, sad, angry, but an MMSA pickle holds"):
        unpack(index, tmp_path / "back.pkl")


def test_two_at_a_time_do_not_write_one_file(tmp_path: Path) -> None:
    index, _ = pack(MmsaSource(written(tmp_path, content())), tmp_path / "set")
    with (tmp_path / ".back.pkl.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being written by another process"):
            unpack(index, tmp_path / "back.pkl")
    unpack(index, tmp_path / "back.pkl")  # what a killed one has left does not stand in the way
    assert not (tmp_path / ".back.pkl.part").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    index, _ = pack(MmsaSource(written(tmp_path, content())), tmp_path / "set")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from mmsa_dist.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["unpack", str(index.folder), "--to", str(tmp_path / "back.pkl")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert "no space left for" in done.stderr
    assert not (tmp_path / "back.pkl").exists()
    assert not (tmp_path / ".back.pkl.part").exists()
