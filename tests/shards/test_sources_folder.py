"""A csv and a folder of features: where files are looked for, what is read, and what is said where there are none."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.cli import pack as pack_command
from shards.errors import ConfigError, DataError, MmsaError
from shards.index import Index
from shards.sources.columns import FileColumns
from shards.sources.folder import FolderSource
from shards.utterance import SPLITS, Utterance
from shards.write import pack
from tests.shards.test_sources_table import keys, table, write_csv

GUIDE = Path(__file__).parents[2] / "docs" / "your-data.md"
WIDTHS = {"text": 6, "audio": 5, "vision": 4}


def arrays() -> dict[str, dict[str, np.ndarray]]:
    """modality -> "video/clip" -> (T, D), each of its own length."""
    rng = np.random.default_rng(0)
    ids = [key.replace("_", "/") for key in keys(table())]
    return {m: {key: rng.standard_normal((rng.integers(1, 7), width)) for key in ids} for m, width in WIDTHS.items()}


def write_files(folder: Path, given: dict[str, dict[str, np.ndarray]], together: bool = False) -> Path:
    """features/audio/v0/1.npy; or, together, features/v0_1.npz."""
    root = folder / "features"
    for key in {key for its in given.values() for key in its}:
        of = {modality: its[key] for modality, its in given.items() if key in its}
        for modality, array in of.items():
            path = root / modality / f"{key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not together:
                np.save(path, array)
        if together:
            np.savez(root / f"{key.replace('/', '_')}.npz", **of)
    return root


def source(folder: Path, given: Any = None, together: bool = False, **options: Any) -> FolderSource:
    told = {name: options.pop(name) for name in list(options) if name in FileColumns.model_fields}
    if together:
        told.setdefault("files", "{video_id}_{clip_id}.npz")
    root = write_files(folder, given or arrays(), together)
    return FolderSource(write_csv(folder, options.pop("rows", table())), root, FileColumns(**told), **options)


def everything(of: FolderSource) -> dict[str, Utterance]:
    return {(u := of.read(split, n)).key.replace("_", "/"): u for split in SPLITS for n in range(of.counts[split])}


def refused(folder: Path, kind: type[MmsaError], given: Any = None, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        everything(source(folder, given, **options))
    return str(caught.value)


def test_the_example_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its csv, its five lines of Python and its command, as they stand there."""
    section = GUIDE.read_text(encoding="utf-8").split("## A folder of files")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w*)\n(.*?)```", section, flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["csv", "python", ""]
    (_, rows), (_, code), (_, command) = blocks
    monkeypatch.chdir(tmp_path)
    Path("label.csv").write_text(rows, encoding="utf-8")
    exec(code, {})
    words = command.split()
    assert words[:2] == ["mmsa-dist", "pack"]
    assert pack_command(words[2:]) == 0
    index = Index.load(tmp_path / "data" / "folder")
    assert index.name == tmp_path.name.lower()  # label.csv says nothing
    assert (index.splits, index.has_raw_text) == ({"train": 2, "valid": 1, "test": 1}, True)
    assert {name: (part.width, part.max_length) for name, part in index.modalities.items()} == {"audio": (74, 25)}


@pytest.mark.parametrize("together", [False, True])
def test_files_are_found_and_read(tmp_path: Path, together: bool) -> None:
    given, of = arrays(), source(tmp_path, together=together)
    assert of.widths == WIDTHS
    assert of.notes() == []
    found = everything(of)
    for modality, its in given.items():
        for key, array in its.items():
            read = found[key].modalities[modality]
            np.testing.assert_array_equal(read, array.astype(np.float32))
            assert type(read) is np.ndarray and read.dtype == np.float32


def test_another_place_and_other_names(tmp_path: Path) -> None:
    given = {"covarep": arrays()["audio"], "face": arrays()["vision"]}
    of = source(tmp_path, given, audio="covarep", vision="face", text_features="none")
    assert of.widths == {"audio": 5, "vision": 4}
    path = tmp_path / "features" / "covarep" / "v0" / "1.npy"
    path.rename(path.with_name("one.npy"))
    rows = table(file=["one" if n == 1 else str(n % 3) for n in range(24)])
    told = FileColumns(files="{modality}/{video_id}/{file}.npy", audio="covarep", vision="face")
    with pytest.raises(DataError, match=r"vision of 1 utterance is missing, e\.g\. face/v0/one\.npy; leave --strict"):
        FolderSource(write_csv(tmp_path, rows), tmp_path / "features", told, strict=True)
    of = FolderSource(write_csv(tmp_path, rows), tmp_path / "features", told)
    np.testing.assert_array_equal(of.read("train", 1).modalities["audio"], arrays()["audio"]["v0/1"].astype("f4"))


@pytest.mark.parametrize("together", [False, True])
def test_a_missing_file_is_an_absent_modality(tmp_path: Path, together: bool) -> None:
    given = arrays()
    for key in ("v0/1", "v3/0"):
        del given["vision"][key]
    of = source(tmp_path, given, together)
    example = "v0_1.npz" if together else "vision/v0/1.npy"
    assert of.notes() == [f"vision: 2 of 24 utterances have no file, e.g. {example}"]
    assert list(everything(of)["v3/0"].modalities) == ["text", "audio"]
    _, notes = pack(of, tmp_path / "set")
    assert [note for note in notes if note.startswith("vision")] == of.notes()  # said once
    said = refused(tmp_path, DataError, given, together=together, strict=True)
    assert f"vision of 2 utterances is missing, e.g. {example}; leave --strict out where that may be" in said


def test_what_is_absent_besides_the_missing_files_is_said_too(tmp_path: Path) -> None:
    given = arrays()
    del given["vision"]["v0/1"]
    given["vision"]["v3/0"][:] = np.nan
    _, notes = pack(source(tmp_path, given), tmp_path / "set")
    assert "vision: 1 of 24 utterances has no file, e.g. vision/v0/1.npy" in notes
    assert "vision: 2 samples have none; marked absent" in notes


def test_a_modality_without_any_file_is_not_of_the_set(tmp_path: Path) -> None:
    given = {"audio": arrays()["audio"]}
    assert source(tmp_path, given).widths == {"audio": 5}
    assert "vision of 24 utterances is missing, e.g. face/v0/0.npy" in refused(
        tmp_path, DataError, given, vision="face"
    )


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5)])
def test_a_vector_is_one_step(tmp_path: Path, shape: tuple[int, ...]) -> None:
    given = {"audio": {key: np.arange(5).reshape(shape) for key in arrays()["audio"]}}
    assert everything(source(tmp_path, given))["v0/0"].modalities["audio"].tolist() == [[0, 1, 2, 3, 4]]


def test_held_out_videos_and_options_of_tables(tmp_path: Path) -> None:
    rows = table(label_T=[0.5] * 24, label=[0.1] * 24)
    rows["mode"] = ["train" if split == "valid" else split for split in rows.pop("split")]
    of = source(tmp_path, rows=rows, hold_out_valid=2)
    assert of.counts == {"train": 12, "valid": 6, "test": 6}
    assert (of.tasks, of.label_range) == (("M", "T"), (-1.0, 1.0))


def test_the_checksum_is_that_of_all_files(tmp_path: Path) -> None:
    before = source(tmp_path).provenance
    assert before == source(tmp_path).provenance
    given = arrays()
    given["vision"]["v7/2"][-1, -1] += 1
    after = source(tmp_path, given).provenance
    assert {name for name in before if before[name] != after[name]} == {"features_sha256"}


# --- law 9


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"files": "{modality}/{vide_id}/{clip_id}.npy"}, "no column 'vide_id' (--files); did you mean 'video_id'?"),
        (
            {"files": "{modality}/{clip_id}.npz"},
            "--files {modality}/{clip_id}.npz: ends in .npz, expected .npy: a .npy",
        ),
        ({"files": "{clip_id}"}, "--files {clip_id}: ends in no suffix, expected .npz"),
        (
            {"text_features": "none", "audio": "none", "vision": "none"},
            "every modality is called none; without features",
        ),
        (
            {"files": "{modality}/{clip_id}_{video_id}.npy"},
            "neither text/0_v0.npy nor audio/0_v0.npy nor vision/0_v0.npy",
        ),
        ({"files": "../{modality}/{video_id}.npy"}, "'../text/v0.npy' leaves the folder; correct that row of the csv"),
        ({"files": "/{modality}/{video_id}.npy"}, "'/text/v0.npy' leaves the folder"),
    ],
)
def test_patterns_that_lead_nowhere(tmp_path: Path, told: dict[str, str], said: str) -> None:
    assert said in refused(tmp_path, MmsaError, **told)


def test_no_file_of_the_pattern_shows_one_that_is_there(tmp_path: Path) -> None:
    said = refused(tmp_path, DataError, files="{video_id}_{clip_id}.npz")
    assert "neither v0_0.npz nor v0_0.npz" not in said
    assert (
        "holds no features for any row: no v0_0.npz, nor any of the others; it has audio/v0/0.npy: see --files" in said
    )
    with pytest.raises(DataError, match="none: no such folder; expected one of"):
        FolderSource(write_csv(tmp_path, table()), tmp_path / "none")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 3, 5)), "audio/v1/1.npy is an array (2, 3, 5) of float64, expected one utterance: numbers"),
        (np.zeros(()), "audio/v1/1.npy is an array () of float64, expected numbers (steps, width)"),
        (np.array([["a"]]), "audio/v1/1.npy is an array (1, 1) of <U1, expected numbers (steps, width)"),
        (np.array([{}], dtype=object), "audio/v1/1.npy: cannot be read as numbers without pickled objects"),
    ],
)
def test_a_file_that_is_no_features(tmp_path: Path, array: np.ndarray, said: str) -> None:
    given = {"audio": {**arrays()["audio"], "v1/1": array}}
    assert said in refused(tmp_path, DataError, given)


@pytest.mark.fault
@pytest.mark.parametrize("together", [False, True])
def test_a_file_that_is_damaged(tmp_path: Path, together: bool) -> None:
    of = source(tmp_path, together=together)
    path = tmp_path / "features" / ("v0_1.npz" if together else "audio/v0/1.npy")
    whole = path.read_bytes()
    claims_more = whole.replace(b", 5)", b",10**9)") if together else whole.replace(b"'shape': (", b"'shape': (9")
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"x" * 99, claims_more, b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            of.read("train", 1)
        assert str(caught.value).startswith(f"{path}: cannot be read as numbers without pickled objects: ")


@pytest.mark.fault
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    "header", [b", 5(, }", b", 5),  ", b", '), }", b", {}), }", b", [):0 }", b",5" + b"0" * 20 + b"), }"]
)
def test_a_header_that_python_cannot_parse(tmp_path: Path, header: bytes, together: bool) -> None:
    of = source(tmp_path, together=together)
    path = tmp_path / "features" / ("v0_1.npz" if together else "audio/v0/1.npy")
    path.write_bytes(path.read_bytes().replace(b", 5), }".ljust(len(header)), header))
    with pytest.raises(DataError, match="cannot be read as numbers without pickled objects: "):
        of.read("train", 1)


@pytest.mark.fault
def test_files_that_cannot_be_looked_at(tmp_path: Path) -> None:
    rows = table()
    rows["video_id"][0] = "a" * 300
    assert "cannot be looked at (File name too long); let this user read the folder" in refused(
        tmp_path, DataError, rows=rows
    )
    write_files(tmp_path, arrays())
    (tmp_path / "features/vision/v7/2.npy").unlink()
    (tmp_path / "features/vision/v7/2.npy").symlink_to("/proc/self/mem")  # reading it fails, as of a bad disk
    with pytest.raises(DataError, match=r"vision/v7/2\.npy: cannot be read as numbers .* Input/output error"):
        FolderSource(write_csv(tmp_path, table()), tmp_path / "features")


def test_utterances_of_one_file_are_told(tmp_path: Path) -> None:
    of = source(tmp_path, {"audio": arrays()["audio"]}, audio="audio", vision="none", text_features="none")
    assert of.notes() == []
    for video in {key.split("/")[0] for key in arrays()["audio"]}:
        path = tmp_path / "features" / "audio" / f"{video}.npy"
        np.save(path, np.ones((3, 5)))
    columns = FileColumns(files="{modality}/{video_id}.npy", vision="none", text_features="none")
    of = FolderSource(tmp_path / "table.csv", tmp_path / "features", columns)
    assert of.notes() == ["audio: 24 utterances share their file with others, e.g. audio/v0.npy; see --files"]


def test_widths_that_differ(tmp_path: Path) -> None:
    given = {"audio": {**arrays()["audio"], "v1/1": np.zeros((3, 4))}}
    with pytest.raises(
        DataError, match=r"/audio/v1/1\.npy: audio is .*\(3, 4\).*, expected \(steps, 5\) as in audio/v0/0\.npy; "
    ):
        pack(source(tmp_path, given), tmp_path / "set")
    empty = {"audio": {key: np.zeros((0, 5)) for key in arrays()["audio"]}}
    assert "audio has length zero in every file" in refused(tmp_path, DataError, empty)


def test_contradictions(tmp_path: Path) -> None:
    assert "has 6 valid rows already" in refused(tmp_path, ConfigError, hold_out_valid=2)


def test_a_modality_without_any_file_is_told_of_and_refused_where_all_must_be_there(tmp_path: Path) -> None:
    """A folder that was not copied is not taken for a data set without vision in silence."""
    given = {"text": arrays()["text"], "audio": arrays()["audio"]}
    of = source(tmp_path, given)
    assert list(of.widths) == ["text", "audio"]
    assert of.notes() == ["vision: no utterance has a file, e.g. vision/v0/0.npy: left out (--vision none says so)"]
    said = refused(tmp_path, DataError, given, strict=True)
    assert "vision of 24 utterances is missing, e.g. vision/v0/0.npy; --vision none where there is to be none" in said
    named = source(tmp_path, given, vision="none", strict=True)
    assert list(named.widths) == ["text", "audio"] and named.notes() == []
