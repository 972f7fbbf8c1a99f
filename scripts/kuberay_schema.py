"""Writes tests/cluster/kuberay.json: what KubeRay's API takes, as a JSON schema small enough to keep.

    git clone --branch v1.7.0 https://github.com/ray-project/kuberay
    python scripts/kuberay_schema.py kuberay v1.7.0

From the two custom resource definitions that KubeRay is installed with (Apache-2.0). Left out: descriptions, status,
and fields of a pod that no manifest of ours has (`LEFT_OUT`). Equal parts stand once. Objects are closed, so that a
misspelt key is an error here as it is in `kubectl apply --validate=strict`.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
FOLDER = Path("ray-operator/config/crd/bases")
OUT = Path(__file__).resolve().parent.parent / "tests" / "cluster" / "kuberay.json"
KEPT = {
    "type", "properties", "required", "items", "enum", "additionalProperties", "minimum", "maximum", "pattern",
    "anyOf", "minItems", "maxItems", "minLength", "maxLength",
}  # fmt: skip
LEFT_OUT = {
    "ephemeralContainers", "initContainers", "lifecycle", "livenessProbe", "startupProbe", "topologySpreadConstraints",
    "podAffinity", "podAntiAffinity", "resourceClaims", "volumeDevices", "dnsConfig", "hostAliases", "readinessGates",
    "schedulingGates", "submitterPodTemplate", "headService", "gcsFaultToleranceOptions", "deletionStrategy",
    "historyServerOptions", "networkPolicy", "tlsOptions", "ingressOptions", "envFrom", "resizePolicy",
    "awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "csi", "downwardAPI", "ephemeral", "fc",
    "flexVolume", "flocker", "gcePersistentDisk", "gitRepo", "glusterfs", "image_volume", "iscsi",
    "photonPersistentDisk", "portworxVolume", "projected", "quobyte", "rbd", "scaleIO", "storageos", "vsphereVolume",
}  # fmt: skip
"""Fields that no manifest of ours has."""


def main(kuberay: Path, release: str) -> None:
    """Reads the definitions in the checkout `kuberay`, whose release is `release`."""
    schemas = {}
    for kind, file in KINDS.items():
        definition = yaml.load((kuberay / FOLDER / file).read_text(encoding="utf-8"), yaml.CSafeLoader)
        (v1,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
        schemas[kind] = trimmed(v1["schema"]["openAPIV3Schema"])
        schemas[kind]["properties"].pop("status")
        schemas[kind]["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    text = f"Made of the custom resource definitions of KubeRay {release}, github.com/ray-project/kuberay, Apache-2.0, "
    shared = once(schemas)
    OUT.write_text(
        json.dumps({"$comment": text + "by scripts/kuberay_schema.py", **schemas, "$defs": shared}, indent=0) + "\n",
        encoding="utf-8",
    )


def trimmed(schema: dict[str, Any]) -> dict[str, Any]:
    """A part of a definition as a closed JSON schema without words."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {key: value for key, value in schema.items() if key in KEPT}
    if "properties" in kept:
        kept["properties"] = {name: trimmed(part) for name, part in kept["properties"].items() if name not in LEFT_OUT}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = trimmed(kept[key])
    return kept


def once(schemas: dict[str, Any]) -> dict[str, Any]:
    """Moves what stands several times into definitions, which are given, and leaves references."""
    seen: Counter[str] = Counter()

    def count(part: Any) -> None:
        if isinstance(part, dict):
            if "type" in part:
                seen[json.dumps(part, sort_keys=True)] += 1
            for each in part.values():
                count(each)

    count(schemas)
    names = {text: f"d{n}" for n, text in enumerate(t for t, times in seen.items() if times > 1 and len(t) > 120)}
    shared: dict[str, Any] = {}

    def refer(part: Any, top: bool = False) -> Any:
        if not isinstance(part, dict):
            return part
        name = None if top else names.get(json.dumps(part, sort_keys=True))
        if name and name not in shared:
            shared[name] = {}
            shared[name] = {key: refer(value) for key, value in part.items()}
        return {"$ref": f"#/$defs/{name}"} if name else {key: refer(value) for key, value in part.items()}

    for kind in KINDS:
        schemas[kind] = refer(schemas[kind], top=True)
    return shared


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
