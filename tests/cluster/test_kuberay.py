"""What `render kuberay-…` writes, against the schema of KubeRay's own definitions, and its operator's rules."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from cluster.description import Description
from cluster.manifests.kuberay import ray_cluster, ray_job
from tests.cluster.descriptions import FULL, SMALL, changed

SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("kuberay.json").read_text(encoding="utf-8"))
"""Written by scripts/kuberay_schema.py."""
KEYED = changed(FULL, kubernetes={"service_account": None, "credentials_secret": "bucket"})
SAME = changed(FULL, workers={"least": 4})
DESCRIPTIONS = {"full": FULL, "small": SMALL, "credentials": KEYED, "one size": SAME}


def check(manifest: dict[str, Any]) -> None:
    schema = {**SCHEMA[manifest["kind"]], "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def manifests(description: dict[str, Any]) -> list[dict[str, Any]]:
    found = Description.model_validate(description)
    return [yaml.safe_load(ray_cluster(found)), yaml.safe_load(ray_job(found))]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec


def groups(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pods' specs of the head and of the workers."""
    spec = cluster_spec(manifest)
    (workers,) = spec["workerGroupSpecs"]
    return spec["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]


def test_the_schema_refuses_what_kuberay_would() -> None:
    for break_it in (
        lambda spec: spec.update(rayVersionn="2.60.0"),
        lambda spec: spec["headGroupSpec"].update(serviceType=3),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagee="x"),
        lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["volumes"][0].update(pvc={}),
        lambda spec: spec["authOptions"].update(mode="tokens"),
    ):
        for manifest in manifests(FULL):
            break_it(cluster_spec(manifest))
            with pytest.raises(jsonschema.ValidationError):
                check(manifest)


@pytest.mark.parametrize("description", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_kuberay_takes_both_objects(description: dict[str, Any]) -> None:
    for manifest in manifests(description):
        check(manifest)
        assert manifest["apiVersion"] == "ray.io/v1"
        assert manifest["metadata"]["name"] == "mosi"


@pytest.mark.parametrize("description", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_rules_of_kuberays_operator(description: dict[str, Any]) -> None:
    """What its `validation.go` refuses beyond the schema."""
    for manifest in manifests(description):
        spec = cluster_spec(manifest)
        assert spec["rayVersion"] == ray.__version__ and spec["authOptions"]["mode"] == "token"
        (workers,) = spec["workerGroupSpecs"]
        assert 1 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
        for group in (spec["headGroupSpec"], workers):
            assert "resources" not in group, "not both rayStartParams and resources"
            assert "restartPolicy" not in group["template"]["spec"], "Never or unset with autoscaler v2"
        scales = workers["minReplicas"] < workers["maxReplicas"]
        assert spec["enableInTreeAutoscaling"] is scales
        assert (spec.get("autoscalerOptions", {}).get("version") == "v2") is scales
        if manifest["kind"] == "RayJob":
            assert manifest["spec"]["shutdownAfterJobFinishes"] is True, "needed by ttlSecondsAfterFinished"
            assert manifest["spec"]["backoffLimit"] >= 0


@pytest.mark.parametrize("description", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_pods_get_what_they_ask_for_and_no_rights(description: dict[str, Any]) -> None:
    for pod in (pod for manifest in manifests(description) for pod in groups(manifest)):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "all"}
        assert container["readinessProbe"]["httpGet"]["path"] == "/api/healthz"


def test_the_probed_path_asks_for_no_token() -> None:
    agent = (Path(ray.__file__).parent / "dashboard" / "http_server_agent.py").read_text(encoding="utf-8")
    public = agent.partition("should remain public")[2].partition("}")[0]
    assert '"/api/healthz"' in public


def test_the_head_is_never_on_a_spot_node_and_workers_are() -> None:
    for manifest in manifests(FULL):
        head, worker = groups(manifest)
        (term,) = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        assert term["matchExpressions"] == [
            {"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}
        ]
        assert "tolerations" not in head
        assert worker["nodeSelector"] == {
            "cloud.google.com/gke-spot": "true",
            "cloud.google.com/gke-accelerator": "nvidia-l4",
        }
        assert {each["key"] for each in worker["tolerations"]} == {"cloud.google.com/gke-spot", "nvidia.com/gpu"}
        assert worker["containers"][0]["resources"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "2"}
        assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    for manifest in manifests(SMALL):
        assert not {"affinity", "nodeSelector", "tolerations"} & {key for pod in groups(manifest) for key in pod}


def test_credentials_are_a_volume_and_never_a_value() -> None:
    for manifest in manifests(KEYED):
        for pod in groups(manifest):
            (container,) = pod["containers"]
            environment = {each["name"]: each.get("value") for each in container["env"]}
            path = environment["AWS_SHARED_CREDENTIALS_FILE"]
            (mount,) = (each for each in container["volumeMounts"] if each["name"] == "credentials")
            assert path == f"{mount['mountPath']}/credentials" and mount["readOnly"] is True
            (volume,) = (each for each in pod["volumes"] if each["name"] == "credentials")
            assert volume["secret"]["secretName"] == "bucket"
            assert volume["secret"]["defaultMode"] & 0o007 == 0
    google = changed(KEYED, storage="gs://bucket/mmsa", command="train mult --data gs://bucket/mosi")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in str(groups(manifests(google)[0]))


def test_the_head_reads_the_bucket_too() -> None:
    """It runs the drivers of jobs, which open the data; and where nodes come and go, KubeRay's right to ask for pods is
    given to the account that it is named."""
    for manifest in (*manifests(FULL), *manifests(SAME)):
        assert [pod["serviceAccountName"] for pod in groups(manifest)] == ["msa", "msa"]
    apart = changed(FULL, kubernetes={"head_service_account": "msa-head"})
    for manifest in manifests(apart):
        assert [pod["serviceAccountName"] for pod in groups(manifest)] == ["msa-head", "msa"]


def test_a_job_runs_the_command_and_goes_on_after_a_retry() -> None:
    _, manifest = manifests(FULL)
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:4] == ["mmsa-dist", "cluster", "run", "--nodes"]
    assert words[words.index("--workers") + 1] == "2:8"
    assert words[words.index("--runs-dir") + 1].startswith("/mnt/all/"), "on the disk that a new cluster sees too"
    assert manifest["spec"]["backoffLimit"] == 3
    assert "\n" not in manifest["spec"]["entrypoint"], "it becomes one line of a shell"


def test_the_service_is_within_the_cluster() -> None:
    for manifest in manifests(FULL):
        head = cluster_spec(manifest)["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")
        assert head["rayStartParams"] == {"num-cpus": "0"}


def test_an_awkward_word_survives_the_shell_and_yaml() -> None:
    awkward = ["train", "mult", "--data", "s3://b/a b", "--name", "it's # 1: yes"]
    for text in (ray_job(Description.model_validate(changed(SMALL, command=awkward))),):
        words = shlex.split(yaml.safe_load(text)["spec"]["entrypoint"])
        assert words[words.index("train") :][:6] == awkward


def test_the_schema_names_its_source() -> None:
    assert re.search(r"KubeRay v\d+\.\d+\.\d+, github\.com/ray-project/kuberay, Apache-2\.0", SCHEMA["$comment"])
