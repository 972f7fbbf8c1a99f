"""A model's own environment: what its requirements install is enough, and all of it is pinned."""

import json
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import pytest

from mmsa_dist.predictor import Predictor
from shards.index import Index
from shards.read import ShardReader
from tests.mmsa_dist.conftest import Process, Tracked, free_port
from tests.mmsa_dist.test_serving import files_of, record_of

UNREACHED = ("Could not find a version", "No matching distribution", "Connection", "connection", "Temporary failure")
"""What pip says where it reaches no index, or one that does not have what an index of the world has."""


@pytest.mark.slow
def test_an_environment_made_of_the_requirements_answers_requests(
    tracked: Tracked, index: Index, tmp_path: Path
) -> None:
    """As `mlflow models serve --env-manager virtualenv` makes one: a new one, from the model's files, without us."""
    files = files_of(tracked)
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"],
        cwd=files, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    if done.returncode and any(word in done.stderr for word in UNREACHED):
        pytest.skip(f"pip reaches no package index that has them: {done.stderr.strip().splitlines()[-1][:200]}")
    assert done.returncode == 0, done.stderr
    frozen = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, timeout=300, check=True)
    got = {line.partition("==")[0].lower().replace("_", "-"): line for line in frozen.stdout.splitlines()}
    pins = (files / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins}
    assert not {"mmsa-dist", "ray", "deepspeed"} & got.keys()
    assert got.keys() <= pinned, "what they bring and nobody pinned"

    port = free_port()
    words = ["models", "serve", "-m", str(files), "--env-manager", "local"]
    utterance = ShardReader(index).sample(index.numbers("test").start, with_text=True)
    predictor = Predictor.load(files / "artifacts" / "model")
    body = json.dumps({"dataframe_records": [record_of(utterance, predictor.columns)]}).encode()
    process = Process(words, port, "/ping", tmp_path, python, PYTHONPATH="", PYTHONNOUSERSITE="1")
    try:
        request = urllib.request.Request(f"{process.uri}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            (answer,) = json.load(response)["predictions"]
    finally:
        process.close()
    assert answer["sentiment"] == pytest.approx(float(predictor.predict([utterance])["M"][0]), abs=1e-5)
    assert Path(sys.executable).parent != python.parent
