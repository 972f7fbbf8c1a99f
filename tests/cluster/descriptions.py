"""Descriptions that tests render."""

from pathlib import Path
from typing import Any

import yaml

FULL: dict[str, Any] = {
    "name": "mosi",
    "command": "train ufen_mtfn --data s3://bucket/mosi --seed 3",
    "image": "registry.example.org/mmsa-dist:0.1.0-cuda",
    "storage": "s3://bucket/mmsa",
    "mlflow": "http://mlflow.internal:5000",
    "head": {"cpus": 4, "memory_gib": 16, "machine": "m7i.xlarge"},
    "workers": {
        "least": 1, "most": 4, "cpus": 16, "memory_gib": 64, "gpus": 2, "gpu": "nvidia-l4", "spot": True,
        "machine": "g6.4xlarge",
    },
    "checkpoint": {"mtbf_hours": 2.0, "cost_seconds": 2.0, "write_seconds": 20.0},
    "shared": {"path": "/mnt/all", "claim": "all", "nfs": "fs-1.efs.us-west-2.amazonaws.com:/"},
    "cloud": {
        "region": "us-west-2", "zones": ["us-west-2a"], "project": "my-project", "machine_image": "ami-0123456789",
        "identity": "workers",
    },
    "kubernetes": {"namespace": "msa", "service_account": "msa"},
    "slurm": {"partition": "gpu", "account": "me", "qos": "low", "hours": 1.5, "setup": ["module load python"]},
}  # fmt: skip
"""Everything that a target has a use for."""

LEAST: dict[str, Any] = {"name": "mosi", "command": "train ufen_mtfn --data /mnt/mmsa-dist/mosi"}
"""What every description has."""

SMALL: dict[str, Any] = {
    **LEAST,
    "image": "mmsa-dist:0.1.0",
    "head": {"machine": "e2-standard-4"},
    "workers": {"machine": "e2-standard-8"},
    "shared": {"claim": "all", "nfs": "10.0.0.2:/share"},
    "cloud": {"region": "us-central1", "zones": ["us-central1-a"], "project": "my-project"},
}
"""What every target needs, and no more."""


def changed(description: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A description with other values; of a part that is a mapping only those that are given."""
    merged = {
        key: {**description.get(key, {}), **value} if isinstance(value, dict) else value for key, value in parts.items()
    }
    return {key: value for key, value in {**description, **merged}.items() if value is not None}


def written(folder: Path, description: dict[str, Any]) -> Path:
    """The description as a file."""
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(description), encoding="utf-8")
    return path
