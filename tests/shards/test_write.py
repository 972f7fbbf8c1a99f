"""Packing: standard WebDataset tars, byte for byte the same each time, a folder that is there whole or not at all."""

import json
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from webdataset.tariterators import base_plus_ext

from shards.errors import ConfigError, DataError
from shards.files import exchange, sha256_of, write_atomic
from shards.half import _SERIAL, to_float16
from shards.index import Index
from shards.moments import Moments
from shards.read import ShardReader
from shards.sources.generated import GeneratedSource
from shards.tar import _header, escape_key, safetensors, unescape_key
from shards.utterance import MODALITIES, SPLITS, Utterance
from shards.write import pack
from tests.shards.made import WIDTHS, Samples, packed, utterances

ROOT = Path(__file__).parents[2]
COUNTS = {"train": 30, "valid": 7, "test": 8}


@pytest.fixture
def samples() -> list[Utterance]:
    return utterances(COUNTS, absent=0.2)


@pytest.fixture
def index(tmp_path: Path, samples: list[Utterance]) -> Index:
    return packed(tmp_path / "set", samples)


def same(one: Utterance, other: Utterance) -> None:
    assert (one.key, one.split, one.raw_text) == (other.key, other.split, other.raw_text)
    assert {t: np.float32(v) for t, v in one.labels.items()} == {t: np.float32(v) for t, v in other.labels.items()}
    assert one.modalities.keys() == other.modalities.keys()
    for name, values in one.modalities.items():
        np.testing.assert_array_equal(values, other.modalities[name])
    assert (one.tokens is None) == (other.tokens is None)
    if one.tokens is not None:
        np.testing.assert_array_equal(one.tokens, other.tokens)


# --- the format


def test_plain_webdataset_reads_every_sample(index: Index, samples: list[Utterance]) -> None:
    originals = {u.key: u for u in samples}
    seen = Counter()
    for number in range(len(index.shards)):
        for found in webdataset.WebDataset(str(index.tar_path(number)), shardshuffle=False):
            assert {name for name in found if not name.startswith("__")} == {"json", "safetensors"}
            told = json.loads(found["json"])
            original = originals[unescape_key(found["__key__"])]
            tensors = load_tensors(found["safetensors"])
            tokens = tensors.pop("tokens")
            same(Utterance(told["key"], told["split"], tensors, told["labels"], told["raw_text"], tokens), original)
            assert {values.dtype for values in tensors.values()} == {np.dtype(np.float16)}
            seen[original.key] += 1
    assert seen == Counter(originals.keys())


def test_the_table_says_where_payloads_lie(index: Index) -> None:
    for number, shard in enumerate(index.shards):
        data = index.tar_path(number).read_bytes()
        assert len(data) == shard.bytes
        for row in index.table(number).to_pylist():
            told = json.loads(data[row["json_offset"] : row["json_offset"] + row["json_size"]])
            assert told["key"] == row["key"]
            tensors = load_tensors(data[row["offset"] : row["offset"] + row["size"]])
            assert {m: len(tensors[m]) if m in tensors else 0 for m in MODALITIES} == {
                m: row[f"length_{m}"] for m in MODALITIES
            }
            assert len(tensors["tokens"]) == row["n_tokens"]
            assert told["labels"]["M"] == pytest.approx(row["label_M"])


def test_labels_in_json_are_spelled_as_they_are_told(tmp_path: Path) -> None:
    one = [Utterance(s, s, {"audio": np.ones((1, 5), np.float32)}, {"M": 2.4}) for s in SPLITS]
    index = packed(tmp_path / "set", one)
    row = index.table(0).to_pylist()[0]
    text = index.tar_path(0).read_bytes()[row["json_offset"] :][: row["json_size"]]
    assert text == b'{"key":"train","labels":{"M":2.4},"split":"train"}'


def test_members_are_plain_files_with_fixed_metadata(index: Index) -> None:
    with tarfile.open(index.tar_path(0)) as tar:
        for member in tar:
            assert member.isreg()
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (
                0,
                0,
                0,
                "",
                "",
                0o444,
            )
            assert "/" not in member.name and ".." not in member.name


def test_shards_hold_one_split_each_and_are_about_as_large_as_told(tmp_path: Path, samples: list[Utterance]) -> None:
    index = packed(tmp_path / "set", samples, shard_bytes=20_000)
    assert [shard.split for shard in index.shards] == sorted((s.split for s in index.shards), key=SPLITS.index)
    for split in SPLITS:
        of_split = [index.shards[n] for n in index.shards_of(split)]
        assert sum(shard.samples for shard in of_split) == COUNTS[split]
        assert max(shard.samples for shard in of_split) - min(shard.samples for shard in of_split) <= 1
        assert all(shard.bytes < 20_000 + 10_240 + 6_000 for shard in of_split)  # one sample and the tar's end more
    assert {p.name for p in index.folder.iterdir()} == {"index.json"} | {
        name for shard in index.shards for name in (shard.url, shard.table)
    }
    assert all(shard.sha256 == sha256_of(index.folder / shard.url) for shard in index.shards)
    assert all(shard.table_sha256 == sha256_of(index.folder / shard.table) for shard in index.shards)


def keys(index: Index, split: str) -> list[str]:
    return [key for n in index.shards_of(split) for key in index.table(n)["key"].to_pylist()]


def test_the_same_input_and_seed_give_the_same_bytes(tmp_path: Path, samples: list[Utterance]) -> None:
    one, again = (packed(tmp_path / name, samples, seed=7) for name in ("one", "again"))
    for path in one.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name


def test_the_seed_gives_the_order_and_nothing_else(tmp_path: Path, samples: list[Utterance]) -> None:
    orders = [keys(packed(tmp_path / str(seed), samples, seed=seed), "train") for seed in (0, 1)]
    in_order = [u.key for u in samples if u.split == "train"]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(in_order)
    assert orders[0] != orders[1] != in_order != orders[0]


# --- ours is what the libraries write, only faster


@given(st.text(st.sampled_from("abc_$%09"), min_size=1, max_size=120), st.integers(0, 2**36))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    assert _header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


@given(
    st.dictionaries(
        st.sampled_from([*MODALITIES, "tokens"]),
        st.tuples(st.integers(0, 5), st.integers(1, 4), st.sampled_from([np.float32, np.float16, np.int32])),
    )
)
def test_arrays_are_as_safetensors_writes_them(shapes: dict[str, tuple[int, int, type]]) -> None:
    made = {name: np.arange(t * d).astype(dtype).reshape(t, d) for name, (t, d, dtype) in shapes.items()}
    turned = {name: np.asfortranarray(array) for name, array in made.items()}
    for given_as in (made, turned):
        pieces, size = safetensors(given_as)
        joined = b"".join(pieces)
        assert joined == save_tensors(made) and size == len(joined)


def test_half_precision_is_the_same_by_torch_and_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of float32: any bits, and those around every boundary between two float16, subnormal and huge ones."""
    rng = np.random.default_rng(0)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    between = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    edges = [np.nextafter(between, np.float32(way)) for way in (-np.inf, np.inf)]
    values = np.concatenate([rng.integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32), between, *edges])
    values = np.concatenate([values, -values])[: len(values) // 3 * 6].reshape(-1, 3)
    values = values[np.isfinite(values).all(axis=1)]
    import torch  # noqa: F401

    def bits(array: np.ndarray) -> np.ndarray:
        return to_float16(array)[0][0].view(np.uint16)

    by_torch = bits(values)
    values.flags.writeable = False
    np.testing.assert_array_equal(by_torch, bits(values))
    monkeypatch.delitem(sys.modules, "torch")
    np.testing.assert_array_equal(by_torch, bits(values))


@pytest.mark.parametrize("way", ["torch", "numpy"])
def test_arrays_of_any_kind_become_float16_together(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: F401

    if way == "numpy":
        monkeypatch.delitem(sys.modules, "torch")
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((3 * _SERIAL // 4, 3), dtype=np.float32)
    given = [
        plain,
        np.asfortranarray(plain[:7]),
        plain[:1][::-1],
        plain[9::-2],
        plain.astype(np.float64),
        plain[:5].astype(">f4"),
        (10 * plain[:5]).astype(np.int64),
        np.zeros((0, 3), np.float32),
    ]
    halves, finite = to_float16(*given)
    assert finite and all(half.flags.c_contiguous for half in halves)
    for half, array in zip(halves, given, strict=True):
        np.testing.assert_array_equal(half, array.astype(np.float16), strict=True)
    assert to_float16() == ([], True)
    for value in (np.inf, -np.inf, np.nan, -np.nan, 65_520, -65_520):
        spoilt = plain[:5].copy()
        spoilt[3, 1] = value
        assert not to_float16(plain, spoilt, plain[:2])[1]
    largest = np.full((2, 2), np.finfo(np.float16).max, np.float32)
    assert to_float16(largest, -largest)[1]


# --- keys


@given(st.text(min_size=1, max_size=60))
def test_any_key_survives_webdatasets_rules(key: str) -> None:
    name = escape_key(key)
    assert unescape_key(name) == key
    assert base_plus_ext(f"{name}.safetensors") == (name, "safetensors")
    assert not set(name) & set("./\\ \0") and name.isascii()


@given(st.sets(st.text(min_size=1, max_size=200), min_size=1, max_size=8))
def test_awkward_keys_are_read_back(tmp_path_factory: pytest.TempPathFactory, awkward: set[str]) -> None:
    awkward |= {"vid$_$1.5_2.0", "a/b", "..", "__meta__", "é漢字", "%2E", "x" * 300}
    made = [Utterance(k, "train", {"audio": np.full((1, 5), n, np.float32)}, {"M": 0.0}) for n, k in enumerate(awkward)]
    made += [Utterance(f"{s} of it", s, {"audio": np.ones((1, 5), np.float32)}, {"M": 0.0}) for s in SPLITS[1:]]
    index = packed(tmp_path_factory.mktemp("keys") / "set", made, shard_bytes=1 << 20)
    originals = {u.key: u for u in made}
    seen = []
    for found in webdataset.WebDataset(str(index.tar_path(0)), shardshuffle=False):
        key = unescape_key(found["__key__"])
        assert json.loads(found["json"])["key"] == key
        np.testing.assert_array_equal(load_tensors(found["safetensors"])["audio"], originals[key].modalities["audio"])
        seen.append(key)
    assert sorted(seen) == sorted(awkward)
    assert sorted(keys(index, "train")) == sorted(awkward)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="empty id"):
        escape_key("")
    with pytest.raises(DataError, match="not valid unicode"):
        escape_key("\ud800")


# --- values


def ragged(split: str) -> st.SearchStrategy[list[Utterance]]:
    """Up to three samples of a split, any float32 values, the audio sometimes absent."""
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    of = {
        m: arrays(np.float32, st.tuples(st.integers(1, 4), st.just(width)), elements=values)
        for m, width in WIDTHS.items()
    }
    tokens = arrays(np.int32, st.integers(1, 5), elements=st.integers(0, 30000))
    modalities = st.fixed_dictionaries({"text": of["text"], "vision": of["vision"]}, optional={"audio": of["audio"]})
    sample = st.tuples(modalities, st.floats(-3, 3, width=32), st.text(max_size=9), tokens)
    return st.lists(sample, min_size=1, max_size=3).map(
        lambda drawn: [Utterance(f"{split}{n}", split, m, {"M": y}, text, t) for n, (m, y, text, t) in enumerate(drawn)]
    )


@given(ragged("train"), ragged("valid"), ragged("test"))
@settings(max_examples=30)
def test_ragged_samples_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, train: list[Utterance], valid: list[Utterance], test: list[Utterance]
) -> None:
    train[0].modalities["audio"] = np.ones((1, WIDTHS["audio"]), np.float32)  # else there is no audio at all
    made = [*train, *valid, *test]
    index = packed(tmp_path_factory.mktemp("ragged") / "set", made, dtype="float32", shard_bytes=2048)
    with ShardReader(index) as reader:
        found = {u.key: u for u in reader.samples(range(index.num_samples), with_text=True)}
    assert found.keys() == {u.key for u in made}
    for original in made:
        same(found[original.key], original)


def test_statistics_are_those_of_the_real_steps_of_train(index: Index, samples: list[Utterance]) -> None:
    for modality in WIDTHS:
        steps = np.concatenate(
            [u.modalities[modality] for u in samples if u.split == "train" and modality in u.modalities]
        )
        np.testing.assert_allclose(index.statistics[modality]["mean"], steps.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(index.statistics[modality]["std"], steps.std(0, dtype=np.float64), rtol=1e-12)
        longest = max(len(u.modalities[modality]) for u in samples if modality in u.modalities)
        assert index.modalities[modality].max_length == longest


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.floats(-1e8, 1e8))
def test_moments_hold_where_the_mean_is_far_from_zero(lengths: list[int], mean: float) -> None:
    rng = np.random.default_rng(len(lengths))
    parts = [rng.normal(mean, 1, (n, 3)) for n in lengths]
    moments = Moments(3)
    for part in parts:
        moments.add(part)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(moments.result()["mean"], rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.result()["std"], rows.std(0), rtol=1e-6, atol=1e-6)
    merged = Moments(3)
    for part in [*parts, np.zeros((0, 3))]:
        other = Moments(3)
        if len(part):
            other.add(part)
        merged.merge(Moments.from_parts(*other.parts()))
    assert merged.parts() == moments.parts()


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path, samples: list[Utterance]) -> None:
    samples[3].modalities["text"][0, 2] = -70_000.0
    with pytest.raises(DataError) as caught:
        packed(tmp_path / "set", samples)
    assert samples[3].key in str(caught.value)
    assert "text has a value of 70000, more than float16 holds (65504); pack with --dtype float32" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    index = packed(tmp_path / "set", samples, dtype="float32")
    assert index.dtype == "float32"


# --- the folder


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path, index: Index, samples: list[Utterance]) -> None:
    before = {path.name: path.read_bytes() for path in index.folder.iterdir()}
    with pytest.raises(ConfigError, match=r"is not empty .* --overwrite to replace it"):
        packed(index.folder, samples)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        packed(tmp_path / "file", samples, overwrite=True)
    assert {path.name: path.read_bytes() for path in index.folder.iterdir()} == before


def test_overwrite_replaces_the_whole_folder(index: Index) -> None:
    new = packed(index.folder, utterances({"train": 3}, seed=5), overwrite=True, shard_bytes=1 << 20)
    assert new.splits == {"train": 3, "valid": 1, "test": 1}
    assert len(list(index.folder.iterdir())) == 1 + 2 * 3
    assert [path.name for path in index.folder.parent.iterdir()] == [index.folder.name]


def test_overwrite_never_takes_what_no_packing_wrote(index: Index, samples: list[Utterance]) -> None:
    (index.folder / "thesis.txt").write_text("three years")
    with pytest.raises(ConfigError, match=r"holds 'thesis.txt', which no packing wrote"):
        packed(index.folder, samples, overwrite=True)
    assert (index.folder / "thesis.txt").read_text() == "three years"


def test_an_overwrite_that_fails_keeps_the_old(index: Index, samples: list[Utterance]) -> None:
    before = {path.name: path.read_bytes() for path in index.folder.iterdir()}
    samples[-1].labels["M"] = 99.0
    with pytest.raises(DataError, match="label M is 99"):
        packed(index.folder, samples, overwrite=True)
    assert {path.name: path.read_bytes() for path in index.folder.iterdir()} == before
    assert [path.name for path in index.folder.parent.iterdir()] == [index.folder.name]


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path, samples: list[Utterance]) -> None:
    (tmp_path / "set").mkdir()
    assert packed(tmp_path / "set", samples).num_samples == len(samples)


@pytest.mark.parametrize("system", ["this", "without renameat2"])
def test_folders_are_exchanged_whole(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if system != "this":
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").read_text() == "b"
    assert (tmp_path / "b" / "a").read_text() == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_atomic_write_that_fails_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "text is not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- names, and cost


def test_packing_imports_neither_pandas_nor_torch(tmp_path: Path) -> None:
    """Half a second and more of each process."""
    code = (
        "import sys; from pathlib import Path; from shards.sources.generated import GeneratedSource\n"
        "from shards.write import pack; pack(GeneratedSource('mosi', 9), Path(sys.argv[1]))\n"
        "assert not {'pandas', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], cwd=ROOT, check=True, timeout=120)


def test_generated_data_is_called_synthetic_whatever_its_name(tmp_path: Path) -> None:
    index, notes = pack(GeneratedSource("mosi", samples=3), tmp_path / "set", name="mosi")
    assert (index.name, index.synthetic) == ("synthetic-mosi", True)
    assert any("synthetic data" in note for note in notes)


def test_four_times_the_samples_take_no_more_memory(tmp_path: Path) -> None:
    def peak(samples: int) -> int:
        tracemalloc.start()
        pack(GeneratedSource("mosi", samples=samples), tmp_path / str(samples), shard_bytes=1 << 20)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)  # whatever is imported or cached once
    small, large = peak(60), peak(240)
    assert large < small * 1.2, f"{small:,} bytes for 60 samples, {large:,} for 240"


def test_duplicates_are_refused_wherever_they_are(tmp_path: Path, samples: list[Utterance]) -> None:
    twice = [*samples, Utterance(samples[4].key, "test", samples[4].modalities, samples[4].labels)]
    with pytest.raises(DataError) as caught:
        pack(Samples(twice), tmp_path / "set")
    assert f"id {samples[4].key!r} occurs at train[4] and test[8]; ids must be unique" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
