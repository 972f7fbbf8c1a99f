"""Law 9 for computational sequences: damaged files, files that point elsewhere, folds and options that cannot be."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from shards.errors import ConfigError, DataError
from shards.formats import PackCsd
from shards.sources.csd import CsdSource
from shards.sources.folds import read_folds
from tests.shards.sequences import write_csd
from tests.shards.test_sources_csd import AUDIO, LABELS, WORDS, everything, source

pytestmark = pytest.mark.fault


def refused(folder: Path, path: Path) -> str:
    """What is said about the sequence at `path` as audio; nothing of it is read."""
    of = source(folder, audio=AUDIO)
    with pytest.raises(DataError) as caught:
        everything(CsdSource(folder / of.where, {"audio": path}, (folder / "folds.json",)))
    return str(caught.value)


def changed(folder: Path, change: Callable[[h5py.Group, Path], None]) -> Path:
    """An audio sequence after `change` has been at its entry ``a``; beside it another file, of secrets."""
    path, secret = write_csd(folder / "bad.csd", AUDIO), folder / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["features"], file["intervals"] = AUDIO["a"]
    secret.with_suffix(".raw").write_bytes(bytes(8 * 2 * 4))
    with h5py.File(path, "r+") as file:
        change(file["a sequence/data/a"], secret)
    return path


def link(entry: h5py.Group, secret: Path) -> None:
    del entry["features"]
    entry["features"] = h5py.ExternalLink(secret, "features")


def link_of_all(entry: h5py.Group, secret: Path) -> None:
    data = entry.parent
    del data["a"]
    data["a"] = h5py.ExternalLink(secret, "/")


def soft_link(entry: h5py.Group, secret: Path) -> None:
    del entry["intervals"]
    entry["intervals"] = h5py.SoftLink("/a sequence/data/b/intervals")


def external_storage(entry: h5py.Group, secret: Path) -> None:
    del entry["features"]
    entry.create_dataset("features", (8, 2), "f4", external=[(secret.with_suffix(".raw"), 0, h5py.h5f.UNLIMITED)])


def virtual(entry: h5py.Group, secret: Path) -> None:
    layout = h5py.VirtualLayout((8, 2), "f4")
    layout[:] = h5py.VirtualSource(secret, "features", (8, 2))
    del entry["features"]
    entry.create_virtual_dataset("features", layout)


def references(entry: h5py.Group, secret: Path) -> None:
    del entry["features"]
    entry.create_dataset("features", (8, 1), h5py.ref_dtype)


def ragged_references(entry: h5py.Group, secret: Path) -> None:
    del entry["features"]
    entry.create_dataset("features", (8, 1), h5py.vlen_dtype(h5py.ref_dtype))


def bomb(entry: h5py.Group, secret: Path) -> None:
    for name, width in (("features", 2), ("intervals", 2)):
        del entry[name]
        entry.create_dataset(name, (10**12, width), "f4", chunks=(1024, width))


def shorter(entry: h5py.Group, secret: Path) -> None:
    del entry["intervals"]
    entry["intervals"] = np.zeros((7, 2))


def wide(entry: h5py.Group, secret: Path) -> None:
    del entry["features"]
    entry["features"] = np.zeros((8, 3))


def words(entry: h5py.Group, secret: Path) -> None:
    del entry["features"]
    entry["features"] = np.full((8, 1), b"so")


def flat_times(entry: h5py.Group, secret: Path) -> None:
    del entry["intervals"]
    entry["intervals"] = np.zeros(16)


def no_times(entry: h5py.Group, secret: Path) -> None:
    del entry["intervals"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (link, "entry 'a': 'features' is a link to elsewhere, which a sequence has no use for; it is not followed"),
        (link_of_all, "entry 'a': 'a' is a link to elsewhere"),
        (soft_link, "entry 'a': 'intervals' is a link to elsewhere"),
        (external_storage, "entry 'a': 'features' is stored in other files, which a sequence has no use for; not read"),
        (virtual, "entry 'a': 'features' is stored in other files"),
        (references, "entry 'a': features are object (8, 1), expected numbers (steps, width)"),
        (ragged_references, "entry 'a': features are object (8, 1), expected numbers (steps, width)"),
        (bomb, "entry 'a': 'features' claims to be float32 (1000000000000, 2), more than 2 GB; not read"),
        (shorter, "entry 'a': 8 steps of features, but 7 intervals"),
        (wide, "entry 'b': features have width 2, others 3"),
        (words, "entry 'a': features are |S2 (8, 1), expected numbers (steps, width)"),
        (flat_times, "entry 'a': intervals are float64 (16,), expected numbers (steps, 2): start and end"),
        (no_times, "entry 'a': has no 'intervals', only features"),
    ],
)
def test_an_entry_that_is_none(tmp_path: Path, change: Callable[[h5py.Group, Path], None], said: str) -> None:
    path = changed(tmp_path, change)
    assert f"{path}: {said}" in refused(tmp_path, path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "bad.csd"
    assert refused(tmp_path, path) == f"{path}: no such file; expected a computational sequence (.csd)"
    for content in (b"", b"<html>404</html>"):
        path.write_bytes(content)
        said = refused(tmp_path, path)
        assert said.startswith(f"{path}: cannot be read as a computational sequence (HDF5): Unable to ")
        assert said.endswith("it is another kind of file, or damaged: download it again")
    with h5py.File(path, "w") as file:
        file.create_group("x")
    assert "0 of its groups (x) hold data, expected one, named after the sequence; is it a" in refused(tmp_path, path)
    with h5py.File(path, "w") as file:
        file["x"] = 3
    assert f"{path}: 'x' is no group; is it a .csd file?" in refused(tmp_path, path)
    write_csd(path, {})
    assert f"{path}: not one of its 0 entries has a step; expected an entry a video" in refused(tmp_path, path)
    write_csd(path, {"a": (np.zeros((0, 3)), np.zeros((0, 2)))})
    assert f"{path}: not one of its 1 entries has a step" in refused(tmp_path, path)


def test_wherever_a_file_is_cut_or_flipped_it_is_a_sentence(tmp_path: Path) -> None:
    """Nothing of HDF5's own reaches the user. What is damaged where nobody looks is no fault."""
    whole = write_csd(tmp_path / "whole.csd", AUDIO).read_bytes()
    of, path = source(tmp_path, audio=AUDIO), tmp_path / "bad.csd"
    rng = np.random.default_rng(0)
    broken = [whole[: int(n)] for n in rng.integers(1, len(whole), 40)]
    for place, value in zip(rng.integers(0, len(whole), 120), rng.integers(0, 256, 120), strict=True):
        flipped = bytearray(whole)
        flipped[place : place + 8] = bytes([value]) * 8
        broken.append(bytes(flipped))
    sentences = 0
    for content in broken:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        try:
            everything(CsdSource(Path(of.where), {"audio": path}, (tmp_path / "folds.json",)))
        except DataError as error:
            sentences += str(error).startswith(str(path))
    assert sentences > 40


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "folds.yaml: holds nothing; expected lists of video ids under train, valid and test"),
        ("- a\n", "folds.yaml: holds a list; expected lists"),
        ("train: [", "folds.yaml: neither YAML nor JSON: while parsing a flow"),
        ("[" * 9999, "folds.yaml: neither YAML nor JSON: maximum recursion depth exceeded"),
        ("trian: [a]\n", "folds.yaml: unknown fold 'trian'; did you mean 'train'?"),
        ("train: a\n", "folds.yaml: train is no list of video ids; expected lists"),
        ("train: [[a]]\n", "folds.yaml: train is no list of video ids; expected lists"),
        ("train: [a]\nvalid: [b]\n", "folds.yaml: test names no video; expected lists"),
        ("train: [a]\nval: [b]\ntest: [b]\n", "folds.yaml: video 'b' is in valid and in test; it may be in one only"),
    ],
)
def test_folds_that_are_none(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "folds.yaml"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_folds((path,))
    assert said in str(caught.value)


def test_files_of_folds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: no such file; expected lists of video ids"):
        read_folds((tmp_path / "none.yaml",))
    with pytest.raises(ConfigError, match="--folds: 2 files; give one YAML or JSON file, or three: train, valid, test"):
        read_folds((tmp_path / "a", tmp_path / "b"))
    path = tmp_path / "folds.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"folds\.yaml: cannot be read as text in UTF-8"):
        read_folds((path,))


def test_videos_of_another_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not one of its 3 videos, e\.g\. 'a', is in the folds, e\.g\. 'x'; are"):
        source(tmp_path, folds={"train": ["x"], "valid": ["y"], "test": ["z"]}, audio=AUDIO)


def test_options_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither features nor words are named; add --text, --audio, --vision or"):
        source(tmp_path)
    with pytest.raises(ConfigError, match="--align words: which sequence has the words"):
        source(tmp_path, audio=AUDIO, align="words")
    with pytest.raises(DataError, match=r"text\.csd: entry 'a': features are \|S4 \(4, 1\), expected numbers"):
        source(tmp_path, text=WORDS)
    with pytest.raises(DataError, match=r"words\.csd: entry 'a': features are float32 \(8, 2\), expected words"):
        source(tmp_path, words=AUDIO)


def test_options_reach_the_source(tmp_path: Path) -> None:
    source(tmp_path, audio=AUDIO, vision=AUDIO, text=AUDIO, words=WORDS)
    names = {name: tmp_path / f"{name}.csd" for name in ("text", "audio", "vision", "words")}
    options = PackCsd(
        out=tmp_path / "set",
        labels=write_csd(tmp_path / "labels.csd", LABELS),
        folds=(tmp_path / "folds.json",),
        align="words",
        label_column=1,
        label_range=(0, 9),
        **names,
    )
    options.check()
    of = options.source()
    assert of.widths == {"text": 2, "audio": 2, "vision": 2}
    assert (of.has_raw_text, of.label_range) == (True, (0, 9))
    utterance = of.read("train", 0)
    assert utterance.labels == {"M": 9}
    assert {modality: len(values) for modality, values in utterance.modalities.items()} == dict.fromkeys(of.widths, 2)
