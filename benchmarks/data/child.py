"""A contestant in a process of its own, so that nobody pays for what another holds; it answers line by line.

``python -m benchmarks.data.child read NAME FOLDER READERS``: for each line, "cold" (the first at most) or "warm", one
epoch over the train split; the first includes opening. ``… write FOLDER LIKE SAMPLES SHARD_BYTES``: for each line, a
format's name, one packing. An answer is the `Rate` as JSON, or ``{"missing": PACKAGE}``.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.data.foreign import installed, load
from benchmarks.data.measure import forget, rate

SETTLE = 0.3
"""Seconds in which workers that an epoch has kept busy come to rest."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.filterwarnings("ignore", message=".*not writable.*")  # nobody writes into what was read
    torch.set_num_threads(1)
    kind, *words = sys.argv[1:]
    lines = (line.strip() for line in sys.stdin)
    for answer in (reads if kind == "read" else writes)(lines, *words):
        print(json.dumps(answer), file=answers)
    answers.flush()
    os._exit(0)  # libraries with threads and shared memory of their own are slow to leave


def reads(lines: Iterator[str], name: str, folder: str, readers: str) -> Iterator[dict[str, Any]]:
    from benchmarks.data.readers import READERS

    reader = READERS[name]
    if not installed(reader.needs):
        yield {"missing": reader.needs}
        return
    load(reader.needs)
    yield {"ready": name}
    files = Path(folder) / reader.folder
    with ExitStack() as stack:
        epochs: list[Callable[[], int]] = []

        def epoch() -> int:
            if not epochs:
                epochs.append(stack.enter_context(reader.open(files, int(readers))))
            return epochs[0]()

        for line in lines:
            if line == "cold":
                assert not epochs, "what is mapped stays in the page cache"
                forget(files)
            yield vars(rate(epoch))
            time.sleep(SETTLE)


def writes(lines: Iterator[str], folder: str, like: str, samples: str, shard_bytes: str) -> Iterator[dict[str, Any]]:
    from benchmarks.data.sets import FORMATS, Resident, written

    source = Resident(like, int(samples))
    yield {"ready": source.bytes // source.total}
    for name in lines:
        if installed(FORMATS[name].needs):
            yield vars(rate(lambda: written(source, name, Path(folder), int(shard_bytes))))  # noqa: B023
        else:
            yield {"missing": FORMATS[name].needs}


if __name__ == "__main__":
    main()
