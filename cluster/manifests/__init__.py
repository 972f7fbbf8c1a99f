"""The files of each kind of cluster, from one description: `TARGETS` names them."""

from collections.abc import Callable
from dataclasses import dataclass

from cluster.description import Description
from cluster.manifests import kuberay, ray_up, slurm


@dataclass(frozen=True)
class Target:
    """One kind of manifest."""

    about: str
    """What it is, for a list."""
    file: str
    """Ending of the file that is written, behind the description's name."""
    text: Callable[[Description], str]
    """Writes it. Raises ConfigError where the description lacks something, or holds what this kind cannot do."""
    ignores: tuple[str, ...]
    """Keys of the description that mean nothing here, told where they are set."""


BY_RAY_UP = ("kubernetes", "slurm", "shared.claim")
BY_KUBERAY = ("cloud", "slurm", "shared.nfs", "head.machine", "workers.machine", "token", "source")
"""Keys that mean nothing there."""

TARGETS: dict[str, Target] = {
    "ray-up-aws": Target("cluster on EC2 for Ray's cluster launcher", "aws.yaml", ray_up.aws, BY_RAY_UP),
    "ray-up-gcp": Target("cluster on Google Compute Engine, likewise", "gcp.yaml", ray_up.gcp, BY_RAY_UP),
    "kuberay-cluster": Target(
        "RayCluster for KubeRay, to submit commands to",
        "raycluster.yaml",
        kuberay.ray_cluster,
        BY_KUBERAY,
    ),
    "kuberay-job": Target(
        "RayJob for KubeRay: a cluster for one command, gone when it has ended",
        "rayjob.yaml",
        kuberay.ray_job,
        BY_KUBERAY,
    ),
    "slurm": Target(
        "batch script for Slurm's sbatch",
        "sbatch",
        slurm.script,
        (
            *("image", "cuda", "cloud", "kubernetes", "shared.claim", "shared.nfs", "head", "token", "source"),
            *("workers.machine", "workers.spot", "workers.idle_minutes"),
        ),
    ),
}
