"""How soon the first batch is there after a restart in the middle of an epoch.

From the moment at which a process begins to open the data set until it has its first batch, with files that are not in
the page cache: at the epoch's beginning (a cold start), at 1 % and at 99 % of it. Each time in a process of its own
that has verified no file before, so that the checksums of what it opens are in the figure. Plain webdataset has no way
into the middle of an epoch but to read what comes before; what that takes is shown beside.
"""

import json
import multiprocessing
import os
import time
from itertools import islice
from pathlib import Path

import torch
import webdataset

from benchmarks.data.measure import forget
from benchmarks.data.readers import BATCH, collated, from_safetensors
from shards.batch import BatchSpec
from shards.index import Index
from shards.loader import Loader
from shards.plan import training_plan
from shards.read import ShardReader

PLACES = {"beginning": 0.0, "1 %": 0.01, "99 %": 0.99}


def measure(folder: Path, scratch: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """ "ours" and "webdataset" -> place -> seconds, one a round (webdataset: one in all)."""
    found: dict[str, dict[str, list[float]]] = {"ours": {}, "webdataset": {}}
    fork = multiprocessing.get_context("fork")
    for turn in range(1 + rounds):
        for name, place in PLACES.items():
            answers = scratch / "resume.json"
            for who, work in (("ours", _first_batch), ("webdataset", _first_batch_of_webdataset)):
                if who == "webdataset" and turn != 1:
                    continue
                answers.unlink(missing_ok=True)
                forget(folder)
                process = fork.Process(target=work, args=(folder, place, answers, scratch / f"cache-{turn}-{name}"))
                process.start()
                process.join()
                if process.exitcode or not answers.exists():
                    raise SystemExit(f"error: {who} gave no batch at {name} (exit code {process.exitcode})")
                seconds = json.loads(answers.read_text())
                if turn:
                    found[who].setdefault(name, []).append(seconds)
    return found


def _first_batch(folder: Path, place: float, answers: Path, cache: Path) -> None:
    os.environ["MMSA_CACHE"] = str(cache)
    torch.set_num_threads(1)
    began = time.perf_counter()
    index = Index.load(folder)
    with ShardReader(index) as reader, Loader(reader, BatchSpec.of(index), readers=1) as loader:
        plan = training_plan(index, "train", seed=0, epoch=0, global_batch=BATCH)
        batches = loader.train(plan, rank=0, world=1, start_step=int(place * plan.num_steps))
        next(iter(batches))
        answers.write_text(json.dumps(time.perf_counter() - began))


def _first_batch_of_webdataset(folder: Path, place: float, answers: Path, cache: Path) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    urls = sorted(map(str, folder.glob("train-*.tar")))
    skipped = int(place * Index.load(folder).splits["train"])
    samples = islice(iter(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)), skipped, None)
    collated([from_safetensors(sample) for sample in islice(samples, BATCH)])
    answers.write_text(json.dumps(time.perf_counter() - began))
