"""Which Ray cluster a process belongs to, told to those who would guess. Imports nothing that takes time."""

import os


def name_own_cluster() -> None:
    """Runs first in every process that Ray starts for us.

    What Ray Train asks of "the cluster" goes to the one that `RAY_ADDRESS` names, else to the newest of the machine:
    where somebody else's runs too, it does not find our run there, and takes the CPUs of living ranks away.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
