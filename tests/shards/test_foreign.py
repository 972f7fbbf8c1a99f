"""`mmsa-dist index`: tars that somebody else wrote are read in place, exactly, and never touched."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from mmsa_dist.__main__ import main
from shards.batch import BatchSpec, collate
from shards.errors import ConfigError, DataError
from shards.files import sha256_of
from shards.foreign.build import index_tars
from shards.index import Index
from shards.loader import Loader
from shards.plan import training_plan
from shards.read import ShardReader
from shards.sources.generated import GeneratedSource
from shards.tables import table_bytes, table_schema
from shards.verify import check_shard
from shards.write import pack
from tests.shards.foreign import (
    arrays,
    described,
    indexed,
    members,
    names,
    npy,
    npz,
    options,
    read,
    write_set,
    write_tar,
)
from tests.shards.made import packed, utterances

COUNTS = {"train": 12, "valid": 3, "test": 2}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_every_number_where_it_stands(tmp_path: Path, kind: str, dtype: str) -> None:
    made = write_set(tmp_path, COUNTS, kind, dtype, tars=2)
    before = {path: (sha256_of(path), path.stat().st_mtime_ns) for path in tmp_path.glob("*.tar")}
    index = indexed(tmp_path)
    assert index.splits == COUNTS and index.tasks == ("M",) and index.dtype == dtype and index.foreign
    found = read(index)
    assert found.keys() == made.keys()
    for key, sample in found.items():
        assert sample.split == key.partition("/")[0]
        assert sample.raw_text == f"words of {key}"
        assert sample.labels == {"M": pytest.approx(int(key.partition("/v")[2]) / 10)}
        for name, array in made[key].items():
            np.testing.assert_array_equal(sample.modalities[name], array)
            assert sample.modalities[name].dtype == array.dtype and sample.modalities[name].flags.aligned
    rows = np.concatenate([made[key]["audio"] for key in made if key.startswith("train")]).astype(np.float64)
    np.testing.assert_allclose(index.statistics["audio"]["mean"], rows.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(index.statistics["audio"]["std"], rows.std(0), rtol=1e-9)
    assert before == {path: (sha256_of(path), path.stat().st_mtime_ns) for path in tmp_path.glob("*.tar")}
    batch = collate(list(found.values()), BatchSpec.of(index))
    assert batch.values["audio"].dtype == torch.float32
    for row, key in enumerate(batch.keys):
        expected = torch.from_numpy(made[key]["audio"].astype(np.float32))
        assert torch.equal(batch.values["audio"][row, : len(expected)], expected)
    assert all(not check_shard(index, n) for n in range(len(index.shards)))


def test_types_may_differ_from_sample_to_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = {f"v{i}": arrays(rng, dtype) for i, dtype in enumerate(("float16", "float64", "float32"))}
    write_tar(tmp_path / "train.tar", [(k, members(a, "npy") | described(0, "a")) for k, a in made.items()])
    index = indexed(tmp_path)
    assert index.dtype == "float64" and index.splits == {"train": 3, "valid": 0, "test": 0}
    for key, sample in read(index).items():
        assert sample.modalities["text"].dtype == made[key]["text"].dtype
        np.testing.assert_array_equal(sample.modalities["text"], made[key]["text"])


def test_our_own_shards_in_another_folder(tmp_path: Path) -> None:
    own = packed(tmp_path / "own", utterances({"train": 20, "valid": 4, "test": 3}, absent=0.2))
    other = indexed(own.folder, tmp_path / "other", allow_absent=True, label_range=(-3.0, 3.0))
    assert [shard.sha256 for shard in other.shards] == [shard.sha256 for shard in own.shards]
    assert (other.tasks, other.modalities, other.splits) == (own.tasks, own.modalities, own.splits)
    assert other.has_tokens and other.has_raw_text
    expected, found = read(own), read(other)
    assert list(found) == list(expected)
    for key, sample in found.items():
        assert sample.labels == expected[key].labels and sample.raw_text == expected[key].raw_text
        np.testing.assert_array_equal(sample.tokens, expected[key].tokens)
        assert sample.modalities.keys() == expected[key].modalities.keys()
        for name, array in sample.modalities.items():
            np.testing.assert_array_equal(array, expected[key].modalities[name])
    for name, statistics in own.statistics.items():
        np.testing.assert_allclose(other.statistics[name]["mean"], statistics["mean"], rtol=1e-6, atol=1e-8)


def test_the_options_say_what_is_where(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(5, dtype=np.int64)
    sample = {
        "A.NPY": npy(rng.standard_normal((4, 5)).astype("f4")),
        "f.npz": npz({"x": rng.standard_normal((2, 3)), "y": rng.standard_normal(6)}),
        "ids.safetensors": save({"ids": ids}),
        "score.txt": b" 1.5\n",
        "meta.json": json.dumps({"says": {"it": "hello"}, "frames": 3, "t": -0.5, "part": "Dev"}).encode(),
    }
    write_tar(tmp_path / "x.tar", [("a/clip", sample)])
    index = indexed(
        tmp_path, audio="a.npy", vision="f.npz:x", text="f.npz:y", tokens="ids.safetensors:ids", label="score.txt",
        label_text="meta.json:t", raw_text="meta.json:says.it", audio_length="meta.json:frames",
        split="meta.json:part", label_range=(-2.0, 2.0), name="mine",
    )  # fmt: skip
    (found,) = read(index).values()
    assert (found.key, found.split, found.raw_text) == ("a/clip", "valid", "hello")
    assert found.labels == {"M": 1.5, "T": -0.5}
    assert {name: array.shape for name, array in found.modalities.items()} == {
        "text": (1, 6), "audio": (3, 5), "vision": (2, 3),
    }  # fmt: skip
    np.testing.assert_array_equal(found.tokens, ids)
    assert found.tokens is not None and found.tokens.dtype == np.int32
    assert (index.name, index.label_range, index.layout["audio"]) == ("mine", (-2, 2), "a.npy")


@pytest.mark.parametrize("data", [b"3.5", b"not a number", b"", b"nan", b"inf", b"\xff"])
def test_a_label_that_is_none(tmp_path: Path, data: bytes) -> None:
    content = members(arrays(np.random.default_rng(0)), "npy")
    write_tar(tmp_path / "train.tar", [("ok", content | {"cls": b"1"}), ("bad", content | {"cls": data})])
    with pytest.raises(DataError, match=r"train\.tar: sample 'bad' has"):
        indexed(tmp_path)
    assert names(tmp_path) == ["train.tar"]


def test_no_labels_at_all(tmp_path: Path) -> None:
    write_tar(tmp_path / "test.tar", [("v", members(arrays(np.random.default_rng(0)), "npy"))])
    with pytest.raises(ConfigError, match="--label none"):
        indexed(tmp_path)
    index = indexed(tmp_path, label="none")
    assert index.tasks == () and read(index)["v"].labels == {}


def test_padding(tmp_path: Path) -> None:
    audio = np.zeros((6, 5), np.float32)
    audio[[0, 2]] = 1
    content = members(arrays(np.random.default_rng(0)) | {"audio": audio}, "npy")
    write_tar(tmp_path / "train.tar", [("a", content | described(0, "x"))])
    assert len(read(indexed(tmp_path))["a"].modalities["audio"]) == 6
    index = indexed(tmp_path, strip_padding=True, overwrite=True)
    np.testing.assert_array_equal(read(index)["a"].modalities["audio"], audio[:3])
    write_tar(tmp_path / "train.tar", [("a", content | described(0, "x", audio_lengths=4))])
    assert len(read(indexed(tmp_path, overwrite=True))["a"].modalities["audio"]) == 4
    write_tar(tmp_path / "train.tar", [("a", content | described(0, "x", audio_lengths=7))])
    with pytest.raises(DataError, match=r"has '7' as length of audio \(json:audio_lengths\), expected 0 to 6"):
        indexed(tmp_path, overwrite=True)


def test_a_missing_modality_is_an_error_unless_it_may_be(tmp_path: Path) -> None:
    """FAULTS 4."""
    rng = np.random.default_rng(0)
    whole, lacking = members(arrays(rng), "npy"), members(arrays(rng), "npy")
    del lacking["audio.npy"]
    write_tar(tmp_path / "train.tar", [("a", whole | described(0, "x")), ("b", lacking | described(1, "y"))])
    with pytest.raises(DataError, match=r"sample 'b' has no audio \(audio\.npy\); if samples may lack it: --allow"):
        indexed(tmp_path)
    index, notes = index_tars([tmp_path], None, options(allow_absent=True))
    assert set(read(index)["b"].modalities) == {"text", "vision"} and "audio: 1 sample has none" in str(notes)
    assert not collate(list(read(index).values()), BatchSpec.of(index)).present["audio"][1]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """FAULTS 6: they cannot be zeroed in the tar, so they are counted, and read as zero."""
    rng = np.random.default_rng(0)
    some, none = arrays(rng), arrays(rng)
    some["audio"][0, :2] = np.nan, -np.inf
    none["audio"][:] = np.nan
    samples = [(key, members(a, "npy") | described(0, "x")) for key, a in (("some", some), ("none", none))]
    index = indexed(write_tar(tmp_path / "train.tar", samples))
    found = read(index)
    assert index.non_finite == {"text": 0, "audio": 2 + none["audio"].size, "vision": 0}
    np.testing.assert_array_equal(found["some"].modalities["audio"], np.nan_to_num(some["audio"], neginf=0))
    assert "audio" not in found["none"].modalities
    assert np.isfinite(index.statistics["audio"]["mean"]).all()


GOOD = np.ones((2, 5), np.float32)


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ({"audio.npy": npy(np.asfortranarray(np.ones((2, 5))))}, "is in Fortran order"),
        ({"audio.npy": npy(GOOD.astype(">f4"))}, "is of type '>f4', expected little-endian float16"),
        ({"audio.npy": npy(np.array([[{}]]), allow_pickle=True)}, "is of type '|O'"),
        ({"audio.npy": npy(np.zeros(2, [("a", "f4")]))}, "is of type"),
        ({"audio.npy": npy(GOOD.astype("i8"))}, "audio of type int64, expected float16, float32, float64"),
        ({"audio.npy": npy(np.ones((2, 5, 1), "f4"))}, r"of shape (2, 5, 1), expected (steps, width)"),
        ({"audio.npy": npy(np.array(1, np.float32))}, r"of shape (), expected (steps, width)"),
        ({"audio.npy": npy(np.ones((2, 4), "f4"))}, "audio of width 4, the samples before it of 5"),
        ({"audio.npy": npy(np.full((2, 5), 1e300))}, "1e+300, more than float32 holds"),
        ({"audio.npy": npy(GOOD)[:-1]}, "is float32 of shape (2, 5), but has 39 bytes"),
        ({"audio.npy": npy(GOOD) + b"x"}, "is float32 of shape (2, 5), but has 41 bytes"),
        ({"audio.npy": b""}, "is no npy file"),
        ({"audio.npy": b"\x80\x04\x95pickle"}, "is no npy file"),
    ],
)
def test_what_cannot_be_read_in_place(tmp_path: Path, member: dict[str, bytes], said: str) -> None:
    first = ("a", {"audio.npy": npy(GOOD), "cls": b"0"})
    write_tar(tmp_path / "train.tar", [first, ("b", member | {"cls": b"0"})])
    with pytest.raises(DataError) as error:
        indexed(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'train.tar'}: sample 'b' has ") and said in str(error.value)


@pytest.mark.parametrize("suffix", ["audio.pth", "audio.pkl", "audio.pyd", "audio.npy.gz", "audio.h5"])
def test_members_that_are_refused_by_their_name(tmp_path: Path, suffix: str) -> None:
    write_tar(tmp_path / "train.tar", [("a", {suffix: b"cos\nsystem\n(S'exit 1'\ntR.", "txt": b"x", "cls": b"0"})])
    with pytest.raises(ConfigError, match=rf"audio seems to be in the members \.{suffix}, but that is"):
        indexed(tmp_path)
    with pytest.raises(ConfigError, match=rf"--audio {suffix}: such a member is"):
        indexed(tmp_path, audio=suffix)
    assert not indexed(tmp_path, audio="none").modalities


def test_one_tar_for_many_readers_and_ranks(tmp_path: Path) -> None:
    """FAULTS 7 and 8."""
    made = write_set(tmp_path, {"train": 11, "valid": 1})
    index = indexed(tmp_path)
    seen: list[str] = []
    for rank in range(3):
        with ShardReader(index) as reader:
            loader = Loader(reader, BatchSpec.of(index), 4)
            steps = list(loader.train(training_plan(index, "train", 0, 1, 4, 8), rank, 3, 1, 0))
            loader.close()
        assert len(steps) == 3
        batches = [batch for step in steps for batch in step]
        seen += [key for b in batches for key, weight in zip(b.keys, b.weight, strict=True) if weight]
    assert sorted(seen) == sorted(key for key in made if key.startswith("train"))


def test_members_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    sample = members(arrays(np.random.default_rng(0)), "npy") | described(0, "x")
    evil = {"pyd": b"cos\nsystem\n(S'exit 1'\ntR.", "mp4": b"v" * 3000}
    write_tar(tmp_path / "train.tar", [("a", sample | evil), ("__pycache__/x", evil), ("b", sample | evil)])
    index, notes = index_tars([tmp_path], None, options())
    assert list(read(index)) == ["a", "b"]
    assert "members that are never read: .mp4 (2), .pyd (2)" in notes


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--audio", "audio.npy:x"], "a .npy member has no fields"),
        (["--audio", "features.npz"], "say which tensor of it"),
        (["--label", "audio.npy"], "expected a .json, .txt or .cls member"),
        (["--label", "json:"], "expected MEMBER or MEMBER:FIELD"),
        (["--label-range", "1", "1"], "the lower one first"),
        (["--workers", "-1"], "expected a number of processes"),
        (["--text", "none", "--audio", "none", "--vision", "none", "--raw-text", "none"], "nothing in its samples"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, argv: list[str], said: str, capsys: Any) -> None:
    write_set(tmp_path, {"train": 1})
    assert main(["index", str(tmp_path), *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "code"), [("nowhere/*.tar", 3), ("s3://bucket/a.tar", 2), ("/dev/null", 3), (".", 3)]
)
def test_what_is_no_tar(tmp_path: Path, given: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["index", given]) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("offset_audio", 1 << 40, "audio is in bytes 1099511627776 to"),
        ("offset_audio", -8, "audio is in bytes -8 to"),
        ("length_audio", 1 << 30, "audio is in bytes"),
        ("length_audio", -1, "audio has -1 steps of 'float32'"),
        ("dtype_audio", "int64", "steps of 'int64', expected some of float16, float32, float64"),
        ("dtype_audio", "", "steps of ''"),
        ("json_size", 1 << 40, "in the table, expected some of 512 to"),
    ],
)
def test_a_forged_table(tmp_path: Path, column: str, value: Any, said: str) -> None:
    """Behind the checksums: a table never leads outside its tar."""
    write_set(tmp_path, {"train": 2})
    index = forged_table(indexed(tmp_path), column, value)
    with pytest.raises(DataError, match=re.escape(said)):
        ShardReader(index, verify=False).sample(0)


def test_verify_compares_the_table_with_the_tar(tmp_path: Path) -> None:
    write_set(tmp_path, {"train": 2})
    index = indexed(tmp_path)
    other = index.table(0).to_pylist()[1]["offset_audio"]
    (wrong,) = check_shard(forged_table(index, "offset_audio", other), 0)
    assert "train-0.tar: audio of 'train/v0' is not in its member 'train/v0.audio.npy'" in wrong
    index = indexed(tmp_path, overwrite=True)
    (wrong,) = check_shard(forged_table(index, "offset", index.table(0).to_pylist()[0]["offset"] + 512), 0)
    assert "train-0.tar: holds 0 samples, its table has 2" in wrong


def forged_table(index: Index, column: str, value: Any) -> Index:
    """The index as it would be with another value in the first row of its first table."""
    columns = index.table(0).to_pydict()
    columns[column][0] = value
    table = table_bytes(columns, table_schema(index.tasks, foreign=True))
    index.table_path(0).write_bytes(table)
    shard = index.shards[0].model_copy(
        update={"table_bytes": len(table), "table_sha256": hashlib.sha256(table).hexdigest()}
    )
    return index.model_copy(update={"shards": (shard, *index.shards[1:])})


GUIDE = Path(__file__).parents[2] / "docs" / "your-data.md"


def guided(heading: str) -> list[str]:
    """The code below a heading of the guide."""
    section = GUIDE.read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    return re.split(r"```(?:python)?\n", section.partition("\n## ")[0])[1::2]


def test_the_guides_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, commands, *_ = guided("\n## WebDataset shards of somebody else")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    for line in commands.splitlines():
        words = line.removeprefix("mmsa-dist ").split()
        tars = [str(path) for word in words if "*" in word for path in Path().glob(word)]
        assert main([word for word in words if "*" not in word] + tars) == 0
    assert "mine: train 100, valid 20, test 20 samples; text 300, audio 74; 3 shards," in capsys.readouterr().out
    index = Index.load("mine")
    assert len(read(index)) == 140
    labels = [index.table(n)["label_M"].to_pylist() for n in range(3)]
    assert all(told != sorted(told) for told in labels)


def test_the_guides_way_to_sort_by_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    made = {f"{split}/v{n}": (split, arrays(rng)) for n in range(4) for split in ("train", "valid", "test")}
    samples = [(key, members(a, "npy") | described(0.5, key, split=split)) for key, (split, a) in made.items()]
    write_tar(tmp_path / "mixed" / "all-0.tar", samples)
    with pytest.raises(DataError, match=r"write the shards anew, a tar for each \(docs/your-data\.md"):
        indexed(tmp_path / "mixed", split="json:split")
    monkeypatch.chdir(tmp_path)
    exec(guided("\n### A tar for each split")[0], {})
    index = indexed(tmp_path / "sorted")
    assert index.splits == {"train": 4, "valid": 4, "test": 4}
    for key, sample in read(index).items():
        assert sample.split == made[key][0] and sample.raw_text == key
        np.testing.assert_array_equal(sample.modalities["audio"], made[key][1]["audio"])


def test_what_is_found_is_told_in_one_line(tmp_path: Path) -> None:
    write_set(tmp_path, {"train": 2})
    _, notes = index_tars([tmp_path], None, options(label="json:label", vision="none"))
    assert notes[:2] == ["found: text in text.npy, audio in audio.npy, raw_text in json:text",
                         "as told: label in json:label"]  # fmt: skip


@pytest.mark.parametrize(("labels", "classes"), [("01", True), (("-1", "1.0", "0"), True), (("0.5", "1"), False),
                                                 ("0123", False)])  # fmt: skip
def test_labels_that_look_like_classes(tmp_path: Path, labels: tuple[str, ...], classes: bool) -> None:
    content = members(arrays(np.random.default_rng(0)), "npy")
    for n in range(2):
        samples = [(f"{n}/{i}", content | {"cls": labels[i].encode()}) for i in range(n, len(labels))]
        write_tar(tmp_path / f"train-{n}.tar", samples)
    _, notes = index_tars([tmp_path], None, options())
    said = [note for note in notes if "classes?" in note]
    assert bool(said) == classes and all("--label-range" in note for note in said)
    _, notes = index_tars([tmp_path], None, options(label_range=(-1.0, 3.0), overwrite=True))
    assert "classes?" not in str(notes)


def test_what_the_guide_says_of_the_size_of_tables(tmp_path: Path) -> None:
    """docs/your-data.md, "What it costs": of MOSI about 80 bytes a sample, of foreign tars 140, of features 60 kB."""
    ours, _ = pack(GeneratedSource("mosi", 800), tmp_path / "ours")
    foreign = indexed(tmp_path / "ours", tmp_path / "foreign")

    def each(index: Index, *suffixes: str) -> float:
        files = [path for path in Path(index.where).rglob("*") if path.suffix in suffixes]
        return sum(path.stat().st_size for path in files) / index.num_samples

    assert each(ours, ".arrow") == pytest.approx(80, rel=0.1)
    assert each(foreign, ".arrow") == pytest.approx(140, rel=0.1)
    assert each(ours, ".tar") == pytest.approx(60_000, rel=0.1)
