"""A run on data in a bucket: the losses of a run on the folder, and nothing of the credentials in what it leaves."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.run_folder import read_events, read_json
from tests.data import packed
from tests.end_to_end.started import Run, two_cpus
from tests.shards.remote.servers import BUCKET, KEY, SECRET, Bucket, s3

OPTIONS = [
    "--workers", "2", "--launcher", "local", "--epochs", "1", "--batch-size", "16",
    "--tracking.no-enabled", "--train.monitor", "mae",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("data"), samples=48)


@pytest.fixture(scope="module")
def remote(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str, Bucket, Path]]:
    """A run on the folder's copy in a bucket, the address, the bucket, and the cache that it filled."""
    cache = tmp_path_factory.mktemp("cache")
    with s3() as bucket, pytest.MonkeyPatch.context() as environment:
        bucket.tell(environment)
        environment.setenv("MMSA_CACHE", str(cache))
        address = bucket.upload(folder, "mosi")
        run = Run(tmp_path_factory.mktemp("remote"), "ufen_mtfn", "--data", address, *OPTIONS)
        try:
            run.result()
            yield run, address, bucket, cache
        finally:
            run.kill()


@two_cpus
def test_a_run_on_data_in_a_bucket(remote: tuple[Run, str, Bucket, Path]) -> None:
    run, address, bucket, cache = remote
    shards = {key: count for key, count in bucket.gets.items() if key != "mosi/index.json"}
    assert shards and set(shards.values()) == {1}, "each file once for the driver and both ranks"
    assert address in (run.folder / "recipe.yaml").read_text()
    for path in (path for place in (run.runs, cache) for path in place.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert SECRET.encode() not in content and KEY.encode() not in content, path


@two_cpus
@pytest.mark.slow
def test_its_losses_are_those_of_a_run_on_the_folder(
    remote: tuple[Run, str, Bucket, Path], folder: Path, tmp_path: Path
) -> None:
    local = Run(tmp_path, "ufen_mtfn", "--data", str(folder), *OPTIONS)
    try:
        local.result()
    finally:
        local.kill()
    assert numbers(local) == numbers(remote[0])


def numbers(run: Run) -> tuple[float, float]:
    """The last epoch's training loss, and the test's mean absolute error."""
    epochs = [event for event in read_events(run.folder) if event["event"] == "epoch"]
    return epochs[-1]["train_loss"], run.result()["test"]["mae"]


@two_cpus
@pytest.mark.fault
def test_a_run_goes_on_from_its_mirror(words: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """The command is killed and its machine lost: another one goes on with what is in the bucket."""
    with s3() as bucket, pytest.MonkeyPatch.context() as environment:
        bucket.tell(environment)
        address = f"s3://{BUCKET}/mirror"
        run = Run(tmp_path / "lost", *words, "--workers", "2", "--launcher", "local", "--checkpoint.mirror", address)
        try:
            run.until_epoch(4)
        finally:
            run.kill()
        name = run.folder.name
        shutil.rmtree(tmp_path / "lost")
        again = Run(tmp_path / "new", "--resume", f"{address}/{name}", "--runs-dir", str(tmp_path / "new"))
        try:
            assert again.result() == undisturbed, again.output
        finally:
            again.kill()
        assert f"comes from {address}/{name}" in again.output and "going on after step" in again.output
        shutil.rmtree(tmp_path / "new" / name)
        done = Run(tmp_path / "new", "--resume", f"{address}/{name}", "--runs-dir", str(tmp_path / "new"))
        assert done.wait() == 2 and "the run is finished" in done.output
        assert read_json(tmp_path / "new" / name / "result.json") == undisturbed
