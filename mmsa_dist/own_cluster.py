"""Which Ray cluster a process belongs to, told to those who would guess. Imports nothing that takes time."""

import os

NOBODY = "http://127.0.0.1:0"
"""An address at which nobody answers."""


def name_own_cluster() -> None:
    """Runs first in every process that Ray starts for us.

    What Ray Train asks of "the cluster" goes to the one that `RAY_ADDRESS` names, else to the newest of the machine:
    where somebody else's runs too, it does not find our run there, and takes the CPUs of living ranks away. The same
    happens where ours has no dashboard, which would have answered: it is asked for at its usual port all the same, and
    another cluster's dashboard may be there.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if _internal_kv_get(b"webui:url", namespace=b"dashboard") == b"":
        os.environ["RAY_API_SERVER_ADDRESS"] = NOBODY
