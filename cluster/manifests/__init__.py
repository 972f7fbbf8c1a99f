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


TARGETS: dict[str, Target] = {
    "ray-up-aws": Target(
        "cluster on EC2 for Ray's cluster launcher", "aws.yaml", ray_up.aws, ("kubernetes", "slurm", "shared.claim")
    ),
    "ray-up-gcp": Target(
        "cluster on Google Compute Engine, likewise", "gcp.yaml", ray_up.gcp, ("kubernetes", "slurm", "shared.claim")
    ),
    "kuberay-cluster": Target(
        "RayCluster for KubeRay, to submit commands to",
        "raycluster.yaml",
        kuberay.ray_cluster,
        ("cloud", "slurm", "shared.nfs", "head.machine", "workers.machine", "token", "source"),
    ),
    "kuberay-job": Target(
        "RayJob for KubeRay: a cluster for one command, gone when it has ended",
        "rayjob.yaml",
        kuberay.ray_job,
        ("cloud", "slurm", "shared.nfs", "head.machine", "workers.machine", "token", "source"),
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
