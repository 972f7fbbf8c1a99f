"""Runs the contestants of packing and reading, in rounds, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.data.readers import READERS
from benchmarks.data.sets import FORMATS
from benchmarks.record import ROOT
from mmsa_dist.places import RANK_ENVIRONMENT

Rates = dict[str, dict[str, dict[str, list[dict[str, float]]]]]
"""name -> readers -> "cold" or "warm" -> one rate a round; a name whose package is missing has none."""


class Child:
    """A process that answers lines (`benchmarks.data.child`).

    Args:
        rivals: folder with packages that only contestants use, or None.
        cache: where ours remembers what it has verified.
    """

    def __init__(self, words: Iterable[str], rivals: Path | None, cache: Path) -> None:
        paths = [str(path) for path in (ROOT, rivals) if path]
        environment = {
            **os.environ,
            **RANK_ENVIRONMENT,  # for every contestant: freed memory stays, as it does in a rank
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "MMSA_CACHE": str(cache),
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.data.child", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._said.close()

    def answer(self, line: str = "") -> dict[str, Any]:
        """The answer to `line`; without one, what it says by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if line:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        said = self._process.stdout.readline()
        if not said:
            self._said.seek(0)
            raise SystemExit(f"error: {' '.join(self._process.args)} ended:\n{self._said.read().decode()}")  # type: ignore[arg-type]
        return dict(json.loads(said))


def packing(folder: Path, like: str, samples: int, shard_bytes: int, rounds: int, rivals: Path | None) -> Any:
    """(bytes of float16 a sample, name -> rates) of each format; leaves every format written below `folder`."""
    rates: dict[str, list[dict[str, float]]] = {name: [] for name, form in FORMATS.items() if form.timed}
    words = ["write", str(folder), like, str(samples), str(shard_bytes)]
    with Child(words, rivals, folder / "cache") as child:
        size = child.answer()["ready"]
        for name in FORMATS:
            child.answer(name)  # not counted
        for _ in range(rounds):
            for name, found in rates.items():
                said = child.answer(name)
                if "missing" not in said:
                    found.append(said)
    return size, rates


def reading(folder: Path, settings: Iterable[int], sessions: int, rounds: int, rivals: Path | None) -> Rates:
    """Every contestant with every number of readers: cold once and warm `rounds` times in each session."""
    rates: Rates = {name: {} for name in READERS}
    for _ in range(sessions):
        for readers in settings:
            _session(folder, readers, rounds, rivals, rates)
    return rates


def _session(folder: Path, readers: int, rounds: int, rivals: Path | None, rates: Rates) -> None:
    """Cold in turn, each process gone before the next begins: what one has mapped stays in the page cache, and several
    read the same shards. Then warm in rounds; what is read first after a start is not counted.
    """
    names = [name for name, reader in READERS.items() if not (readers and reader.alone)]
    with ExitStack() as stack:
        children: dict[str, Child] = {}

        def child(name: str) -> Child:
            return Child(["read", name, str(folder), str(readers)], rivals, folder / "cache")

        for name in names:
            with child(name) as cold:
                if "missing" not in cold.answer():
                    found = rates[name].setdefault(str(readers), {"cold": [], "warm": []})
                    found["cold"].append(cold.answer("cold"))
        for name in names:
            if str(readers) in rates[name]:
                children[name] = stack.enter_context(child(name))
                children[name].answer()
        for turn in range(1 + rounds):
            for name, warm in children.items():
                answer = warm.answer("warm")
                if turn:
                    rates[name][str(readers)]["warm"].append(answer)
