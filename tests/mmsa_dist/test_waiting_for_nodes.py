"""Ranks that are to start again wait for a node in place of one that is gone, and what is waited for is said."""

import time

import pytest

from mmsa_dist import places
from mmsa_dist.errors import StoppedError, TransientError
from mmsa_dist.recipe import Recipe, from_dict

SHORT = "launch.workers: 2 workers x 1 CPUs need 2 CPUs, the Ray cluster has 1"


def recipe(**launch: object) -> Recipe:
    return from_dict({"system": "self_mm", "data": {"path": "none"}, "launch": {"workers": 2, "timeout": 2, **launch}})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What the cluster has at each look, the last of it for ever; no time to settle."""
    has: list[dict[str, float]] = []
    monkeypatch.setattr("ray.cluster_resources", lambda: has.pop(0) if len(has) > 1 else has[0])
    monkeypatch.setattr(places, "SETTLE", 0.0)
    return has


def never() -> bool:
    return False


def test_a_node_that_comes_is_waited_for_and_that_is_said_once(cluster: list[dict[str, float]]) -> None:
    cluster += [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0}]
    said: list[str] = []
    places.wait_for_nodes(recipe(timeout=60), said.append, never)
    assert said == [f"waiting for a node: {SHORT}"]


def test_where_all_are_there_nothing_is_said(cluster: list[dict[str, float]]) -> None:
    cluster += [{"CPU": 2.0}]
    said: list[str] = []
    places.wait_for_nodes(recipe(), said.append, never)
    assert said == []


def test_a_range_needs_its_least(cluster: list[dict[str, float]]) -> None:
    cluster += [{"CPU": 1.0}]
    places.wait_for_nodes(recipe(min_workers=1), lambda sentence: pytest.fail(sentence), never)


def test_a_gpu_that_is_gone_is_waited_for_too(cluster: list[dict[str, float]]) -> None:
    cluster += [{"CPU": 2.0, "GPU": 1.0}]
    with pytest.raises(TransientError, match="2 workers x 1 GPUs need 2 GPUs, the Ray cluster has 1, and no node came"):
        places.wait_for_nodes(recipe(gpus_per_worker=1), lambda sentence: None, never)


def test_nobody_waits_for_ever(cluster: list[dict[str, float]]) -> None:
    """Exit code 75: trying again later may help, which what is wrong with a command never does."""
    cluster += [{"CPU": 1.0}]
    with pytest.raises(TransientError, match=rf"{SHORT}, and no node came in 2 s .*--resume with --workers LEAST:MOST"):
        places.wait_for_nodes(recipe(), lambda sentence: None, never)


def test_who_is_asked_to_end_waits_no_longer(cluster: list[dict[str, float]]) -> None:
    cluster += [{"CPU": 1.0}]
    with pytest.raises(StoppedError):
        places.wait_for_nodes(recipe(), lambda sentence: None, lambda: True)


def test_a_node_that_is_missed_while_ray_waits_is_said_once(
    cluster: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look is not enough: a node that joins is not counted at once."""
    monkeypatch.setattr(places, "LOOK", 0.0)
    cluster += [{"CPU": cpus} for cpus in (2.0, 1.0, 2.0, 1.0, 1.0)]
    said: list[str] = []
    look = places.Shortage(recipe(), said.append)
    for _ in range(4):
        look()
    assert said == []
    look()
    look()
    assert said == [f"waiting for a node: {SHORT}"]


def test_ray_does_not_wait_for_ever_either(cluster: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LOOK", 0.0)
    cluster += [{"CPU": 1.0}]
    look = places.Shortage(recipe(timeout=1), lambda sentence: None)
    look()
    look()
    time.sleep(1.1)
    with pytest.raises(TransientError, match=rf"{SHORT}, and no node came in 1 s"):
        look()


def test_places_that_ranks_have_not_taken_yet_are_no_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy cluster they take longer than two looks: a run that grew by them would start again and again."""
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(places, "LOOK", 0.0)
    running: list[bool] = []
    growth = places.Growth(recipe(workers=1, min_workers=1).launch, 2, begun=lambda: bool(running))
    assert [growth() for _ in range(3)] == [None] * 3
    running.append(True)
    assert [growth() for _ in range(2)] == [None, 2], "room at two looks"
