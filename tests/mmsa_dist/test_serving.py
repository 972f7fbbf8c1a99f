"""Registered models: what they are made of, who holds an alias, and that they answer over HTTP."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from mmsa_dist.errors import TrainingError
from mmsa_dist.predictor import Predictor
from mmsa_dist.recipe import from_dict
from mmsa_dist.tracking import Link, finish_run, open_run
from mmsa_dist.tracking.aliases import promote_better
from mmsa_dist.tracking.models import code_paths, registered_name
from shards.index import Index
from shards.read import ShardReader
from shards.utterance import Utterance
from tests.mmsa_dist import runs
from tests.mmsa_dist.conftest import Process, Tracked, free_port

ANSWERS = ["sentiment", "sentiment_text", "sentiment_audio", "sentiment_vision"]


@pytest.fixture(scope="module")
def reads_text(tmp_path_factory: pytest.TempPathFactory, index: Index, empty_database: Path) -> Tracked:
    """A registered model that reads transcripts; the encoder's folder and the run are gone since."""
    runs_dir = tmp_path_factory.mktemp("text")
    shutil.copyfile(empty_database, runs_dir / "mlflow.db")
    encoder = runs.tiny_encoder(runs_dir / "encoder")
    folder, recipe = runs.trained(runs_dir, index, encoder=str(encoder), tracking={"register_as": "reads text"})
    run_id = open_run(folder, recipe)
    published = finish_run(folder, recipe)
    shutil.rmtree(encoder)
    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    return Tracked(runs_dir, folder, recipe, str(run_id), published, mlflow.MlflowClient(uri, uri))


def files_of(tracked: Tracked) -> Path:
    """The logged model's folder."""
    version = tracked.client.get_model_version(tracked.published.name, tracked.published.version)
    model = tracked.client.get_logged_model(version.source.removeprefix("models:/"))
    return Path(model.artifact_location.removeprefix("file://"))


@cache
def installed() -> frozenset[str]:
    return frozenset(each.name for each in distributions())


def utterances_of(index: Index) -> list[Utterance]:
    """The test split."""
    return ShardReader(index).samples(index.numbers("test"), with_text=True)


def record_of(utterance: Utterance, columns: tuple[str, ...]) -> dict[str, Any]:
    """An utterance as a client sends it."""
    values = {**{name: array.tolist() for name, array in utterance.modalities.items()}, "raw_text": utterance.raw_text}
    return {column: values.get(column) for column in columns}


# --- what a model is made of


def test_nothing_in_a_model_is_pickled(tracked: Tracked, reads_text: Tracked) -> None:
    kinds = {".safetensors", ".json", ".yaml", ".py", ".txt", ".md", ".typed", ""}
    for model in (tracked, reads_text):
        files = [file for file in files_of(model).rglob("*") if file.is_file()]
        assert {file.suffix for file in files} <= kinds
        for file in files:
            content = file.read_bytes()
            assert not zipfile.is_zipfile(file) and not tarfile.is_tarfile(file)
            assert not content.startswith(b"\x80")  # every pickle since protocol 2
            with pytest.raises(Exception):  # noqa: B017  whatever pickle says of what is none
                pickle.loads(content)


def test_no_weights_and_no_data_are_copied_twice(reads_text: Tracked) -> None:
    """The encoder's weights are among the system's; of its folder only the shape and the tokenizer travel."""
    encoder = files_of(reads_text) / "artifacts" / "model" / "encoder"
    assert "config.json" in {file.name for file in encoder.iterdir()}
    assert not list(encoder.glob("*.safetensors"))


def test_the_example_is_made_up(tracked: Tracked, index: Index) -> None:
    example = json.loads((files_of(tracked) / "serving_input_example.json").read_text())
    assert example["dataframe_split"]["columns"] == ["text", "audio", "vision"]
    sent = np.array(example["dataframe_split"]["data"][0][1])
    for sample in ShardReader(index).samples(range(index.num_samples)):
        audio = sample.modalities.get("audio")
        assert audio is None or audio.shape != sent.shape or not np.allclose(audio, sent)


def test_the_signature_says_what_goes_in_and_out(tracked: Tracked, reads_text: Tracked) -> None:
    for model, text in ((tracked, "text"), (reads_text, "raw_text")):
        signature = yaml.safe_load((files_of(model) / "MLmodel").read_text())["signature"]
        assert [column["name"] for column in json.loads(signature["inputs"])] == [text, "audio", "vision"]
        assert all(column["required"] for column in json.loads(signature["inputs"]))
        assert [column["name"] for column in json.loads(signature["outputs"])] == ANSWERS


def test_requirements_are_pinned_and_few(tracked: Tracked, reads_text: Tracked) -> None:
    *lines, last = (files_of(tracked) / "requirements.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines]
    assert last == "-c constraints.txt"
    assert all("==" in line and "+" not in line for line in lines)
    assert {"torch", "mlflow", "safetensors"} <= set(names)
    assert not {"ray", "deepspeed", "transformers", "mmsa-dist"} & set(names)
    assert "transformers==" in (files_of(reads_text) / "requirements.txt").read_text()


def test_all_that_they_bring_is_pinned_too(tracked: Tracked, reads_text: Tracked) -> None:
    """Else the model's environment would be another one next year."""
    for model in (tracked, reads_text):
        lines = (files_of(model) / "constraints.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines)
        assert not any("+" in pin for pin in pins.values())
        for line in (files_of(model) / "requirements.txt").read_text().splitlines()[:-1]:
            assert line in lines
        for name in pins:
            for text in distribution(name).requires or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    assert needed.name not in installed() or canonicalize_name(needed.name) in map(
                        canonicalize_name, pins
                    )
        assert {"fastapi", "sympy", "starlette"} <= pins.keys(), "what they bring"
        assert not {"ray", "deepspeed", "mmsa-dist", "pytest"} & pins.keys()
        assert ("tokenizers" in pins) == (model is reads_text)


def test_it_loads_where_mmsa_dist_is_not_installed(reads_text: Tracked, index: Index, tmp_path: Path) -> None:
    """Another process, in which our packages can only come from the model itself."""
    utterance = utterances_of(index)[0]
    predictor = Predictor.load(files_of(reads_text) / "artifacts" / "model")
    record = record_of(utterance, predictor.columns)
    (tmp_path / "record.json").write_text(json.dumps([record]))
    code = f"""
import json, sys
def ours(finder):  # the finder of an editable install
    return "editable" in (getattr(finder, "__module__", "") + type(finder).__module__)
sys.meta_path[:] = [finder for finder in sys.meta_path if not ours(finder)]
try:
    import mmsa_dist
    raise SystemExit("it is installed after all: " + mmsa_dist.__file__)
except ModuleNotFoundError:
    pass
import mlflow, pandas
model = mlflow.pyfunc.load_model({str(files_of(reads_text))!r})
answer = model.predict(pandas.DataFrame(json.load(open("record.json"))))
import mmsa_dist, shards
print(json.dumps({{"answer": answer.to_dict("records"), "ours": [mmsa_dist.__file__, shards.__file__]}}))
print([name for name in ("ray", "deepspeed", "matplotlib") if name in sys.modules])
"""
    (tmp_path / "load.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "load.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told, heavy = done.stdout.strip().splitlines()[-2:]
    assert heavy == "[]"
    assert all(str(files_of(reads_text)) in file for file in json.loads(told)["ours"])
    expected = predictor.predict([utterance])
    assert json.loads(told)["answer"][0]["sentiment"] == pytest.approx(float(expected["M"][0]), abs=1e-5)


def test_a_system_of_a_third_party_brings_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_system.py").write_text(
        "from mmsa_dist.systems.self_mm import SelfMM\nclass Theirs(SelfMM): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    roots = [Path(path) for path in code_paths("their_system:Theirs")]
    assert [root.name for root in roots] == ["shards", "mmsa_dist", "their_system.py"]
    assert all(root.exists() for root in roots)
    assert len(code_paths("self_mm")) == 2


# --- versions and aliases


def test_a_version_says_where_it_comes_from(tracked: Tracked, index: Index) -> None:
    version = tracked.client.get_model_version("tiny", "1")
    result = json.loads((tracked.folder / "result.json").read_text())
    assert version.run_id == tracked.run_id
    assert version.tags["data.fingerprint"] == index.fingerprint
    assert version.tags["system"] == "self_mm" and version.tags["code.version"] == "0.1.0"
    assert float(version.tags["valid.mae"]) == result["valid"]["mae"]
    assert f"| mae | {result['valid']['mae']:.4f} | {result['test']['mae']:.4f} |" in version.description
    assert "synthetic data" in version.description and "Self-Supervised" in version.description
    assert tracked.published.uri == "models:/tiny/1" and tracked.published.aliases == ("champion",)
    assert holder(tracked, "tiny") == "1"


def test_finishing_again_registers_nothing_again(tracked: Tracked) -> None:
    before = tracked.client.get_run(tracked.run_id).data.metrics
    again = finish_run(tracked.folder, tracked.recipe)
    assert again == tracked.published
    assert len(tracked.client.search_model_versions("name = 'tiny'")) == 1
    assert tracked.client.get_run(tracked.run_id).data.metrics == before
    assert tracked.client.get_run(tracked.run_id).info.status == "FINISHED"


def test_a_kill_between_registering_and_saying_so_registers_once(tracked: Tracked) -> None:
    link = Link.load(tracked.folder)
    assert link is not None
    replace(link, model=None).save(tracked.folder)
    try:
        assert finish_run(tracked.folder, tracked.recipe) == tracked.published
        assert len(tracked.client.search_model_versions("name = 'tiny'")) == 1
    finally:
        link.save(tracked.folder)


def version_with(tracked: Tracked, name: str, mae: float, data: str = "same") -> str:
    """A version of the tracked model that claims this validation MAE."""
    if not tracked.client.search_registered_models(f"name = '{name}'"):
        tracked.client.create_registered_model(name)
    source = tracked.client.get_model_version("tiny", "1")
    tags = {"data.fingerprint": data, "valid.mae": str(mae), "valid.corr": str(1 - mae)}
    return str(tracked.client.create_model_version(name, str(files_of(tracked)), source.run_id, tags).version)


def holder(tracked: Tracked, name: str) -> str:
    return str(tracked.client.get_model_version_by_alias(name, "champion").version)


@pytest.mark.parametrize("monitor", ["mae", "corr"])
def test_an_alias_goes_to_the_better_model(monitor: str, tracked: Tracked) -> None:
    name = f"promoted-{monitor}"
    good, worse, equal, better = (version_with(tracked, name, mae) for mae in (0.5, 0.6, 0.5, 0.4))
    assert promote_better(tracked.client, name, good, "champion", monitor) is None
    note = promote_better(tracked.client, name, worse, "champion", monitor)
    assert note is not None and f"champion stays with version {good}" in note and f"version {worse}" in note
    assert holder(tracked, name) == good
    assert promote_better(tracked.client, name, equal, "champion", monitor) is None  # at least as good
    assert holder(tracked, name) == equal
    assert promote_better(tracked.client, name, better, "champion", monitor) is None
    assert holder(tracked, name) == better


def test_models_of_other_data_cannot_be_compared_so_the_new_one_has_the_alias(tracked: Tracked) -> None:
    old, new = version_with(tracked, "other-data", 0.5), version_with(tracked, "other-data", 0.9, data="other")
    promote_better(tracked.client, "other-data", old, "champion", "mae")
    assert promote_better(tracked.client, "other-data", new, "champion", "mae") is None
    assert holder(tracked, "other-data") == new
    told = tracked.client.get_model_version("other-data", new).tags["promoted.champion.reason"]
    assert told == f"asked for when it was trained; not compared with version {old}, which learnt from other data"


def test_of_two_that_end_together_the_better_keeps_the_alias(tracked: Tracked) -> None:
    """The worse one moves the alias after the better one has looked: the better one looks again."""
    better, worse = version_with(tracked, "race", 0.4), version_with(tracked, "race", 0.6)

    class Interrupted:
        """A client in which another run's call comes between this one's."""

        def __init__(self) -> None:
            self.came = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tracked.client, name)

        def set_registered_model_alias(self, *words: str) -> None:
            tracked.client.set_registered_model_alias(*words)
            if not self.came:
                self.came = True
                tracked.client.set_registered_model_alias("race", "champion", worse)

    assert promote_better(Interrupted(), "race", better, "champion", "mae") is None  # type: ignore[arg-type]
    assert holder(tracked, "race") == better


def test_a_worse_run_is_registered_and_told_why_it_is_no_champion(
    tracked: Tracked, index: Index, tmp_path: Path
) -> None:
    folder, recipe = runs.trained(tmp_path, index, "worse", epochs=1, tracking=tracked.recipe.tracking.model_dump())
    result = json.loads((folder / "result.json").read_text())
    result["valid"]["mae"] = 9.0
    (folder / "result.json").write_text(json.dumps(result))
    shutil.move(folder, tracked.runs_dir / "worse")
    open_run(tracked.runs_dir / "worse", recipe)
    published = finish_run(tracked.runs_dir / "worse", recipe)
    assert published is not None and published.version == "2" and published.aliases == ()
    assert "champion stays with version 1 of tiny" in published.notes[0] and "9.0000" in published.notes[0]
    assert holder(tracked, "tiny") == "1"
    tracked.client.delete_model_version("tiny", "2")


def test_a_model_that_answers_otherwise_gets_no_alias(
    tracked: Tracked, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load test: what was logged is not what was trained."""
    from mmsa_dist.tracking import models

    def spoiled(run_dir: Path, into: Path) -> Path:
        folder = packaged(run_dir, into)
        weights = load_file(folder / "weights.safetensors")
        save_file({name: tensor + 0.1 for name, tensor in weights.items()}, folder / "weights.safetensors")
        return folder

    packaged = models.model_folder
    monkeypatch.setattr(models, "model_folder", spoiled)
    tracking = {"register_as": "spoiled", "alias": ["champion"]}
    folder, recipe = runs.trained(tmp_path, index, epochs=1, tracking=tracking)
    shutil.move(folder, tracked.runs_dir / "spoiled")
    open_run(tracked.runs_dir / "spoiled", recipe)
    with pytest.raises(TrainingError, match=r"it was not registered and no alias was moved"):
        finish_run(tracked.runs_dir / "spoiled", recipe)
    with pytest.raises(MlflowException):
        tracked.client.get_registered_model("spoiled")


@pytest.mark.parametrize(
    ("system", "asked", "name"),
    [
        ("self_mm", None, "self_mm"),
        ("self_mm", "mine", "mine"),
        ("self_mm", "none", None),
        ("mmsa_dist.systems.self_mm:SelfMM", None, "SelfMM"),
    ],
)
def test_the_name_in_the_registry(system: str, asked: str | None, name: str | None) -> None:
    assert registered_name(from_dict({"system": system, "tracking": {"register_as": asked}})) == name


# --- answering over HTTP


@pytest.fixture(scope="module")
def served(reads_text: Tracked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """`mlflow models serve` on the registered model."""
    uri = f"sqlite:///{reads_text.runs_dir / 'mlflow.db'}"
    port = free_port()
    words = ["models", "serve", "-m", "models:/reads text/1", "--env-manager", "local"]
    process = Process(words, port, "/ping", tmp_path_factory.mktemp("served"), MLFLOW_TRACKING_URI=uri)
    yield process
    process.close()


def ask(served: Process, body: object) -> tuple[int, Any]:
    """The status and the answer."""
    request = urllib.request.Request(
        served.uri + "/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_server_answers_real_samples(served: Process, reads_text: Tracked, index: Index) -> None:
    predictor = Predictor.load(files_of(reads_text) / "artifacts" / "model")
    utterances = utterances_of(index)
    records = [record_of(utterance, predictor.columns) for utterance in utterances]
    assert any(record["audio"] is None for record in records)  # some lack a modality: null
    status, answer = ask(served, {"dataframe_records": records})
    assert status == 200
    assert list(answer["predictions"][0]) == ANSWERS
    expected = predictor.predict(utterances)
    for column, task in zip(ANSWERS, "MTAV", strict=True):
        found = [row[column] for row in answer["predictions"]]
        np.testing.assert_allclose(found, expected[task], atol=1e-5)
    with np.load(reads_text.folder / "predictions" / "test.npz") as saved:
        np.testing.assert_allclose([row["sentiment"] for row in answer["predictions"]], saved["p"], atol=1e-5)


def test_whole_numbers_are_numbers(served: Process) -> None:
    """A JavaScript client writes 1.0 as 1."""
    record = {"raw_text": "good film", "audio": [[0, 1, 2, 3, 4]], "vision": []}
    status, whole = ask(served, {"dataframe_records": [record]})
    assert status == 200
    status, broken = ask(served, {"dataframe_records": [{**record, "audio": [[0.0, 1.0, 2.0, 3.0, 4.0]]}]})
    assert status == 200 and whole == broken


def test_other_forms_of_a_request(served: Process) -> None:
    record = {"raw_text": "good film", "audio": [[0, 1, 2, 3, 4]], "vision": None}
    expected = ask(served, {"dataframe_records": [record]})
    assert expected[0] == 200
    split = {"columns": list(record), "data": [list(record.values())]}
    assert ask(served, {"dataframe_split": split}) == expected
    assert ask(served, {"inputs": [record]}) == expected


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"audio": [[1, 2]]}, "'row 1', step 0: audio has 2 features a step, the model was trained on 5"),
        ({"audio": "loud"}, "'row 1': audio is str 'loud'"),
        ({"raw_text": None, "audio": None, "vision": []}, "'row 1': has none of raw_text, audio, vision"),
    ],
)
def test_a_request_that_cannot_be_read_is_a_400_with_a_sentence(
    changed: dict[str, Any], says: str, served: Process
) -> None:
    good = {"raw_text": "good film", "audio": [[0, 1, 2, 3, 4]], "vision": None}
    status, answer = ask(served, {"dataframe_records": [good, {**good, **changed}]})
    assert status == 400
    assert says in answer["message"]
    assert "Traceback" not in json.dumps(answer)


def test_a_column_that_is_missing_is_named(served: Process) -> None:
    status, answer = ask(served, {"dataframe_records": [{"raw_text": "good film", "audio": [[0] * 5], "visual": None}]})
    assert status == 400
    assert "missing inputs ['vision']" in answer["message"] and "extra inputs: ['visual']" in answer["message"]


def test_pyfunc_takes_a_dataframe_of_arrays(reads_text: Tracked) -> None:
    """What a program that loads the model itself would pass."""
    model = mlflow.pyfunc.load_model(str(files_of(reads_text)))
    frame = pd.DataFrame([{"raw_text": "good", "audio": np.ones((4, 5)), "vision": np.ones((2, 7))}])
    assert list(model.predict(frame).columns) == ANSWERS
