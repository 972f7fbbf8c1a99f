"""Peak memory of a rank, from a data set as large as MOSI to one of ten times MOSEI.

That of a process of its own that reads the train split: the peak of anonymous memory (RssAnon), noted after each batch.
Mapped files are not in it: they are the page cache's, which gives them back when somebody needs the memory.

Both data sets have the same samples, so that only their number differs: MOSEI's lengths, its widths divided by
`narrow`, so that ten of them fit on a disk; and a shard holds as many samples as one of 64 MB does at full width. The
small one is read again and again, until as many batches were made.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.data.measure import anonymous_memory
from benchmarks.record import ROOT
from shards.batch import BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.plan import training_plan
from shards.read import ShardReader
from shards.sources.generated import PRESETS, GeneratedSource
from shards.write import MEGABYTE, pack

SMALL, LARGE = "small", "large"
BATCH = 64
SHARD = 600
"""Samples of 64 MB in MOSEI's full width."""


class Narrow(GeneratedSource):
    """MOSEI's lengths in narrower features."""

    def __init__(self, samples: int, narrow: int) -> None:
        super().__init__("mosei", samples)
        self.widths = {name: max(1, width // narrow) for name, width in self.widths.items()}


def sets(folder: Path, samples: int, narrow: int) -> dict[str, Path]:
    """Name -> folder of the two data sets; `samples` of the large one."""
    small = min(samples, sum(PRESETS["mosi"].counts))
    found = {}
    for name, count in {SMALL: small, LARGE: samples}.items():
        source = Narrow(count, narrow)
        steps = {modality: sum(span) / 2 for modality, span in PRESETS["mosei"].lengths.items()}
        each = 2 * sum(steps[modality] * width for modality, width in source.widths.items())
        found[name] = folder / name
        pack(source, found[name], shard_bytes=int(min(64 * MEGABYTE, SHARD * each)), workers=2)
    return found


def measure(folders: dict[str, Path], cache: Path) -> dict[str, dict[str, Any]]:
    """What `read` tells of each data set."""
    batches = max(-(-Index.load(folder).splits["train"] // BATCH) for folder in folders.values())
    results = {}
    for name, folder in folders.items():
        command = [sys.executable, "-m", "benchmarks.data.memory", str(folder), str(batches), str(cache)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    return results


def read(folder: Path, batches: int) -> dict[str, Any]:
    """Makes so many batches of the train split with one reader thread; this process's memory, in bytes."""
    before = anonymous_memory()
    index = Index.load(folder)
    peak = made = epoch = 0
    with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), readers=1) as loader:
        while made < batches:
            for _ in loader.train(training_plan(index, "train", 0, epoch, BATCH), rank=0, world=1):
                peak = max(peak, anonymous_memory())
                made += 1
            epoch += 1
    shards = len(index.shards_of("train"))
    return {
        "samples": index.splits["train"],
        "shards": shards,
        "stored": sum(shard.bytes for shard in index.shards),
        "before": before,
        "anonymous": peak,
    }


if __name__ == "__main__":
    import os

    os.environ["MMSA_CACHE"] = sys.argv[3]
    torch.set_num_threads(1)
    print(json.dumps(read(Path(sys.argv[1]), int(sys.argv[2]))))
