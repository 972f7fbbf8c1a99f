"""Checkpoints on a disk that lies: what is whole is used, what is not is said and never counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsa_dist import checkpoint
from mmsa_dist.checkpoint import Checkpoint
from mmsa_dist.errors import ConfigError, DataError
from mmsa_dist.portable import MOMENTS, State


def write(folder: Path, step: int, keep: int = 9, best: int | None = None) -> Path:
    weights = {"w": torch.full((3,), float(step))}
    moments = {key: {"w": torch.ones(3)} for key in MOMENTS}
    return checkpoint.save(folder, Checkpoint(State(step, weights, moments), {}, {"epoch": step}), keep, best)


def flip(file: Path) -> None:
    """One byte of the payload changes, the size does not."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.saved(folder)]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.tidy(tmp_path) == [] and checkpoint.load_latest(tmp_path) is None
    write(tmp_path, 1)
    write(tmp_path, 2)
    write(tmp_path, 2)  # by an attempt that went on from 1
    found = checkpoint.load_latest(tmp_path)
    assert found is not None and found.progress == {"epoch": 2}
    assert found.engine.step == 2 and torch.equal(found.engine.weights["w"], torch.full((3,), 2.0))
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]
    assert not list(tmp_path.glob(".*")), "nothing hidden stays"


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=2, best=2 if step > 1 else None)
    assert steps(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_damaged_one_is_put_aside_and_said_and_the_one_before_used(tmp_path: Path) -> None:
    write(tmp_path, 1)
    flip(write(tmp_path, 2) / "optimizer.safetensors")
    (sentence,) = checkpoint.tidy(tmp_path)
    assert "step-00000002: optimizer.safetensors differs from its sha256; it is put aside" in sentence
    found = checkpoint.load_latest(tmp_path)
    assert found is not None and found.engine.step == 1
    write(tmp_path, 2, keep=1)
    assert steps(tmp_path) == ["step-00000002"], "the damaged one does not count as the newest"
    assert checkpoint.damage(tmp_path / "step-00000002") is None


def test_a_damaged_best_one_is_said_before_the_run_goes_on(tmp_path: Path) -> None:
    flip(write(tmp_path, 1) / "weights.safetensors")
    moments: dict[str, dict[str, torch.Tensor]] = {key: {} for key in MOMENTS}
    checkpoint.save(tmp_path, Checkpoint(State(2, {}, moments), {}, {"best_step": 1}), 1, 1)
    aside, best = checkpoint.tidy(tmp_path)
    assert "put aside" in aside and "step-00000001: was the best epoch's" in best


def test_none_whole_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    flip(write(tmp_path, 1) / "weights.safetensors")
    with pytest.raises(DataError, match=r"step-00000001: weights.safetensors differs .* or remove .* to begin"):
        checkpoint.tidy(tmp_path)
    assert steps(tmp_path) == ["step-00000001"], "it is still there to look at"


def test_a_newer_one_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    with pytest.raises(ConfigError, match=r"step-00000002: written by a newer mmsa-dist \(schema 99"):
        checkpoint.tidy(tmp_path)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    "content",
    [[], {}, {"schema": 1, "files": {}}, {"schema": 1, "files": []}, {"schema": None, "files": {}}, "text", None],
)
def test_a_manifest_of_another_shape_is_damage(content: Any, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text(json.dumps(content))
    assert checkpoint.damage(path) == "manifest.json cannot be read"


def test_what_a_kill_cut_short_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".partial-step-00000002-77").mkdir()
    assert checkpoint.tidy(tmp_path) == [] and not list(tmp_path.glob(".partial-*"))


def test_one_that_is_replaced_is_not_lost_to_a_kill(tmp_path: Path) -> None:
    """Between the two renames: fp16 that skips steps may save the same step twice."""
    write(tmp_path, 7).rename(tmp_path / ".partial-step-00000007-99-replaced")
    (tmp_path / ".partial-step-00000007-99").mkdir()
    assert checkpoint.tidy(tmp_path) == [] and steps(tmp_path) == ["step-00000007"]
    assert not list(tmp_path.glob(".*"))


def test_one_that_is_removed_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while an old one is removed: nothing is taken for damaged afterwards."""
    write(tmp_path, 1)
    with monkeypatch.context() as killed:
        killed.setattr("mmsa_dist.checkpoint.shutil.rmtree", lambda path, **more: None)
        write(tmp_path, 2, keep=1)
    assert steps(tmp_path) == ["step-00000002"]
    assert checkpoint.tidy(tmp_path) == [] and not list(tmp_path.glob(".*"))


def test_weights_are_not_loaded_unverified(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    assert torch.equal(checkpoint.load_weights(path)["w"], torch.full((3,), 3.0))
    flip(path / "weights.safetensors")
    with pytest.raises(DataError, match=r"weights\.safetensors differs from its sha256"):
        checkpoint.load_weights(path)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        checkpoint.load_weights(tmp_path / "step-00000009")


def test_the_weights_that_are_kept_can_be_checked(tmp_path: Path) -> None:
    """By what they were written with, not by what they are when they are kept."""
    best = tmp_path / "best"
    checkpoint.keep_weights(write(tmp_path, 1), best)
    assert checkpoint.damage(best, None) is None
    flip(best / "weights.safetensors")
    assert checkpoint.damage(best, None) == "weights.safetensors differs from its sha256"
    checkpoint.keep_weights(write(tmp_path, 2), best)
    assert checkpoint.damage(best, None) is None and sorted(path.name for path in best.iterdir()) == [
        "manifest.json",
        "weights.safetensors",
    ]
