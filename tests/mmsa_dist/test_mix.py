"""Training on two data sets at once: laws 1 and 3 hold, and each set has metrics of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.__main__ import main
from mmsa_dist.recipe import from_dict
from mmsa_dist.run_folder import read_events
from shards.write import pack
from tests.data import TinySource
from tests.mmsa_dist.test_laws import recipe_for, train

CHANGES: dict[str, Any] = {"train": {"epochs": 3}, "checkpoint": {"every_steps": 4}}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mix")
    for seed, (name, samples) in enumerate({"one": 70, "two": 40}.items()):
        pack(TinySource(samples, 0.1, seed), folder / name, name=name, dtype="float32", shard_bytes=8_000)
    return [str(folder / "one"), str(folder / "two")]


def test_ranks_do_not_change_a_mix_and_a_restart_is_invisible(
    ranks: Callable[..., Any], sets: list[str], tmp_path: Path
) -> None:
    values = recipe_for("self_mm", tmp_path, **CHANGES).dump()
    values["data"] |= {"path": sets, "weights": [1, 2], "length_pool": 2, "normalize": ["audio"]}
    recipe = from_dict(values).dump()
    one = ranks(train, 1, tmp_path / "one", recipe)[0]
    two = ranks(train, 2, tmp_path / "two", recipe)[0]
    assert two["losses"][:8] == pytest.approx(one["losses"][:8], abs=1e-5)
    ranks(train, 2, tmp_path / "cut", recipe, 10)
    again = ranks(train, 2, tmp_path / "cut", recipe)[0]
    assert again["losses"] == two["losses"][-len(again["losses"]) :] and again["result"] == two["result"]
    assert 0 < len(again["losses"]) < len(two["losses"]) - 4
    result = two["result"]
    assert result["data"] == "synthetic-one+synthetic-two" and result["synthetic"]
    assert set(result["sets"]) == {"synthetic-one", "synthetic-two"}
    for split, counts in {"valid": (14, 8), "test": (14, 8)}.items():
        each = [of_set[split]["mae"] for of_set in result["sets"].values()]
        whole = sum(mae * n for mae, n in zip(each, counts, strict=True)) / sum(counts)
        assert result[split]["mae"] == pytest.approx(whole, abs=1e-6)


@pytest.mark.slow
@pytest.mark.fault
def test_a_mix_is_trained_killed_and_resumed_as_a_user_does(sets: list[str], tmp_path: Path) -> None:
    """kill -9 of the launcher with its ranks; the same command with --resume, at another number of ranks."""
    words = ["self_mm", "--data", *sets, "--data.weights", "1", "2", "--data.length-pool", "2", "--epochs", "8"]
    words += ["--launcher", "local", "--tracking.no-enabled", "--batch-size", "8", "--train.patience", "99"]
    words += [
        "--checkpoint.every-steps",
        "3",
        *[f"--optim.lr.{group}=1e-3" for group in ("text", "audio", "vision", "rest")],
    ]
    command = [sys.executable, "-m", "mmsa_dist", "train", *words, "--workers", "2", "--runs-dir", str(tmp_path)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    run = until_epoch(tmp_path, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "result.json").exists()
    assert main(["train", "--resume", str(run), "--workers", "1"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["epochs"] == 8 and set(result["sets"]) == {"synthetic-one", "synthetic-two"}
    order = json.loads((run / "plan.json").read_text())["order"]
    assert order["order"] == "mix-1+lengths-1" and order["shares"] == [1, 2]
    passes = [of_set["passes_per_epoch"] for of_set in order["sets"]]
    assert passes == pytest.approx([66 / 3 / 42, 66 * 2 / 3 / 24], abs=1e-6)
    epochs = [event["epoch"] for event in read_events(run) if event["event"] == "epoch"]
    assert sorted(set(epochs)) == list(range(1, 9))


def until_epoch(runs: Path, epoch: int, process: "subprocess.Popen[bytes]", patience: float = 300.0) -> Path:
    """The run's folder, once that epoch is over."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        assert process.poll() is None, (runs / "log").read_text()
        for run in (path.parent for path in runs.glob("*/events")):
            if any(e["event"] == "epoch" and e["epoch"] >= epoch for e in read_events(run)):
                return run
        time.sleep(0.02)
    raise AssertionError((runs / "log").read_text())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.weights", "1"], "data.weights: 1 for 2 data sets (synthetic-one, synthetic-two); give one for each"),
        (["--data.weights", "1", "-2"], "data.weights: -2 is not a positive number"),
        (["--data.align-widths", "x"], "data.align"),
    ],
)
def test_what_is_wrong_with_a_mix_is_said_before_anything_starts(
    sets: list[str], tmp_path: Path, words: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["train", "self_mm", "--data", *sets, "--runs-dir", str(tmp_path / "runs"), *words])
    error = capfd.readouterr().err
    assert code == 2 and sentence in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()
