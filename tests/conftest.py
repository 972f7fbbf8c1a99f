"""Fixtures for every test."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several test files run at once, and idle threads spin
os.environ.pop("COLUMNS", None)  # a table is as wide in a test as in any pipe

from tests.ranks import close_pools, run_ranks

# nothing here goes to somebody's cluster or MLflow server
for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_"))]:
    del os.environ[name]
# Ray runs its workers at nice 15: beside tests whose ranks keep the cores busy they were seen to get a twentieth of one
os.environ.update(RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")

settings.register_profile("house", deadline=None)  # a busy machine is not a slow program
settings.load_profile("house")

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        # as in a shell's background and under nohup: commands that tests signal would inherit it and hear nothing
        signal.signal(number, usual)


LONGEST = (
    "test_faults",
    "test_sweep",
    "test_sweep_resume",
    "test_reproduce",
    "test_laws",
    "test_submit",
    "test_jobs",
    "test_predict_ray",
    "test_stopping",
    "test_elastic",
    "test_doctor",
    "test_engine",
    "test_text_ranks",
    "test_demo",
    "test_resume",
    "test_real",
)
"""Files that take minutes, mostly of waiting: begun with, so that none is left to run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was verified is remembered here, not in the user's cache folder; rank processes and commands inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks`: ``ranks(fn, 2, *args)`` calls a module's function on two CPU ranks (see `tests.ranks`)."""
    yield run_ranks
    close_pools()
