"""How well an epoch is shuffled: ours at several windows, a full permutation, and webdataset's own buffer shuffle.

All on the same shards of MOSEI's train split (webdataset reads real tars of keys alone). Means over `EPOCHS` epochs:

- moved: how far a sample is from where it lies on disk, |place in the epoch - place on disk| / samples, its median. A
  random permutation has 0.293 (1 - sqrt(1/2)); no shuffling 0.
- repeated: Spearman's correlation of a sample's places in two epochs, root mean square over all pairs of epochs. 0 is
  best; 1 is the same order again. Where shards stay whole it is about 1 / sqrt(shards), by chance, of either sign.
- neighbours: of samples that are next to each other on disk, the share that is in the same batch; times 1,000. Samples
  side by side on disk are as alike as any two, since packing shuffles; in data indexed in place they may be one video.
- shards in a batch: how many different ones its samples come from, on average.
"""

import argparse
import io
import math
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import ROOT, Row, record
from benchmarks.render import measured, table, wanted
from shards.order import Numbers, ShardOrder, packed_counts, permutation
from shards.plan import Plan

DEFAULT = "ours, 8 shards together (default)"
PICTURE = ROOT / "docs" / "shuffle.png"
BATCH = 32
EPOCHS = 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=16326, help="as MOSEI's train split by default")
    parser.add_argument("--per-shard", type=int, default=350, help="about so many in a shard, ragged")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    counts = ragged(options.samples, options.per_shard)
    with tempfile.TemporaryDirectory() as folder:
        urls = tars(counts, Path(folder))
        orders = contestants(counts, urls)
        epochs = {name: [order(epoch) for epoch in range(1, 1 + EPOCHS)] for name, order in orders.items()}
    found = {name: quality(pair, counts) for name, pair in epochs.items()}
    rows = report(found, counts)
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        draw({name: pair[0] for name, pair in epochs.items()}, PICTURE)
        record("shuffle", rows, raw={"counts": counts, "quality": found})


def report(found: dict[str, dict[str, Any]], counts: list[int]) -> list[Row]:
    """Four rows a contestant; the bound is for what one gets without asking."""
    rows, how = [], f"mean of {EPOCHS} epochs"
    bound = 0.9 * found["full permutation"]["moved"]
    for name, figures in found.items():
        mine = name == DEFAULT
        met, least = (figures["moved"] >= bound, f">= {bound:.3f}, 0.9 of a permutation's") if mine else (None, "")
        rows += [
            Row(f"{name}: moved, median", figures["moved"], "", least, how, met),
            Row(f"{name}: repeated between two epochs", figures["repeated"], "", "", f"RMS of {EPOCHS} epochs' pairs"),
            Row(f"{name}: neighbours on disk in one batch", 1000 * figures["neighbours"], "per mille", "", how),
            Row(f"{name}: shards in a batch of {BATCH}", figures["shards"], f"of {len(counts)}", "", how),
        ]
    return rows


def contestants(counts: list[int], urls: list[str]) -> dict[str, Callable[[int], Numbers]]:
    """Name -> epoch -> the samples' places on disk, in the order of the epoch."""
    ours = {
        f"ours, {n} shards together{' (default)' if n == 8 else ''}": partial(plan_order, counts, n)
        for n in (1, 4, 8, 16)
    }
    return {
        "no shuffling": lambda epoch: np.arange(sum(counts)),
        **ours,
        "ours, all shards together": partial(plan_order, counts, len(counts)),
        "ours, 8 shards, sorted by length in pools of 16 batches": partial(plan_order, counts, 8, pool=16),
        "full permutation": lambda epoch: permutation(sum(counts), 0, epoch),
        "webdataset, shuffle(1000), shards shuffled": partial(webdataset_order, urls, 1000),
        "webdataset, shuffle(5000), shards shuffled": partial(webdataset_order, urls, 5000),
    }


def plan_order(counts: list[int], window: int, epoch: int, pool: int = 0) -> Numbers:
    """An epoch of our plan; lengths, where it sorts by them, are of no data set but as ragged as MOSEI's."""
    from shards.costs import CostRule

    lengths = np.random.default_rng(1).integers(100, 500, sum(counts))
    order = ShardOrder("", "train", 0, packed_counts(counts), seed=1, epoch=epoch, window=window)
    rule = CostRule((("length_audio", 1),)) if pool else None
    plan = Plan(order, BATCH, pool, rule, (lambda numbers: lengths[numbers]) if pool else None)
    return np.concatenate([plan.step(s) for s in range(plan.num_steps)])


def webdataset_order(urls: list[str], buffer: int, epoch: int) -> Numbers:
    """An epoch of a webdataset pipeline as its manual builds it; its seed is the epoch."""
    import webdataset

    shards = webdataset.SimpleShardList(urls, seed=epoch)
    shuffled = [shards, webdataset.tarfile_to_samples(), webdataset.shuffle(buffer, seed=epoch)]
    return np.array([int(sample["__key__"]) for sample in webdataset.DataPipeline(*shuffled)])


def ragged(samples: int, per_shard: int) -> list[int]:
    """Samples of each shard: within a tenth of `per_shard`, the last what is left."""
    rng = np.random.default_rng(0)
    counts: list[int] = []
    while (rest := samples - sum(counts)) > 0:
        counts.append(min(rest, int(rng.integers(round(0.9 * per_shard), round(1.1 * per_shard)))))
    return counts


def tars(counts: list[int], folder: Path) -> list[str]:
    """Shards whose samples are their numbers."""
    number, urls = 0, []
    for shard, count in enumerate(counts):
        urls.append(str(folder / f"{shard:05d}.tar"))
        with tarfile.open(urls[-1], "w") as tar:
            for _ in range(count):
                member = tarfile.TarInfo(f"{number:08d}.txt")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
                number += 1
    return urls


def quality(epochs: Sequence[Numbers], counts: list[int]) -> dict[str, Any]:
    """The figures of the module's docstring; and where the deciles of what samples move are, in the first epoch."""
    size = len(epochs[0])
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs), "every sample once"
    places = [np.argsort(epoch) for epoch in epochs]
    pairs = [np.corrcoef(one, other)[0, 1] for one, other in combinations(places, 2)]  # places are ranks already
    moved = [np.abs(place - np.arange(size)) / size for place in places]
    shard_of = np.repeat(np.arange(len(counts)), counts)
    batches = [epoch[: size // BATCH * BATCH].reshape(-1, BATCH) for epoch in epochs]
    return {
        "moved": float(np.mean([np.median(move) for move in moved])),
        "moved_deciles": np.quantile(moved[0], np.arange(0.1, 1, 0.1)).round(4).tolist(),
        "repeated": float(np.sqrt(np.mean(np.square(pairs)))),
        "neighbours": float(np.mean([place[1:] // BATCH == place[:-1] // BATCH for place in places])),
        "shards": float(np.mean([len(np.unique(shard_of[batch])) for epoch in batches for batch in epoch])),
    }


def draw(orders: dict[str, NDArray[Any]], path: Path) -> None:
    """Place in the epoch over place on disk, a point a sample."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 5
    figure = Figure(figsize=(2.1 * columns, 2.3 * math.ceil(len(orders) / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, order) in enumerate(orders.items(), 1):
        axes = figure.add_subplot(math.ceil(len(orders) / columns), columns, i)
        axes.plot(order[::4], np.arange(len(order))[::4], ",", color="#1f4e79", alpha=0.5)
        axes.set_title(name.replace(", ", ",\n", 1), fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.supxlabel("place on disk", fontsize=8)
    figure.supylabel("place in the epoch", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
