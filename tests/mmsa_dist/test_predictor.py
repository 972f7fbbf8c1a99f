"""A trained system that answers, without what trained it."""

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mmsa_dist import checkpoint
from mmsa_dist.data_card import DataCard
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.predictor import Predictor, chunks
from mmsa_dist.recipe import Recipe
from shards.index import Index
from shards.read import ShardReader
from shards.utterance import Utterance
from tests.mmsa_dist import runs

EXACT = 1e-5
"""Batches of other sizes sum in another order."""


@pytest.fixture(scope="module")
def predictor(trained: tuple[Path, Recipe]) -> Predictor:
    return Predictor.load(trained[0])


@pytest.fixture(scope="module")
def utterances(index: Index) -> list[Utterance]:
    """The test split, transcripts included."""
    return ShardReader(index).samples(index.numbers("test"), with_text=True)


@pytest.fixture(scope="module")
def read_text(tmp_path_factory: pytest.TempPathFactory, index: Index) -> tuple[Path, Recipe]:
    """A run whose text went through an encoder."""
    folder = tmp_path_factory.mktemp("text")
    return runs.trained(folder, index, "text", encoder=str(runs.tiny_encoder(folder / "encoder")))


def answers(predictor: Predictor, utterances: list[Utterance], size: int) -> np.ndarray:
    return np.concatenate([predictor.predict(chunk)["M"] for chunk in chunks(utterances, size)])


@pytest.mark.parametrize("size", [1, 3, 16])
def test_predicts_what_the_run_predicted_in_any_batches(
    size: int, predictor: Predictor, trained: tuple[Path, Recipe], utterances: list[Utterance]
) -> None:
    with np.load(trained[0] / "predictions" / "test.npz") as saved:
        assert [utterance.key for utterance in utterances] == saved["key"].tolist()
        np.testing.assert_allclose(answers(predictor, utterances, size), saved["p"], atol=EXACT)
        assert np.ptp(saved["p"]) > 0.01  # it does answer something


def test_predicts_through_a_text_encoder(read_text: tuple[Path, Recipe], utterances: list[Utterance]) -> None:
    predictor = Predictor.load(read_text[0])
    assert predictor.columns == ("raw_text", "audio", "vision")
    with np.load(read_text[0] / "predictions" / "test.npz") as saved:
        np.testing.assert_allclose(answers(predictor, utterances, 4), saved["p"], atol=EXACT)
    changed = [Utterance(u.key, u.split, u.modalities, {}, raw_text="bad bad film") for u in utterances]
    assert not np.allclose(answers(predictor, changed, 4), answers(predictor, utterances, 4), atol=1e-4)


def test_an_encoder_that_has_moved_is_said(read_text: tuple[Path, Recipe], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(read_text[0], run)
    card = json.loads((run / "data.json").read_text())
    card["text"]["encoder"] = str(tmp_path / "gone")
    (run / "data.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match="gone"):
        Predictor.load(run)


def test_standardises_as_in_training(trained: tuple[Path, Recipe], utterances: list[Utterance], tmp_path: Path) -> None:
    """The fixture's recipe standardises audio: without the statistics the answers differ."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    card = json.loads((run / "data.json").read_text())
    assert card.pop("statistics").keys() == {"audio"}
    (run / "data.json").write_text(json.dumps(card))
    with np.load(run / "predictions" / "test.npz") as saved:
        assert not np.allclose(answers(Predictor.load(run), utterances, 16), saved["p"], atol=1e-3)


def test_every_task_of_the_system_is_answered(predictor: Predictor, utterances: list[Utterance]) -> None:
    assert predictor.tasks == ("M", "T", "A", "V")
    assert {task: len(values) for task, values in predictor.predict(utterances[:2]).items()} == dict.fromkeys("MTAV", 2)


# --- records


def record_of(utterance: Utterance) -> dict[str, object]:
    """What a client would send: JSON and back."""
    return json.loads(json.dumps({name: array.tolist() for name, array in utterance.modalities.items()}))


def test_a_record_is_the_utterance(predictor: Predictor, utterances: list[Utterance]) -> None:
    for utterance in utterances:
        sent = predictor.utterance(record_of(utterance), "row 0")
        np.testing.assert_array_equal(predictor.predict([sent])["M"], predictor.predict([utterance])["M"])


def npy(array: np.ndarray, **more: Any) -> str:
    """A .npy file in base64."""
    file = io.BytesIO()
    np.save(file, array, **more)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_npy_file_in_base64_is_its_array(
    dtype: str, order: Any, predictor: Predictor, utterances: list[Utterance]
) -> None:
    whole = next(u for u in utterances if len(u.modalities) == 3)
    arrays = {name: array.astype(dtype, order=order) for name, array in whole.modalities.items()}
    packed = predictor.utterance({name: npy(array) for name, array in arrays.items()}, "a")
    listed = predictor.utterance({name: array.tolist() for name, array in arrays.items()}, "a")
    for name, array in packed.modalities.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, listed.modalities[name])


def huge() -> str:
    """A header that promises 4 TB."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 5)})
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "audio is str '', expected a list of steps of 5 numbers each, or a .npy file of them in base64"),
        ("AAAA", "or a .npy file of them in base64"),
        ("\u00e4\u00f6", "or a .npy file of them in base64"),
        (npy(np.zeros((2, 5), np.float32))[:-8], "or a .npy file of them in base64"),
        (huge(), "bytes for the shape (1000000000000, 5)"),
        (npy(np.array([["a"]])), "it holds <U1"),
        (npy(np.array([None]), allow_pickle=True), "it holds object"),
        (base64.b64encode(b"\x93NUMPY\x01\x00\x10\x00((((((((((((((((").decode(), "or a .npy file of them in base64"),
        (npy(np.zeros((2, 4), np.float32)), "audio has 4 features a step, the model was trained on 5"),
        (npy(np.zeros(4, np.float32)), "audio has 4 features a step, the model was trained on 5"),
        (npy(np.zeros((1, 2, 5), np.float32)), "audio has 3 dimensions, expected 2"),
        (npy(np.full((1, 5), np.nan)), "audio step 0, feature 0 is nan, expected a finite number"),
        (npy(np.full((1, 5), 1e300)), "audio step 0, feature 0 is inf, expected a finite number"),
    ],
    ids=range(13),
)
def test_a_npy_file_that_cannot_be_taken_is_said(value: str, says: str, predictor: Predictor) -> None:
    with pytest.raises(DataError) as raised:
        predictor.utterance({**predictor.example(), "audio": value}, "row 7")
    assert says in str(raised.value) and "'row 7'" in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("nothing", [None, [], float("nan")], ids=["null", "empty", "nan"])
def test_what_is_null_or_empty_is_absent(nothing: object, predictor: Predictor, utterances: list[Utterance]) -> None:
    whole = record_of(next(u for u in utterances if len(u.modalities) == 3))
    without = {name: value for name, value in whole.items() if name != "audio"}
    expected = predictor.predict([predictor.utterance(without, "a")])["M"]
    assert predictor.predict([predictor.utterance({**without, "audio": nothing}, "a")])["M"] == expected
    assert predictor.predict([predictor.utterance(whole, "a")])["M"] != expected


def test_one_flat_list_is_one_step(predictor: Predictor) -> None:
    row = predictor.example()
    flat = {**row, "audio": row["audio"][0]}
    nested = {**row, "audio": [row["audio"][0]]}
    assert predictor.predict([predictor.utterance(flat, "a")]) == predictor.predict([predictor.utterance(nested, "a")])


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("audio", [[1, 2, 3]], "step 0: audio has 3 features a step, the model was trained on 5"),
        ("audio", [[0] * 5, [0] * 4], "step 1: audio has 4 features a step, the model was trained on 5"),
        ("audio", [[0, 0, "loud", 0, 0]], "audio holds what is not a number"),
        ("audio", [[0, 0, None, 0, 0]], "audio step 0, feature 2 is nan, expected a finite number"),
        ("audio", [[0, 0, 1e60, 0, 0]], "audio step 0, feature 2 is inf, expected a finite number"),
        ("audio", [[[0] * 5] * 5], "audio has 3 dimensions, expected 2"),
        ("audio", 3, "audio is int 3, expected a list of steps of 5 numbers"),
        ("audio", "loud", "audio is str 'loud', expected a list of steps"),
        ("audio", {"a": 1}, "audio is dict"),
        ("audio", [[0] * 5, 3], "audio step 1 is int 3, expected a list of 5 numbers"),
    ],
)
def test_a_record_that_cannot_be_read_is_said(column: str, value: object, says: str, predictor: Predictor) -> None:
    with pytest.raises(DataError) as raised:
        predictor.utterance({**predictor.example(), column: value}, "row 7")
    assert says in str(raised.value)
    assert "'row 7'" in str(raised.value)


def test_a_text_that_is_none_is_said(read_text: tuple[Path, Recipe]) -> None:
    with pytest.raises(DataError, match=r"row 0.*raw_text is list \['good'\], expected a string"):
        Predictor.load(read_text[0]).utterance({"raw_text": ["good"]}, "row 0")


def test_an_utterance_with_nothing_in_it_is_said(predictor: Predictor) -> None:
    with pytest.raises(DataError, match=r"'row 3'.*has none of text, audio, vision"):
        predictor.predict([predictor.utterance({"audio": None}, "row 3")])


def test_an_utterance_of_another_width_is_said(predictor: Predictor) -> None:
    wide = Utterance("a", "test", {"vision": np.zeros((2, 35), np.float32)}, {})
    with pytest.raises(DataError, match="'a': vision has 35 features a step, the model was trained on 7"):
        predictor.predict([wide])


def test_an_answer_that_is_no_number_is_said(predictor: Predictor) -> None:
    huge = Utterance("a", "test", {"text": np.full((2, 12), np.inf, np.float32)}, {})
    with pytest.raises(DataError, match=r"'a': the model's answer is nan"):
        predictor.predict([huge])


# --- folders that are not whole


@pytest.fixture
def run(trained: tuple[Path, Recipe], tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("file", ["recipe.yaml", "data.json", "best/weights.safetensors"])
def test_a_missing_file_is_said(file: str, run: Path) -> None:
    (run / file).unlink()
    with pytest.raises(DataError, match=file.rpartition("/")[2]):
        Predictor.load(run)


def test_damaged_weights_are_said(run: Path) -> None:
    weights = run / "best" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"best: weights.safetensors has 1000 bytes, expected \d+; take the registered"):
        Predictor.load(run)
    (run / "best" / "manifest.json").unlink()  # as older versions left it
    with pytest.raises(DataError, match=r"weights.safetensors: damaged"):
        Predictor.load(run)


def test_weights_of_another_system_are_said(run: Path) -> None:
    weights = run / "best" / "weights.safetensors"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    del tensors[first]
    save_file(tensors, weights)
    (run / "best" / "manifest.json").unlink()
    checkpoint.write_manifest(weights.parent)
    with pytest.raises(DataError, match=f"does not fit SelfMM of this version: {first} is missing"):
        Predictor.load(run)


def test_a_damaged_data_card_is_said(run: Path) -> None:
    (run / "data.json").write_text('{"name": "x"')
    with pytest.raises(DataError, match=r"data.json: the file: .*JSON"):
        Predictor.load(run)
    (run / "data.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match=r"data.json: fingerprint: "):
        Predictor.load(run)


def test_a_data_card_is_read_as_it_was_written(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    card = DataCard.load(trained[0])
    card.save(tmp_path)
    assert DataCard.load(tmp_path) == card
    assert list(card.spec().widths) == ["text", "audio", "vision"]


def test_loading_needs_nothing_of_training(trained: tuple[Path, Recipe]) -> None:
    """Neither Ray nor DeepSpeed nor MLflow, nor transformers where no encoder is used."""
    code = (
        "import sys; from pathlib import Path; from mmsa_dist.predictor import Predictor\n"
        f"predictor = Predictor.load(Path({str(trained[0])!r}))\n"
        "predictor.predict([predictor.utterance(predictor.example(), 'a')])\n"
        "print([name for name in ('ray', 'deepspeed', 'mlflow', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
