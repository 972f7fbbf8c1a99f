"""How many trials run at once, by what the cluster's nodes have."""

from typing import Any

import pytest

from mmsa_dist.config import LaunchConfig
from mmsa_dist.errors import ConfigError
from tune.room import concurrency


def nodes(*each: tuple[float, float]) -> list[dict[str, float]]:
    """By their CPUs and GPUs."""
    return [{"CPU": cpus, "GPU": gpus, "memory": 1e9} if gpus else {"CPU": cpus} for cpus, gpus in each]


@pytest.mark.parametrize(
    ("values", "there", "at_once"),
    [
        ({"workers": 1}, nodes((2, 0)), 2),
        ({"workers": 2}, nodes((2, 0)), 1),
        ({"workers": 2}, nodes((9, 0)), 4),
        ({"workers": 2, "cpus_per_worker": 3}, nodes((16, 0)), 2),
        ({"workers": 2, "gpus_per_worker": 1}, nodes((64, 8)), 4),
        ({"workers": 2, "gpus_per_worker": 0.25}, nodes((64, 1)), 2),
        ({"workers": 1, "gpus_per_worker": 0.1}, nodes((64, 1)), 10),
        ({"workers": 4, "gpus_per_worker": 1}, nodes((8, 100)), 2),
        ({"workers": 1}, nodes((1, 0), (1, 0), (1, 0), (1, 0)), 4),
        ({"workers": 4}, nodes((1, 0), (1, 0), (1, 0), (1, 0)), 1),
        ({"workers": 1, "cpus_per_worker": 2}, nodes((3, 0), (3, 0)), 2),  # a CPU of each node is of no use
        ({"workers": 1, "gpus_per_worker": 0.4}, nodes((64, 2)), 4),  # and a fifth of each GPU
        ({"workers": 1, "gpus_per_worker": 1}, nodes((1, 8), (8, 0), (8, 4)), 5),
    ],
)
def test_as_many_trials_as_fit(values: dict[str, Any], there: list[dict[str, float]], at_once: int) -> None:
    assert concurrency(LaunchConfig(**values), there) == at_once


def test_not_even_one_trial_fits_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"one trial needs 3 CPUs = 3 workers x 1, the Ray cluster has 2; lower"):
        concurrency(LaunchConfig(workers=3), nodes((1, 0), (1, 0)))
    with pytest.raises(ConfigError, match=r"one trial needs 2 GPUs = 2 workers x 1, the Ray cluster has 1; lower"):
        concurrency(LaunchConfig(workers=2, gpus_per_worker=1), nodes((64, 1)))
    with pytest.raises(
        ConfigError, match="each with 4 CPUs and 0 GPUs of one node; the Ray cluster's nodes have 2 CPU"
    ):
        concurrency(LaunchConfig(workers=1, cpus_per_worker=4), nodes((2, 0), (2, 0), (2, 0)))
