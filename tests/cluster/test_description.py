"""`cluster.yaml`: what it says, what it may not say, and what follows of it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import job
from cluster.commands import EXAMPLE
from cluster.description import Description, load
from cluster.errors import ConfigError
from tests.cluster.descriptions import FULL, LEAST, changed, written


def refused(folder: Path, description: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        load(written(folder, description))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(folder / "cluster.yaml"))
    return str(raised.value)


def test_the_example_is_a_description_and_shows_every_key() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert load(EXAMPLE).name == "mosi"
    for name, field in Description.model_fields.items():
        assert f"{name}:" in text, name
        for inner in getattr(field.annotation, "model_fields", {}):
            if (name, inner) != ("head", "spot"):  # has one value only
                assert f"{inner}:" in text, f"{name}.{inner}"


def test_what_the_example_shows_as_defaults_are_the_defaults() -> None:
    """Its commented lines, uncommented, are read too; those whose value is a default are the default."""
    text = EXAMPLE.read_text(encoding="utf-8")
    text = re.sub(r"^( *)# ( *[a-z_]+:)", r"\1\2", text, flags=re.MULTILINE)
    text = re.sub(r"^ *every_seconds:.*\n", "", text, flags=re.MULTILINE)  # instead of others
    whole = Description.model_validate(yaml.safe_load(text))
    fresh = Description.model_validate(LEAST)
    assert whole.slurm.requeues == fresh.slurm.requeues and whole.slurm.hours == fresh.slurm.hours
    assert whole.kubernetes.spot_label == fresh.kubernetes.spot_label
    assert whole.kubernetes.gpu_label == fresh.kubernetes.gpu_label
    assert whole.kubernetes.retries == fresh.kubernetes.retries
    assert whole.kubernetes.keep_minutes == fresh.kubernetes.keep_minutes
    assert whole.kubernetes.token_secret == f"{whole.name}-ray-token"
    assert whole.workers.idle_minutes == fresh.workers.idle_minutes
    assert whole.checkpoint.cost_seconds == fresh.checkpoint.cost_seconds
    assert whole.checkpoint.write_seconds == fresh.checkpoint.write_seconds
    assert (whole.cache_gib, whole.token, whole.source) == (fresh.cache_gib, fresh.token, fresh.source)
    assert (whole.cloud.ssh_user, whole.cloud.disk_gib) == (fresh.cloud.ssh_user, fresh.cloud.disk_gib)
    assert whole.shared.path == fresh.shared.path and whole.slurm.python == fresh.slurm.python


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"worker": {}}, "unknown key 'worker'; did you mean 'workers'?"),
        ({"workers": {"cpu": 4}}, "unknown key 'workers.cpu'; did you mean 'cpus'?"),
        ({"kubernetes": {"namespaces": "a"}}, "unknown key 'kubernetes.namespaces'; did you mean 'namespace'?"),
        ({"name": "MOSI"}, "name: expected lower case, digits and dashes, a letter first, found 'MOSI'"),
        ({"name": None}, "name is missing"),
        ({"workers": {"cpus": "4"}}, "workers.cpus: input should be a valid integer, found '4'"),
        ({"workers": {"most": 0}}, "workers.most: input should be greater than or equal to 1, found 0"),
        ({"head": {"spot": True}}, "head.spot: a head that is taken away ends every job of its cluster"),
        ({"workers": {"least": 5, "most": 4}}, "workers: least: 5 nodes are more than most, 4"),
        ({"workers": {"gpu": "l4"}}, "workers: gpu: l4 is named, but gpus is 0"),
        ({"workers": {"cpus": 2, "gpus": 4}}, "workers: cpus: 2 CPUs for 4 ranks"),
        ({"image": "a:1", "workers": {"gpus": 1}}, "workers.gpus: 1 GPUs, but image a:1 has no CUDA"),
        ({"image": "a-cuda:1", "cuda": False, "workers": {"gpus": 1}}, "image a-cuda:1 has no CUDA"),
        ({"mlflow": "http://0.0.0.0:5000"}, "mlflow: 0.0.0.0 is what a server listens at"),
        ({"mlflow": "http://[::]:5000"}, "mlflow: 0.0.0.0 is what a server listens at"),
        ({"mlflow": "http://localhost:5000"}, "mlflow: http://localhost:5000 is each node itself"),
        ({"mlflow": "http://127.0.0.1:5000"}, "mlflow: http://127.0.0.1:5000 is each node itself"),
        ({"mlflow": "sqlite:///x"}, "mlflow: sqlite:///x is no server; expected http://HOST:PORT"),
        ({"checkpoint": {"every_seconds": 60.0, "mtbf_hours": 2.0}}, "checkpoint: every_seconds and mtbf_hours both"),
        ({"shared": {"path": "runs"}}, "shared.path: runs is no absolute path"),
        ({"shared": {"nfs": "/export"}}, "shared.nfs: /export is no NFS export; expected HOST:/PATH"),
        ({"kubernetes": {"spot_label": "spot"}}, "kubernetes.spot_label: spot is no label; expected KEY=VALUE"),
        ({"command": "train 'ufen"}, "command: train 'ufen: No closing quotation"),
        ({"command": ""}, "command: nothing to run"),
        ({"slurm": {"setup": ["a\nb"]}}, "slurm.setup.0: expected one line"),
        ({"slurm": {"setup": ["a\u2028b"]}}, "slurm.setup.0: expected one line"),
        ({"slurm": {"partition": "a b"}}, "slurm.partition: expected one word of letters, digits and .,:@+/-"),
        ({"kubernetes": {"namespace": "a; rm"}}, "kubernetes.namespace: expected one word of letters"),
        ({"shared": {"path": "/mnt/$HOME"}}, "shared.path: /mnt/$HOME is no absolute path of letters"),
        ({"mlflow": "http://host:99999"}, "mlflow: http://host:99999 is no server; expected http://HOST:PORT"),
        ({"mlflow": "http://host:5000/`id`"}, "is no server; expected http://HOST:PORT"),
        ({"workers": {"most": 10**6}}, "workers.most: input should be less than or equal to 10000"),
        ({"slurm": {"hours": math.inf}}, "slurm.hours: input should be"),
        ({"checkpoint": {"mtbf_hours": math.nan}}, "checkpoint.mtbf_hours: input should be a finite number"),
        ({"checkpoint": {"every_seconds": 1e-9}}, "checkpoint.every_seconds: input should be greater than or equal"),
    ],
)
def test_what_is_wrong_is_one_sentence(parts: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(tmp_path, changed(LEAST, **parts))


@pytest.mark.parametrize("key", ["storage", "mlflow"])
@pytest.mark.parametrize("address", ["http://bob:s3kret@host:5000", "https://host/path?token=s3kret"])
def test_a_secret_in_an_address_is_refused(key: str, address: str, tmp_path: Path) -> None:
    assert f"{key}: holds a user, a password or a signature" in refused(tmp_path, changed(LEAST, **{key: address}))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("name: a\ncommand: train x\nname: b\n")
    with pytest.raises(ConfigError, match=r"cluster\.yaml, line 1: name is there twice"):
        load(tmp_path / "cluster.yaml")


@pytest.mark.parametrize("text", ["- a\n", "", "name: [a\n", "\x00", "name: 2026-99-99\n", "? {a: b}\n", "[" * 5000])
def test_what_is_no_description_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^[^\n]*cluster\.yaml[^\n]*$"):
        load(tmp_path / "cluster.yaml")


def test_a_file_that_is_missing_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*`mmsa-dist cluster init --to .*` writes one"):
        load(tmp_path / "none.yaml")


def test_the_interval_is_young_and_dalys() -> None:
    description = Description.model_validate(FULL)
    seconds = description.checkpoint.seconds
    assert seconds == pytest.approx(math.sqrt(2 * 2.0 * 2.0 * 3600))
    assert job.command(description)[-2:] == ["--checkpoint.every-seconds", "170"]
    slow = Description.model_validate(changed(FULL, checkpoint={"write_seconds": 500.0}))
    assert slow.checkpoint.seconds == 500.0, "none begins before the last is written"
    fixed = changed(LEAST, checkpoint={"every_seconds": 60.0})
    assert job.command(Description.model_validate(fixed))[-1] == "60"
    assert "--checkpoint.every-seconds" not in job.command(Description.model_validate(LEAST))


def test_the_command_gets_what_its_cluster_decides() -> None:
    words = job.words(Description.model_validate(FULL))
    assert words[: words.index("--")] == ["cluster", "run", "--nodes", "1:4", "--cpus", "16", "--gpus", "2"]
    text = " ".join(words)
    assert "train ufen_mtfn --data s3://bucket/mosi --seed 3 --runs-dir /mnt/all/runs/mosi" in text
    assert "--launch.cpus-per-worker 8 --launch.gpus-per-worker 1 --workers 2:8" in text, "a rank for each GPU"
    assert "--checkpoint.mirror s3://bucket/mmsa/runs" in text


def test_a_command_that_keeps_no_runs_gets_none_of_it() -> None:
    description = Description.model_validate(changed(LEAST, command=["mmsa-dist", "verify", "s3://bucket/mosi"]))
    assert job.command(description) == ["verify", "s3://bucket/mosi"]


@pytest.mark.parametrize("option", sorted(job.DECIDED))
def test_what_the_description_decides_may_not_be_in_the_command(option: str) -> None:
    description = Description.model_validate(changed(LEAST, command=["train", "mult", f"{option}=4"]))
    with pytest.raises(ConfigError, match=f"command: {option} is decided by "):
        job.words(description)
