"""Packing and reading beside every rival; a rank's memory; how a run comes back in the middle of an epoch.

All on the same generated data, samples like MOSEI's, unaligned. A figure is the best of its rounds (what else the
machine does can only add), after one round that is not counted. Rates are per second of CPU time, child processes
included, and per second of the clock.

Reading ends with batches of 64 samples padded to float32 torch tensors with labels, and everybody does the whole of it,
with 0, 1, 2 and 4 readers: threads of ours, DataLoader workers of the others; 0 reads in the training process. Warm is
from the page cache; cold is the first epoch of a process, opening included, on files dropped from it, which counts if
they came from the disk.

- raw read: the shards' bytes into a buffer, nothing else; the limit;
- memory map, numpy or torch: the practical limit. One flat float16 file a modality, offsets in memory, shuffled,
  converted by numpy or by torch; no labels, no masks, no keys, no checks;
- ours: an epoch of the plan, shuffled, checked, with labels, masks and keys;
- webdataset: the same shards, safetensors; and shards of three .npy members, which is how one writes them without
  further thought; mosaicml-streaming and litdata: their own formats. All in file order, unshuffled, which is the best
  that they can do;
- MMSA's loader: a loader of that shape, written anew: the whole pickle in memory, float32, padded to the longest of the
  data set, a dictionary a sample, torch's own collation. Its cold epoch begins with reading the pickle.

mosaicml-streaming and litdata are read from `--rivals FOLDER`; see benchmarks/README.md for how to fill it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import memory, resume
from benchmarks.data.measure import rate
from benchmarks.data.reading import packing, reading
from benchmarks.data.report import report
from benchmarks.record import record
from benchmarks.render import measured, table, wanted
from shards.index import Index

PARTS = ("reading", "memory", "resume")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000, help="samples to pack and read, over all splits")
    parser.add_argument("--shard-mb", type=float, default=16, help="size of a shard; every reader needs one at least")
    parser.add_argument("--readers", type=int, nargs="+", default=[0, 1, 2, 4], help="threads or workers")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, of packing and in each session")
    parser.add_argument("--sessions", type=int, default=2, help="times that every reading process is started anew")
    parser.add_argument("--rivals", type=Path, help="folder with the packages of benchmarks/rivals.txt")
    parser.add_argument("--memory-samples", type=int, default=228_560, help="of the large data set: ten times MOSEI")
    parser.add_argument("--narrow", type=int, default=16, help="divides the widths there, to save disk and time")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="fewer are not recorded")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmsa-data-") as name:
        results = measure(Path(name), options)
    rows, tables = report(options, results)
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    for part in tables:
        print(f"\n{part.title}\n\n{table(part.head, part.rows)}")
    if set(options.parts) == set(PARTS) and not options.no_record:
        record("data", rows, raw=results, tables=tables)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it goes into the raw figures."""
    results: dict[str, Any] = {}
    rivals = options.rivals.resolve() if options.rivals else None
    if "reading" in options.parts:
        files, shard_bytes = folder / "reading", int(options.shard_mb * 2**20)
        size, packed = packing(files, "mosei", options.samples, shard_bytes, options.rounds, rivals)
        index = Index.load(files / "ours")
        results |= {"bytes_per_sample": size, "packing": packed, "checksums": vars(rate(lambda: checksums(index)))}
        results["reading"] = reading(files, options.readers, options.sessions, options.rounds, rivals)
    if {"memory", "resume"} & set(options.parts):
        folders = memory.sets(folder, options.memory_samples, options.narrow)
        if "memory" in options.parts:
            results["memory"] = memory.measure(folders, folder / "cache")
        if "resume" in options.parts:
            results["resume"] = resume.measure(folders[memory.LARGE], folder, options.rounds)
    return results


def checksums(index: Index) -> int:
    """What is checked once per file and node."""
    for n in range(len(index.shards)):
        index.expected_tar(n).check()
    return index.num_samples


if __name__ == "__main__":
    main()
