"""`mmsa-dist predict --ray`: the rows of one process from many, each once, whatever dies on the way."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mmsa_dist.errors import ConfigError, DataError, TransientError
from mmsa_dist.predict import main
from mmsa_dist.prediction.kept import JOB
from mmsa_dist.recipe import Recipe, from_dict
from mmsa_dist.session import card, data_spec
from mmsa_dist.systems import get_system
from shards.index import Index
from shards.write import pack
from tests.data import TinyEmotions, TinySource
from tests.mmsa_dist import runs
from tests.mmsa_dist.classifier import CLASSIFIER
from tests.mmsa_dist.conftest import Tracked, free_port
from tests.mmsa_dist.test_predict_cli import mmsa_pickle, read
from tests.processes import lives, wait_until

pytestmark = pytest.mark.ray

SAMPLES = 203
"""Does not divide by batches, parts or processes."""


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    """A cluster of two CPUs, joined by this process, for what is predicted in it."""
    import ray

    from shards.ray_cluster import LOCAL, join

    join(LOCAL, "--ray", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Several shards a split."""
    folder = tmp_path_factory.mktemp("large") / "set"
    return pack(TinySource(SAMPLES, absent=0.1), folder, dtype="float32", shard_bytes=8_000)[0]


def words(model: Path, index: Index, out: Path, *more: str) -> list[str]:
    return [str(model), "--data", str(index.folder), "--out", str(out), *more]


def predicted(*command: str) -> None:
    assert main(list(command)) == 0


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parts_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def finished(out: Path) -> list[Path]:
    return sorted(parts_of(out).glob("part-*.parquet"))


@pytest.mark.parametrize(("suffix", "size"), [(".csv", "1"), (".parquet", "7"), (".jsonl", "64")])
def test_the_rows_are_those_of_one_process(
    suffix: str, size: str, trained: tuple[Path, Recipe], large: Index, tmp_path: Path, capsys: Any
) -> None:
    """To the last bit: the same samples go through the system together."""
    told = []
    for name, more in (("one", []), ("many", ["--ray", "--workers", "2"])):
        predicted(*words(trained[0], large, tmp_path / f"{name}{suffix}", "--batch-size", size, "--json", *more))
        told.append(json.loads(capsys.readouterr().out))
    one, many = (read(tmp_path / f"{name}{suffix}") for name in ("one", "many"))
    assert one == many and len(many) == SAMPLES and len({row["key"] for row in many}) == SAMPLES
    for split, metrics in told[0]["metrics"].items():
        assert told[1]["metrics"][split] == pytest.approx(metrics, rel=1e-12)
    assert left(tmp_path) == [f"many{suffix}", f"one{suffix}"]


def test_a_split_of_one_sample(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    index = runs.packed(tmp_path / "set", samples=5)
    assert index.splits["test"] == 1
    predicted(*words(trained[0], index, tmp_path / "p.csv", "--split", "test", "--ray"))
    (row,) = read(tmp_path / "p.csv")
    assert row["split"] == "test"


def test_a_registered_model_that_reads_transcripts(
    tracked: Tracked, large: Index, encoders: Callable[..., Path], tmp_path: Path
) -> None:
    """Its encoder's folder travels with it; and a model from the registry does as a run's does."""
    run, _ = runs.trained(tmp_path / "runs", large, epochs=1, encoder=str(encoders("bert")))
    store = ["--runs-dir", str(tracked.runs_dir)]
    for number, (model, more) in enumerate([(str(run), []), ("models:/tiny@champion", store)]):
        one, many = (tmp_path / f"{name}-{number}.csv" for name in ("one", "many"))
        predicted(model, "--data", str(large.folder), "--out", str(one), "--split", "valid", *more)
        predicted(model, "--data", str(large.folder), "--out", str(many), "--split", "valid", "--ray", *more)
        assert one.read_text() == many.read_text()


def classifier(run: Path, index: Index) -> Path:
    """A model of classes, as its weights were drawn."""
    recipe = from_dict({"system": CLASSIFIER, "data": {"path": str(index.folder)}})
    torch.manual_seed(1)
    system = get_system(CLASSIFIER)(recipe.model, data_spec(recipe, index))
    (run / "best").mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.dump(), sort_keys=False))
    card(recipe, index).save(run)
    save_file(system.state_dict(), run / "best" / "weights.safetensors")
    return run


def test_classes(tmp_path: Path, capsys: Any) -> None:
    index, _ = pack(TinyEmotions(60), tmp_path / "set", dtype="float32")
    run = classifier(tmp_path / "run", index)
    told = []
    for name, more in (("one", []), ("many", ["--ray"])):
        predicted(*words(run, index, tmp_path / f"{name}.csv", "--batch-size", "5", "--json", *more))
        told.append(json.loads(capsys.readouterr().out)["metrics"])
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "many.csv").read_text()
    assert told[1]["test"] == pytest.approx(told[0]["test"], rel=1e-9) and "acc_happy" in told[1]["test"]


def test_samples_without_anything_to_read_are_counted(large: Index, tmp_path: Path, capsys: Any) -> None:
    run, _ = runs.trained(tmp_path, large, data={"modalities": ["audio"]}, epochs=1)
    said = []
    for name, more in (("one", []), ("many", ["--ray"])):
        predicted(*words(run, large, tmp_path / f"{name}.csv", *more))
        said += re.findall(r"note: (\d+) of 203 samples have none of audio", capsys.readouterr().err)
    assert said[0] == said[1] and int(said[0]) > 1


# --- what dies


def started(*command: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with a cluster of its own."""
    whole = [sys.executable, "-m", "mmsa_dist", "predict", *command]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, trained: tuple[Path, Recipe]) -> tuple[Path, Index, Path]:
    """A model, data that take it seconds, one sample at a time, and what one process predicts."""
    folder = tmp_path_factory.mktemp("slow")
    index, _ = pack(TinySource(4_000), folder / "set", dtype="float32")
    predicted(*words(trained[0], index, folder / "one.csv", "--batch-size", "1"))
    return trained[0], index, folder / "one.csv"


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_same_command_goes_on(number: signal.Signals, slow: tuple[Path, Index, Path], tmp_path: Path) -> None:
    model, index, one = slow
    out = tmp_path / "p.csv"
    command = words(model, index, out, "--batch-size", "1", "--ray", "--workers", "2")
    process = started(*command)
    wait_until(lambda: process.poll() is not None or len(finished(out)) >= 5)
    assert process.poll() is None, process.communicate()[1]
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    before = {path.name: path.stat() for path in finished(out)}
    total = 39 + 13 + 13  # parts of 63 of 4,000 samples
    assert 5 <= len(before) < total and not out.exists()
    assert "Traceback" not in said
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert f"{len(before)} of {total} parts are finished and kept beside {out}: the same command goes on" in said
    wait_until(lambda: not any(map(lives, family)))

    process = started(*command)
    wait_until(lambda: process.poll() is not None or len(finished(out)) > len(before))
    for path in finished(out):  # what was finished is not done again
        if path.name in before and path.exists():
            with suppress(FileNotFoundError):
                assert path.stat().st_mtime_ns == before[path.name].st_mtime_ns
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert f"predicting: going on: {len(before)} of {total} parts are there" in said
    assert out.read_text() == one.read_text()
    assert left(tmp_path) == ["p.csv"]


@pytest.mark.fault
def test_a_process_that_is_killed_is_replaced(slow: tuple[Path, Index, Path], tmp_path: Path) -> None:
    model, index, one = slow
    out = tmp_path / "p.csv"
    process = started(*words(model, index, out, "--batch-size", "1", "--ray", "--workers", "2"))
    wait_until(lambda: process.poll() is not None or len(finished(out)) >= 3)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "MapWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2, "two processes predict"
    workers[0].kill()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert out.read_text() == one.read_text() and left(tmp_path) == ["p.csv"]


# --- what is kept, and what of it is used


@pytest.fixture
def begun(
    trained: tuple[Path, Recipe], large: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], Path]:
    """A command that was stopped when three parts were finished, and its target."""
    from mmsa_dist.prediction.kept import Kept

    out, save = tmp_path / "p.csv", Kept.save

    def stopping(self: Kept, *part: Any) -> None:
        save(self, *part)
        if len(self.done) == 3:
            raise KeyboardInterrupt

    command = words(trained[0], large, out, "--batch-size", "4", "--ray")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Kept, "save", stopping)
        main(command)
    assert len(finished(out)) == 3
    return command, out


def refused(error: type[Exception], *command: str) -> str:
    with pytest.raises(error) as caught:
        main(list(command))
    return str(caught.value)


def test_another_model_does_not_go_on(begun: tuple[list[str], Path], large: Index, tmp_path: Path) -> None:
    command, out = begun
    run, _ = runs.trained(tmp_path / "runs", large, epochs=1, seed=2)
    said = refused(ConfigError, str(run), *command[1:])
    assert "3 parts of another prediction wait beside it (the model's files differ)" in said
    assert str(parts_of(out)) in said and len(finished(out)) == 3


def test_other_data_does_not_go_on(begun: tuple[list[str], Path], trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    _, out = begun
    other = runs.packed(tmp_path / "other", samples=60, seed=3)
    said = refused(ConfigError, *words(trained[0], other, out, "--batch-size", "4", "--ray"))
    assert "(the data differ)" in said and len(finished(out)) == 3


def test_other_options_do_not_go_on(begun: tuple[list[str], Path]) -> None:
    command, _ = begun
    assert "(--split differ)" in refused(ConfigError, *command, "--split", "test")
    assert "(--batch-size differ)" in refused(ConfigError, *command, "--batch-size", "8")


def test_other_workers_and_another_place_of_the_data_do(
    begun: tuple[list[str], Path], large: Index, tmp_path: Path, trained: tuple[Path, Recipe]
) -> None:
    _, out = begun
    shutil.copytree(large.folder, tmp_path / "moved")
    moved = Index.load(tmp_path / "moved")
    predicted(*words(trained[0], moved, out, "--batch-size", "4", "--ray", "--workers", "1"))
    predicted(*words(trained[0], large, tmp_path / "one.csv", "--batch-size", "4"))
    assert out.read_text() == (tmp_path / "one.csv").read_text()


@pytest.mark.fault
def test_a_damaged_part_is_done_again(begun: tuple[list[str], Path], large: Index, tmp_path: Path) -> None:
    command, out = begun
    whole, short, empty = finished(out)
    content = bytearray(whole.read_bytes())
    content[len(content) // 3] ^= 1
    whole.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-20])
    empty.write_bytes(b"")
    predicted(*command)
    predicted(*[word for word in command if word != "--ray"][:-1], "4", "--out", str(tmp_path / "one.csv"))
    assert out.read_text() == (tmp_path / "one.csv").read_text()


def test_two_at_once_are_refused(begun: tuple[list[str], Path]) -> None:
    import fcntl
    import os

    command, out = begun
    held = os.open(parts_of(out), os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another mmsa-dist predict is at work on it" in refused(ConfigError, *command)
    finally:
        os.close(held)
    predicted(*command)


def test_a_job_that_cannot_be_read_is_another(begun: tuple[list[str], Path]) -> None:
    command, out = begun
    (parts_of(out) / JOB).write_text("{")
    assert "3 parts of another prediction" in refused(ConfigError, *command)


# --- what is said


@pytest.mark.fault
@pytest.mark.parametrize("which", ["tar", "table"])
def test_a_damaged_shard(which: str, trained: tuple[Path, Recipe], large: Index, tmp_path: Path, capsys: Any) -> None:
    """One sentence, and the rest is kept; --quarantine goes on without it, and so does one process."""
    data = tmp_path / "data"
    shutil.copytree(large.folder, data)
    lost = large.shards[-1]
    shard = data / (lost.url if which == "tar" else lost.table)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    index = Index.load(data)
    command = words(trained[0], index, tmp_path / "p.csv", "--batch-size", "4", "--ray")
    said = refused(DataError, *command)
    assert shard.name in said and "--quarantine" in said and "Traceback" not in said and "Ray" not in said
    told = capsys.readouterr().err
    assert re.search(r"\d+ of \d+ parts are finished and kept", told)
    assert left(tmp_path) == [".p.csv.parts", "data"]
    shutil.rmtree(parts_of(tmp_path / "p.csv"))
    for name, more in (("many", ["--ray"]), ("one", [])):
        predicted(*words(trained[0], index, tmp_path / f"{name}.csv", "--quarantine", *more))
        assert f"left out: shard {index.name}/{lost.url} with {lost.samples} samples" in capsys.readouterr().err
    rows = read(tmp_path / "many.csv")
    assert rows == read(tmp_path / "one.csv") and len(rows) == SAMPLES - lost.samples


def test_data_that_the_node_does_not_see(
    trained: tuple[Path, Recipe], large: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster whose nodes share nothing: the folder is the driver's alone."""
    from mmsa_dist.prediction import on_ray

    made = on_ray.job_of

    def elsewhere(data: Any, where: str, *rest: Any) -> Any:
        return made(data, str(tmp_path / "nowhere"), *rest)

    monkeypatch.setattr(on_ray, "job_of", elsewhere)
    said = refused(ConfigError, *words(trained[0], large, tmp_path / "p.csv", "--ray"))
    assert "does not see" in said and "a shared folder or a bucket" in said
    assert left(tmp_path) == []


def test_data_that_changed_on_the_node(
    trained: tuple[Path, Recipe], large: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmsa_dist.prediction import on_ray

    made, other = on_ray.job_of, runs.packed(tmp_path / "other", samples=40, seed=9)

    def elsewhere(data: Any, where: str, *rest: Any) -> Any:
        return made(data, str(other.folder), *rest)

    monkeypatch.setattr(on_ray, "job_of", elsewhere)
    assert "finds another data set there" in refused(DataError, *words(trained[0], large, tmp_path / "p.csv", "--ray"))


def test_more_processes_than_there_are_cpus(trained: tuple[Path, Recipe], large: Index, tmp_path: Path) -> None:
    said = refused(ConfigError, *words(trained[0], large, tmp_path / "p.csv", "--ray", "--workers", "3"))
    assert "--workers 3" in said and "2 CPUs" in said and "use --workers 2" in said
    assert left(tmp_path) == []


def test_no_gpu(trained: tuple[Path, Recipe], large: Index, tmp_path: Path) -> None:
    said = refused(ConfigError, *words(trained[0], large, tmp_path / "p.csv", "--ray", "--device", "cuda"))
    assert "--device cuda" in said and "no GPU" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--workers", "2"], "--workers says where --ray predicts; give --ray too"),
        (["--address", "auto"], "--address says where --ray predicts; give --ray too"),
        (["--ray", "--workers", "0"], "workers"),
    ],
)
def test_options_that_do_nothing_are_refused(
    more: list[str], says: str, trained: tuple[Path, Recipe], large: Index, tmp_path: Path
) -> None:
    assert says in refused(ConfigError, *words(trained[0], large, tmp_path / "p.csv", *more))


def test_a_pickle_is_packed_first(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    data = mmsa_pickle(tmp_path / "new.pkl")
    command = [str(trained[0]), "--data", str(data), "--out", str(tmp_path / "p.csv")]
    assert "pack it first (mmsa-dist pack mmsa" in refused(ConfigError, *command, "--ray")
    assert "is a pickle; leave it out" in refused(ConfigError, *command, "--quarantine")


def test_a_place_that_cannot_be_written(trained: tuple[Path, Recipe], large: Index, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(ConfigError, *words(trained[0], large, tmp_path / "file" / "p.csv", "--ray"))
    assert "choose another --out" in said and left(tmp_path) == ["file"]


def test_a_cluster_that_does_not_answer(trained: tuple[Path, Recipe], large: Index, tmp_path: Path) -> None:
    """In a process of its own, which has joined none yet."""
    address = f"127.0.0.1:{free_port()}"
    process = started(*words(trained[0], large, tmp_path / "p.csv", "--ray", "--address", address))
    said = process.communicate(timeout=300)[1]
    assert process.returncode == TransientError.exit_code
    assert f"no Ray cluster answers at {address}" in said and "Traceback" not in said
    assert left(tmp_path) == []
