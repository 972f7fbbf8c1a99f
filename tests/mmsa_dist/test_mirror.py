"""Checkpoints in a bucket, on real endpoints: what is whole comes back, what is not is said, nobody waits."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmsa_dist import checkpoint, run_folder, train
from mmsa_dist.__main__ import main
from mmsa_dist.checkpoint import Checkpoint
from mmsa_dist.errors import ConfigError, DataError, TransientError
from mmsa_dist.mirror import END, Mirror, Sender
from mmsa_dist.portable import MOMENTS, State
from shards.remote import store
from tests.mmsa_dist.runs import packed, trained
from tests.shards.remote.servers import BUCKET, Bucket, google, s3

ADDRESS = f"s3://{BUCKET}/runs/one"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Bucket]:
    with s3() as bucket:
        yield bucket


@pytest.fixture
def bucket(endpoint: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    endpoint.tell(monkeypatch)
    monkeypatch.setenv("MMSA_REMOTE_BACKOFF", "0.01")
    for item in endpoint.client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        endpoint.client.delete_object(Bucket=BUCKET, Key=item["Key"])
    return endpoint


def write(run: Path, step: int, best: int = 0) -> Path:
    weights = {"w": torch.full((3,), float(step))}
    moments = {key: {"w": torch.ones(3)} for key in MOMENTS}
    content = Checkpoint(State(step, weights, moments), {}, {"best_step": best})
    return checkpoint.save(run / "checkpoints", content, 1, best or None)


def keys(bucket: Bucket) -> set[str]:
    found = bucket.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {item["Key"].removeprefix("runs/one/") for item in found}


def test_what_is_sent_comes_back(bucket: Bucket, tmp_path: Path) -> None:
    mirror = Mirror(ADDRESS)
    assert mirror.steps() == set() and mirror.restore(tmp_path / "new") is None
    run = tmp_path / "run"
    for step, best in ((1, 1), (2, 1), (3, 1)):
        mirror.put(write(run, step, best), step)
    mirror.keep({1, 3})
    assert mirror.steps() == {1, 3}
    assert {key.split("/")[1] for key in keys(bucket)} == {"step-00000001", "step-00000003"}
    assert mirror.restore(tmp_path / "new") == 3
    found = checkpoint.load_latest(tmp_path / "new" / "checkpoints")
    assert found is not None and found.engine.step == 3 and found.progress == {"best_step": 1}
    best = checkpoint.load_weights(tmp_path / "new" / "checkpoints" / "step-00000001")
    assert torch.equal(best["w"], torch.ones(3))
    assert mirror.restore(tmp_path / "new") is None, "what is there already is not brought again"
    assert mirror.restore(run) is None


@pytest.mark.parametrize("damaged", [1, 3, 4])
def test_a_whole_one_takes_the_place_of_a_damaged_one(damaged: int, bucket: Bucket, tmp_path: Path) -> None:
    """Of the disk the best (1), the newest (3) or one that was never sent (4) is damaged."""
    mirror, own = Mirror(ADDRESS), tmp_path / "checkpoints"
    for step in (1, 3):
        mirror.put(write(tmp_path, step, 1), step)
    if damaged == 1:
        shutil.rmtree(own / "step-00000003")
    elif damaged == 4:
        write(tmp_path, 4, 1)  # retention removes 3
    (own / f"step-{damaged:08d}" / "weights.safetensors").write_bytes(b"")
    assert mirror.restore(tmp_path) == 3
    checkpoint.tidy(own)
    assert [path.name for path in checkpoint.saved(own)] == ["step-00000001", "step-00000003"]
    assert mirror.restore(tmp_path) is None


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_the_best_one_comes_back_also_where_the_newest_is_whole(how: str, bucket: Bucket, tmp_path: Path) -> None:
    mirror, own = Mirror(ADDRESS), tmp_path / "checkpoints"
    for step in (1, 3):
        mirror.put(write(tmp_path, step, 1), step)
    best = own / "step-00000001"
    if how == "missing":
        shutil.rmtree(best)
    else:
        (best / "weights.safetensors").write_bytes(b"")
    assert mirror.restore(tmp_path) == 1
    assert [checkpoint.damage(path) for path in checkpoint.saved(own)] == [None, None]
    assert mirror.restore(tmp_path) is None
    mirror.keep({3})
    shutil.rmtree(best)
    assert mirror.restore(tmp_path) is None, "the mirror has it no more"


def test_without_its_manifest_there_is_none(bucket: Bucket, tmp_path: Path) -> None:
    """As a kill leaves it that came while it was sent."""
    mirror = Mirror(ADDRESS)
    mirror.put(write(tmp_path, 1), 1)
    mirror.put(write(tmp_path, 2), 2)
    bucket.client.delete_object(Bucket=BUCKET, Key="runs/one/checkpoints/step-00000002/manifest.json")
    assert mirror.steps() == {1} and mirror.restore(tmp_path / "new") == 1


@pytest.mark.parametrize("address", [ADDRESS, "a folder"])
def test_what_is_not_kept_leaves_nothing(address: str, bucket: Bucket, tmp_path: Path) -> None:
    """Nor does what a kill left that came while it was sent."""
    folder = tmp_path / "mirror"
    mirror = Mirror(address if "://" in address else folder.as_uri())
    for step in (1, 2, 3):
        mirror.put(write(tmp_path, step), step)
    mirror._remove("checkpoints/step-00000002/manifest.json")
    mirror.keep({3})
    if mirror.address == ADDRESS:
        assert {key.split("/")[1] for key in keys(bucket)} == {"step-00000003"}
    else:
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert mirror.steps() == {3}


def test_damage_is_said_and_nothing_half_brought_stays(bucket: Bucket, tmp_path: Path) -> None:
    mirror = Mirror(ADDRESS)
    mirror.put(write(tmp_path, 1), 1)
    key = "runs/one/checkpoints/step-00000001/weights.safetensors"
    content = bytearray(bucket.get(key))
    content[-1] ^= 1
    bucket.put(key, bytes(content))
    with pytest.raises(DataError, match=r"step-00000001/weights\.safetensors: sha256 is"):
        mirror.restore(tmp_path / "new")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    bucket.put("runs/one/checkpoints/step-00000001/manifest.json", b"{}")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        mirror.restore(tmp_path / "new")


def test_the_sender_sends_the_newest_and_the_best(bucket: Bucket, tmp_path: Path) -> None:
    warnings: list[str] = []
    write(tmp_path, 1, 1)  # of an attempt that was killed before it was sent
    sender = Sender(Mirror(ADDRESS), checkpoint.saved(tmp_path / "checkpoints"), warnings.append)
    for step in range(2, 7):
        best = 3 if step >= 3 else 1
        sender.offer(write(tmp_path, step, best), best)
    sender.close()
    assert (Mirror(ADDRESS).steps(), warnings) == ({3, 6}, [])
    assert not list((tmp_path / "checkpoints").glob(".*")), "nothing that was held for sending stays"
    assert Mirror(ADDRESS).restore(tmp_path / "new") == 6


def test_a_bucket_that_is_away_costs_a_warning(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "1.5")
    away, warnings = Mirror(ADDRESS), list[str]()
    sender = Sender(away, [], warnings.append)
    sender.offer(write(tmp_path, 1), None)
    sender.close()
    (warning,) = warnings
    assert "checkpoint of step 1 is not in the mirror: s3://" in warning and "tries" in warning
    with pytest.raises(TransientError):
        away.describe(described(tmp_path))


def test_whatever_cannot_be_sent_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is no server's fault: the thread lives on, and the next checkpoint is tried."""
    warnings: list[str] = []
    sender = Sender(Mirror(f"file://{tmp_path}/mirror"), [], warnings.append)
    with monkeypatch.context() as broken:
        broken.setattr(Mirror, "put", lambda *args: 1 / 0)
        sender.offer(write(tmp_path, 1), None)
        while not warnings:
            time.sleep(0.01)
    with monkeypatch.context() as full:
        full.setattr("mmsa_dist.checkpoint.link_or_copy", lambda *args: os.close(-1))
        sender.offer(write(tmp_path, 2), None)
    sender.offer(write(tmp_path, 3), None)
    sender.close()
    assert len(warnings) == 2 and "step 1 is not in the mirror" in warnings[0] and "step 2 is not" in warnings[1]
    assert Mirror(f"file://{tmp_path}/mirror").steps() == {3}


def described(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text("system: self_mm\n")
    return folder


@pytest.mark.parametrize("here", [False, True])
def test_a_finished_run_is_finished_in_its_mirror_too(
    here: bool, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is gone, or is of a machine on which it was interrupted and which did not see its end: nothing is
    evaluated again, and all that it left is there."""
    index, store = packed(tmp_path / "data"), f"s3://{BUCKET}/runs"
    untracked = {"tracking": {"enabled": False}, "checkpoint": {"mirror": store}}
    run, recipe = trained(tmp_path / "runs", index, "one", **untracked)
    Mirror(ADDRESS).describe(run)
    for step in (1, 2):
        Mirror(ADDRESS).put(write(run, step, 1), step)
    train.conclude(recipe, run, run_folder.read_json(run / "result.json"))
    left = {name: (run / name).read_bytes() for name in END if (run / name).is_file()}
    assert {"events/rank-0.jsonl", "predictions/test.npz", "result.json"} <= left.keys()
    recipe_file = (run / "recipe.yaml").read_bytes()
    shutil.rmtree(run)
    if here:
        run.mkdir()
        (run / "recipe.yaml").write_bytes(recipe_file)
    assert main(["train", "--resume", str(run) if here else ADDRESS, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert f"--resume {run}: the run is finished; its result is in {run / 'result.json'}" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in left} == left
    assert checkpoint.damage(run / "best", None) is None
    assert torch.equal(load_file(run / "best" / "weights.safetensors")["w"], torch.ones(3))
    assert not list(run.rglob(".*"))


def test_a_result_that_cannot_be_sent_costs_a_warning(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MMSA_REMOTE_TIMEOUT", "1.5")
    run_folder.write_json(tmp_path / "result.json", {})
    train.finish_mirror(f"s3://{BUCKET}/runs", tmp_path)
    assert "warning: the result is not in the mirror: s3://" in capsys.readouterr().err


def test_addresses_that_cannot_be(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: https:// cannot be written to"):
        Mirror("https://example.org/runs")
    with pytest.raises(ConfigError, match="addresses begin with one of"):
        Mirror("ftp://example.org/runs")
    with pytest.raises(DataError, match=r"there is no run \(no recipe\.yaml\)"):
        Mirror(f"s3://{BUCKET}/none").bring_description(tmp_path)


def test_a_folder_is_a_mirror_too(tmp_path: Path) -> None:
    mirror = Mirror.of(f"file://{tmp_path}/shared", described(tmp_path))
    mirror.describe(tmp_path)
    mirror.put(write(tmp_path, 4), 4)
    mirror.put(write(tmp_path, 4), 4)
    assert mirror.steps() == {4} and mirror.restore(tmp_path / "new") == 4
    mirror.bring_description(tmp_path / "new")
    assert (tmp_path / "new" / "recipe.yaml").read_text() == "system: self_mm\n"
    shutil.rmtree(tmp_path / "shared")
    assert mirror.steps() == set()


def test_a_bucket_of_google_is_a_mirror_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSA_REMOTE_BACKOFF", "0.01")
    store._filesystem.cache_clear()
    with google() as bucket:
        bucket.tell(monkeypatch)
        mirror = Mirror.of(f"gs://{BUCKET}/runs of may", described(tmp_path))
        assert mirror.steps() == set()
        mirror.describe(tmp_path)
        for step in (1, 2, 3, 3):
            mirror.put(write(tmp_path / "run", step, 1), step)
        mirror._remove("checkpoints/step-00000002/manifest.json")  # as a kill leaves it that came while it was sent
        mirror.keep({1, 3})
        assert mirror.steps() == {1, 3} and mirror.restore(tmp_path / "new") == 3
        for name, content in (("time.json", b"{}"), ("result.json", b"[]")):
            (tmp_path / name).write_bytes(content)
            mirror.bring_end(tmp_path / "new")
            assert not (tmp_path / "new" / name).exists()
        mirror.put_files(tmp_path, END)
        mirror.bring_end(tmp_path / "new")
        assert (tmp_path / "new" / "result.json").read_bytes() == b"[]"
        assert checkpoint.damage(tmp_path / "new" / "best", None) is None
        mirror.bring_description(tmp_path / "new")
        assert (tmp_path / "new" / "recipe.yaml").read_text() == "system: self_mm\n"
        folders = {name.split("/")[3] for name in bucket.names() if "/checkpoints/" in name}
        assert folders == {"step-00000001", "step-00000003"}
        with pytest.raises(DataError, match=r"there is no bucket 'none' \(HTTP 404\)"):
            Mirror("gs://none/runs").describe(tmp_path)
    with pytest.raises(TransientError, match="the connection is refused; 5 tries"):
        mirror.steps()
    store._filesystem.cache_clear()


def test_the_help_names_every_address_there_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "self_mm", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Address (s3://bucket/folder, gs://bucket/folder, or file:///folder" in said
