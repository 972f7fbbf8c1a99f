"""What `render ray-up-…` writes, as Ray's own launcher takes it: its schema, its defaults, its way to EC2."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.description import Description
from cluster.manifests.ray_up import aws, gcp
from tests.cluster.descriptions import FULL, SMALL, changed

GOOGLE = changed(
    FULL,
    cloud={"zones": ["us-central1-a"], "region": "us-central1", "identity": "w@my-project.iam.gserviceaccount.com"},
    workers={"machine": "n1-standard-16", "gpu": "nvidia-tesla-t4"},
    storage="gs://bucket/mmsa",
)
BARE = {"image": None}
CASES = {
    "aws full": (aws, FULL),
    "aws without an image": (aws, changed(FULL, **BARE)),
    "aws small": (aws, SMALL),
    "gcp full": (gcp, GOOGLE),
    "gcp without an image": (gcp, changed(GOOGLE, **BARE)),
    "gcp small": (gcp, SMALL),
}


def config(case: str) -> dict[str, Any]:
    write, description = CASES[case]
    found: dict[str, Any] = yaml.safe_load(write(Description.model_validate(description)))
    return found


def commands(found: dict[str, Any]) -> list[str]:
    keys = [key for key in found if key.endswith("commands")]
    return [command for key in keys for command in found[key]]


@pytest.mark.parametrize("case", CASES)
def test_rays_launcher_takes_it(case: str) -> None:
    found = config(case)
    prepared = prepare_config(found)  # with the defaults of its cloud, as `ray up` does
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == {"head", "worker"}
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "initialization_commands"):
        assert prepared[key] == found[key], f"{key} are ours, not the default ones"
    assert "rayproject" not in str(prepared), "nothing of a default image"


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_kept_and_workers_are_bounded(case: str) -> None:
    found = config(case)
    head, worker = (found["available_node_types"][name] for name in ("head", "worker"))
    assert found["head_node_type"] == "head" and head["max_workers"] == 0 and head["resources"] == {"CPU": 0}
    spot = "InstanceMarketOptions" in worker["node_config"] or "SPOT" in str(worker["node_config"].get("scheduling"))
    assert spot is ("small" not in case)
    assert "SPOT" not in str(head) and "InstanceMarketOptions" not in str(head)
    assert found["max_workers"] == worker["max_workers"] == (1 if "small" in case else 4)
    assert worker["min_workers"] == 1


@pytest.mark.parametrize("case", CASES)
def test_nobody_outside_reaches_it_and_the_token_is_a_path(case: str) -> None:
    found = config(case)
    assert found["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = (command for command in found["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in start
    for command in (*found["head_start_ray_commands"][1:], *found["worker_start_ray_commands"][1:]):
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in command
    assert ("MLFLOW_TRACKING_URI=http://mlflow.internal:5000" in start) is ("small" not in case)


@pytest.mark.parametrize("case", CASES)
def test_every_command_is_one_that_bash_can_read(case: str) -> None:
    for command in commands(config(case)):
        assert "\n" not in command
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=30)


def test_without_an_image_every_machine_installs_by_the_constraints() -> None:
    for case, bucket in (("aws without an image", "s3"), ("gcp without an image", "gs,s3")):
        found = config(case)
        (install,) = (command for command in found["setup_commands"] if "pip install" in command)
        assert f'-c ~/mmsa-dist/constraints.txt "$HOME/mmsa-dist[{bucket}]"' in install
        assert found["file_mounts"]["~/mmsa-dist"] == "." and ".git" in found["rsync_exclude"]
        assert "docker" not in found
        library = {"aws": "boto3", "gcp": "google-api-python-client"}[case[:3]]
        assert found["head_setup_commands"][0].endswith(f"-c ~/mmsa-dist/constraints.txt {library}")
        images = (path.read_text() for path in (Path(__file__).parents[2] / "cluster").glob("Dockerfile*"))
        assert all(f" {library} " in text for text in images), "with an image there is nothing to install"
    found = config("aws full")
    assert found["docker"]["image"] == "registry.example.org/mmsa-dist:0.1.0-cuda" and found["setup_commands"] == []
    assert "-v /mnt/all:/mnt/all" in found["docker"]["run_options"]


def test_the_shared_disk_is_mounted_before_all_else() -> None:
    text = " ".join(config("aws full")["initialization_commands"])
    assert "fs-1.efs.us-west-2.amazonaws.com:/ /mnt/all" in text and "mountpoint -q /mnt/all ||" in text


@pytest.mark.parametrize("case", ["aws full", "aws small"])
def test_ec2_takes_the_machines(case: str) -> None:
    """Against the model of EC2's API that boto3 itself checks calls by."""
    import botocore.loaders
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    model = ServiceModel(botocore.loaders.Loader().load_service_model("ec2", "service-2"))
    shape = model.operation_model("RunInstances").input_shape
    for node in config(case)["available_node_types"].values():
        asked = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(asked, shape).has_errors()
        assert set(asked) <= set(shape.members)
    wrong = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, "InstanceType": 3}, shape)
    assert wrong.has_errors(), "the check checks something"


RAYS_ROLE = "ray-autoscaler-v1"


@pytest.fixture
def amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An EC2 of moto's within this process, with keys that open nothing else. Ray has been used there before: it waits
    a quarter of a minute for a role that it has just made."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        iam = boto3.client("iam", region_name="us-west-2")
        iam.create_instance_profile(InstanceProfileName=RAYS_ROLE)
        iam.create_role(RoleName=RAYS_ROLE, AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName=RAYS_ROLE, RoleName=RAYS_ROLE)
        yield


def test_rays_launcher_finds_all_it_needs_on_ec2(amazon: None) -> None:
    """Ray's own steps before it rents machines: roles, keys, subnets, security groups."""
    from ray.autoscaler._private.aws.config import bootstrap_aws

    found = bootstrap_aws(prepare_config(config("aws full")))
    head, worker = (found["available_node_types"][name]["node_config"] for name in ("head", "worker"))
    assert head["KeyName"] == worker["KeyName"] and head["SubnetIds"] and worker["SecurityGroupIds"]
    assert worker["IamInstanceProfile"] == {"Name": "workers"}, "ours, which opens the bucket"
    assert RAYS_ROLE in found["head_node"]["IamInstanceProfile"]["Arn"], "Ray's, which may rent machines"


def test_google_gets_its_gpus_where_the_machine_has_none() -> None:
    worker = config("gcp full")["available_node_types"]["worker"]["node_config"]
    assert worker["guestAccelerators"] == [{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 2}]
    assert worker["scheduling"]["provisioningModel"] == "SPOT" and worker["scheduling"]["automaticRestart"] is False
    assert worker["scheduling"]["onHostMaintenance"] == "TERMINATE", "machines with GPUs cannot move"
    assert worker["serviceAccounts"][0]["email"] == "w@my-project.iam.gserviceaccount.com"
    built_in = changed(GOOGLE, workers={"machine": "g2-standard-24", "gpu": None})
    found = yaml.safe_load(gcp(Description.model_validate(built_in)))
    assert "guestAccelerators" not in found["available_node_types"]["worker"]["node_config"]
